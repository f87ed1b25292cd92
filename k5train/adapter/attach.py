"""How is the adapter attached to the transformer, and with which values does it start?"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from diffusers import Kandinsky5Transformer3DModel
from peft import LoKrConfig
from peft import LoraConfig as PeftLoraConfig
from peft.tuners.lokr import LoKrLayer
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from k5cache.shared.errors import RunError
from k5train.adapter.pairs import Pair, Sizes, read_pairs
from k5train.adapter.targets import Matched, linear_sizes, match_targets, module_ranks
from k5train.options.adapter import LoraConfig

ADAPTER = "default"
_PARTS = ("lora_A", "lora_B", "lora_magnitude_vector", "lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a",
          "lokr_w2_b")  # fmt: skip
_ZEROS = ("lora_B", "lokr_w1", "lokr_w1_a")  # the parts that are zero at the start, so that the adapter changes nothing


def add_lora(transformer: Kandinsky5Transformer3DModel, config: LoraConfig, seed: int) -> Matched:
    """Wrap the target linears with an adapter through peft, and freeze everything else.

    The start is peft's (A uniform in +-1/sqrt(in), B zero), but drawn from (seed, module name): it does not depend on
    what else was drawn before, on which other modules are targeted, or on the device. Weights are float32.

    Raises:
        RecipeError: a target matches nothing, or more than it names.
        RunError: ``init_lora`` cannot be read, or does not fit.
    """
    matched = match_targets(transformer, config.targets)
    ranks = module_ranks(transformer, config, matched)
    peft_config = _peft_config(config, matched, ranks)
    if config.algo in ("dora", "lokr"):
        with torch.random.fork_rng(devices=[]):  # peft draws a start of its own
            transformer.add_adapter(peft_config, adapter_name=ADAPTER)
    else:
        add_without_values(transformer, peft_config)
    for name, layer in adapted_layers(transformer):
        for part, parameter in adapter_parts(layer):
            parameter.data = _start_of(name, part, parameter, seed)
    if config.init_lora is not None:
        start_from(transformer, Path(config.init_lora))
    return replace(matched, ranks=ranks)


def _start_of(name: str, part: str, parameter: nn.Parameter, seed: int) -> Tensor:
    if part == "lora_magnitude_vector":
        return parameter.data.float()  # the norms of the weights, as peft computed them
    if part in _ZEROS:
        return torch.zeros_like(parameter, dtype=torch.float32)
    tag = name if part == "lora_A" else f"{name}.{part}"
    digest = hashlib.sha256(f"{seed}:{tag}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little", signed=True))
    values = nn.init.kaiming_uniform_(torch.empty(parameter.shape), a=math.sqrt(5), generator=generator)
    return values.to(parameter.device)


def add_without_values(transformer: Kandinsky5Transformer3DModel, config: PeftLoraConfig) -> None:
    """Add a plain adapter beside its linears, its memory allocated and its values not yet set.

    peft would draw A twice and B once: 190 million numbers at rank 32, 1.7 s. On the meta device it draws none.
    """
    with init_empty_weights():
        transformer.add_adapter(config, adapter_name=ADAPTER)
    for _, layer in adapted_layers(transformer):
        for part in (layer.lora_A, layer.lora_B):
            part[ADAPTER].to_empty(device=layer.get_base_layer().weight.device)


def _peft_config(config: LoraConfig, matched: Matched, ranks: Mapping[str, int]) -> Any:
    if config.algo == "lokr":
        return LoKrConfig(
            r=config.rank,
            alpha=config.rank,
            target_modules=list(matched.modules),
            decompose_factor=config.decompose_factor,
        )
    pattern: dict[str, Any] = {f"^{re.escape(n)}$": rank for n, rank in ranks.items() if rank != config.rank}
    return PeftLoraConfig(
        r=config.rank,
        lora_alpha=config.rank if config.alpha is None else config.alpha,
        rank_pattern=pattern,
        alpha_pattern=pattern if config.alpha is None else {},
        lora_dropout=config.dropout,
        init_lora_weights=config.algo == "dora",  # the others' start is drawn by add_lora alone
        target_modules=list(matched.modules),
        use_rslora=config.algo == "rslora",
        use_dora=config.algo == "dora",
    )


def start_from(transformer: nn.Module, path: Path) -> None:
    """Give the attached adapter the values of a LoRA file from any trainer: it then changes what the file changes.

    Where the file's rank is smaller, the remaining ranks stay at their start, which changes nothing. Modules that the
    file does not adapt stay at their start too.

    Raises:
        RunError: the file adapts a module that the adapter does not, has a higher rank, has NaN or infinity, or
            belongs to another model.
    """
    layers = dict(adapted_layers(transformer))
    weights = {name: [getattr(layer, part)[ADAPTER].weight for part in ("lora_A", "lora_B")] for name, layer in
               layers.items()}  # fmt: skip
    pairs = _start_for({name: a.shape[0] for name, (a, _) in weights.items()}, path, linear_sizes(transformer))
    for name, (down, up) in pairs.items():
        a, b = weights[name]
        with torch.no_grad():
            a[: len(down)] = down
            b[:, : len(down)] = up / layers[name].scaling[ADAPTER]


def check_start(empty: Kandinsky5Transformer3DModel, config: LoraConfig) -> None:
    """Refuse an ``init_lora`` that cannot be started from, before anything is loaded.

    Args:
        empty: the transformer's architecture, without weights.

    Raises:
        RecipeError: a target matches nothing, or a rank is too high.
        RunError: what ``start_from`` raises.
    """
    assert config.init_lora is not None
    ranks = module_ranks(empty, config, match_targets(empty, config.targets))
    _start_for(ranks, Path(config.init_lora), linear_sizes(empty))


def _start_for(ranks: Mapping[str, int], path: Path, sizes: Sizes) -> dict[str, Pair]:
    """The pairs of a file from which adapters of these ranks can start."""
    pairs = read_pairs(path, sizes)
    for name, (down, _) in pairs.items():
        if name not in ranks:
            raise RunError(
                f"{path} adapts {name}, which train.lora.targets does not",
                "Use the targets that the LoRA was trained with",
            )
        if len(down) > ranks[name]:
            raise RunError(
                f"{path} has rank {len(down)} at {name}, the adapter {ranks[name]}",
                f"Use --set train.lora.rank={len(down)}",
            )
    return pairs


def lora_parameters(transformer: nn.Module) -> list[nn.Parameter]:
    """What is trained, in module order: A and B of every adapted module, or the parts of its kind of adapter."""
    return [parameter for _, layer in adapted_layers(transformer) for _, parameter in adapter_parts(layer)]


def adapted_layers(transformer: nn.Module) -> list[tuple[str, Any]]:
    """The modules that have an adapter, by name, in module order."""
    return [
        (name, module)
        for name, module in transformer.named_modules()
        if isinstance(module, LoraLayer | LoKrLayer) and any(True for _ in adapter_parts(module))
    ]


def adapter_parts(layer: Any) -> Iterator[tuple[str, nn.Parameter]]:
    """The trained tensors of one adapted module, by peft's name for them."""
    for part in layer.adapter_layer_names:
        by_adapter = getattr(layer, part, None)
        if by_adapter is not None and ADAPTER in by_adapter and part in _PARTS:
            value = by_adapter[ADAPTER]
            yield part, value if isinstance(value, nn.Parameter) else value.weight

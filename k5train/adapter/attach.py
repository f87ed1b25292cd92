"""The adapter: which modules get one, how it starts, and the one file that diffusers and ComfyUI both load in full."""

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
from torch import nn

from k5cache.shared.errors import RunError
from k5train.adapter.keys import read_pairs
from k5train.adapter.targets import Matched, linear_names, match_targets, module_ranks
from k5train.options.adapter import LoraConfig

ADAPTER = "default"


PREFIX = "transformer."  # diffusers loads nothing without it, and says nothing; ComfyUI takes it too


def add_lora(transformer: Kandinsky5Transformer3DModel, config: LoraConfig, seed: int) -> Matched:
    """Wrap the target linears with an adapter through peft, and freeze everything else.

    The start is peft's (A uniform in +-1/sqrt(in), B zero) but drawn from (seed, module name): the same whatever
    else was drawn before, whatever other modules are targeted, on any device. Weights are float32.

    Raises:
        RecipeError: a target matches nothing, or more than it says.
        RunError: ``init_lora`` cannot be read, or does not fit.
    """
    matched = match_targets(transformer, config.targets)
    ranks = module_ranks(transformer, config, matched)
    peft_config = _peft_config(config, matched, ranks)
    if config.algo in ("dora", "lokr"):
        with torch.random.fork_rng(devices=[]):  # peft draws a start of its own
            transformer.add_adapter(peft_config, adapter_name=ADAPTER)
    else:
        _add_unset(transformer, peft_config)
    for name, layer in _layers(transformer):
        for part, parameter in _parts(layer):
            tag = name if part == "lora_A" else f"{name}.{part}"
            digest = hashlib.sha256(f"{seed}:{tag}".encode()).digest()
            generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little", signed=True))
            if part == "lora_magnitude_vector":
                parameter.data = parameter.data.float()  # the norms of the weights, as peft has found them
            elif part in _ZEROS:
                parameter.data = torch.zeros_like(parameter, dtype=torch.float32)
            else:
                start = nn.init.kaiming_uniform_(torch.empty(parameter.shape), a=math.sqrt(5), generator=generator)
                parameter.data = start.to(parameter.device)
    if config.init_lora is not None:
        start_from(transformer, Path(config.init_lora))
    return replace(matched, ranks=ranks)


def _add_unset(transformer: Kandinsky5Transformer3DModel, config: PeftLoraConfig) -> None:
    """A plain adapter where its weights are, its values still to come.

    peft would draw A twice and B once, 190 million numbers at rank 32: 1.7 s. On the meta device it draws none.
    """
    with init_empty_weights():
        transformer.add_adapter(config, adapter_name=ADAPTER)
    for _, layer in _layers(transformer):
        for part in (layer.lora_A, layer.lora_B):
            part[ADAPTER].to_empty(device=layer.get_base_layer().weight.device)


_ZEROS = ("lora_B", "lokr_w1", "lokr_w1_a")  # what makes the start change nothing


def _peft_config(config: LoraConfig, matched: Matched, ranks: Mapping[str, int]) -> Any:
    pattern: dict[str, Any] = {f"^{re.escape(n)}$": rank for n, rank in ranks.items() if rank != config.rank}
    if config.algo == "lokr":
        return LoKrConfig(
            r=config.rank,
            alpha=config.rank,
            target_modules=list(matched.modules),
            decompose_factor=config.decompose_factor,
        )
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
    """Give the adapter that is there the values of a LoRA file of any make: it then changes what the file changed.

    Where the file's rank is smaller, the ranks beyond it stay at their start, which changes nothing. Modules that the
    file does not adapt stay at their start.

    Raises:
        RunError: the file adapts a module that the adapter does not, has a higher rank, or belongs to another model.
    """
    pairs = read_pairs(path, linear_names(transformer))
    layers = dict(_layers(transformer))
    for name, (down, up) in pairs.items():
        if name not in layers:
            raise RunError(
                f"{path} adapts {name}, which train.lora.targets does not",
                "Use the targets that the LoRA was trained with",
            )
        ours = [getattr(layers[name], part)[ADAPTER].weight for part in ("lora_A", "lora_B")]
        rank = down.shape[0]
        if (down.shape[1], up.shape[0]) != (ours[0].shape[1], ours[1].shape[0]):
            raise RunError(f"{path} has another width at {name}", "Use a LoRA of this base model")
        if rank > ours[0].shape[0]:
            raise RunError(
                f"{path} has rank {rank} at {name}, the adapter {ours[0].shape[0]}",
                f"Use --set train.lora.rank={rank}",
            )
        with torch.no_grad():
            ours[0][:rank] = down
            ours[1][:, :rank] = up / layers[name].scaling[ADAPTER]


def lora_parameters(transformer: nn.Module) -> list[nn.Parameter]:
    """What is trained, in module order: A and B of every adapted module, or the parts of its kind of adapter."""
    return [parameter for _, layer in _layers(transformer) for _, parameter in _parts(layer)]


def _layers(transformer: nn.Module) -> list[tuple[str, Any]]:
    return [
        (n, m) for n, m in transformer.named_modules() if isinstance(m, LoraLayer | LoKrLayer) and list(_parts(m))
    ]  # fmt: skip


def _parts(layer: Any) -> Iterator[tuple[str, nn.Parameter]]:
    """The trained tensors of one adapted module by their peft name."""
    for part in layer.adapter_layer_names:
        holder = getattr(layer, part, None)
        if holder is not None and ADAPTER in holder and part in _PARTS:
            found = holder[ADAPTER]
            yield part, found if isinstance(found, nn.Parameter) else found.weight


_PARTS = ("lora_A", "lora_B", "lora_magnitude_vector", "lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a",
          "lokr_w2_b")  # fmt: skip

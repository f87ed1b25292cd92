"""How is the one LoRA file written that diffusers and ComfyUI both load in full, and how is it loaded again?"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import Kandinsky5Transformer3DModel
from peft import LoraConfig as PeftLoraConfig
from safetensors.torch import save_file
from torch import Tensor, nn

from k5cache.shared.errors import RunError
from k5cache.shared.files import make_folder, write_whole
from k5cache.shared.plain import parse_json
from k5cache.shared.units import count_of
from k5train.adapter.attach import ADAPTER, adapted_layers, adapter_parts, add_without_values
from k5train.adapter.keys import kind_of
from k5train.adapter.lora_file import read_file, refuse_not_finite
from k5train.adapter.pairs import understand
from k5train.adapter.targets import linear_sizes

PREFIX = "transformer."  # without it diffusers loads nothing and gives no error; ComfyUI accepts it


def lora_state_dict(transformer: nn.Module, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """A copy of the adapter as it is saved: ``transformer.<module>.lora_{A,B}.weight``, alpha / rank folded into B, on
    the CPU.

    diffusers and ComfyUI then take alpha = rank, and agree; a separate ``.alpha`` makes diffusers raise an error. DoRA
    adds ``lora_magnitude_vector``. LoKr has ``lokr_w1`` and ``lokr_w2``, or their halves ``_a`` and ``_b``; its scale
    is 1.
    """
    state = {}
    for name, layer in adapted_layers(transformer):
        for part, parameter in adapter_parts(layer):
            tensor = parameter.detach()
            if part == "lora_B":
                tensor = tensor.float() * layer.scaling[ADAPTER]
            ending = ".weight" if part in ("lora_A", "lora_B") else ""
            state[f"{PREFIX}{name}.{part}{ending}"] = tensor.to("cpu", dtype, copy=True)
    return {key: tensor.contiguous() for key, tensor in state.items()}


def save_lora(
    path: Path,
    transformer: nn.Module,
    metadata: Mapping[str, str] | None = None,
    dtype: torch.dtype = torch.float32,
    record: Callable[[Path], object] = lambda path: None,
) -> None:
    """Write the adapter, whole or not at all.

    float32 by default: the file is all that remains of the run, and further training, merging and the comparison with
    diffusers start from it. 16 bits halve it (438 to 219 MB at rank 32); `k5train export` can do that later, but not
    undo it. There is no ``lora_adapter_metadata``: diffusers reads the rank, and alpha = rank, from the tensors.

    Args:
        metadata: strings for the file's header.
        record: called with the finished file before it gets its name.
    """
    write_lora(path, lora_state_dict(transformer, dtype), metadata, record)


def write_lora(
    path: Path,
    tensors: dict[str, Tensor],
    metadata: Mapping[str, str] | None = None,
    record: Callable[[Path], object] = lambda path: None,
) -> None:
    """Write what ``lora_state_dict`` has copied, as ``save_lora`` does."""
    header = {"format": "pt", **(metadata or {})}
    make_folder(path.parent)

    def write(temporary: Path) -> None:
        save_file(tensors, temporary, metadata=header)
        record(temporary)

    write_whole(path, write)


def load_lora(transformer: Kandinsky5Transformer3DModel, path: Path) -> tuple[str, ...]:
    """Load a LoRA: into the adapter that is attached, or else into a new one with alpha = rank.

    Returns:
        the names of the adapted modules.

    Raises:
        RunError: the file cannot be read as a LoRA of this model, has NaN or infinity, or does not fit the adapter.
    """
    state, metadata = read_file(path)
    if kind_of(state) in ("dora", "lokr"):
        refuse_not_finite(path, state)
        return _load_by_diffusers(transformer, path, state, metadata)
    pairs = understand(path, state, metadata, linear_sizes(transformer)).pairs
    if not adapted_layers(transformer):
        _attach_with_ranks(transformer, {name: down.shape[0] for name, (down, _) in pairs.items()})
    layers = dict(adapted_layers(transformer))
    if set(layers) != set(pairs):
        different = sorted(set(layers) ^ set(pairs))
        raise RunError(
            f"{path} adapts {count_of(len(pairs), 'module')}, "
            f"the adapter here {len(layers)}; they differ in {different[0]}",
            "Use the targets that the LoRA was trained with",
        )
    for name, layer in layers.items():
        for part, tensor, factor in zip(("lora_A", "lora_B"), pairs[name], (1.0, layer.scaling[ADAPTER]), strict=True):
            weight = getattr(layer, part)[ADAPTER].weight
            if weight.shape != tensor.shape:
                raise RunError(
                    f"{path} has {name}.{part} as {list(tensor.shape)}, expected {list(weight.shape)}",
                    "Use the base model and the rank that the LoRA was trained with",
                )
            weight.data = (tensor / factor).to(weight.device)
    return tuple(layers)


def _attach_with_ranks(transformer: Kandinsky5Transformer3DModel, ranks: Mapping[str, int]) -> None:
    """Attach a float32 adapter of these ranks, its values not yet set."""
    rank = max(ranks.values())
    others: dict[str, Any] = {f"^{re.escape(n)}$": r for n, r in ranks.items() if r != rank}
    config = PeftLoraConfig(
        r=rank,
        lora_alpha=rank,
        rank_pattern=others,
        alpha_pattern=others,
        init_lora_weights=False,
        target_modules=list(ranks),
    )
    add_without_values(transformer, config)


def _load_by_diffusers(
    transformer: Kandinsky5Transformer3DModel, path: Path, state: dict[str, Tensor], metadata: Mapping[str, str]
) -> tuple[str, ...]:
    """Load DoRA or LoKr into a transformer without an adapter, as a user of diffusers loads them."""
    if adapted_layers(transformer):
        raise RunError(
            f"{path} is not a plain LoRA and cannot replace the adapter that is attached",
            "Load it on a base without an adapter",
        )
    # Of a DoRA it has the strength, by which pipe.load_lora_weights goes; the call that loads LoKr never reads it.
    text = metadata.get("lora_adapter_metadata") if kind_of(state) == "dora" else None
    config = {"metadata": parse_json(text)} if text else {}
    transformer.load_lora_adapter(dict(state), prefix=PREFIX.rstrip("."), adapter_name=ADAPTER, **config)
    layers = adapted_layers(transformer)
    for _, layer in layers:
        for _, parameter in adapter_parts(layer):
            parameter.data = parameter.data.float()
    return tuple(name for name, _ in layers)

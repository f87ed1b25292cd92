"""LoRA files of other makes: whose keys are these, and which module and matrix does each one mean?

Four families are read: diffusers' and ours (``transformer.``), ComfyUI's (``diffusion_model.``), peft's
(``base_model.model.``) or bare module names, and kohya's (``lora_unet_`` and underscores, ``lora_down``, ``alpha``).
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from k5cache.shared.errors import RunError

PREFIXES = ("base_model.model.", "model.diffusion_model.", "diffusion_model.", "transformer.", "module.")


FLAT_PREFIXES = ("lora_unet_", "lora_transformer_")


_SUFFIX = re.compile(r"\.(?:(lora_A|lora_down|lora\.down)|(lora_B|lora_up|lora\.up))(?:\.default)?\.weight$|\.(alpha)$")


Pair = tuple[Tensor, Tensor]


"""``lora_A [r, in]`` and ``lora_B [out, r]``, alpha / rank folded into the second; float32."""


def read_pairs(path: Path, modules: Iterable[str] | Mapping[str, tuple[int, int]]) -> dict[str, Pair]:
    """Every pair of a LoRA file by the module it adapts.

    Args:
        modules: names of the transformer's linears; kohya's names are not readable without. With their outputs and
            inputs, a file of a model of another size is refused.

    Raises:
        RunError: the file cannot be read, holds keys of no known family or another kind of adapter, half a pair, or
            matrices of a model of another size.
    """
    state, config = _read(path)
    flat = {name.replace(".", "_"): name for name in modules}
    parts: dict[str, dict[str, Tensor]] = {}
    for key, tensor in state.items():
        found = name_of(key, flat)
        if found is None:
            raise RunError(
                f"{path} has the key {key}, which is no LoRA key of this model",
                "Give a plain LoRA for Kandinsky 5 Image, with diffusers', ComfyUI's, peft's or kohya's keys",
            )
        parts.setdefault(found[0], {})[found[1]] = tensor
    if not parts:
        raise RunError(f"{path} has no tensors", "Give a whole LoRA file")
    pairs = {}
    for name, part in parts.items():
        if "A" not in part or "B" not in part:
            raise RunError(f"{path} has half of the pair for {name}", "Give a whole LoRA file")
        down, up = part["A"].float(), part["B"].float()
        shape = modules[name] if isinstance(modules, Mapping) else (up.shape[0], down.shape[-1])
        if (up.shape[0], down.shape[-1]) != shape:
            raise RunError(
                f"{path} is of a model of another size: {name} has {up.shape[0]} x {down.shape[-1]} weights there, "
                f"{shape[0]} x {shape[1]} here",
                "Give the model that it was trained on: --model DIR",
            )
        rank = down.shape[0]
        pairs[name] = (down, up * (part["alpha"].item() / rank if "alpha" in part else _scaling(name, rank, config)))
    return pairs


def _scaling(name: str, rank: int, config: Mapping[str, Any]) -> float:
    """What peft multiplies a module's ``B A`` with, by the config in diffusers' metadata; 1 where there is none."""
    found = (a for pattern, a in (config.get("alpha_pattern") or {}).items() if re.match(rf"(.*\.)?({pattern})$", name))
    alpha = next(found, config.get("lora_alpha", rank))
    return float(alpha) / (rank**0.5 if config.get("use_rslora") else rank)


def name_of(key: str, flat: Mapping[str, str]) -> tuple[str, str] | None:
    """The module and the part (``A``, ``B`` or ``alpha``) that a key means. None: neither ours nor kohya's.

    Args:
        flat: module names by their kohya form, with underscores for dots.
    """
    match = _SUFFIX.search(key)
    if match is None:
        return None
    part = "A" if match.group(1) else "B" if match.group(2) else "alpha"
    name = key[: match.start()]
    for prefix in FLAT_PREFIXES:
        if name.startswith(prefix):
            found = flat.get(name.removeprefix(prefix))
            return (found, part) if found else None
    for prefix in PREFIXES:
        name = name.removeprefix(prefix)
    return (name, part) if name.replace(".", "_") in flat else None


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors, and peft's config where diffusers' metadata holds it or peft saved it beside the file."""
    try:
        with safe_open(path, framework="pt") as file:
            state = {key: file.get_tensor(key) for key in list(file.keys())}
            metadata = json.loads((file.metadata() or {}).get("lora_adapter_metadata", "{}"))
    except (OSError, SafetensorError, ValueError) as error:
        raise RunError(f"{path} cannot be read: {error}", "Give the .safetensors file of a LoRA") from error
    beside = path.with_name("adapter_config.json")
    if not metadata and beside.is_file() and all(key.startswith("base_model.model.") for key in state):
        try:  # peft's own file, whose strength is in the config that it saves beside it
            return state, dict(json.loads(beside.read_text(encoding="utf-8")))
        except (OSError, ValueError) as error:
            raise RunError(f"{beside} cannot be read: {error}", "Mend it, or move the LoRA away from it") from error
    return state, {k.removeprefix("transformer."): v for k, v in metadata.items()}

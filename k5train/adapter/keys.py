"""What is in a LoRA file: its tensors and metadata, and which module and matrix does each key mean?

Four families of keys are read: diffusers' and ours (``transformer.``), ComfyUI's (``diffusion_model.``), peft's
(``base_model.model.``) or bare module names, and kohya's (``lora_unet_`` and underscores, ``lora_down``, ``alpha``).
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
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


def read_file(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of a safetensors file.

    Raises:
        RunError: it cannot be read, or is not one.
    """
    try:
        with safe_open(path, framework="pt") as file:
            return {key: file.get_tensor(key) for key in list(file.keys())}, file.metadata() or {}
    except (OSError, SafetensorError) as error:
        raise RunError(f"{path} cannot be read: {error}", "Give the .safetensors file of a LoRA") from error


def read_pairs(path: Path, sizes: Mapping[str, tuple[int, int]]) -> dict[str, Pair]:
    """Every pair of a LoRA file by the module it adapts.

    Args:
        sizes: outputs and inputs of every linear of the transformer. kohya's keys cannot be read without the names.

    Raises:
        RunError: the file cannot be read, has keys of an unknown family or of another kind of adapter, half a pair,
            or matrices for a model of another size.
    """
    state, metadata = read_file(path)
    config = _peft_config(path, state, metadata)
    names = {name.replace(".", "_"): name for name in sizes}
    matrices: dict[str, dict[str, Tensor]] = {}
    for key, tensor in state.items():
        meaning = meaning_of(key, names)
        if meaning is None:
            raise RunError(
                f"{path} has the key {key}, which is no LoRA key of this model",
                "Give a plain LoRA for Kandinsky 5 Image, with diffusers', ComfyUI's, peft's or kohya's keys",
            )
        name, part = meaning
        matrices.setdefault(name, {})[part] = tensor
    if not matrices:
        raise RunError(f"{path} has no tensors", "Give a whole LoRA file")
    pairs = {}
    for name, parts in matrices.items():
        if "A" not in parts or "B" not in parts:
            raise RunError(f"{path} has half of the pair for {name}", "Give a whole LoRA file")
        down, up = parts["A"].float(), parts["B"].float()
        if (up.shape[0], down.shape[-1]) != sizes[name]:
            raise RunError(
                f"{path} belongs to a model of another size: {name} has {up.shape[0]} x {down.shape[-1]} weights "
                f"there, {sizes[name][0]} x {sizes[name][1]} here",
                "Give the model that it was trained on: --model DIR",
            )
        rank = down.shape[0]
        pairs[name] = (down, up * (parts["alpha"].item() / rank if "alpha" in parts else _scaling(name, rank, config)))
    return pairs


def meaning_of(key: str, names: Mapping[str, str]) -> tuple[str, str] | None:
    """The module and the part (``A``, ``B`` or ``alpha``) that a key means. None: no key of a family that is read.

    Args:
        names: module names by their kohya form, which has underscores for dots.
    """
    match = _SUFFIX.search(key)
    if match is None:
        return None
    part = "A" if match.group(1) else "B" if match.group(2) else "alpha"
    name = key[: match.start()]
    for prefix in FLAT_PREFIXES:
        if name.startswith(prefix):
            module = names.get(name.removeprefix(prefix))
            return (module, part) if module else None
    for prefix in PREFIXES:
        name = name.removeprefix(prefix)
    return (name, part) if name.replace(".", "_") in names else None


def _scaling(name: str, rank: int, config: Mapping[str, Any]) -> float:
    """What peft multiplies a module's ``B A`` with, according to its config; 1 without a config."""
    patterns = (config.get("alpha_pattern") or {}).items()
    alphas = (alpha for pattern, alpha in patterns if re.match(rf"(.*\.)?({pattern})$", name))
    alpha = next(alphas, config.get("lora_alpha", rank))
    return float(alpha) / (rank**0.5 if config.get("use_rslora") else rank)


def _peft_config(path: Path, state: Mapping[str, Tensor], metadata: Mapping[str, str]) -> dict[str, Any]:
    """peft's config: from diffusers' metadata, or from the file that peft saves beside its own; empty without one."""
    try:
        config = json.loads(metadata.get("lora_adapter_metadata", "{}"))
    except ValueError as error:
        raise RunError(f"{path} cannot be read: {error}", "Give the .safetensors file of a LoRA") from error
    if config:
        return {key.removeprefix("transformer."): value for key, value in config.items()}
    beside = path.with_name("adapter_config.json")
    if not beside.is_file() or not all(key.startswith("base_model.model.") for key in state):
        return {}
    try:
        return dict(json.loads(beside.read_text(encoding="utf-8")))
    except (OSError, ValueError) as error:
        raise RunError(f"{beside} cannot be read: {error}", "Correct it, or move the LoRA to another folder") from error

"""How is a DoRA or a LoKr written for diffusers, or for ComfyUI? And with which base, where that decides the numbers?

ComfyUI knows a module of this model by kohya's name, ``lora_unet_`` and underscores, and has no ``lycoris_`` for it.
Its rules, from ``comfy/weight_adapter``, for a weight ``W`` and ``delta``, the product of the pair:

- a LoKr adds ``kron(w1, w2)``, as peft does, times alpha / rank if a factor is a pair;
- a DoRA's weight is ``(W + delta) * dora_scale / |W|``, where peft's is ``(W + delta) * magnitude / |W + delta|``, with
  the norms of rows. So ``dora_scale`` is ``magnitude * |W| / |W + delta|``, which depends on the base.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Literal

import torch
from safetensors import safe_open
from torch import Tensor

from k5cache.shared.disk_errors import named
from k5cache.shared.errors import RunError
from k5cache.shared.fingerprint import fingerprint
from k5cache.shared.part_files import weight_files
from k5train.adapter.keys import flat_names, meaning_of
from k5train.adapter.lora_file import refuse_not_finite
from k5train.adapter.pairs import Sizes, understand

Format = Literal["diffusers", "kohya"]
MAGNITUDE = "lora_magnitude_vector"
_FACTOR = re.compile(r"\.(?P<part>lokr_w[12](?:_[ab])?)$")
"""A factor of a LoKr, whole or half of a pair. One of a convolution, ``lokr_t2``, has no place in this model."""


def dora_for(
    form: Format, path: Path, state: Mapping[str, Tensor], metadata: Mapping[str, str], sizes: Sizes,
    folder: Path | None,
) -> dict[str, Tensor]:  # fmt: skip
    """The tensors of a DoRA under other keys.

    Args:
        folder: the checkpoint, whose weights ComfyUI's magnitudes depend on. None: none was given.

    Raises:
        RunError: it is unclear, or ComfyUI's magnitudes are asked for and the base is not there, or another one.
    """
    refuse_not_finite(path, state)
    magnitudes, matrices = magnitudes_of(path, state, sizes)
    lora = understand(path, {key: state[key] for key in matrices}, metadata, sizes)
    by_module = {module: state[key] for module, key in magnitudes.items()}
    if by_module.keys() != lora.pairs.keys() or any(t.numel() != sizes[name][0] for name, t in by_module.items()):
        raise RunError(f"{path} does not have one magnitude for each output of each module", "Give a whole DoRA file")
    result: dict[str, Tensor] = {}
    weight_of = _weights(path, metadata, folder) if form == "kohya" else None
    for name, (down, up) in lora.pairs.items():
        magnitude = by_module[name].float().flatten()
        if weight_of is None:
            result |= {f"transformer.{name}.lora_A.weight": down, f"transformer.{name}.lora_B.weight": up}
            result[f"transformer.{name}.{MAGNITUDE}"] = magnitude
            continue
        flat = f"lora_unet_{name.replace('.', '_')}"
        weight = weight_of(name).float()
        scale = magnitude * weight.norm(dim=1) / (weight + up @ down).norm(dim=1)
        result |= {f"{flat}.lora_down.weight": down, f"{flat}.lora_up.weight": up, f"{flat}.dora_scale": scale[:, None]}
        result[f"{flat}.alpha"] = torch.tensor(float(down.shape[0]))
    return result


def magnitudes_of(path: Path, keys: Iterable[str], sizes: Sizes) -> tuple[dict[str, str], list[str]]:
    """A DoRA's keys: module -> that of its magnitudes, and those of its matrices.

    Raises:
        RunError: its magnitudes are ComfyUI's.
    """
    keys, names = list(keys), flat_names(sizes)
    if any(key.endswith(".dora_scale") for key in keys):
        raise RunError(
            f"{path} has dora_scale, whose meaning depends on the program that wrote it",
            "Give the file that it was exported from, which has lora_magnitude_vector",
        )
    magnitudes = [key for key in keys if key.endswith(f".{MAGNITUDE}")]
    by_module = {meaning_of(f"{key.removesuffix(MAGNITUDE)}alpha", names).module: key for key in magnitudes}
    return by_module, [key for key in keys if key not in set(magnitudes)]


def lokr_for(form: Format, path: Path, state: Mapping[str, Tensor], sizes: Sizes) -> dict[str, Tensor]:
    """The tensors of a LoKr under other keys, its strength in the first factor.

    Raises:
        RunError: a key is none of a LoKr of this model, or a product does not have its weight's shape.
    """
    refuse_not_finite(path, state)
    result: dict[str, Tensor] = {}
    for name, parts in _factors(path, state, sizes).items():
        alpha = parts.pop("alpha", None)
        rank = next((len(tensor) for part, tensor in parts.items() if part.endswith("_b")), None)
        shapes = [_shape(parts, factor) for factor in ("lokr_w1", "lokr_w2")]
        product = tuple(a * b for a, b in zip(*shapes, strict=True)) if all(shapes) else None
        if product != sizes[name]:
            raise RunError(
                f"{path} has factors at {name} whose product is {product or 'incomplete'}, not {sizes[name]}",
                "Give a whole LoKr file of this model, or its own model: --model DIR",
            )
        first = next(part for part in ("lokr_w1", "lokr_w1_a") if part in parts)
        if alpha is not None and rank:
            parts[first] = parts[first] * (float(alpha) / rank)
        stem = f"transformer.{name}" if form == "diffusers" else f"lora_unet_{name.replace('.', '_')}"
        result |= {f"{stem}.{part}": tensor for part, tensor in parts.items()}
        if form == "kohya":  # alpha = rank, so that the strength is 1. Of whole factors it is not used
            result[f"{stem}.alpha"] = torch.tensor(float(rank or 1))
    return result


def _factors(path: Path, state: Mapping[str, Tensor], sizes: Sizes) -> dict[str, dict[str, Tensor]]:
    """Module -> part -> its tensor in float32."""
    factors: dict[str, dict[str, Tensor]] = {}
    for module, parts in factor_keys(path, state, sizes).items():
        for part, key in parts.items():
            if state[key].ndim != (0 if part == "alpha" else 2):
                raise _not_of_a_lokr(path, key)
            factors.setdefault(module, {})[part] = state[key].float()
    return factors


def factor_keys(path: Path, keys: Iterable[str], sizes: Sizes) -> dict[str, dict[str, str]]:
    """A LoKr's keys: module -> part -> its key.

    Raises:
        RunError: one is none of a LoKr of this model, or a module is there twice.
    """
    names = flat_names(sizes)
    factors: dict[str, dict[str, str]] = {}
    for key in keys:
        part = match["part"] if (match := _FACTOR.search(key)) else "alpha" if key.endswith(".alpha") else ""
        meaning = meaning_of(f"{key.removesuffix(part)}alpha", names) if part else None
        if meaning is None or not meaning.exists:
            raise _not_of_a_lokr(path, key)
        if part in factors.setdefault(meaning.module, {}):
            raise RunError(f"{path} has {meaning.module} under two names", "Save the LoKr again where it comes from")
        factors[meaning.module][part] = key
    return factors


def _not_of_a_lokr(path: Path, key: str) -> RunError:
    return RunError(f"{path} has the key {key}, which is not a LoKr's of this model", "Give a LoKr of this model")


def _shape(parts: Mapping[str, Tensor], factor: str) -> tuple[int, int] | None:
    """Rows and columns of a factor. None: it is not there, or is half of a pair."""
    if factor in parts:
        rows, columns = parts[factor].shape
        return rows, columns
    left, right = parts.get(f"{factor}_a"), parts.get(f"{factor}_b")
    if left is None or right is None or left.shape[1] != right.shape[0]:
        return None
    return left.shape[0], right.shape[1]


def check_base(path: Path, metadata: Mapping[str, str], base: str, folder: Path) -> None:
    """Refuse a base that a DoRA was not trained on: its magnitudes are those of that base's rows.

    Args:
        base: the fingerprint of the transformer in ``folder``.

    Raises:
        RunError: it was trained on another one, as its metadata say.
    """
    if metadata.get("k5.base_fingerprint") not in (None, base):
        raise RunError(
            f"{path} was trained on another base than {folder}", "Give the model folder that it was trained on"
        )


def _weights(path: Path, metadata: Mapping[str, str], folder: Path | None) -> Callable[[str], Tensor]:
    """The weight of a module in the checkpoint that a DoRA was trained on."""
    if folder is None:
        raise RunError(
            f"{path} is a DoRA, and its magnitudes depend on the base's weights in ComfyUI",
            "Give the model folder that it was trained on: --model DIR",
        )
    files = weight_files(folder, "transformer")
    check_base(path, metadata, fingerprint(folder, "transformer"), folder)
    places: dict[str, Path] = {}
    for file in files:
        with named(file), safe_open(file, framework="pt") as opened:
            places |= dict.fromkeys(opened.keys(), file)

    def weight_of(module: str) -> Tensor:
        file = places[f"{module}.weight"]
        with named(file), safe_open(file, framework="pt") as opened:
            tensor: Tensor = opened.get_tensor(f"{module}.weight")
            return tensor

    return weight_of

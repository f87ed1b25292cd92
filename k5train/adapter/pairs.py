"""Which pair of matrices does a LoRA file hold for each module? Whatever is not clear is refused with its reason."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from k5cache.shared.errors import RunError
from k5train.adapter.keys import Meaning, flat_names, kind_of, meaning_of
from k5train.adapter.lora_file import READABLE, is_finite, largest, read_file, refuse_not_finite
from k5train.adapter.strength import peft_config, strength_of

Pair = tuple[Tensor, Tensor]
"""``lora_A [r, in]`` and ``lora_B [out, r]``, the strength folded into the second; float32."""

Sizes = Mapping[str, tuple[int, int]]
"""Outputs and inputs of every linear of the transformer, by its name."""

_OTHER_KINDS = {
    "dora": ("a DoRA, whose magnitudes a plain LoRA cannot hold",
             "Use it as it is in diffusers, which reads lora_magnitude_vector; for ComfyUI, which reads dora_scale, run"
             " `k5train export FILE --model DIR`"),
    "lokr": ("a LoKr, whose products are not pairs of matrices",
             "Use it as it is, in ComfyUI or by pipe.transformer.load_lora_adapter(FILE, prefix=\"transformer\")"),
    "loha": ("a LoHa, whose products are not pairs of matrices", "Use it as it is, in ComfyUI"),
}  # fmt: skip
_SAVE_AGAIN = "Save the LoRA again with the program that it comes from"


class OtherModel(RunError):
    """A LoRA has no module of this model."""


class OtherSize(RunError):
    """A LoRA has the modules of this model, but for a model of another width."""


@dataclass(frozen=True)
class Lora:
    """A LoRA file as it was understood."""

    pairs: dict[str, Pair]
    """By module."""
    strengths: dict[str, float]
    """Module -> the factor that is folded into its pair."""
    left_out: tuple[str, ...]
    """Keys of text encoders."""
    metadata: dict[str, str]

    @property
    def silent(self) -> list[str]:
        """The modules that it does not change, as ``silent_in``."""
        return silent_in(self.pairs)


def silent_in(pairs: Mapping[str, Pair]) -> list[str]:
    """The modules that do not change, since one of their matrices or their strength is zero."""
    return [name for name, (down, up) in pairs.items() if not largest(down) or not largest(up)]


def read_lora(path: Path, sizes: Sizes) -> Lora:
    """Read a LoRA file of any family of keys.

    Args:
        sizes: kohya's keys cannot be read without the modules' names.

    Raises:
        OtherModel: it has no module of this model.
        OtherSize: its matrices belong to a model of another size.
        RunError: it cannot be read, is not a plain LoRA of this model, or what it means is not clear.
    """
    state, metadata = read_file(path)
    return understand(path, state, metadata, sizes)


def read_pairs(path: Path, sizes: Sizes) -> dict[str, Pair]:
    """Every pair of a LoRA file by the module it adapts. Raises what ``read_lora`` does."""
    return read_lora(path, sizes).pairs


def understand(path: Path, state: Mapping[str, Tensor], metadata: Mapping[str, str], sizes: Sizes) -> Lora:
    """What the tensors of a LoRA file mean; ``read_lora`` after the file is read, with the same errors."""
    refuse_not_finite(path, state)
    refuse_kind(path, state)
    keys, left_out = keys_by_module(path, state, sizes)
    config = peft_config(path, state, metadata)
    pairs, strengths = {}, {}
    for module, parts in keys.items():
        if "A" not in parts or "B" not in parts:
            raise RunError(f"{path} has half of the pair for {module}", "Give a whole LoRA file")
        down, up = (_matrix(path, parts[part], state[parts[part]]) for part in "AB")
        _check_shapes(path, module, down, up, sizes[module])
        alpha = state[parts["alpha"]] if "alpha" in parts else None
        strength = strengths[module] = strength_of(path, module, down.shape[0], alpha, config)
        folded = up if strength == 1 else up * strength
        if not is_finite(folded) or not is_finite(down) or _overflows(down, folded):
            raise RunError(
                f"{path} has values at {module} that are too large for float32 at their strength, x{strength:g}",
                _SAVE_AGAIN,
            )
        pairs[module] = (down, folded)
    return Lora(pairs, strengths, left_out, dict(metadata))


def refuse_kind(path: Path, keys: Iterable[str]) -> None:
    """Refuse an adapter of another kind, by its keys.

    Raises:
        RunError: it is no plain LoRA.
    """
    kind = kind_of(keys)
    if kind in _OTHER_KINDS:
        problem, fix = _OTHER_KINDS[kind]
        raise RunError(f"{path} is {problem}", fix)


def keys_by_module(path: Path, keys: Iterable[str], sizes: Sizes) -> tuple[dict[str, dict[str, str]], tuple[str, ...]]:
    """Module -> part -> the key in the file; and the keys of text encoders.

    Raises:
        RunError: a key is none of a plain LoRA of this model, or what it means is not clear.
    """
    names = flat_names(sizes)
    meanings = {key: meaning_of(key, names) for key in keys}
    _refuse_other_models(path, meanings)
    _refuse_unclear(path, meanings)
    left_out = tuple(key for key, meaning in meanings.items() if meaning.part == "text encoder")
    return _keys_by_module(path, meanings), left_out


def _overflows(down: Tensor, up: Tensor) -> bool:
    """Whether the product of two finite matrices has infinities. Computed only if their largest values allow it."""
    most = torch.finfo(torch.float32).max
    if down.shape[0] * largest(down) * largest(up) <= most:
        return False
    return not largest(up.double() @ down.double()) <= most


def _refuse_other_models(path: Path, meanings: Mapping[str, Meaning]) -> None:
    if any(meaning.exists for meaning in meanings.values()):
        return
    if all(meaning.part == "text encoder" for meaning in meanings.values()):
        raise OtherModel(
            f"{path} is a LoRA for text encoders only",
            "Give one of the transformer: Kandinsky's pipeline loads no other",
        )
    keys = [key for key, meaning in meanings.items() if meaning.part != "text encoder"]
    raise OtherModel(
        f"{path} is a LoRA of another model: Kandinsky 5 Image has none of its modules, such as {keys[0]}",
        "Give a LoRA that was trained on Kandinsky 5 Image",
    )


def _refuse_unclear(path: Path, meanings: Mapping[str, Meaning]) -> None:
    biases = [key for key, meaning in meanings.items() if meaning.part == "bias"]
    if biases:
        raise RunError(
            f"{path} has biases such as {biases[0]}, which a plain LoRA cannot hold",
            "Train it without lora_bias; ComfyUI ignores biases",
        )
    for key, meaning in meanings.items():
        if meaning.part == "unknown":
            raise RunError(
                f"{path} has the key {key}, which is not a plain LoRA's",
                "Give a plain LoRA, with diffusers', ComfyUI's, peft's or kohya's keys",
            )
        if not meaning.exists and meaning.part != "text encoder":
            raise RunError(
                f"{path} adapts {meaning.module}, which this model does not have",
                "Give a LoRA of this model, or its own model: --model DIR",
            )
    adapters = sorted({meaning.adapter for meaning in meanings.values() if meaning.part in ("A", "B")})
    if len(adapters) > 1:
        raise RunError(
            f"{path} holds several adapters: {', '.join(name or 'one without a name' for name in adapters)}",
            "Save one adapter in a file",
        )


def _keys_by_module(path: Path, meanings: Mapping[str, Meaning]) -> dict[str, dict[str, str]]:
    """Module -> part -> the key in the file."""
    keys: dict[str, dict[str, str]] = {}
    for key, meaning in meanings.items():
        if meaning.part == "text encoder":
            continue
        parts = keys.setdefault(meaning.module, {})
        if meaning.part in parts:
            raise RunError(
                f"{path} has {meaning.module} twice: {parts[meaning.part]} and {key}",
                f"{_SAVE_AGAIN}: programs differ in which one they take",
            )
        parts[meaning.part] = key
    return keys


def _matrix(path: Path, key: str, tensor: Tensor) -> Tensor:
    """A tensor as a float32 matrix. One of a 1 x 1 convolution, ``[r, in, 1, 1]``, is a matrix too."""
    if tensor.dtype not in READABLE:
        raise RunError(
            f"{path} has {key} as {str(tensor.dtype).removeprefix('torch.')}, which is not a LoRA's numbers",
            "Save the LoRA in float32, bfloat16 or float16",
        )
    if tensor.ndim < 2 or any(n != 1 for n in tensor.shape[2:]):
        raise RunError(f"{path} has {key} in the shape {list(tensor.shape)}, which is not a matrix", _SAVE_AGAIN)
    return tensor.reshape(tensor.shape[:2]).float()


def _check_shapes(path: Path, module: str, down: Tensor, up: Tensor, size: tuple[int, int]) -> None:
    if (up.shape[0], down.shape[1]) != size:
        raise OtherSize(
            f"{path} belongs to a model of another size: {module} has {up.shape[0]} x {down.shape[1]} weights "
            f"there, {size[0]} x {size[1]} here",
            "Give the model that it was trained on: --model DIR",
        )
    if down.shape[0] != up.shape[1] or down.shape[0] == 0:
        raise RunError(
            f"{path} has matrices at {module} that do not fit together: ranks {down.shape[0]} and {up.shape[1]}",
            _SAVE_AGAIN,
        )

"""How is an adapter's file written for other programs: with other keys, in 16 bits, or several merged into one?"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from accelerate import init_empty_weights
from diffusers import Kandinsky5Transformer3DModel
from safetensors.torch import save_file
from torch import Tensor

from k5cache.shared.errors import RunError
from k5cache.shared.files import make_folder, write_whole
from k5cache.shared.kind import Kind
from k5cache.shared.template import PIPELINES
from k5train.adapter.checks import check_model_folder, check_target, check_weights
from k5train.adapter.files import PREFIX
from k5train.adapter.header import EXPORTED_KEY, pipeline_of
from k5train.adapter.keys import kind_of
from k5train.adapter.lora_file import largest, read_file, refuse_not_finite
from k5train.adapter.other_kinds import Format, dora_for, lokr_for
from k5train.adapter.pairs import Lora, Pair, Sizes, silent_in, understand
from k5train.adapter.targets import linear_sizes
from k5train.base.architecture import full_size
from k5train.base.quantize import empty_transformer

Number = Literal["fp32", "bf16", "fp16"]
DTYPES: dict[Number, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Written:
    """What a LoRA file that was written holds."""

    num_modules: int
    num_silent: int
    """Modules at which it changes nothing."""
    left_out: tuple[str, ...]
    """Keys of text encoders, which are not in it."""


def export(source: Path, target: Path, form: Format, number: Number, folder: Path | None) -> Written:
    """Write a LoRA from any trainer, or a DoRA or a LoKr, with other keys and the same metadata.

    Args:
        form: ``diffusers`` (ComfyUI loads it too, except a DoRA), or ``kohya``.
        folder: the checkpoint, for its modules, and its weights for a DoRA with kohya's keys. None: Kandinsky 5 Image
            Lite's.

    Raises:
        RunError: the file cannot be read as an adapter of this model, its values do not fit ``number``, ``target``
            exists, or a DoRA's base is needed.
    """
    check_target(target)
    sizes = linear_sizes(architecture(folder, source))
    state, metadata = read_file(source)
    kind = kind_of(state)
    if kind in ("dora", "lokr"):
        tensors = (
            dora_for(form, source, state, metadata, sizes, folder)
            if kind == "dora"
            else lokr_for(form, source, state, sizes)
        )
        modules = {key.rpartition(".lokr_" if kind == "lokr" else ".lora_")[0] for key in tensors} - {""}
        # Magnitudes and strengths stay in float32: they are few, and an alpha may be odd and above 256.
        rounded = {
            key: tensor if tensor.ndim < 2 or key.endswith("dora_scale") else _rounded(key, tensor, number)
            for key, tensor in tensors.items()
        }
        _save(target, rounded, {**_told(metadata), EXPORTED_KEY: form})
        return Written(len(modules), 0, ())
    lora = understand(source, state, metadata, sizes)
    write(target, lora.pairs, form, number, _told(lora.metadata))
    return Written(len(lora.pairs), len(lora.silent), lora.left_out)


def _told(metadata: Mapping[str, str]) -> dict[str, str]:
    """The metadata of an export: without the strength, which is folded into a matrix now."""
    return {key: value for key, value in metadata.items() if key != "lora_adapter_metadata"}


def merge(
    sources: Sequence[Path], weights: Sequence[float], target: Path, form: Format, number: Number, folder: Path | None
) -> Written:
    """Write one LoRA that does what several do together, each times its weight.

    The result is exact: ranks are laid side by side, ``[B1*w1 | B2*w2] @ [A1; A2]``, so its rank is the sum of theirs.

    Raises:
        RunError: a file cannot be read, shapes differ, there is not one finite weight for each file, values do not fit
            ``number``, or ``target`` exists.
    """
    check_target(target)
    check_weights(len(sources), weights)
    sizes = linear_sizes(architecture(folder, sources[0]))
    loras = [_read_to_merge(source, sizes) for source in sources]
    pairs = side_by_side([lora.pairs for lora in loras], weights)
    names = ", ".join(f"{source.name} x {weight:g}" for source, weight in zip(sources, weights, strict=True))
    write(target, pairs, form, number, {"software": "kandinsky5-lora", "k5.merged": names,
                                        "modelspec.title": target.stem})  # fmt: skip
    return Written(len(pairs), len(silent_in(pairs)), tuple(key for lora in loras for key in lora.left_out))


def _read_to_merge(source: Path, sizes: Sizes) -> Lora:
    state, metadata = read_file(source)
    refuse_not_finite(source, state)
    kind, names = kind_of(state), {"dora": "DoRA", "lokr": "LoKr"}
    if kind in names:
        why = "it scales the rows of the base's weights" if kind == "dora" else "its products have nearly full rank"
        raise RunError(
            f"{source} is a {names[kind]}, which no LoRA does exactly: {why}",
            "Load it beside the others, each at its strength: in ComfyUI as a LoRA node of its own"
            + (", in diffusers by pipe.set_adapters" if kind == "dora" else ""),
        )
    return understand(source, state, metadata, sizes)


def side_by_side(loras: Sequence[Mapping[str, Pair]], weights: Sequence[float]) -> dict[str, Pair]:
    """For each module the pair whose product is the weighted sum of the products in all LoRAs.

    Raises:
        RunError: a module has different shapes in two files.
    """
    merged = {}
    for name in dict.fromkeys(name for lora in loras for name in lora):
        parts = [(*lora[name], weight) for lora, weight in zip(loras, weights, strict=True) if name in lora]
        if len({(down.shape[1], up.shape[0]) for down, up, _ in parts}) > 1:
            raise RunError(f"{name} has different shapes in two files", "Merge LoRAs of one base model")
        merged[name] = (torch.cat([d for d, _, _ in parts]), torch.cat([up * w for _, up, w in parts], dim=1))
    return merged


def write(target: Path, pairs: Mapping[str, Pair], form: Format, number: Number, metadata: Mapping[str, str]) -> None:
    """Write pairs as a LoRA file, whole or not at all.

    Raises:
        RunError: a value does not fit ``number``.
    """
    _save(target, state_of(pairs, form, number), metadata)


def _save(target: Path, state: dict[str, Tensor], metadata: Mapping[str, str]) -> None:
    make_folder(target.parent)
    write_whole(target, lambda path: save_file(state, path, metadata={"format": "pt", **metadata}))


def state_of(pairs: Mapping[str, Pair], form: Format, number: Number) -> dict[str, Tensor]:
    """Pairs under the keys of one family. kohya's ``alpha`` is the rank, as the strength is already in ``lora_up``.

    Raises:
        RunError: a value does not fit ``number``.
    """
    state = {}
    for name, (down, up) in pairs.items():
        for letter, word, tensor in (("A", "down", down), ("B", "up", up)):
            key = f"lora_unet_{name.replace('.', '_')}.lora_{word}" if form == "kohya" else f"{name}.lora_{letter}"
            prefix = "" if form == "kohya" else PREFIX
            state[f"{prefix}{key}.weight"] = _rounded(key, tensor, number)
        if form == "kohya":  # in float32: a rank may be odd and above 256, which bfloat16 would round
            state[f"lora_unet_{name.replace('.', '_')}.alpha"] = torch.tensor(float(down.shape[0]))
    return state


def _rounded(key: str, tensor: Tensor, number: Number) -> Tensor:
    rounded = tensor.to(DTYPES[number]).contiguous()
    before, after = largest(tensor), largest(rounded)
    if not math.isfinite(before):
        raise RunError(f"{key} would have values that are too large for any LoRA file", "Use smaller weights")
    wider = f"Use --dtype {'bf16 or fp32' if number == 'fp16' else 'fp32'}"
    if not math.isfinite(after):
        limit = torch.finfo(rounded.dtype).max
        raise RunError(f"{key} has values up to {before:.6g}, and {number} holds none above {limit:.6g}", wider)
    if before and not after:
        raise RunError(f"{key} would become all zero: its values are too small for {number}", wider)
    return rounded


def architecture(folder: Path | None, file: Path | None = None) -> Kandinsky5Transformer3DModel:
    """A transformer without weights: the checkpoint's, or Kandinsky 5 Image Lite's, which needs no checkpoint.

    Args:
        file: a LoRA of ours says whether it is for the one that edits images, whose first matrix is wider.

    Raises:
        ModelError: there is no such folder, or no transformer of Kandinsky 5 Image in it.
    """
    check_model_folder(folder)
    if folder is not None:
        return empty_transformer(folder)
    with init_empty_weights():
        kind: Kind = "i2i" if file and pipeline_of(file) == PIPELINES["i2i"] else "t2i"
        return Kandinsky5Transformer3DModel.from_config(full_size(kind))

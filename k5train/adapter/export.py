"""LoRA files for other programs: another family of keys, 16 bits, several merged into one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

import torch
from diffusers import Kandinsky5Transformer3DModel
from safetensors.torch import save_file
from torch import Tensor

from k5cache.shared.errors import RunError
from k5cache.shared.files import write_whole
from k5train.adapter.keys import Pair, read_pairs
from k5train.adapter.who_loads import linear_modules, read_file
from k5train.base.quantize import empty_transformer

Format = Literal["diffusers", "kohya"]


Number = Literal["fp32", "bf16", "fp16"]


DTYPES: dict[Number, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def export(source: Path, target: Path, form: Format, number: Number, folder: Path | None) -> int:
    """Write a LoRA from anywhere with other keys, keeping its metadata. Returns the number of modules.

    Args:
        form: ``diffusers`` (ComfyUI takes it too), or ``kohya``.
        folder: the checkpoint, for its names; None: Kandinsky 5 Image Lite's.

    Raises:
        RunError: the file cannot be read as a LoRA of this model, or something is at ``target``.
    """
    pairs = read_pairs(source, linear_modules(architecture(folder)))
    _, metadata = read_file(source)
    kept = {k: v for k, v in metadata.items() if k != "lora_adapter_metadata"}  # it names an alpha that is now folded
    write(target, pairs, form, number, kept)
    return len(pairs)


def merge(
    sources: Sequence[Path], weights: Sequence[float], target: Path, form: Format, number: Number, folder: Path | None
) -> int:
    """Write one LoRA that does what several do together, each times its weight. Returns the number of modules.

    Exactly: ranks are laid side by side, ``[B1*w1 | B2*w2] @ [A1; A2]``, so the rank is the sum of theirs.

    Raises:
        RunError: a file cannot be read, shapes differ, there is not one weight a file, or something is at ``target``.
    """
    if len(weights) != len(sources):
        raise RunError(
            f"There are {len(sources)} files and {len(weights)} weights", "Give one --weight for each file, in order"
        )
    modules = linear_modules(architecture(folder))
    pairs = side_by_side([read_pairs(source, modules) for source in sources], weights)
    names = ", ".join(f"{source.name} x {weight:g}" for source, weight in zip(sources, weights, strict=True))
    write(target, pairs, form, number, {"software": "kandinsky5-lora", "k5.merged": names,
                                        "modelspec.title": target.stem})  # fmt: skip
    return len(pairs)


def side_by_side(loras: Sequence[Mapping[str, Pair]], weights: Sequence[float]) -> dict[str, Pair]:
    """The pairs whose product is the weighted sum of all products, a module at a time.

    Raises:
        RunError: a module has other shapes in another file.
    """
    merged = {}
    for name in dict.fromkeys(name for lora in loras for name in lora):
        parts = [(*lora[name], weight) for lora, weight in zip(loras, weights, strict=True) if name in lora]
        if len({(down.shape[1], up.shape[0]) for down, up, _ in parts}) > 1:
            raise RunError(f"{name} has other shapes in another file", "Merge LoRAs of one base model")
        merged[name] = (torch.cat([d for d, _, _ in parts]), torch.cat([up * w for _, up, w in parts], dim=1))
    return merged


def write(target: Path, pairs: Mapping[str, Pair], form: Format, number: Number, metadata: Mapping[str, str]) -> None:
    """Write pairs as a LoRA file, whole or not at all.

    Raises:
        RunError: something is at ``target``.
    """
    if target.exists():
        raise RunError(f"{target} is there already", "Give another name with -o")
    state = keys_of(pairs, form, DTYPES[number])
    target.parent.mkdir(parents=True, exist_ok=True)
    write_whole(target, lambda path: save_file(state, path, metadata={"format": "pt", **metadata}))


def keys_of(pairs: Mapping[str, Pair], form: Format, dtype: torch.dtype) -> dict[str, Tensor]:
    """Pairs under the keys of one family. kohya's ``alpha`` is the rank: the strength is in ``lora_up`` already."""
    state = {}
    for name, (down, up) in pairs.items():
        if form == "kohya":
            flat = f"lora_unet_{name.replace('.', '_')}"
            state[f"{flat}.lora_down.weight"] = down
            state[f"{flat}.lora_up.weight"] = up
            state[f"{flat}.alpha"] = torch.tensor(float(down.shape[0]))
        else:
            state[f"transformer.{name}.lora_A.weight"] = down
            state[f"transformer.{name}.lora_B.weight"] = up
    # A rank may be odd and above 256, which bfloat16 would round.
    return {key: tensor.to(torch.float32 if key.endswith(".alpha") else dtype).contiguous() for key, tensor in
            state.items()}  # fmt: skip


def architecture(folder: Path | None) -> Kandinsky5Transformer3DModel:
    """A transformer without weights: the checkpoint's, or Kandinsky 5 Image Lite's, which needs no download."""
    if folder is not None:
        return empty_transformer(folder)
    from accelerate import init_empty_weights

    from k5train.base.architecture import FULL_SIZE

    with init_empty_weights():
        return Kandinsky5Transformer3DModel.from_config(FULL_SIZE)

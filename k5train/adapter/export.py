"""How is a LoRA file written for other programs: with other keys, in 16 bits, or several merged into one?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

import torch
from accelerate import init_empty_weights
from diffusers import Kandinsky5Transformer3DModel
from safetensors.torch import save_file
from torch import Tensor

from k5cache.shared.errors import RunError
from k5cache.shared.files import write_whole
from k5train.adapter.keys import Pair, read_file, read_pairs
from k5train.adapter.targets import linear_sizes
from k5train.base.architecture import FULL_SIZE
from k5train.base.quantize import empty_transformer

Format = Literal["diffusers", "kohya"]
Number = Literal["fp32", "bf16", "fp16"]
DTYPES: dict[Number, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def export(source: Path, target: Path, form: Format, number: Number, folder: Path | None) -> int:
    """Write a LoRA from any trainer with other keys and the same metadata. Returns the number of modules.

    Args:
        form: ``diffusers`` (ComfyUI loads it too), or ``kohya``.
        folder: the checkpoint, for its modules. None: Kandinsky 5 Image Lite's.

    Raises:
        RunError: the file cannot be read as a LoRA of this model, or ``target`` exists.
    """
    pairs = read_pairs(source, linear_sizes(architecture(folder)))
    _, metadata = read_file(source)
    metadata.pop("lora_adapter_metadata", None)  # it names an alpha that is folded in now
    write(target, pairs, form, number, metadata)
    return len(pairs)


def merge(
    sources: Sequence[Path], weights: Sequence[float], target: Path, form: Format, number: Number, folder: Path | None
) -> int:
    """Write one LoRA that does what several do together, each times its weight. Returns the number of modules.

    The result is exact: ranks are laid side by side, ``[B1*w1 | B2*w2] @ [A1; A2]``, so its rank is the sum of theirs.

    Raises:
        RunError: a file cannot be read, shapes differ, there is not one weight for each file, or ``target`` exists.
    """
    if len(weights) != len(sources):
        raise RunError(
            f"There are {len(sources)} files and {len(weights)} weights", "Give one --weight for each file, in order"
        )
    sizes = linear_sizes(architecture(folder))
    pairs = side_by_side([read_pairs(source, sizes) for source in sources], weights)
    names = ", ".join(f"{source.name} x {weight:g}" for source, weight in zip(sources, weights, strict=True))
    write(target, pairs, form, number, {"software": "kandinsky5-lora", "k5.merged": names,
                                        "modelspec.title": target.stem})  # fmt: skip
    return len(pairs)


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
        RunError: ``target`` exists.
    """
    if target.exists():
        raise RunError(f"{target} already exists", "Give another name with -o")
    state = state_of(pairs, form, DTYPES[number])
    target.parent.mkdir(parents=True, exist_ok=True)
    write_whole(target, lambda path: save_file(state, path, metadata={"format": "pt", **metadata}))


def state_of(pairs: Mapping[str, Pair], form: Format, dtype: torch.dtype) -> dict[str, Tensor]:
    """Pairs under the keys of one family. kohya's ``alpha`` is the rank, as the strength is already in ``lora_up``."""
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
    """A transformer without weights: the checkpoint's, or Kandinsky 5 Image Lite's, which needs no checkpoint."""
    if folder is not None:
        return empty_transformer(folder)
    with init_empty_weights():
        return Kandinsky5Transformer3DModel.from_config(FULL_SIZE)

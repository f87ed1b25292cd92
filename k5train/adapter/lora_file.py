"""Can a file be opened as a LoRA, and are its numbers sound?"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from k5cache.shared.disk_errors import named
from k5cache.shared.errors import RunError

PIPELINE_KEY = "k5.pipeline"  # in the metadata of a LoRA for image-to-image: the class of diffusers that it is for
EXPORTED_KEY = "k5.exported"  # in the metadata of a DoRA or a LoKr that was exported: the family of its keys

# A key of an adapter, of whatever kind and for whatever model.
_ADAPTER_KEY = re.compile(r"lora|lokr_|hada_|oft_|dora_scale|\.diff(_b)?$")
_PICKLES = (".ckpt", ".pt", ".pth", ".bin", ".pkl")
# How files begin that are saved under a LoRA's name by mistake, in small letters, and what they are.
_BEGINNINGS = {
    b"pk\x03\x04": "pickle",  # a zip, which torch.save writes
    b"\x80": "pickle",
    b"version https://git-lfs": "lfs",
    b"<!doctype": "page",
    b"<html": "page",
}
# runs/resume_state.py: the name of a state's folder and the files that say so, of this version and of earlier ones.
_STATE = re.compile(r"step-\d{6,}", re.ASCII)
_OF_A_STATE = ("step.json", "state.json")
_KINDS = {
    "pickle": (
        "is a pickle, which can run any code when it is opened",
        "Get the .safetensors of it, or convert it where you trust it",
    ),
    "lfs": ("is only the pointer of Git LFS, not the file itself", "Run: git lfs pull"),
    "page": ("is a web page, not a LoRA", "Download the file itself"),
}
# The numbers that are read. Integers mean something only together with scales, for which there are no keys.
READABLE = frozenset(
    {torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.float8_e4m3fn, torch.float8_e5m2}
)


def read_file(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of a LoRA's safetensors file. Nothing is unpickled.

    Raises:
        RunError: it cannot be read, is another kind of file, or has no key of an adapter.
    """
    try:
        _check_kind(path)
        with named(path), safe_open(path, framework="pt") as file:
            keys = list(file.keys())
            _check_is_adapter(path, keys)
            return {key: file.get_tensor(key) for key in keys}, file.metadata() or {}
    except SafetensorError as error:
        reason = str(error).removeprefix("Error while deserializing header: ")
        raise RunError(
            f"{path} cannot be read: it is damaged, cut short or not a .safetensors file ({reason})",
            "Download or copy it again",
        ) from error
    except OSError as error:
        raise RunError(
            f"{path} cannot be read: {error.strerror or error}", "Give the .safetensors file of a LoRA"
        ) from error


def pipeline_of(path: Path) -> str | None:
    """The pipeline of diffusers that a LoRA of ours was trained for. None: it does not say, or cannot be read."""
    return read_metadata(path).get(PIPELINE_KEY)


def read_metadata(path: Path) -> dict[str, str]:
    """The strings in the header of a LoRA's safetensors file. Empty if it has none, or cannot be read."""
    if not path.is_file():
        return {}
    with suppress(SafetensorError, OSError), safe_open(path, framework="pt") as file:
        return file.metadata() or {}
    return {}


def _check_kind(path: Path) -> None:
    _refuse_state(path)
    if path.is_dir():
        inside = sorted(path.glob("*.safetensors"))
        files = ", ".join(map(str, inside[:3])) + (", ..." if len(inside) > 3 else "")
        raise RunError(f"{path} is a folder", f"Give the file: {files}" if inside else "Give a .safetensors file")
    if not path.exists():
        raise RunError(f"There is no {path}", "Give the .safetensors file of a LoRA")
    if not path.is_file():
        raise RunError(f"{path} is not a file", "Give the .safetensors file of a LoRA")
    with path.open("rb") as file:
        beginning = file.read(64)
    if not beginning:
        raise RunError(f"{path} is empty", "Download or copy it again")
    if beginning[8:9] == b"{":  # safetensors: eight bytes of length, then JSON
        return
    text = beginning.lstrip().lower()
    kind = next((kind for start, kind in _BEGINNINGS.items() if text.startswith(start)), None)
    kind = "pickle" if path.suffix.lower() in _PICKLES else kind
    if kind:
        problem, fix = _KINDS[kind]
        raise RunError(f"{path} {problem}", fix)


def _refuse_state(path: Path) -> None:
    """Refuse what a run resumes from: its matrices have no strength yet, which other files of the run have in them."""
    folder = path if path.is_dir() else path.parent
    if any((folder / name).is_file() for name in _OF_A_STATE) and _STATE.fullmatch(folder.resolve().name):
        checkpoint = folder.resolve().parent.parent / "checkpoints" / f"{folder.resolve().name}.safetensors"
        raise RunError(
            f"{path} is the state that a run resumes from, whose matrices do not have their strength in them",
            f"Give the LoRA of that step: {checkpoint}" if checkpoint.is_file() else "Give a LoRA of the run",
        )


def _check_is_adapter(path: Path, keys: list[str]) -> None:
    if not keys:
        raise RunError(f"{path} has no tensors", "Give a whole LoRA file")
    if not any(_ADAPTER_KEY.search(key) for key in keys):
        raise RunError(
            f"{path} is not a LoRA: none of its {len(keys)} tensors is part of one, such as {keys[0]}",
            "Give the .safetensors file of a LoRA",
        )


def not_finite(state: Mapping[str, Tensor]) -> list[str]:
    """The keys of tensors that have NaN or infinity."""
    return [key for key, tensor in state.items() if tensor.dtype in READABLE and not is_finite(tensor)]


def is_finite(tensor: Tensor) -> bool:
    """Whether every number is neither NaN nor infinite."""
    return math.isfinite(largest(tensor))


def largest(tensor: Tensor) -> float:
    """The largest magnitude; NaN if there is one, 0 without numbers. One pass over the tensor, which is not copied."""
    if not tensor.numel():
        return 0.0
    exact = tensor.float() if tensor.dtype.itemsize == 1 else tensor  # torch has no order of 8-bit floats
    low, high = exact.aminmax()  # both are NaN if any number is
    return max(abs(low.item()), abs(high.item()))


def refuse_not_finite(path: Path, state: Mapping[str, Tensor]) -> None:
    """Refuse a file with NaN or infinity, which would make every picture black or noise.

    Raises:
        RunError: says how many tensors have it.
    """
    if bad := not_finite(state):
        raise RunError(
            f"{path} has NaN or infinity in {len(bad)} of {len(state)} tensors: {some(bad)}",
            "Its training diverged. Use an earlier checkpoint, or train again with a lower train.optim.lr",
        )


def some(names: Iterable[str], count: int = 2) -> str:
    """The first names of many, for a message."""
    names = list(names)
    return ", ".join(names[:count]) + (f" and {len(names) - count} more" if len(names) > count else "")

"""Is a file a LoRA, and what does its header say? Read without torch, so that a wrong file is refused at once."""

from __future__ import annotations

import re
from contextlib import suppress
from pathlib import Path

from safetensors import SafetensorError, safe_open

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


def check_kind(path: Path) -> None:
    """Refuse what is not the safetensors file of a LoRA, by its name, its place and its first bytes.

    Raises:
        RunError: says what it is.
    """
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


def check_is_adapter(path: Path, keys: list[str]) -> None:
    """Refuse a file without a key of an adapter.

    Raises:
        RunError: names a key that it has.
    """
    if not keys:
        raise RunError(f"{path} has no tensors", "Give a whole LoRA file")
    if not any(_ADAPTER_KEY.search(key) for key in keys):
        raise RunError(
            f"{path} is not a LoRA: none of its tensors is part of one, such as {keys[0]}",
            "Give the .safetensors file of a LoRA",
        )


def pipeline_of(path: Path) -> str | None:
    """The pipeline of diffusers that a LoRA of ours was trained for. None: it does not say, or cannot be read."""
    return read_metadata(path).get(PIPELINE_KEY)


def read_metadata(path: Path) -> dict[str, str]:
    """The strings in the header of a LoRA's safetensors file. Empty if it has none, or cannot be read."""
    if not path.is_file():
        return {}
    with suppress(SafetensorError, OSError), safe_open(path, framework="np") as file:
        return file.metadata() or {}
    return {}

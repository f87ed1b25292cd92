"""Did one of our commands draw a picture? Then the same command may draw over it; nobody else's picture is replaced."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from k5cache.shared.errors import OutputError
from k5cache.shared.files import make_folder, write_whole
from k5cache.shared.outputs import check_file

if TYPE_CHECKING:
    from PIL.Image import Image

_BEGINS = b"\x89PNG\r\n\x1a\n"
_OURS = (b"tEXtSoftware\x00k5cache ", b"tEXtSoftware\x00k5train ")
_MOST_BYTES = 4096  # Pillow writes texts before the pixels


def check_picture(path: Path) -> Path:
    """Refuse a picture that cannot be written, or one that is there and was not drawn by our commands.

    Returns:
        where to write, with links followed.

    Raises:
        OutputError: says why, and what to name instead.
    """
    return check_replaceable(check_file(path, ".png"), path, is_ours, "was not drawn by k5cache or k5train")


def check_replaceable(real: Path, path: Path, is_ours: Callable[[bytes], bool], what: str) -> Path:
    """Refuse to replace a file that is there.

    Args:
        real: ``path`` with links followed.
        is_ours: whether a file that begins so may be replaced.
        what: why a file may not be.

    Raises:
        OutputError: says so.
    """
    if real.exists():
        try:
            with real.open("rb") as file:
                is_replaceable = is_ours(file.read(_MOST_BYTES))
        except OSError:
            is_replaceable = False
        if not is_replaceable:
            raise OutputError(f"{path} is there already and {what}", f"Choose another name with -o, or remove {path}")
    return real


def is_ours(begins: bytes) -> bool:
    """Whether a file that begins so is a picture that we drew."""
    return begins.startswith(_BEGINS) and any(mark in begins for mark in _OURS)


def write_picture(picture: Image, path: Path, software: str) -> None:
    """Write a PNG that says which command drew it, whole or not at all.

    Args:
        software: such as ``k5train sample``.
    """
    from PIL.PngImagePlugin import PngInfo

    note = PngInfo()
    note.add_text("Software", software)
    make_folder(path.parent)
    write_whole(path, partial(picture.save, format="PNG", pnginfo=note))

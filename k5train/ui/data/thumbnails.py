"""How does a page show thousands of pictures? Small ones are made once, and cached by what they were made of."""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Callable
from contextlib import suppress
from io import BytesIO
from pathlib import Path

from PIL import Image

from k5cache.shared.inside import is_inside
from k5cache.shared.plain import UnfitFile, open_plain
from k5cache.sources.items import UnreadableImage, stat_numbers
from k5train.ui.data.crops import whole
from k5train.ui.project import Project

SMALL, LARGE = 320, 1600
"""Pixels of the longer side: of a tile, and of a picture on a page of its own."""
PLACEHOLDER = ("#ffffff", "#3d454e")
"""What is written in the place of a picture, and its ground."""
_VERSION = 1
_MOST_BYTES = 64 << 20
_QUALITY = {SMALL: 82, LARGE: 90}
_AT_ONCE = threading.BoundedSemaphore(2 if (os.cpu_count() or 1) > 2 else 1)
"""Pictures that are made at the same time. Each may take 1.5 GB, with ``decode.MAX_PIXELS``, and a processor is left
for the pages: 45 new tiles of a folder must not delay its style sheet."""


def thumbnail(project: Project, key: str, make: Callable[[], Image.Image], side: int = SMALL) -> bytes:
    """A small picture as WebP, made once for all pages and tabs.

    Args:
        key: names the content and what is shown of it.
        make: makes the picture if it is not there.
        side: the most pixels of a side.

    Raises:
        UnreadableImage: ``make`` says why there is none.
    """
    name = hashlib.sha256(f"{_VERSION} {side} {key}".encode("utf-8", "surrogateescape")).hexdigest()
    folder = project.own / "thumbnails" / name[:2]
    path = folder / f"{name[2:34]}.webp"
    with suppress(OSError):
        return _read(project, path)
    with _AT_ONCE:
        with suppress(OSError):  # another tab asked for it too
            return _read(project, path)
        picture = make()
        picture.thumbnail((side, side), Image.Resampling.LANCZOS)
        data = BytesIO()
        picture.save(data, format="WEBP", quality=_QUALITY.get(side, 82), method=2)
    with suppress(OSError):  # without permission, or with a full disk, it is made each time
        _write(project, folder, path, data.getvalue())
    return data.getvalue()


def small_file(project: Project, path: Path) -> bytes:
    """A picture file of the project as a tile. Raises ``UnreadableImage``, ``OSError``, ``OutputError``."""
    inside = project.inside(path)
    key = f"file {project.relative(path)} {stat_numbers(inside.stat())}"
    return thumbnail(project, key, lambda: whole(inside, SMALL))


def _read(project: Project, path: Path) -> bytes:
    """A thumbnail that was made before; ``OSError`` if it was not, or if it lies outside the project."""
    with open_plain(path, _MOST_BYTES) as file:
        if not is_inside(project.own, path):
            raise UnfitFile(path, "it lies outside the project")
        return file.read()


def _write(project: Project, folder: Path, path: Path, data: bytes) -> None:
    """Write a file so that it appears whole. It need not be durable: it can be made again."""
    own = project.own
    if not is_inside(project.root, own) or not is_inside(own, path):
        return
    project.make_own()
    folder.mkdir(parents=True, exist_ok=True)
    temporary = folder / f".tmp-{os.getpid()}-{os.urandom(6).hex()}"
    try:
        temporary.write_bytes(data)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def placeholder(reason: str) -> str:
    """What stands for a picture that cannot be shown: an SVG that says why."""
    lines = _wrapped(reason, 20, 6)
    first = 218 - 17 * len(lines)
    text = "".join(f'<text x="160" y="{first + 34 * n}">{_escaped(line)}</text>' for n, line in enumerate(lines))
    # Its own ground, since a picture does not know whether the page is light or dark; letters for a tile of 140 pixels.
    return (
        '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 320 320" width="320" height="320" font-size="28" '
        f'font-family="system-ui,sans-serif" text-anchor="middle" fill="{PLACEHOLDER[0]}">'
        f'<path d="M0 0h320v320H0z" fill="{PLACEHOLDER[1]}"/>'
        '<path d="M110 24h100v60H110zM110 76l30-26 24 18 20-12 26 20" fill="none" '
        f'stroke="{PLACEHOLDER[0]}" stroke-width="3"/>{text}</svg>'
    )


def _wrapped(text: str, width: int, most: int) -> list[str]:
    lines = [""]
    for word in text.split():
        word = word if len(word) <= width else f"{word[: width - 3]}..."
        if len(lines[-1]) + len(word) >= width:
            lines.append("")
        lines[-1] = f"{lines[-1]} {word}".strip()
    return lines if len(lines) <= most else [*lines[: most - 1], f"{lines[most - 1]} ..."]


def _escaped(text: str) -> str:
    allowed = "".join(character if character.isprintable() else "?" for character in text)
    return allowed.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def as_reason(error: UnreadableImage | OSError) -> str:
    """Why there is no picture, in a few words."""
    if isinstance(error, UnreadableImage):
        return error.reason
    return "is no longer there" if isinstance(error, FileNotFoundError) else error.strerror or "cannot be read"

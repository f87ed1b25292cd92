"""How do pictures get into a report, and how large may they be? As data: URIs of JPEGs, reduced until all fit."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from pathlib import Path

from k5cache.shared.plain import open_plain
from k5train.pictures.saved import FORMATS

SIDES = (1024, 768, 512, 384, 256)
"""The longest side of pictures, in pixels: the first at which all of them fit is taken."""
LEAST_SIDES = (192, 128)
"""Tried too where the pictures are those of one step, and there is nothing left to leave out."""
QUALITY = 87
MISSING = "data:,"
"""Of a picture that cannot be read: its description is shown in its place."""
_TRIED = 8
_MOST_BYTES = 256 << 20
_BEGINNING = "data:image/jpeg;base64,"


def fitting(
    counts: Mapping[Path, int], num_bytes: int, sides: Sequence[int] = SIDES
) -> tuple[dict[Path, str], int] | None:
    """The sources of some pictures that together take at most ``num_bytes``, and the longest side that they have.

    Args:
        counts: picture -> how often it is shown.

    Returns:
        None if they do not fit at the smallest size.
    """
    few = list(counts)[:: len(counts) // _TRIED + 1]
    for side in sides:
        if _needed([source_of(path, side) for path in few]) / max(1, len(few)) * len(counts) > 1.1 * num_bytes:
            continue
        sources = {}
        left = num_bytes
        for path, count in counts.items():
            sources[path] = source_of(path, side)
            left -= len(sources[path]) * count
            if left < 0:
                break
        else:
            return sources, side
    return None


def _needed(sources: Sequence[str]) -> int:
    return sum(map(len, sources))


def source_of(path: Path, side: int) -> str:
    """A picture of at most ``side`` pixels, in a URI."""
    from PIL import Image

    try:
        with open_plain(path, _MOST_BYTES) as file, Image.open(file, formats=FORMATS) as opened:
            opened.draft("RGB", (side, side))
            picture = opened.convert("RGB")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):
        return MISSING
    picture.thumbnail((side, side), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=QUALITY)
    return _BEGINNING + base64.b64encode(buffer.getvalue()).decode("ascii")

"""Items: what a source gives, an image on disk or in a table with its captions. Values only; nothing is opened."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".avif", ".bmp", ".tif", ".tiff"})

Content = Path | bytes
"""An image as a file, or as the bytes of one that lies in a table."""


class UnreadableImage(Exception):
    """One image that cannot be used. Caught where images are looped over: it is skipped and reported."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


@dataclass(frozen=True)
class MaskFile:
    """A mask as found: which part of an image counts."""

    path: str
    num_bytes: int
    mtime_ns: int
    inode: int


@dataclass(frozen=True)
class SourceItem:
    """One image with its captions, as found."""

    path: str
    """Its name in the source, unique: relative to a folder with forward slashes, or table and row."""
    num_bytes: int
    """With time and inode: other values mean that the image may have changed. Of a table's row they are the table's."""
    mtime_ns: int
    inode: int
    """Its lower 63 bits, so that it fits a signed column."""
    captions: tuple[str, ...]
    """As written, at least one."""
    mask: MaskFile | None = None


@dataclass(frozen=True)
class Skipped:
    """Something in the source that is not used, and why."""

    path: str
    reason: str

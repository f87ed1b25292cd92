"""What does a source give? Items: images on disk or in a table, with their captions. Values only; nothing is opened."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".avif", ".bmp", ".tif", ".tiff"})

Content = Path | bytes
"""An image as a file, or as its bytes if it is in a table."""


class UnreadableImage(Exception):
    """One image that cannot be used. Caught where images are looped over: it is skipped and reported."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


@dataclass(frozen=True)
class MaskFile:
    """A mask that a source has: which part of an image counts."""

    path: str
    num_bytes: int
    mtime_ns: int
    inode: int


@dataclass(frozen=True)
class SourceItem:
    """One image that a source has, with its captions."""

    path: str
    """Its name in the source, unique: relative to a folder with forward slashes, or table and row."""
    num_bytes: int
    """If size, time or inode differ, the image may have changed. A table's row has the size and time of its file."""
    mtime_ns: int
    inode: int
    """The lower 63 bits, so that it fits a signed column."""
    captions: tuple[str, ...]
    """As written, at least one."""
    mask: MaskFile | None = None


@dataclass(frozen=True)
class Skipped:
    """Something in the source that is not used, and why."""

    path: str
    reason: str

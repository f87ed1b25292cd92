"""What does a source give? Items: images on disk or in a table, with their captions. Values only; nothing is opened."""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass, field
from pathlib import Path

from k5cache.shared import content

IMAGE_SUFFIXES = frozenset(
    {
        *(".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".apng", ".webp", ".avif", ".avifs", ".bmp", ".dib", ".gif"),
        *(".tif", ".tiff", ".jp2", ".j2k", ".jpf", ".jpx", ".heic", ".heif", ".hif", ".jxl"),
    }
)
"""Files that are opened as images. What is in them decides how they are read; .heic and .jxl need a plugin of Pillow,
and without it ``decode.open_image`` says which."""

METADATA = ("metadata.jsonl", "metadata.csv", "metadata.parquet")  # datasets' FolderBasedBuilder.METADATA_FILENAMES

_AS_PNG = "save it as PNG"
_AS_TIFF = "export it as a 16-bit TIFF or a PNG"
NAMED_SUFFIXES: dict[str, str] = {
    **dict.fromkeys((".psd", ".psb"), f"is a Photoshop document: {_AS_PNG}"),
    **dict.fromkeys((".xcf", ".kra", ".clip", ".afphoto"), f"is the document of a paint program: {_AS_PNG}"),
    **dict.fromkeys((".svg", ".ai", ".eps"), f"is a drawing without pixels: {_AS_PNG}"),
    **dict.fromkeys((".ico", ".cur", ".icns"), f"is an icon: {_AS_PNG}"),
    **dict.fromkeys((".tga", ".pcx", ".dds", ".qoi"), f"is of a kind that is not supported: {_AS_PNG}"),
    **dict.fromkeys((".ppm", ".pgm", ".pbm", ".pnm", ".pam"), f"is of a kind that is not supported: {_AS_PNG}"),
    **dict.fromkeys((".exr", ".hdr"), f"is an HDR image, which is not supported: {_AS_PNG}"),
    **dict.fromkeys((".jxr", ".wdp"), f"is a JPEG XR, which is not supported: {_AS_PNG}"),
    **dict.fromkeys((".dng", ".cr2", ".cr3", ".crw", ".nef", ".nrw"), f"is a camera's raw file: {_AS_TIFF}"),
    **dict.fromkeys((".arw", ".orf", ".rw2", ".raf", ".srw", ".pef"), f"is a camera's raw file: {_AS_TIFF}"),
    **dict.fromkeys((".raw", ".3fr", ".iiq", ".x3f", ".rwl"), f"is a camera's raw file: {_AS_TIFF}"),
}
"""Suffix of pictures that are known and cannot be read -> what to say of such a file instead of passing it over."""

PICTURE_DECODER = content.PICTURE_DECODER

Content = Path | bytes
"""An image as a file, or as its bytes if it is in a table."""


class UnreadableImage(Exception):
    """One image that cannot be used. Caught where images are looped over: it is skipped and reported."""

    def __init__(self, reason: str, has_changed: bool = False) -> None:
        """``has_changed``: the file is no longer the one that the encode began with."""
        super().__init__(reason)
        self.reason = reason
        self.has_changed = has_changed

    @property
    def is_lasting(self) -> bool:
        """Whether the same bytes fail again: not if the system could not read them, or had no memory left."""
        cause = self.__cause__
        if isinstance(cause, UnreadableImage):
            return cause.is_lasting
        by_the_system = isinstance(cause, MemoryError) or (isinstance(cause, OSError) and cause.errno is not None)
        return not (by_the_system or self.has_changed)


def stat_numbers(status: os.stat_result) -> tuple[int, int, int]:
    """(size, mtime, a hash of inode, ctime and mtime) of a file, each of which fits a signed 64-bit column.

    ctime is the time of the last change of any kind. No program can set it, so an edit that puts size and mtime back
    is seen. The hash is also of ``PICTURE_DECODER``.
    """
    text = f"{status.st_ino} {status.st_ctime_ns} {status.st_mtime_ns} {PICTURE_DECODER}"
    digest = hashlib.blake2b(text.encode("ascii"), digest_size=8).digest()
    return status.st_size, fitting_ns(status.st_mtime_ns), int.from_bytes(digest, "little") >> 1


def fitting_ns(time_ns: int) -> int:
    """A file's time in nanoseconds as a signed 64-bit number: one before 1677 or after 2262 becomes the nearest."""
    return min(max(time_ns, -(2**63)), 2**63 - 1)


@dataclass(frozen=True)
class PictureFile:
    """A picture that belongs to an image: its mask, or the source that it is an edit of."""

    path: str
    num_bytes: int
    mtime_ns: int
    inode: int
    """This and the two before are as in ``SourceItem``."""


@dataclass(frozen=True)
class SourceItem:
    """One image that a source has, with its captions."""

    path: str
    """Its name in the source, unique: relative to a folder with forward slashes, or table and row."""
    num_bytes: int
    """If size, time or inode differ, the image may have changed. A table's row has the size and time of its file."""
    mtime_ns: int
    inode: int
    """The third of ``stat_numbers``: another one if the file was replaced or changed in any way."""
    captions: tuple[str, ...]
    """As written, at least one."""
    mask: PictureFile | None = None
    """Which part of the image counts."""
    source: PictureFile | None = field(default=None, repr=False)  # not in old caches' notes of what was listed
    """For image-to-image: the picture before the edit, of which this image is the result. ``find.Source.read_source``
    reads it by its ``path``. The captions are then instructions."""


@dataclass(frozen=True)
class Flawed:
    """An image that is used although its file is damaged, and what is wrong with it."""

    path: str
    flaw: str


@dataclass(frozen=True)
class Skipped:
    """Something in the source that is not used, and why."""

    path: str
    reason: str
    is_lasting: bool = True
    """Whether it stays so until a file changes. A folder or a file that cannot be read may be readable next time."""


def printable(path: str) -> str:
    """Replace the lone surrogates of a file name that is not UTF-8: they can be neither printed nor stored."""
    return path if path.isascii() else path.encode("utf-8", "surrogateescape").decode("utf-8", "replace")

"""Images: which there are with which captions, and the exact pixels that each one is trained on.

Pillow reads, torch resizes. torch is imported where pixels are loaded, so that planning does without it.
"""

from __future__ import annotations

import hashlib
import os
import re
import warnings
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image, UnidentifiedImageError

from k5cache.buckets import Geometry
from k5cache.config import CacheConfig

if TYPE_CHECKING:
    from torch import Tensor

IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".avif", ".bmp", ".tif", ".tiff"})
MAX_PIXELS = 500_000_000  # 1.5 GB as RGB; the largest photographs have about 250 million
_FORMATS = ("JPEG", "PNG", "WEBP", "AVIF", "BMP", "DIB", "TIFF", "GIF")  # by content, whatever the suffix says
_ORIENTATION = 0x0112  # EXIF tag
_TRANSPOSE = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_TURNS_SIDES = frozenset({5, 6, 7, 8})
_LATE_METADATA = (b"eXIf", b"Raw profile type exif", b"XML:com.adobe.xmp")
_TAIL_BYTES = 1 << 20

# Pillow's remarks on metadata (a damaged EXIF tag, a tag with too many values) say nothing of the pixels. Its own limit
# of 89 million pixels is below what cameras make; MAX_PIXELS is checked in its place, on every image opened here.
warnings.filterwarnings("ignore", category=UserWarning, module=r"PIL\.")
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)
Image.MAX_IMAGE_PIXELS = MAX_PIXELS


class UnreadableImage(Exception):
    """One image that cannot be used. Caught where images are looped over: it is skipped and reported."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


@dataclass(frozen=True)
class SourceItem:
    """One image with its captions, as found on disk."""

    path: str
    """Relative to the source folder, with forward slashes."""
    num_bytes: int
    mtime_ns: int
    inode: int
    """Its lower 63 bits, so that it fits a signed column."""
    captions: tuple[str, ...]
    """As written, at least one."""


@dataclass(frozen=True)
class Skipped:
    """Something in the source that is not used, and why."""

    path: str
    reason: str


def find_items(source: Path, config: CacheConfig) -> tuple[list[SourceItem], list[Skipped]]:
    """List the images under ``source`` that have a caption, and those that cannot be used. No image is opened.

    The caption of ``cat.jpg`` is ``cat.txt`` beside it, one caption a line; ``cat.png`` would share it. Hidden files
    and folders are passed over. Links are followed, each folder is entered once.

    Returns:
        both sorted by path.
    """
    items: list[SourceItem] = []
    skipped: list[Skipped] = []
    for folder, prefix in _folders(source, skipped):
        images, texts = [], {}
        for entry in folder:
            stem, dot, suffix = entry.name.rpartition(".")
            if dot + suffix.lower() in IMAGE_SUFFIXES:
                images.append((stem, entry))
            elif dot + suffix.lower() == ".txt":
                texts[stem] = entry.path
        captions: dict[str, tuple[str, ...] | str] = {}
        for stem, entry in images:
            if stem not in captions:
                captions[stem] = _read_captions(texts.get(stem), stem)
            found = _item(entry, prefix + entry.name, captions[stem])
            if isinstance(found, Skipped):
                skipped.append(found)
            else:
                items.append(found)
    return sorted(items, key=lambda item: item.path), sorted(skipped, key=lambda skip: skip.path)


def hash_file(path: Path) -> str:
    """The sha256 of the bytes, 32 hex digits.

    Raises:
        UnreadableImage: it cannot be opened or read.
    """
    with _reasons(), path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:32]


def image_size(path: Path) -> tuple[int, int]:
    """(width, height) after EXIF rotation, from the header alone.

    Raises:
        UnreadableImage: it is no image, or too large.
    """
    with _open(path) as image:
        if image.format == "TIFF":  # Pillow itself turns TIFF, and says so in its size
            return image.size
        if image.format == "PNG" and _has_late_metadata(path):
            image.load()
        return (image.height, image.width) if _orientation(image) in _TURNS_SIDES else image.size


def load_pixels(path: Path, geometry: Geometry) -> Tensor:
    """The crop that is trained on.

    EXIF rotation applied, colours as ``colour.to_srgb`` says, the first frame of an animation. The resize is torch's
    bicubic with antialias on uint8: rows, then columns, 8 bits between, each pass within 1/255 of Pillow's.

    Returns:
        uint8 ``[3, H, W]``, contiguous; H and W are the bucket's.

    Raises:
        UnreadableImage: it cannot be decoded, is not of the size that ``geometry`` was made for, or is too long and
            thin to be resized.
    """
    import torch
    from torch.nn import functional as F

    from k5cache.colour import to_srgb

    bucket, resized = geometry.bucket, (geometry.resized_height, geometry.resized_width)
    if resized[0] * resized[1] > MAX_PIXELS:
        raise UnreadableImage(f"{geometry.width}x{geometry.height} is too long and thin to fill {bucket.name}")
    with _open(path) as image:
        image.load()
        method = _TRANSPOSE.get(_orientation(image))
        rgb = to_srgb(image)
        rgb = rgb if method is None else rgb.transpose(method)
        rows = np.array(rgb)
    if rgb.size != (geometry.width, geometry.height):
        found, expected = f"{rgb.width}x{rgb.height}", f"{geometry.width}x{geometry.height}"
        raise UnreadableImage(f"is {found} now and was {expected}: the file changed meanwhile")
    # Rows of RGB as Pillow has them: torch's uint8 kernel is fastest on this layout.
    pixels = torch.from_numpy(rows).permute(2, 0, 1)
    if resized != rows.shape[:2]:
        pixels = F.interpolate(pixels[None], size=resized, mode="bicubic", antialias=True)[0]
    crop = pixels[:, geometry.top : geometry.top + bucket.height, geometry.left : geometry.left + bucket.width]
    return (crop.flip(2) if geometry.flipped else crop).contiguous()


def load_many(
    jobs: Iterable[tuple[Path, Geometry]], workers: int | None = None
) -> Iterator[tuple[int, Tensor | UnreadableImage]]:
    """``load_pixels`` of every job on ``workers`` threads, in the order of ``jobs``, ahead of the caller.

    At most ``2 * workers`` images are in work or waiting, and ``jobs`` is drawn from no faster. Closing the iterator
    ends the threads.

    Args:
        jobs: image and geometry.
        workers: threads; by default one a core, at most 8.

    Yields:
        (position in ``jobs``, uint8 ``[3, H, W]`` or why there is none).
    """
    workers = workers or min(8, os.cpu_count() or 1)
    remaining = iter(jobs)
    with ThreadPoolExecutor(workers, thread_name_prefix="k5-load") as pool:
        waiting = deque(pool.submit(_load, *job) for job in islice(remaining, 2 * workers))
        try:
            index = 0
            while waiting:
                loaded = waiting.popleft().result()
                waiting.extend(pool.submit(_load, *job) for job in islice(remaining, 1))
                yield index, loaded
                index += 1
        finally:
            for future in waiting:
                future.cancel()


def _load(path: Path, geometry: Geometry) -> Tensor | UnreadableImage:
    try:
        return load_pixels(path, geometry)
    except UnreadableImage as error:
        return error


@contextmanager
def _open(path: Path) -> Iterator[Image.Image]:
    """The image at ``path``, not yet decoded. Whatever goes wrong while it is open is an ``UnreadableImage``."""
    with _reasons(), path.open("rb") as file:
        if not file.read(1):
            raise UnreadableImage("is empty (0 bytes)")
        file.seek(0)
        with Image.open(file, formats=_FORMATS) as image:
            if image.width * image.height > MAX_PIXELS:
                raise UnreadableImage(_too_large(f"{image.width}x{image.height}"))
            yield image


@contextmanager
def _reasons() -> Iterator[None]:
    """Turn what Pillow and the file system raise into an ``UnreadableImage`` that a person understands."""
    try:
        yield
    except UnreadableImage:
        raise
    except FileNotFoundError as error:
        raise UnreadableImage("is no longer there") from error
    except UnidentifiedImageError as error:
        raise UnreadableImage("is not an image, or of a kind that is not read") from error
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise UnreadableImage(_too_large("it")) from error
    except MemoryError as error:
        raise UnreadableImage("needs more memory than there is") from error
    except Exception as error:
        # Damaged bytes make Pillow's decoders raise nearly anything (OSError, SyntaxError, struct.error, ...), and one
        # bad file must not end an encode of thousands.
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise UnreadableImage(f"cannot be read ({reason or type(error).__name__})") from error


def _too_large(what: str) -> str:
    return f"{what} has more than {MAX_PIXELS // 1_000_000} million pixels"


def _orientation(image: Image.Image) -> int:
    """The EXIF (or XMP) orientation, 1 to 8; 1 where there is none or it is damaged."""
    try:
        # The base class's: PNG's own getexif decodes the whole image to look behind the pixels.
        return int(Image.Image.getexif(image).get(_ORIENTATION, 1))
    except Exception:  # the EXIF block is a format of its own and can be damaged in as many ways as an image
        return 1


def _has_late_metadata(path: Path) -> bool:
    """Whether a PNG may say behind its pixels how it is turned, as exiftool writes it."""
    with path.open("rb") as file:
        file.seek(max(0, os.fstat(file.fileno()).st_size - _TAIL_BYTES))
        behind = file.read().rpartition(b"IDAT")[2]
    return any(name in behind for name in _LATE_METADATA)


def _folders(source: Path, skipped: list[Skipped]) -> Iterator[tuple[list[os.DirEntry[str]], str]]:
    """Every folder's visible entries, with its path relative to ``source`` ("" or "sub/").

    Real folders come before linked ones, so that an image is found under its own path where it has one.
    """
    entered = {_file_id(parent.stat()) for parent in source.resolve().parents}  # a link there would lead back here
    real, linked = deque([(os.fspath(source), "")]), deque[tuple[str, str]]()
    while real or linked:
        folder, prefix = real.popleft() if real else linked.popleft()
        try:
            identity = _file_id(Path(folder).stat())
            if identity in entered:
                continue
            entered.add(identity)
            with os.scandir(folder) as found:
                entries = sorted((e for e in found if not e.name.startswith(".")), key=lambda e: e.name)
        except OSError as error:
            skipped.append(Skipped(_printable(prefix) or ".", f"this folder cannot be read ({error.strerror})"))
            continue
        files = []
        for entry in entries:
            if entry.is_dir(follow_symlinks=False):
                real.append((entry.path, f"{prefix}{entry.name}/"))
            elif entry.is_symlink() and Path(entry.path).is_dir():  # DirEntry.is_dir raises on a link to itself
                linked.append((entry.path, f"{prefix}{entry.name}/"))
            else:
                files.append(entry)
        yield files, prefix


def _item(entry: os.DirEntry[str], path: str, captions: tuple[str, ...] | str) -> SourceItem | Skipped:
    """``captions`` is a reason where there are none."""
    if _printable(path) != path:
        return Skipped(_printable(path), "its name is not valid UTF-8")
    try:
        stat = entry.stat()
        if not entry.is_file():  # a pipe would block whoever opens it
            return Skipped(path, "is not a file")
    except OSError:
        return Skipped(path, "is a broken link" if entry.is_symlink() else "is no longer there")
    if isinstance(captions, str):
        return Skipped(path, captions)
    return SourceItem(path, stat.st_size, stat.st_mtime_ns, stat.st_ino & (2**63 - 1), captions)


def _read_captions(path: str | None, stem: str) -> tuple[str, ...] | str:
    """A caption file's lines that are not blank, stripped; or, as a string, why there is no caption."""
    name = _printable(stem) + ".txt"
    if path is None:
        return f"missing caption {name}"
    try:
        with open(path, "rb") as file:  # noqa: PTH123 (10,000 of them: pathlib would take as long as reading)
            text = file.read().decode("utf-8-sig")
    except OSError as error:
        return f"caption {name} cannot be read ({error.strerror})"
    except UnicodeDecodeError:
        return f"caption {name} is not UTF-8"
    if "\0" in text:  # UTF-16 without a mark decodes so
        return f"caption {name} is not UTF-8"
    return tuple(line for line in map(str.strip, re.split(r"[\r\n]+", text)) if line) or "empty caption"


def _file_id(stat: os.stat_result) -> tuple[int, int]:
    return stat.st_dev, stat.st_ino


def _printable(path: str) -> str:
    """File names that are not UTF-8 reach us with lone surrogates, which can be neither printed nor stored."""
    return path.encode("utf-8", "surrogateescape").decode("utf-8", "replace")

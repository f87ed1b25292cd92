"""What is an image's size and content hash, and which exact pixels is it trained on?

Pillow decodes and torch resizes. torch is imported where pixels are loaded, so that planning works without it.
"""

from __future__ import annotations

import hashlib
import io
import os
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from io import BufferedReader
from itertools import islice
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image, UnidentifiedImageError

from k5cache.buckets import Geometry
from k5cache.sources.items import Content, UnreadableImage

if TYPE_CHECKING:
    from torch import Tensor

MAX_PIXELS = 500_000_000  # 1.5 GB as RGB; the largest photographs have about 250 million
_FORMATS = (
    "JPEG",
    "PNG",
    "WEBP",
    "AVIF",
    "BMP",
    "DIB",
    "TIFF",
    "GIF",
)  # recognised by content; the suffix does not matter
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

# Pillow's warnings about metadata (a damaged EXIF tag, a tag with too many values) do not concern the pixels. Its own
# limit of 89 million pixels is below what cameras produce; MAX_PIXELS is checked instead, on every image opened here.
warnings.filterwarnings("ignore", category=UserWarning, module=r"PIL\.")
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)
Image.MAX_IMAGE_PIXELS = MAX_PIXELS


def hash_content(content: Content) -> str:
    """The sha256 of the bytes, 32 hex digits.

    Raises:
        UnreadableImage: it cannot be opened or read.
    """
    with _errors_as_reasons(), _stream(content) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:32]


def image_size(content: Content) -> tuple[int, int]:
    """(width, height) after EXIF rotation, from the header alone.

    Raises:
        UnreadableImage: it is not an image, or is too large.
    """
    with open_image(content) as image:
        if image.format == "TIFF":  # Pillow applies the orientation of TIFF itself, to the size too
            return image.size
        if image.format == "PNG" and _has_late_metadata(content):
            image.load()
        return (image.height, image.width) if orientation(image) in _TURNS_SIDES else image.size


def load_pixels(content: Content, geometry: Geometry) -> Tensor:
    """Load the crop that is trained on.

    EXIF rotation is applied, ``colour.to_srgb`` converts the colours, and of an animation the first frame is taken.
    torch resizes (bicubic, antialias, uint8): rows, then columns, with 8 bits in between. Each pass is within 1/255 of
    Pillow's.

    Returns:
        uint8 ``[3, H, W]``, contiguous; H and W are the bucket's.

    Raises:
        UnreadableImage: it cannot be decoded, is not of the size that ``geometry`` was made for, or is too long and
            thin to be resized.
    """
    import torch
    from torch.nn import functional as F

    from k5cache.sources.colour import to_srgb

    bucket, resized = geometry.bucket, (geometry.resized_height, geometry.resized_width)
    if resized[0] * resized[1] > MAX_PIXELS:
        raise UnreadableImage(f"{geometry.width}x{geometry.height} is too long and thin to fill {bucket.name}")
    with open_image(content) as image:
        image.load()
        exif = orientation(image)
        rgb = turn(to_srgb(image), exif)
        rows = np.array(rgb)
    if rgb.size != (geometry.width, geometry.height):
        now, before = f"{rgb.width}x{rgb.height}", f"{geometry.width}x{geometry.height}"
        raise UnreadableImage(f"is {now} now and was {before}: the file changed during the encode", has_changed=True)
    # Rows of RGB as Pillow has them: torch's uint8 kernel is fastest on this layout.
    pixels = torch.from_numpy(rows).permute(2, 0, 1)
    if resized != rows.shape[:2]:
        pixels = F.interpolate(pixels[None], size=resized, mode="bicubic", antialias=True)[0]
    crop = pixels[:, geometry.top : geometry.top + bucket.height, geometry.left : geometry.left + bucket.width]
    return (crop.flip(2) if geometry.flipped else crop).contiguous()


def load_many(
    jobs: Iterable[tuple[str, Geometry] | tuple[str, Geometry, str]],
    read: Callable[[str], Content],
    workers: int | None = None,
) -> Iterator[tuple[int, Tensor | UnreadableImage]]:
    """Run ``load_pixels`` for every job on ``workers`` threads, in the order of ``jobs``, ahead of the caller.

    At most ``2 * workers`` images are being loaded or waiting, and no more of ``jobs`` is taken. Closing the iterator
    ends the threads.

    Args:
        jobs: an image's path in its source, its geometry and, if the bytes must be the same as when the encode was
            planned, their ``hash_content``.
        read: gives the image at a path; may raise ``UnreadableImage``. Called on the threads.
        workers: the number of threads; by default one per core, at most 8.

    Yields:
        (position in ``jobs``, uint8 ``[3, H, W]`` or the reason why there are no pixels).
    """
    workers = workers or num_workers()
    remaining = iter(jobs)
    with ThreadPoolExecutor(workers, thread_name_prefix="k5-load") as pool:
        waiting = deque(pool.submit(_load, read, *job) for job in islice(remaining, 2 * workers))
        try:
            index = 0
            while waiting:
                loaded = waiting.popleft().result()
                waiting.extend(pool.submit(_load, read, *job) for job in islice(remaining, 1))
                yield index, loaded
                index += 1
        finally:
            for future in waiting:
                future.cancel()


def num_workers() -> int:
    """The default number of threads that decode ahead of the VAE. Threads help: Pillow and torch release the GIL."""
    return min(8, os.cpu_count() or 1)


def _load(
    read: Callable[[str], Content], path: str, geometry: Geometry, content_hash: str = ""
) -> Tensor | UnreadableImage:
    try:
        content = read(path)
        if content_hash:
            with _errors_as_reasons(), _stream(content) as file:
                content = file.read()  # read only once, so that the bytes hashed are the bytes decoded
            if hash_content(content) != content_hash:
                return UnreadableImage("has changed since the encode began; encode again", has_changed=True)
        return load_pixels(content, geometry)
    except UnreadableImage as error:
        return error


@contextmanager
def open_image(content: Content) -> Iterator[Image.Image]:
    """Open an image without decoding it. Any error while it is open becomes an ``UnreadableImage``."""
    with _errors_as_reasons(), _stream(content) as file:
        if not file.read(1):
            raise UnreadableImage("is empty (0 bytes)")
        file.seek(0)
        with Image.open(file, formats=_FORMATS) as image:
            if image.width * image.height > MAX_PIXELS:
                raise UnreadableImage(_too_large(f"{image.width}x{image.height}"))
            yield image


@contextmanager
def _errors_as_reasons() -> Iterator[None]:
    """Turn the errors of Pillow and the file system into an ``UnreadableImage`` that a person understands."""
    try:
        yield
    except UnreadableImage:
        raise
    except FileNotFoundError as error:
        raise UnreadableImage("is no longer there") from error
    except UnidentifiedImageError as error:
        raise UnreadableImage("is not an image, or is of a kind that is not supported") from error
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise UnreadableImage(_too_large("it")) from error
    except MemoryError as error:
        raise UnreadableImage("needs more memory than is free") from error
    except Exception as error:
        # Pillow's decoders raise nearly any exception on damaged bytes (OSError, SyntaxError, struct.error, ...),
        # and one bad file must not end an encode of thousands.
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise UnreadableImage(f"cannot be read ({reason or type(error).__name__})") from error


def _stream(content: Content) -> BufferedReader | io.BytesIO:
    return io.BytesIO(content) if isinstance(content, bytes) else content.open("rb")


def _too_large(subject: str) -> str:
    return f"{subject} has more than {MAX_PIXELS // 1_000_000} million pixels"


def turn(image: Image.Image, exif: int) -> Image.Image:
    """``image`` upright, given its EXIF ``orientation``."""
    method = _TRANSPOSE.get(exif)
    return image if method is None else image.transpose(method)


def orientation(image: Image.Image) -> int:
    """The EXIF (or XMP) orientation, 1 to 8; 1 if there is none or it is damaged."""
    try:
        # The base class's getexif: PNG's own decodes the whole image to look behind the pixels.
        return int(Image.Image.getexif(image).get(_ORIENTATION, 1))
    except Exception:  # EXIF is a format of its own and can be damaged in as many ways as an image
        return 1


def _has_late_metadata(content: Content) -> bool:
    """Whether a PNG may have its orientation behind its pixels, where exiftool writes it."""
    with _stream(content) as file:
        file.seek(max(0, file.seek(0, os.SEEK_END) - _TAIL_BYTES))
        behind = file.read().rpartition(b"IDAT")[2]
    return any(name in behind for name in _LATE_METADATA)

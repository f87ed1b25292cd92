"""What is an image's size and content hash, and which exact pixels is it trained on?

Pillow decodes and torch resizes. torch is imported where pixels are loaded, so that planning works without it.
"""

from __future__ import annotations

import hashlib
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, TypeVar

import numpy as np

from k5cache.buckets import Geometry
from k5cache.shared.content import content_hash_of
from k5cache.sources import decode
from k5cache.sources.decode import (
    MAX_PIXELS,
    decodes_anew,
    errors_as_reasons,
    flaw,
    open_image,
    orientation,
    stream,
    turn,
)
from k5cache.sources.items import Content, UnreadableImage

if TYPE_CHECKING:
    from PIL import Image
    from torch import Tensor

_LATE_METADATA = (b"eXIf", b"Raw profile type exif", b"XML:com.adobe.xmp")
_TAIL_BYTES = 1 << 20
_DECODED_ANEW = (b"\x89PNG", b"II", b"MM", b"BM", b"GIF8")  # how the files begin of which some decode anew
_TURNS_SIDES = frozenset({5, 6, 7, 8})
_Loaded = TypeVar("_Loaded")
_Name = TypeVar("_Name")


@dataclass(frozen=True)
class Examined:
    """What planning knows of an image."""

    content_hash: str
    width: int
    height: int
    flaw: str
    """What is damaged in a file that can be used all the same; "" if nothing is."""


def examine(content: Content) -> Examined:
    """Look at an image before it is encoded; its pixels are decoded only if the file looks damaged.

    Raises:
        UnreadableImage: it is not an image, is too large, or lacks pixels.
    """
    content_hash = hash_content(content)
    with open_image(content) as image:
        return Examined(content_hash, *_upright_size(content, image), flaw(content, image))


def hash_content(content: Content) -> str:
    """The sha256 of the bytes, 32 hex digits.

    For a picture that earlier versions decoded to other pixels, it is the sha256 of the bytes and a note of that, so
    that what they made of it is not used.

    Raises:
        UnreadableImage: it cannot be opened or read.
    """
    with errors_as_reasons(), stream(content) as file:
        digest = hashlib.file_digest(file, "sha256")
        file.seek(0)
        head = file.read(4)
    return content_hash_of(digest, head.startswith(_DECODED_ANEW) and _decodes_anew(content))


def image_size(content: Content) -> tuple[int, int]:
    """(width, height) after EXIF rotation, from the header alone.

    Raises:
        UnreadableImage: it is not an image, or is too large.
    """
    with open_image(content) as image:
        return _upright_size(content, image)


def load_pixels(content: Content, geometry: Geometry) -> Tensor:
    """Load the crop that is trained on.

    EXIF rotation is applied, ``colour.to_srgb`` converts the colours, and of an animation the first frame is taken.
    torch resizes (bicubic, antialias, uint8): rows, then columns, with 8 bits in between. Each pass is within 1/255 of
    Pillow's. A source of another shape than its target is stretched by Pillow's Lanczos filter, as the image-to-image
    pipeline does it.

    Returns:
        uint8 ``[3, H, W]``, contiguous; H and W are the bucket's.

    Raises:
        UnreadableImage: it cannot be decoded, is not of the size that ``geometry`` was made for, or is too long and
            thin to be resized.
    """
    import torch
    from PIL import Image
    from torch.nn import functional as F

    bucket, resized = geometry.bucket, (geometry.resized_height, geometry.resized_width)
    if resized[0] * resized[1] > MAX_PIXELS:
        raise UnreadableImage(f"{geometry.width}x{geometry.height} is too long and thin to fill {bucket.name}")
    rgb = upright(content, geometry)
    if geometry.stretched:  # VaeImageProcessor.resize
        rgb = rgb.resize((bucket.width, bucket.height), Image.Resampling.LANCZOS)
    rows = np.array(rgb)
    # Rows of RGB as Pillow has them: torch's uint8 kernel is fastest on this layout.
    pixels = torch.from_numpy(rows).permute(2, 0, 1)
    if resized != rows.shape[:2]:
        pixels = F.interpolate(pixels[None], size=resized, mode="bicubic", antialias=True)[0]
    crop = pixels[:, geometry.top : geometry.top + bucket.height, geometry.left : geometry.left + bucket.width]
    return (crop.flip(2) if geometry.flipped else crop).contiguous()


def load_whole(content: Content, geometry: Geometry) -> Tensor:
    """Load the whole image in its own size, mirrored if its crop is: uint8 ``[3, H, W]``. Raises as ``load_pixels``."""
    import torch

    pixels = torch.from_numpy(np.array(upright(content, geometry))).permute(2, 0, 1)
    return (pixels.flip(2) if geometry.flipped else pixels).contiguous()


def upright(content: Content, geometry: Geometry) -> Image.Image:
    """The image in sRGB, turned as its EXIF orientation says."""
    from k5cache.sources.colour import to_srgb

    with open_image(content) as image:
        rgb = turn(to_srgb(decode.load(content, image)), orientation(image))
    if rgb.size != (geometry.width, geometry.height):
        now, before = f"{rgb.width}x{rgb.height}", f"{geometry.width}x{geometry.height}"
        raise UnreadableImage(f"is {now} now and was {before}: the file changed during the encode", has_changed=True)
    return rgb


def load_many(
    jobs: Iterable[tuple[_Name, Geometry] | tuple[_Name, Geometry, str]],
    read: Callable[[_Name], Content],
    workers: int | None = None,
) -> Iterator[tuple[int, Tensor | UnreadableImage]]:
    """Run ``load_pixels`` for every job on ``workers`` threads, in the order of ``jobs``, ahead of the caller.

    Arguments and results are those of ``load_ahead``.
    """
    return load_ahead(jobs, read, load_pixels, workers)


def load_ahead(
    jobs: Iterable[tuple[_Name, Geometry] | tuple[_Name, Geometry, str]],
    read: Callable[[_Name], Content],
    load: Callable[[Content, Geometry], _Loaded],
    workers: int | None = None,
) -> Iterator[tuple[int, _Loaded | UnreadableImage]]:
    """Run ``load`` for every job on ``workers`` threads, in the order of ``jobs``, ahead of the caller.

    At most ``2 * workers`` images are being loaded or waiting, and no more of ``jobs`` is taken. Closing the iterator
    ends the threads.

    Args:
        jobs: an image's path in its source, or whatever ``read`` knows it by; its geometry; and, if the bytes must be
            the same as when the encode was planned, their ``hash_content``.
        read: gives the image of that name; may raise ``UnreadableImage``. Called on the threads.
        workers: the number of threads; by default one per core, at most 8.

    Yields:
        (position in ``jobs``, what ``load`` returned or the reason why there are no pixels).
    """
    workers = workers or num_workers()
    remaining = iter(jobs)
    with ThreadPoolExecutor(workers, thread_name_prefix="k5-load") as pool:
        waiting = deque(pool.submit(_load, load, read, *job) for job in islice(remaining, 2 * workers))
        try:
            index = 0
            while waiting:
                loaded = waiting.popleft().result()
                waiting.extend(pool.submit(_load, load, read, *job) for job in islice(remaining, 1))
                yield index, loaded
                index += 1
        finally:
            for future in waiting:
                future.cancel()


def num_workers() -> int:
    """The default number of threads that decode ahead of the VAE. Threads help: Pillow and torch release the GIL."""
    return min(8, os.cpu_count() or 1)


def _load(
    load: Callable[[Content, Geometry], _Loaded],
    read: Callable[[_Name], Content],
    name: _Name,
    geometry: Geometry,
    content_hash: str = "",
) -> _Loaded | UnreadableImage:
    try:
        content = read(name)
        if content_hash:
            with errors_as_reasons(), stream(content) as file:
                content = file.read()  # read only once, so that the bytes hashed are the bytes decoded
            if hash_content(content) != content_hash:
                return UnreadableImage("has changed since the encode began; encode again", has_changed=True)
        return load(content, geometry)
    except UnreadableImage as error:
        return error


def _upright_size(content: Content, image: Image.Image) -> tuple[int, int]:
    if image.format == "PNG" and _has_late_metadata(content):
        image.load()
    return (image.height, image.width) if orientation(image) in _TURNS_SIDES else image.size


def _decodes_anew(content: Content) -> bool:
    try:
        with open_image(content) as image:
            return decodes_anew(image)
    except UnreadableImage:  # nothing was ever made of it
        return False


def _has_late_metadata(content: Content) -> bool:
    """Whether a PNG may have its orientation behind its pixels, where exiftool writes it."""
    with stream(content) as file:
        file.seek(max(0, file.seek(0, os.SEEK_END) - _TAIL_BYTES))
        behind = file.read().rpartition(b"IDAT")[2]
    return any(name in behind for name in _LATE_METADATA)

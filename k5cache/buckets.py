"""Buckets: at which size is an image trained, and which part of it? Pure arithmetic, no I/O."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from k5cache.shared.parts import VAE_SCALE

NATIVE_RESOLUTIONS: tuple[tuple[int, int], ...] = (  # (width, height); Kandinsky5T2IPipeline.resolutions
    (1024, 1024),
    (640, 1408),
    (1408, 640),
    (768, 1280),
    (1280, 768),
    (896, 1152),
    (1152, 896),
)
SIDE_MULTIPLE = 16  # VAE 8 x patch 2
MAX_SIDE = 2048  # Kandinsky5RoPE3D has 128 positions per side, each SIDE_MULTIPLE pixels
MAX_TEXT_TOKENS = 1024  # positions of Kandinsky5RoPE1D


@dataclass(frozen=True, order=True)
class Bucket:
    """A training size in pixels."""

    width: int
    height: int

    @property
    def latent_shape(self) -> tuple[int, int]:
        """(H/8, W/8): the one place where (width, height) becomes (rows, columns)."""
        return self.height // VAE_SCALE, self.width // VAE_SCALE

    @property
    def name(self) -> str:
        """``1024x1024``: width first."""
        return f"{self.width}x{self.height}"


def drawn_by_pipeline(width: int, height: int) -> tuple[int, int]:
    """The size that diffusers' pipelines draw where this one is asked for: about a megapixel, of the nearest shape.

    ``Kandinsky5T2IPipeline`` and ``Kandinsky5I2IPipeline`` of diffusers 0.39 to 0.42, after ``check_inputs``.
    """
    if (width, height) in NATIVE_RESOLUTIONS:
        return width, height
    return min(NATIVE_RESOLUTIONS, key=lambda size: abs(size[0] / size[1] - width / height))


@dataclass(frozen=True)
class Geometry:
    """How an image becomes its bucket: resize the whole image, cut out the bucket, flip. All sizes are in pixels."""

    width: int
    """Of the image on disk, after EXIF rotation."""
    height: int
    bucket: Bucket
    resized_width: int
    resized_height: int
    left: int
    """Where the bucket begins in the resized image."""
    top: int
    flipped: bool = False
    stretched: bool = False
    """Only for a source of another shape than its target: all of it is stretched to the bucket as the image-to-image
    pipeline does it, with Pillow's Lanczos filter."""

    @property
    def upscaled(self) -> bool:
        """Whether the resize enlarges the image."""
        return self.resized_width > self.width or self.resized_height > self.height


@dataclass(frozen=True)
class Framing:
    """Which images are trained on, which part of each, and at which size."""

    table: tuple[Bucket, ...]
    """The square bucket first."""
    crop: Literal["center", "random", "none"] = "center"
    flip: bool = False
    minimum_image_size: int = 0
    no_upscale: bool = False

    def frame(self, width: int, height: int, content_hash: str) -> tuple[Geometry, ...]:
        """The crop of an image of ``width`` x ``height`` pixels, and with ``flip`` also its mirror image.

        Args:
            content_hash: of the image. A random crop depends on it alone, so it is the same on every machine.
        """
        if self.crop == "none":
            geometry = squash(width, height, choose_bucket(width, height, self.table))
        else:
            geometry = cover(width, height, choose_bucket(width, height, self.table))
        if self.crop == "random":
            digest = hashlib.sha256(f"crop {content_hash}".encode()).digest()
            left = int.from_bytes(digest[:8]) % (geometry.resized_width - geometry.bucket.width + 1)
            top = int.from_bytes(digest[8:16]) % (geometry.resized_height - geometry.bucket.height + 1)
            geometry = replace(geometry, left=left, top=top)
        return (geometry, replace(geometry, flipped=True)) if self.flip else (geometry,)

    def refusal(self, geometry: Geometry) -> str:
        """Why an image is not trained on; empty if it is."""
        size = f"is {geometry.width}x{geometry.height} pixels"
        if min(geometry.width, geometry.height) < self.minimum_image_size:
            return f"{size}, a side is below minimum_image_size = {self.minimum_image_size}"
        if self.no_upscale and geometry.upscaled:
            return f"{size}, smaller than its bucket {geometry.bucket.name} (no_upscale)"
        return ""


def is_side(pixels: int) -> bool:
    """Whether the model takes pictures with a side of this many pixels."""
    return SIDE_MULTIPLE <= pixels <= MAX_SIDE and pixels % SIDE_MULTIPLE == 0


def bucket_table(resolution: int, mode: Literal["native", "square"]) -> tuple[Bucket, ...]:
    """The buckets of a recipe, the square one first.

    Args:
        resolution: pixels on the side of the square bucket, a multiple of 16. The other native buckets are scaled by
            ``resolution / 1024``, each side to the nearest multiple of 16 (half up).
        mode: all native buckets, or the square one only.
    """
    sizes = NATIVE_RESOLUTIONS if mode == "native" else NATIVE_RESOLUTIONS[:1]
    scaled = (Bucket(_scaled(width, resolution), _scaled(height, resolution)) for width, height in sizes)
    return tuple(dict.fromkeys(scaled))  # small resolutions round two buckets to one


def fine_table(resolution: int) -> tuple[Bucket, ...]:
    """Buckets so close to each other that images can be squashed into them instead of cropped, the square one first.

    There is one for every length of the longer side, in steps of 16 up to ``MAX_SIDE``. The other side is the largest
    multiple of 16 that keeps the area within ``resolution`` squared. At 1024 there are 191 buckets, and an image of up
    to 3.8:1 has a bucket whose aspect ratio differs by at most 2 %.
    """
    pixels = resolution**2
    longest = min(MAX_SIDE, pixels // SIDE_MULTIPLE)
    sizes = [
        (side, pixels // side // SIDE_MULTIPLE * SIDE_MULTIPLE) for side in range(resolution, longest, SIDE_MULTIPLE)
    ]
    sizes += [(longest, side) for side in range(pixels // longest // SIDE_MULTIPLE * SIDE_MULTIPLE, 0, -SIDE_MULTIPLE)]
    return tuple(dict.fromkeys(Bucket(*size) for long, short in sizes for size in ((long, short), (short, long))))


def choose_bucket(width: int, height: int, table: Sequence[Bucket]) -> Bucket:
    """The bucket with the nearest aspect ratio; of two that are equally near, the first in ``table``.

    Distance is measured in logarithms of ratios, so 2:1 and 1:2 are equally far from the square.
    """
    # A difference of logarithms, not the logarithm of a quotient: it only changes its sign if the sides are swapped.
    ratio = math.log(width) - math.log(height)
    return min(table, key=lambda bucket: abs(math.log(bucket.width) - math.log(bucket.height) - ratio))


def cover(width: int, height: int, bucket: Bucket) -> Geometry:
    """Resize to the smallest size of the same aspect ratio that covers ``bucket``, and crop the centre.

    One side gets the bucket's length. The other is rounded to the nearest pixel (half up) and is never shorter than the
    bucket's.
    """
    if width * bucket.height >= height * bucket.width:  # wider than the bucket: cut left and right
        resized_width, resized_height = _rounded(width * bucket.height, height), bucket.height
    else:
        resized_width, resized_height = bucket.width, _rounded(height * bucket.width, width)
    return Geometry(
        width=width,
        height=height,
        bucket=bucket,
        resized_width=resized_width,
        resized_height=resized_height,
        left=(resized_width - bucket.width) // 2,
        top=(resized_height - bucket.height) // 2,
    )


def squash(width: int, height: int, bucket: Bucket) -> Geometry:
    """Resize the whole image to ``bucket`` and cut nothing."""
    return Geometry(width, height, bucket, bucket.width, bucket.height, left=0, top=0)


def source_geometry(target: Geometry, width: int, height: int) -> Geometry:
    """How a source of ``width`` x ``height`` pixels becomes the bucket of its target.

    A source of the target's shape is resized and cropped exactly as the target is, so that their pixels correspond. Any
    other is stretched. Shapes are the same if they differ by no more than rounding the smaller picture to whole pixels.
    """
    if _are_alike(target, width, height):
        return replace(target, width=width, height=height)
    return replace(squash(width, height, target.bucket), flipped=target.flipped, stretched=True)


def is_turned(target: Geometry, width: int, height: int) -> bool:
    """Whether a source of ``width`` x ``height`` pixels has its target's shape lying on its side.

    Usually one of the two files has lost the orientation that its EXIF data stated.
    """
    return _are_alike(target, height, width) and not _are_alike(target, width, height)


def _are_alike(target: Geometry, width: int, height: int) -> bool:
    """Whether both have one shape, but for rounding the smaller one to whole pixels."""
    difference = abs(width * target.height - height * target.width)
    return difference <= max(width, height, target.width, target.height)


def _scaled(side: int, resolution: int) -> int:
    native = NATIVE_RESOLUTIONS[0][0]
    return max(1, _rounded(side * resolution, native * SIDE_MULTIPLE)) * SIDE_MULTIPLE


def _rounded(numerator: int, denominator: int) -> int:
    """numerator / denominator, rounded to the nearest integer, half up, without floats."""
    return (2 * numerator + denominator) // (2 * denominator)

"""Buckets: which size an image is trained at, and which part of it. Pure arithmetic, no I/O."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

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
VAE_SCALE = 8  # Kandinsky5T2IPipeline.vae_scale_factor_spatial


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


@dataclass(frozen=True)
class Geometry:
    """From an image to its bucket: resize all of it, cut out the bucket, flip. All in pixels."""

    width: int
    """Of the image on disk, after EXIF rotation."""
    height: int
    bucket: Bucket
    resized_width: int
    resized_height: int
    left: int
    """Of the bucket, in the resized image."""
    top: int
    flipped: bool = False

    @property
    def upscaled(self) -> bool:
        """Whether the resize enlarges: the image has fewer pixels than the bucket asks for."""
        return self.resized_width > self.width or self.resized_height > self.height


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


def choose_bucket(width: int, height: int, table: Sequence[Bucket]) -> Bucket:
    """The bucket of nearest aspect ratio; between two equally near, the earlier in ``table``.

    Near is a matter of ratios, so of logarithms: 2:1 and 1:2 are equally far from the square.
    """
    # A difference of logarithms, not the logarithm of a quotient: exactly mirrored for mirrored images.
    ratio = math.log(width) - math.log(height)
    return min(table, key=lambda bucket: abs(math.log(bucket.width) - math.log(bucket.height) - ratio))


def cover(width: int, height: int, bucket: Bucket) -> Geometry:
    """Resize to the smallest size of the same aspect that covers ``bucket``, and crop the centre.

    The side that fits exactly is the bucket's own; the other is rounded to the nearest pixel (half up), never below
    the bucket's.
    """
    if width * bucket.height >= height * bucket.width:  # wider than the bucket: heights meet, the sides are cut
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


def _scaled(side: int, resolution: int) -> int:
    native = NATIVE_RESOLUTIONS[0][0]
    return max(1, _rounded(side * resolution, native * SIDE_MULTIPLE)) * SIDE_MULTIPLE


def _rounded(numerator: int, denominator: int) -> int:
    """numerator / denominator to the nearest integer, half up, without floats."""
    return (2 * numerator + denominator) // (2 * denominator)

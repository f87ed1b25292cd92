"""How does any picture that Pillow opens become 8-bit sRGB without transparency? As viewers show it."""

from __future__ import annotations

from functools import lru_cache
from io import BytesIO
from typing import Any

import numpy as np
from PIL import Image, ImageCms, TiffImagePlugin

from k5cache.sources import tiff

WHITE = (255, 255, 255, 255)
_WHITE_IS_ZERO, _UNSIGNED = 0, 1
_SRGB = ImageCms.createProfile("sRGB")
_NEVER_VISIBLE = 2
"""Of 255 levels. A profile that changes no colour by more than this counts as sRGB, so the pixels stay unchanged."""


def to_srgb(image: Image.Image) -> Image.Image:
    """Convert to mode ``RGB``: 8-bit greys, palettes looked up, embedded profile applied, alpha on white.

    Args:
        image: loaded, of any mode. As in viewers, a profile that is broken or of another colour space is ignored.
    """
    profile = image.info.get("icc_profile")
    colour, alpha = _split_alpha(eight_bit(image))
    if colour.mode not in ("RGB", "L", "CMYK"):
        colour = colour.convert("RGB")
    colour = _apply_profile(colour, profile) if profile else colour
    rgb = colour if colour.mode == "RGB" else colour.convert("RGB")
    if alpha is None or alpha.getextrema() == (255, 255):
        return rgb
    rgb.putalpha(alpha)
    return Image.alpha_composite(Image.new("RGBA", rgb.size, WHITE), rgb).convert("RGB")


def _split_alpha(image: Image.Image) -> tuple[Image.Image, Image.Image | None]:
    """Colour (``RGB``, ``L``, ``CMYK`` or another opaque mode) and alpha (``L``), or None if it is opaque."""
    if image.mode in ("LA", "La"):  # stays grey, because its profile may be for grey
        grey, alpha = image.convert("LA").split()
        return grey, alpha
    if image.has_transparency_data:
        *bands, alpha = image.convert("RGBA").split()
        return Image.merge("RGB", bands), alpha
    return image.convert("L") if image.mode == "1" else image, None


def eight_bit(image: Image.Image) -> Image.Image:
    """Greys of more than 8 bits as ``L`` or ``LA``; anything else unchanged.

    16-bit RGB needs nothing, because Pillow reads its high bytes. White is 2^bits - 1 if the file says how many bits it
    has. 32-bit integers and floats do not say: there, white is the smallest of 255, 65535 and 2^32 - 1 (floats: 1.0,
    255 and 65535) that no value exceeds. Floats up to 16 still have white at 1.0, because HDR highlights exceed it.
    """
    if not image.mode.startswith(("I", "F")):
        return image
    values = np.asarray(image)
    if image.mode == "F":
        values = np.nan_to_num(values.astype(np.float64), nan=0.0, posinf=1.0, neginf=0.0)
        white = _white_of(values, (1.0, 16.0), (255.0, 255.0), (65535.0, np.inf))
    elif image.mode == "I":
        if _is_unsigned(image):
            values = values.view(np.uint32)  # Pillow's own 32 bits are signed
        white = _white_of(values, (255.0, 255.0), (65535.0, 65535.0), (2.0**32 - 1, np.inf))
    else:
        white = 2.0 ** _bits(image) - 1
    grey = np.clip(np.rint(values * (255.0 / white)), 0, 255).astype(np.uint8)
    if _tag(image, tiff.PHOTOMETRIC) == _WHITE_IS_ZERO:  # Pillow inverts 8-bit files only
        grey = 255 - grey
    narrow = Image.fromarray(grey)
    transparent = image.info.get("transparency")
    if isinstance(transparent, int):  # PNG tRNS: this one grey is fully transparent
        narrow.putalpha(Image.fromarray(np.where(values == transparent, 0, 255).astype(np.uint8)))
    return narrow


def _white_of(values: np.ndarray[Any, Any], *scales: tuple[float, float]) -> float:
    """The white of the first scale, a pair (white, limit), whose limit no value exceeds."""
    largest = float(values.max(initial=0))
    return next(white for white, limit in scales if largest <= limit)


def _bits(image: Image.Image) -> int:
    bits = _tag(image, tiff.BITS)
    return int(bits[0]) if isinstance(bits, tuple) else 16


def _is_unsigned(image: Image.Image) -> bool:
    """Whether a TIFF of mode ``I`` has 32 bits without a sign."""
    formats = _tag(image, tiff.SAMPLE_FORMAT) or (_UNSIGNED,)
    return image.format == "TIFF" and _bits(image) == 32 and formats[0] == _UNSIGNED


def _tag(image: Image.Image, number: int) -> Any:
    return image.tag_v2.get(number) if isinstance(image, TiffImagePlugin.TiffImageFile) else None


def _apply_profile(colour: Image.Image, profile: bytes) -> Image.Image:
    if _space(profile) == "RGB" and colour.mode == "L":
        colour = colour.convert("RGB")
    transform = _to_srgb_transform(profile, colour.mode)
    return colour if transform is None else transform.apply(colour)


@lru_cache(maxsize=32)
def _space(profile: bytes) -> str | None:
    """``RGB``, ``GRAY``, ``CMYK``, ...; None if the bytes are not a profile."""
    try:
        return ImageCms.ImageCmsProfile(BytesIO(profile)).profile.xcolor_space.strip()
    except (ImageCms.PyCMSError, OSError, TypeError):
        return None


@lru_cache(maxsize=32)
def _to_srgb_transform(profile: bytes, mode: str) -> ImageCms.ImageCmsTransform | None:
    """The transform from a profile to sRGB; None if the profile is sRGB, or if lcms refuses it.

    lcms refuses an invalid profile and one of another colour space than ``mode``. Threads may share its transforms.
    """
    try:
        source = ImageCms.ImageCmsProfile(BytesIO(profile))
        transform = ImageCms.buildTransform(source, _SRGB, mode, "RGB", ImageCms.Intent.PERCEPTUAL)
        if mode == "RGB" and _is_identity(transform):
            return None
    except (ImageCms.PyCMSError, OSError, ValueError):
        return None
    return transform


def _is_identity(transform: ImageCms.ImageCmsTransform) -> bool:
    steps = np.linspace(0, 255, 9).round().astype(np.uint8)
    before = np.stack(np.meshgrid(steps, steps, steps), axis=-1).reshape(27, 27, 3)
    after = np.asarray(transform.apply(Image.fromarray(before)))
    return int(np.abs(after.astype(np.int16) - before).max()) <= _NEVER_VISIBLE

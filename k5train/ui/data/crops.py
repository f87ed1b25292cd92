"""Which pixels are trained on, as a picture? The steps of ``images.load_pixels``, with Pillow instead of torch."""

from __future__ import annotations

from PIL import Image, ImageDraw

from k5cache.buckets import Geometry
from k5cache.shared.parts import VAE_SCALE
from k5cache.sources import decode
from k5cache.sources.colour import to_srgb
from k5cache.sources.decode import MAX_PIXELS, open_image, orientation, turn
from k5cache.sources.images import upright
from k5cache.sources.items import Content, UnreadableImage

_PALE = 0.8
"""How much white is over what a mask leaves out, as ``k5cache show`` draws it."""


def crop(content: Content, geometry: Geometry) -> Image.Image:
    """The crop that is trained on, in RGB. Each level is within 2 of 255 of ``load_pixels``: two passes, 1 each.

    Only the part that is kept is resized, so that a long and thin picture takes no more memory than its crop.

    Raises:
        UnreadableImage: as ``load_pixels``.
    """
    bucket, resized = geometry.bucket, (geometry.resized_width, geometry.resized_height)
    if max(resized[0] * resized[1], bucket.width * geometry.height) > MAX_PIXELS:
        raise UnreadableImage(f"{geometry.width}x{geometry.height} is too long and thin to fill {bucket.name}")
    picture = upright(content, geometry)
    frame = (geometry.left, geometry.top, geometry.left + bucket.width, geometry.top + bucket.height)
    if resized == picture.size:
        cut = picture.crop(frame)
    elif geometry.stretched:
        cut = picture.resize((bucket.width, bucket.height), Image.Resampling.LANCZOS)
    else:
        cut = _resized(picture, geometry)
    return cut.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if geometry.flipped else cut


def _resized(picture: Image.Image, geometry: Geometry) -> Image.Image:
    """Rows first, then columns, as torch does it. Pillow itself begins with whichever is less work, and where levels
    are cut off at 0 and 255 in between, another order may differ by 15."""
    left, top, right, bottom = box_of(geometry)
    width, height = geometry.bucket.width, geometry.bucket.height
    rows = picture.resize((width, picture.height), Image.Resampling.BICUBIC, box=(left, 0, right, picture.height))
    return rows.resize((width, height), Image.Resampling.BICUBIC, box=(0, top, width, bottom))


def box_of(geometry: Geometry) -> tuple[float, float, float, float]:
    """Left, top, right and bottom of the crop, in pixels of the picture as it is on disk, upright."""
    across, down = geometry.width / geometry.resized_width, geometry.height / geometry.resized_height
    bucket = geometry.bucket
    right, bottom = (geometry.left + bucket.width) * across, (geometry.top + bucket.height) * down
    return geometry.left * across, geometry.top * down, min(right, geometry.width), min(bottom, geometry.height)


def whole(content: Content, side: int) -> Image.Image:
    """The whole picture, upright and in sRGB, with no side longer than ``side`` pixels.

    Raises:
        UnreadableImage: it cannot be decoded.
    """
    with open_image(content) as image:
        if image.format == "JPEG" and image.mode in ("RGB", "L"):
            image.draft(None, (side, side))  # an eighth of the time for photographs
        picture = turn(to_srgb(decode.load(content, image)), orientation(image))
    picture.thumbnail((side, side), Image.Resampling.LANCZOS)
    return picture


def under_mask(picture: Image.Image, levels: bytes) -> Image.Image:
    """A crop, paler where its mask leaves it out.

    Args:
        levels: of the mask, ``[H/8, W/8]`` uint8 in C order.
    """
    size = (picture.width // VAE_SCALE, picture.height // VAE_SCALE)
    if len(levels) != size[0] * size[1]:
        raise UnreadableImage("has a mask of another size")
    mask = Image.frombytes("L", size, levels).resize(picture.size, Image.Resampling.NEAREST)
    pale = Image.blend(picture, Image.new("RGB", picture.size, "white"), _PALE)
    return Image.composite(picture, pale, mask)


def side_by_side(source: Image.Image, target: Image.Image) -> Image.Image:
    """A pair: the source on the left, the target on the right, a thin line between them."""
    gap = max(2, target.width // 64)
    pair = Image.new("RGB", (source.width + gap + target.width, max(source.height, target.height)), "white")
    pair.paste(source, (0, 0))
    pair.paste(target, (source.width + gap, 0))
    ImageDraw.Draw(pair).rectangle((source.width, 0, source.width + gap - 1, pair.height), fill="#808080")
    return pair

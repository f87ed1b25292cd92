"""Which part of an image counts? Its mask says, a greyscale file beside it, read at the size of the latents."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from k5cache.buckets import Geometry
from k5cache.shared.parts import VAE_SCALE
from k5cache.sources.colour import eight_bit
from k5cache.sources.decode import load, open_image, orientation, turn
from k5cache.sources.images import hash_content, image_size
from k5cache.sources.items import Content, SourceItem, UnreadableImage

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor


def check(read: Callable[[str], Content], item: SourceItem, width: int, height: int) -> str:
    """Check an item's mask and return its content hash.

    Raises:
        UnreadableImage: it cannot be read, or has another size than the image.
    """
    assert item.mask is not None
    try:
        content = read(item.mask.path)
        size = image_size(content)
        if size != (width, height):
            raise UnreadableImage(f"is {size[0]}x{size[1]}, the image {width}x{height}")
        return hash_content(content)
    except UnreadableImage as error:
        raise UnreadableImage(f"its mask {item.mask.path} {error.reason}") from error


def load_mask(content: Content, geometry: Geometry) -> Tensor:
    """Load the mask under the crop of its image, averaged over the area of each latent.

    Returns:
        uint8 ``[H/8, W/8]``; 255 means that the whole area counts.

    Raises:
        UnreadableImage: it cannot be decoded, or has another size than the image.
    """
    import torch

    return torch.from_numpy(mask_levels(content, geometry))


def mask_levels(content: Content, geometry: Geometry) -> NDArray[np.uint8]:
    """What ``load_mask`` loads, as an array.

    White counts and black does not. Colours count by their luminance, transparent parts count as black, and EXIF
    rotation is applied as for images. The average is exact: a pixel that the border of a latent cuts counts in
    proportion. (Pillow's box filter takes whole pixels.)
    """
    with open_image(content) as image:
        grey = turn(_grey(load(content, image)), orientation(image))
    if grey.size != (geometry.width, geometry.height):
        raise UnreadableImage(f"is {grey.width}x{grey.height}, the image {geometry.width}x{geometry.height}")
    height, width = geometry.bucket.latent_shape
    down = _shares(geometry.height, geometry.resized_height, geometry.top, height)
    across = _shares(geometry.width, geometry.resized_width, geometry.left, width)
    cells = (down @ (np.asarray(grey) @ across.T)).round().astype(np.uint8)
    return np.ascontiguousarray(cells[:, ::-1] if geometry.flipped else cells)


def _shares(size: int, resized: int, start: int, cells: int) -> NDArray[np.float32]:
    """``[cells, size]``: the share of each pixel in each latent, along one side.

    A latent covers 8 pixels of the resized image; the first one begins at ``start``.
    """
    edges = (start + VAE_SCALE * np.arange(cells + 1)) * (size / resized)
    pixels = np.arange(size)
    covered = np.minimum(edges[1:, None], pixels + 1) - np.maximum(edges[:-1, None], pixels)
    return (covered.clip(0) / np.diff(edges)[:, None]).astype(np.float32)


def _grey(image: Image.Image) -> Image.Image:
    """The mask as 8 bits a pixel, with transparent parts black."""
    image = eight_bit(image)
    if image.has_transparency_data:
        layers = image.convert("LA").convert("RGBA") if image.mode == "La" else image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", layers.size, (0, 0, 0, 255)), layers)
    return image.convert("L")

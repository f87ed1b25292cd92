"""Which bytes answer for a picture of a folder? The crop that an encode would take, the pair, or the whole picture."""

from __future__ import annotations

from pathlib import Path

from PIL import Image

from k5cache.buckets import Geometry
from k5cache.sources.items import SourceItem, UnreadableImage
from k5cache.sources.masks import mask_levels
from k5train.ui.data.cache_pictures import What
from k5train.ui.data.crops import crop, side_by_side, under_mask, whole
from k5train.ui.data.folder_view import Framed, Listing, version_of
from k5train.ui.data.thumbnails import LARGE, SMALL, thumbnail


def picture(listing: Listing, framed: Framed, what: What) -> bytes:
    """A picture of a folder.

    Raises:
        UnreadableImage: there is none; says why.
        OSError: its file cannot be read.
    """
    project, path = listing.project, listing.read(framed.entry.path)
    geometry = framed.geometry
    key = f"folder {listing.entry.relative} {framed.entry.path} {version_of(framed)} {what}"
    if what == "whole" or geometry is None:
        side = LARGE if what == "whole" and geometry else SMALL
        return thumbnail(project, key, lambda: whole(path, side), side)
    if what == "source":
        return thumbnail(project, key, lambda: _source(listing, framed), LARGE)
    if what == "crop":
        return thumbnail(project, key, lambda: _crop(listing, framed, path, geometry), LARGE)
    side = 2 * SMALL if framed.source else SMALL
    return thumbnail(project, key, lambda: _tile(listing, framed, path, geometry), side)


def _tile(listing: Listing, framed: Framed, path: Path, geometry: Geometry) -> Image.Image:
    target = _crop(listing, framed, path, geometry)
    return side_by_side(_source(listing, framed), target) if framed.source else target


def _crop(listing: Listing, framed: Framed, path: Path, geometry: Geometry) -> Image.Image:
    cut = crop(path, geometry)
    item = framed.item
    if not isinstance(item, SourceItem) or item.mask is None or framed.problem:
        return cut
    return under_mask(cut, mask_levels(listing.read(item.mask.path), geometry).tobytes())


def _source(listing: Listing, framed: Framed) -> Image.Image:
    if framed.source is None or framed.item is None or framed.item.source is None:
        raise UnreadableImage("has no source")
    return crop(listing.read_source(framed.item.source.path), framed.source)

"""Which bytes answer for a picture of a cache? The crop under its mask, the pair, or the whole picture, as WebP."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from PIL import Image

from k5cache.shared.errors import CacheError
from k5cache.sources.items import UnreadableImage
from k5cache.store.geometry import geometry_of, source_of_row
from k5cache.store.index import IndexRow
from k5train.ui.data.cache_view import Shown, picture_of, version_of
from k5train.ui.data.crops import crop, side_by_side, under_mask, whole
from k5train.ui.data.thumbnails import LARGE, SMALL, thumbnail

What = Literal["tile", "crop", "source", "whole"]


def picture(shown: Shown, row: IndexRow, what: What) -> bytes:
    """A picture of an item.

    Raises:
        UnreadableImage: there is none; says why.
    """
    name = f"{what} {version_of(row)}"
    if what == "tile":
        return thumbnail(shown.project, name, lambda: _tile(shown, row), 2 * SMALL if row.source_path else SMALL)
    if what == "whole":
        path = _path(shown, row)
        return thumbnail(shown.project, name, lambda: whole(path, LARGE), LARGE)
    is_source = what == "source"
    return thumbnail(shown.project, name, lambda: _crop(shown, row, is_source), LARGE)


def _tile(shown: Shown, row: IndexRow) -> Image.Image:
    target = _crop(shown, row, is_source=False)
    return side_by_side(_crop(shown, row, is_source=True), target) if row.source_path else target


def _crop(shown: Shown, row: IndexRow, is_source: bool) -> Image.Image:
    geometry = source_of_row(row) if is_source else geometry_of(row)
    cut = crop(_path(shown, row, is_source), geometry)
    if is_source or not row.mask_key:
        return cut
    try:
        return under_mask(cut, shown.opened.cache.mask_levels(row.mask_key))
    except CacheError as error:
        raise UnreadableImage("its mask in the cache cannot be read") from error


def _path(shown: Shown, row: IndexRow, is_source: bool = False) -> Path:
    picture = picture_of(shown, row, is_source)
    if picture.path is None:
        raise UnreadableImage(f"its source {picture.problem}" if is_source else picture.problem)
    return picture.path

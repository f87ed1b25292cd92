"""Which pairs are drawn that are no items? Those of the recipe, and those that the cache has already. Reads sources."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from k5cache.encode.wanted import ExaminedEdit, Picture, Stored
from k5cache.shared.errors import DatasetError
from k5cache.shared.model import WantedEdit
from k5cache.sources import images
from k5cache.sources.items import Content, Skipped, UnreadableImage
from k5cache.store.manifest import Edit


@dataclass(frozen=True)
class SortedEdits:
    """Pairs to draw, by what must be done for them."""

    kept: tuple[Edit, ...] = ()
    """The cache has all their rows."""
    examined: tuple[ExaminedEdit, ...] = ()
    """New ones, and those whose rows must be made again."""
    left_out: tuple[Skipped, ...] = ()
    """Those of the cache whose rows must be made again and whose source is gone, or another picture by now."""


def sort_edits(asked: Sequence[WantedEdit], cached: Sequence[Edit], stored: Stored, is_as_before: bool) -> SortedEdits:
    """Look at the sources of the pairs that are asked for, and at those of the cache if their rows are not there.

    Args:
        is_as_before: whether recipe and cleaning are those that made the rows of ``cached``.

    Raises:
        DatasetError: a source that is asked for cannot be read.
    """
    known = {(edit.source_hash, edit.prompt): edit for edit in cached if is_as_before and _is_stored(edit, stored)}
    kept: list[Edit] = []
    examined: list[ExaminedEdit] = []
    left_out: list[Skipped] = []
    wanted: set[tuple[str, str]] = set()
    for edit in asked:
        picture = _look_at_asked(edit)
        if (pair := (picture.content_hash, edit.prompt)) in wanted:
            continue
        wanted.add(pair)
        if pair in known:
            kept.append(replace(known[pair], source=edit.source))
        else:
            examined.append(_examined(edit.source, edit.prompt, picture))
    for cached_edit in cached:
        pair = cached_edit.source_hash, cached_edit.prompt
        if pair in wanted:
            continue
        if pair in known:
            kept.append(known[pair])
            continue
        try:
            picture = look_at(cached_edit.source)
            if picture.content_hash != cached_edit.source_hash:
                raise UnreadableImage("is another picture now")
        except UnreadableImage as error:
            left_out.append(Skipped(cached_edit.source, f"was to be drawn from and {error.reason}", error.is_lasting))
        else:
            examined.append(_examined(cached_edit.source, cached_edit.prompt, picture))
    return SortedEdits(tuple(kept), tuple(examined), tuple(left_out))


def look_at(source: str) -> Picture:
    """Content hash and size of a source that is no item.

    Raises:
        UnreadableImage: it is not there or cannot be read.
    """
    examined = images.examine(_path(source))
    return Picture(examined.content_hash, examined.width, examined.height)


def reader(read_source: Callable[[str], Content], edits: Sequence[ExaminedEdit]) -> Callable[[str], Content]:
    """What reads the sources of items and those of ``edits``."""
    paths = {edit.path for edit in edits}
    return lambda path: Path(path) if path in paths else read_source(path)


def _look_at_asked(edit: WantedEdit) -> Picture:
    try:
        return look_at(edit.source)
    except UnreadableImage as error:
        reason = error.reason if os.path.lexists(_path(edit.source)) else "does not exist"
        raise DatasetError(
            f"The picture {edit.source}, which is to be drawn from, {reason}",
            "Give the path of a picture, relative to the folder that you are in",
        ) from error


def _examined(source: str, prompt: str, picture: Picture) -> ExaminedEdit:
    return ExaminedEdit(source, str(_path(source).absolute()), prompt, picture)


def _path(source: str) -> Path:
    return Path(source).expanduser()


def _is_stored(edit: Edit, stored: Stored) -> bool:
    texts = {edit.text_key, edit.empty_key} - {None}
    return edit.source_key in stored.latents and texts <= stored.texts

"""What did the previous index say of an item, and how does a new index differ from it? Pure, no torch."""

from __future__ import annotations

import hashlib
from bisect import bisect_right
from collections.abc import Callable, Iterable, Sequence, Set
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from k5cache.sources.items import PictureFile, SourceItem
from k5cache.store import columns
from k5cache.store.index import IndexRow, IndexRows
from k5cache.store.keys import are_in

Stat = tuple[int, int, int]
"""(size, time, inode) of a file."""


@dataclass(frozen=True)
class Changes:
    """The paths in which a new index differs from the previous one."""

    added: tuple[str, ...]
    """Paths that the previous index does not have, except those of ``renamed``."""
    removed: tuple[str, ...]
    """Paths that only the previous index has, except those of ``renamed``."""
    renamed: tuple[tuple[str, str], ...]
    """(path in the previous index, path now) of images whose bytes are the same."""
    changed: tuple[str, ...]
    """Paths whose latents, masks, texts or sources have other keys than in the previous index."""


class PreviousIndex:
    """The previous index, looked up by path and, for images that were renamed, by stat and by content.

    Rows are known by their numbers; few become objects.
    """

    def __init__(self, rows: Iterable[IndexRow], items: Sequence[SourceItem], texts: Set[str] = frozenset()) -> None:
        """``texts``: keys of texts in the cache's shards."""
        self._rows = IndexRows.of(rows)
        self._texts = texts
        self._value = {name: self._rows.getter(name) for name in _LOOKED_UP}
        unmirrored, self._unmirrored = _unmirrored(self._rows)
        paths = pa.array([item.path for item in items] if len(self._rows) else [], pa.string())
        of_items = pc.index_in(paths, value_set=self._unmirrored.column("path")).to_pylist()
        places = zip(items, of_items, strict=False)
        # The items' own strings are the keys, so that a million paths are not kept twice.
        self._by_path = {item.path: int(unmirrored[place]) for item, place in places if place is not None}
        is_gone = np.ones(len(unmirrored), bool)
        is_gone[[place for place in of_items if place is not None]] = False
        self._gone_by_stat = {self._stat(number): number for number in unmirrored[is_gone].tolist()}
        self._sources: dict[tuple[str, Stat], int] = {}
        self._gone_sources: dict[Stat, int] = {}
        if len(self._rows.keys("source_path")):
            self._note_sources({item.source.path for item in items if item.source})

    def same_file(self, item: SourceItem) -> tuple[str, int, int] | None:
        """(content hash, width, height) of this very file: the same path, or one that is gone, and the same stat."""
        number = self._number_of(item)
        if number is None:
            return None
        value = self._value
        return value["content_hash"](number), value["width"](number), value["height"](number)

    def same_source(self, source: PictureFile) -> IndexRow | None:
        """A row whose source is this very file: the same path, or one that is gone, and the same stat."""
        stat = (source.num_bytes, source.mtime_ns, source.inode)
        number = self._sources.get((source.path, stat), self._gone_sources.get(stat))
        return None if number is None else self._rows[number]

    def mask_hash(self, item: SourceItem) -> str | None:
        """The content hash of the item's mask if neither the mask nor the image was touched, else None."""
        if item.mask is None:
            return None
        number = self._number_of(item)
        if number is None:
            return None
        row = self._rows[number]
        is_same = (row.mask_num_bytes, row.mask_mtime_ns, row.mask_inode) == mask_stat(item)
        return row.mask_hash if is_same else None

    def caption_keys(self, path: str, captions: str, source_key: str | None) -> tuple[str, ...]:
        """The text keys that the same raw captions have in the previous index, if the cache has all of these texts.

        None at all if the captions are new, or if a text is missing.

        Args:
            captions: their ``captions_hash``.
            source_key: for image-to-image, the key of the source's latents: the same captions with the same source.
        """
        if not len(self._rows):
            return ()
        number, value = self._by_path.get(path), self._value
        if number is None or (value["captions_hash"](number), value["source_key"](number)) != (captions, source_key):
            number = self._with_captions(captions, source_key)
        return tuple(value["caption_keys"](number)) if number is not None and self._has_texts[number] else ()

    def changes(self, rows: Iterable[IndexRow]) -> Changes:
        """How ``rows`` differ from the previous index; mirrored rows are not looked at."""
        before, now = self._unmirrored, IndexRows.of(rows)
        _, now = _unmirrored(now)
        paths, paths_before = now.column("path"), before.column("path")
        places = pc.index_in(paths, value_set=paths_before)
        is_new, is_gone = places.is_null(), pc.invert(pc.is_in(paths_before, value_set=paths))
        gone: dict[str, list[str]] = {}
        hashes, gone_paths = before.column("content_hash").filter(is_gone), paths_before.filter(is_gone).to_pylist()
        for content_hash, path in zip(hashes.to_pylist(), gone_paths, strict=True):
            gone.setdefault(content_hash, []).append(path)
        new_paths, of_new = paths.filter(is_new), now.column("content_hash").filter(is_new)
        added, renamed = list[str](), list[tuple[str, str]]()
        for path, content_hash in zip(new_paths.to_pylist(), of_new.to_pylist(), strict=True):
            if gone.get(content_hash):
                renamed.append((gone[content_hash].pop(0), path))
            else:
                added.append(path)
        removed = {path for paths in gone.values() for path in paths}
        kept = now.only_keys().take(pa.array(np.flatnonzero(columns.flags(places.is_valid()))))
        same = kept.have_same_keys(before.only_keys().take(places.drop_null()))
        return Changes(
            added=tuple(added),
            removed=tuple(path for path in gone_paths if path in removed),
            renamed=tuple(renamed),
            changed=tuple(kept.column("path").filter(pc.invert(same)).to_pylist()),
        )

    def _number_of(self, item: SourceItem) -> int | None:
        stat = (item.num_bytes, item.mtime_ns, item.inode)
        number = self._by_path.get(item.path)
        if number is None:
            return self._gone_by_stat.get(stat)
        return number if self._stat(number) == stat else None

    def _stat(self, number: int) -> Stat:
        return self._value["num_bytes"](number), self._value["mtime_ns"](number), self._value["inode"](number)

    def _note_sources(self, paths: Set[str]) -> None:
        for number, row in enumerate(self._rows):
            if row.source_path:
                stat = row.source_num_bytes, row.source_mtime_ns, row.source_inode
                self._sources[row.source_path, stat] = number
                if row.source_path not in paths:
                    self._gone_sources[stat] = number

    @cached_property
    def _has_texts(self) -> np.ndarray[tuple[int], np.dtype[np.bool_]]:
        """Whether the cache has all texts of a row."""
        keys = self._rows.column("caption_keys")
        missing = np.concatenate([[0], np.cumsum(~are_in(keys.flatten(), self._texts))])
        ends = columns.numbers(keys.offsets) - columns.numbers(keys.offsets)[:1]
        has_texts: np.ndarray[tuple[int], np.dtype[np.bool_]] = missing[ends[1:]] == missing[ends[:-1]]
        return has_texts

    def _with_captions(self, captions: str, source_key: str | None) -> int | None:
        """The last row with these captions and this source."""
        value, order = self._by_captions
        wanted = f"{captions} {source_key or ''}"
        at = bisect_right(range(len(order)), wanted, key=lambda i: value(int(order[i])))
        number = int(order[at - 1]) if at else -1
        return number if number >= 0 and value(number) == wanted else None

    @cached_property
    def _by_captions(self) -> tuple[Callable[[int], str], np.ndarray[Any, Any]]:
        """What rows have for captions and source, and the numbers of the rows in the order of that."""
        parts = self._rows.column("captions_hash"), self._rows.column("source_key").fill_null("")
        names = pc.binary_join_element_wise(*parts, " ")
        return columns.getter(names), columns.numbers(pc.sort_indices(names))


def _unmirrored(rows: IndexRows) -> tuple[np.ndarray[Any, Any], IndexRows]:
    """The rows that are no flipped copies of others, and their numbers."""
    numbers = np.flatnonzero(~columns.flags(rows.column("flipped")))
    return numbers, rows if len(numbers) == len(rows) else rows.take(pa.array(numbers))


_LOOKED_UP = (
    "content_hash",
    "width",
    "height",
    "num_bytes",
    "mtime_ns",
    "inode",
    "captions_hash",
    "source_key",
    "caption_keys",
)


def captions_hash(item: SourceItem) -> str:
    """A hash of the raw captions, kept in the index. If it is unchanged, the row's ``caption_keys`` are still valid."""
    is_clear = not any("\0" in caption for caption in item.captions)  # a table's cell may contain it
    text = "\0".join(item.captions) if is_clear else repr(item.captions)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:16]


def mask_stat(item: SourceItem) -> Stat:
    """(size, time, inode) of the item's mask; zeros if it has none."""
    return (item.mask.num_bytes, item.mask.mtime_ns, item.mask.inode) if item.mask else (0, 0, 0)

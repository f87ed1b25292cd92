"""What did the previous index say of an item, and how does a new index differ from it? Pure, no torch."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from k5cache.sources.items import PictureFile, SourceItem
from k5cache.store.index import IndexRow


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
    """The previous index, looked up by path and, for images that were renamed, by stat and by content."""

    def __init__(self, rows: Iterable[IndexRow], items: Sequence[SourceItem]) -> None:
        rows = list(rows)
        self._by_path = {row.path: row for row in rows if not row.flipped}
        paths = {item.path for item in items}
        self._gone_by_stat = {_stat(row): row for row in self._by_path.values() if row.path not in paths}
        self._caption_keys: dict[tuple[str, str | None], tuple[str, ...]] = {}
        self._sources: dict[tuple[str | None, tuple[int, int, int]], IndexRow] = {}
        source_paths = {item.source.path for item in items if item.source}
        self._gone_sources: dict[tuple[int, int, int], IndexRow] = {}
        for row in rows:
            self._caption_keys[row.captions_hash, row.source_key] = row.caption_keys
            if row.source_path:
                self._sources[row.source_path, source_stat(row)] = row
                if row.source_path not in source_paths:
                    self._gone_sources[source_stat(row)] = row

    def same_file(self, item: SourceItem) -> IndexRow | None:
        """The row of this very file: the same path, or a path that is gone, and the same size, time and inode."""
        row = self._by_path.get(item.path)
        if row is not None:
            return row if _stat(row) == _stat(item) else None
        return self._gone_by_stat.get(_stat(item))

    def same_source(self, source: PictureFile) -> IndexRow | None:
        """A row whose source is this very file: the same path, or one that is gone, and the same stat."""
        stat = (source.num_bytes, source.mtime_ns, source.inode)
        return self._sources.get((source.path, stat)) or self._gone_sources.get(stat)

    def mask_hash(self, item: SourceItem) -> str | None:
        """The content hash of the item's mask if neither the mask nor the image was touched, else None."""
        row = self.same_file(item)
        if row is None or item.mask is None or not row.mask_hash:
            return None
        is_same = (row.mask_num_bytes, row.mask_mtime_ns, row.mask_inode) == mask_stat(item)
        return row.mask_hash if is_same else None

    def caption_keys(self, item: SourceItem, source_key: str | None) -> tuple[str, ...]:
        """The text keys that the same raw captions have in the previous index; none if they are new.

        Args:
            source_key: for image-to-image, the key of the source's latents: the same captions with the same source.
        """
        return self._caption_keys.get((captions_hash(item), source_key), ())

    def changes(self, rows: Sequence[IndexRow]) -> Changes:
        """How ``rows`` differ from the previous index; mirrored rows are not looked at."""
        rows = [row for row in rows if not row.flipped]
        paths = {row.path for row in rows}
        gone: dict[str, list[str]] = {}
        for row in self._by_path.values():
            if row.path not in paths:
                gone.setdefault(row.content_hash, []).append(row.path)
        added, renamed = [], []
        for row in rows:
            if row.path not in self._by_path:
                if gone.get(row.content_hash):
                    renamed.append((gone[row.content_hash].pop(0), row.path))
                else:
                    added.append(row.path)
        removed = {path for gone_paths in gone.values() for path in gone_paths}
        return Changes(
            added=tuple(added),
            removed=tuple(path for path in self._by_path if path in removed),
            renamed=tuple(renamed),
            changed=tuple(row.path for row in rows if self._has_other_keys(row)),
        )

    def _has_other_keys(self, row: IndexRow) -> bool:
        before = self._by_path.get(row.path)
        return before is not None and _keys(before) != _keys(row)


def captions_hash(item: SourceItem) -> str:
    """A hash of the raw captions, kept in the index. If it is unchanged, the row's ``caption_keys`` are still valid."""
    is_clear = not any("\0" in caption for caption in item.captions)  # a table's cell may contain it
    text = "\0".join(item.captions) if is_clear else repr(item.captions)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:16]


def mask_stat(item: SourceItem) -> tuple[int, int, int]:
    """(size, time, inode) of the item's mask; zeros if it has none."""
    return (item.mask.num_bytes, item.mask.mtime_ns, item.mask.inode) if item.mask else (0, 0, 0)


def source_stat(row: IndexRow) -> tuple[int, int, int]:
    """(size, time, inode) of the row's source."""
    return row.source_num_bytes, row.source_mtime_ns, row.source_inode


def _stat(entry: IndexRow | SourceItem) -> tuple[int, int, int]:
    return entry.num_bytes, entry.mtime_ns, entry.inode


def _keys(row: IndexRow) -> tuple[object, ...]:
    return row.latent_key, row.mask_key, row.caption_keys, row.source_key, row.empty_key

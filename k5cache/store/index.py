"""The index: which image has which latents and captions? It has one row per item; its place is the item's number."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import pyarrow as pa

from k5cache.store import locations, tables
from k5cache.store.manifest import IndexInfo, Manifest
from k5cache.store.ours import TABLE_KEYS


@dataclass(frozen=True)
class IndexRow:
    """One item: an image on disk and what the cache holds for it."""

    path: str
    """Of the image, relative to the source folder, with ``/`` on every system."""
    content_hash: str
    num_bytes: int
    mtime_ns: int
    inode: int
    width: int
    """Of the image in pixels, after EXIF rotation."""
    height: int
    bucket_width: int
    bucket_height: int
    resized_width: int
    """Of the image in pixels, resized but not yet cropped."""
    resized_height: int
    left: int
    """Where the crop begins in the resized image, in pixels."""
    top: int
    flipped: bool
    latent_key: str
    caption_keys: tuple[str, ...]
    mask_key: str | None = None
    mask_hash: str | None = None
    """Content hash of the mask file. ``mask_key`` depends on this and on the crop."""
    mask_num_bytes: int = 0
    mask_mtime_ns: int = 0
    mask_inode: int = 0
    caption_lengths: tuple[int, ...] = ()
    """``n_tokens`` of each caption. ``with_index`` fills it in."""
    captions_hash: str = ""
    """Of the raw captions. The encoder compares it to see whether ``caption_keys`` are still right."""
    source_path: str | None = None
    """Of the source, the picture that is edited: a path as ``path``, in the folder of sources if there is one. This
    and all that follow are only in caches for image-to-image."""
    source_hash: str | None = None
    source_num_bytes: int = 0
    source_mtime_ns: int = 0
    source_inode: int = 0
    source_width: int = 0
    """Of the source in pixels, after EXIF rotation. Its crop follows from this and the image's own crop."""
    source_height: int = 0
    source_key: str | None = None
    """Key of the source's latents."""
    empty_key: str | None = None
    """Text key of the empty instruction with this source; None if the cache has no empty instructions."""

    @property
    def latent_keys(self) -> tuple[str, ...]:
        """Of the image's latents and, for image-to-image, its source's."""
        return (self.latent_key, self.source_key) if self.source_key else (self.latent_key,)

    @property
    def text_keys(self) -> tuple[str, ...]:
        """Of the captions and, for image-to-image, the empty instruction with the source."""
        return (*self.caption_keys, self.empty_key) if self.empty_key else self.caption_keys


_TYPES: dict[str, tuple[pa.DataType, bool]] = {
    **{f.name: (pa.int32(), False) for f in fields(IndexRow)},
    **{name: (pa.string(), False) for name in ("path", "content_hash", "latent_key", "captions_hash")},
    **{name: (pa.int64(), False) for name in ("num_bytes", "mtime_ns", "mask_num_bytes", "mask_mtime_ns")},
    "inode": (pa.uint64(), False),
    "mask_inode": (pa.uint64(), False),
    "flipped": (pa.bool_(), False),
    "caption_keys": (pa.list_(pa.field("element", pa.string(), nullable=False)), False),
    "caption_lengths": (pa.list_(pa.field("element", pa.int32(), nullable=False)), False),
    **{name: (pa.int64(), False) for name in ("source_num_bytes", "source_mtime_ns")},
    "source_inode": (pa.uint64(), False),
    **{name: (pa.string(), True) for name in ("mask_key", "mask_hash")},
    **{name: (pa.string(), True) for name in ("source_path", "source_hash", "source_key", "empty_key")},
}
_OF_SOURCES = tuple(f.name for f in fields(IndexRow) if f.name.startswith("source_") or f.name == "empty_key")


def _schema(*without: str) -> pa.Schema:
    return pa.schema([pa.field(f.name, *_TYPES[f.name]) for f in fields(IndexRow) if f.name not in without])


SCHEMA = _schema(*_OF_SOURCES)
SCHEMAS = {1: SCHEMA, 2: _schema()}
"""The columns by the cache's format."""
_LISTS = ("caption_keys", "caption_lengths")


def with_index(root: Path, manifest: Manifest, rows: Sequence[IndexRow]) -> Manifest:
    """Write the next index and locations files for ``rows``. Returns the manifest that names them.

    The manifest is not written: ``write_manifest(root, with_index(root, manifest, rows))`` is the commit. Footers are
    read only of shards that the previous locations file does not cover.

    Raises:
        KeyError: a row names a latent or text key that no shard of ``manifest`` has.
    """
    generation = _next_generation(root, manifest)
    info = locations.write_locations(root, manifest.shards, generation, manifest.locations)
    table = locations.Locations(root, info, manifest.shards)
    lengths = table.text_lengths()
    table.check_latents(key for row in rows for key in (*row.latent_keys, row.mask_key) if key)
    for key in (row.empty_key for row in rows if row.empty_key):
        lengths[key]  # raises
    with_lengths = [replace(row, caption_lengths=tuple(lengths[key] for key in row.caption_keys)) for row in rows]
    return replace(manifest, index=write_index(root, with_lengths, generation, manifest.format), locations=info)


def write_index(root: Path, rows: Sequence[IndexRow], generation: int, format: int) -> IndexInfo:
    """Write ``index-<generation>.parquet``. An encode calls ``with_index``, which also writes the locations."""
    schema = SCHEMAS[format].with_metadata({TABLE_KEYS["index"]: f'{{"format": {format}}}'})
    columns = {name: [getattr(row, name) for row in rows] for name in schema.names}
    table = pa.Table.from_pydict(columns, schema=schema)
    return tables.write_table(root, table, f"index-{generation:06d}.parquet")


def read_index(root: Path, info: IndexInfo, format: int) -> pa.Table:
    """The whole index of a cache of this format, checked against its sha256. Its columns are fields of ``IndexRow``.

    Raises:
        CacheCorrupt: the file is missing or its bytes are not the bytes that were written.
        CacheError: it is not an index.
    """
    return tables.read_table(tables.open_table(root, info, SCHEMAS[format]))


def index_rows(table: pa.Table) -> list[IndexRow]:
    """Every row of an index."""
    return [row_of(values) for values in table.to_pylist()]


def row_of(values: Mapping[str, Any]) -> IndexRow:
    """One row of an index, from the dictionary that Arrow's ``to_pylist`` gives."""
    arguments: dict[str, Any] = {name: tuple(value) if name in _LISTS else value for name, value in values.items()}
    return IndexRow(**arguments)


def _next_generation(root: Path, manifest: Manifest) -> int:
    """One more than the manifest's, and more if a file has that name already: it may be anyone's."""
    generation = 1 + max((_generation(info) for info in (manifest.index, manifest.locations) if info), default=-1)
    while any(os.path.lexists(root / f"{kind}-{generation:06d}.parquet") for kind in TABLE_KEYS):
        generation += 1
    return generation


def _generation(info: IndexInfo) -> int:
    return int(info.file.rpartition("-")[2].removesuffix(".parquet"))

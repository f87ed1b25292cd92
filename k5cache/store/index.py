"""The index: which image has which latents and captions? It has one row per item; its place is the item's number."""

from __future__ import annotations

import functools
import os
import secrets
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, fields, replace
from itertools import islice
from operator import attrgetter
from pathlib import Path
from typing import Any, overload

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from k5cache.remote.behind import mirror_of
from k5cache.store import columns, locations, tables
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
_KEYS = ("latent_key", "source_key", "mask_key", "caption_keys", "empty_key")
_PIECE = 1 << 12  # rows that are Python objects at once


class IndexRows(Sequence[IndexRow]):
    """Rows of an index as columns: a million take 0.25 GiB. As objects they would take 1 GiB, so each is made anew."""

    def __init__(self, table: pa.Table) -> None:
        """``table``: the columns of an index of either format."""
        self.table = table
        self._getters: dict[str, Callable[[int], Any]] = {}

    @classmethod
    def of(cls, rows: Iterable[IndexRow], format: int = max(SCHEMAS)) -> IndexRows:
        """Rows as they come. Give the lower format if none has a source: its columns take less memory."""
        if isinstance(rows, IndexRows):
            return rows
        remaining = iter(rows)
        schema = SCHEMAS[format]
        values_of = attrgetter(*schema.names)
        batches = []
        while piece := [values_of(row) for row in islice(remaining, _PIECE)]:
            arrays = [
                pa.array(values, field.type) for field, values in zip(schema, zip(*piece, strict=True), strict=True)
            ]
            batches.append(pa.RecordBatch.from_arrays(arrays, schema=schema))
        return cls(pa.Table.from_batches(batches, schema).combine_chunks())

    def __len__(self) -> int:
        return int(self.table.num_rows)

    @overload
    def __getitem__(self, i: int) -> IndexRow: ...
    @overload
    def __getitem__(self, i: slice) -> IndexRows: ...
    def __getitem__(self, i: int | slice) -> IndexRow | IndexRows:
        if isinstance(i, slice):
            start, stop, step = i.indices(len(self))
            if step == 1:
                return IndexRows(self.table.slice(start, max(0, stop - start)))
            return self.take(pa.array(range(start, stop, step), pa.int64()))
        if not -len(self) <= i < len(self):
            raise IndexError(f"row {i} of {len(self)}")
        return row_of({name: self.getter(name)(i % len(self)) for name in self.table.column_names})

    def __iter__(self) -> Iterator[IndexRow]:
        for batch in self.table.to_batches(_PIECE):
            for row in zip(*(columns.values(column) for column in batch.columns), strict=True):
                yield row_of(dict(zip(batch.schema.names, row, strict=True)))

    def __eq__(self, other: object) -> bool:
        """Whether the other sequence has the same rows. ``caption_lengths`` count."""
        if not isinstance(other, Sequence):
            return NotImplemented
        return len(self) == len(other) and all(mine == its for mine, its in zip(self, other, strict=True))

    __hash__ = None  # type: ignore[assignment]

    def has_column(self, name: str) -> bool:
        """Whether it is one of the format that the rows are kept in."""
        return name in self.table.column_names

    def column(self, name: str) -> pa.Array:
        """The values of one field, in the order of the rows."""
        if not self.has_column(name):  # of sources
            return _default(name, len(self))
        return columns.one_array(self.table.column(name))

    def keys(self, *names: str) -> pa.Array:
        """All keys in these fields, without nulls. Of captions they are flat."""
        return pa.concat_arrays(
            [(key.flatten() if name in _LISTS else key).drop_null() for name in names for key in [self.column(name)]]
        )

    @property
    def latent_keys(self) -> pa.Array:
        """Of all images and, for image-to-image, all sources."""
        return self.keys("latent_key", "source_key")

    @property
    def text_keys(self) -> pa.Array:
        """Of all captions and, for image-to-image, the empty instructions."""
        return self.keys("caption_keys", "empty_key")

    def named_texts(self, keys: Set[str]) -> set[str]:
        """Which of these few text keys a row has."""
        wanted = pa.array(keys, pa.string())
        return {*wanted.filter(pc.is_in(wanted, value_set=self.text_keys)).to_pylist()}

    @property
    def num_buckets(self) -> int:
        """How many sizes the images are trained at."""
        sizes = self.column("bucket_width").cast(pa.int64()), self.column("bucket_height").cast(pa.int64())
        return len(pc.add(pc.shift_left(sizes[0], 32), sizes[1]).unique())

    def where(self, flags: Sequence[bool] | bytearray | np.ndarray[Any, Any]) -> IndexRows:
        """The rows whose flag is True."""
        return IndexRows(self.table.filter(pa.array(np.asarray(flags, bool))).combine_chunks())

    def has_same_items(self, other: IndexRows, format: int) -> bool:
        """Whether two indexes say the same. ``caption_lengths`` follow from the keys and need not be known yet."""
        ours, theirs = (rows.in_format(format).drop_columns(["caption_lengths"]) for rows in (self, other))
        return bool(ours.equals(theirs))

    def have_same_keys(self, others: IndexRows) -> pa.BooleanArray:
        """Which rows name the same latents, texts and mask as those of ``others`` in the same places."""
        flags = [pc.equal(_comparable(self.column(name)), _comparable(others.column(name))) for name in _KEYS]
        return functools.reduce(pc.and_, flags)

    def take(self, numbers: pa.Array) -> IndexRows:
        """The rows of these numbers, in this order."""
        return IndexRows(self.table.take(numbers).combine_chunks())

    def in_format(self, format: int) -> pa.Table:
        """The columns of an index of this format."""
        schema = SCHEMAS[format]
        return pa.Table.from_arrays([self.column(name) for name in schema.names], schema=schema)

    def only_keys(self) -> IndexRows:
        """These rows without what ``have_same_keys`` does not look at, apart from their paths. Not to be iterated."""
        return IndexRows(self.table.select([name for name in ("path", *_KEYS) if self.has_column(name)]))

    def getter(self, name: str) -> Callable[[int], Any]:
        """One field as a function of a row's number."""
        if name not in self._getters:
            self._getters[name] = columns.getter(self.column(name))
        return self._getters[name]


def _default(name: str, count: int) -> pa.Array:
    """A column of what ``IndexRow`` has by default."""
    kind, is_nullable = _TYPES[name]
    return pa.nulls(count, kind) if is_nullable else pa.repeat(pa.scalar(0, kind), count)


def _comparable(keys: pa.Array) -> pa.Array:
    """A column of keys, or of lists of keys, as strings without nulls."""
    return pc.binary_join(keys.cast(pa.list_(pa.string())), " ") if pa.types.is_list(keys.type) else keys.fill_null("")


def with_index(root: Path, manifest: Manifest, rows: Iterable[IndexRow]) -> Manifest:
    """Write the next index and locations files for ``rows``. Returns the manifest that names them.

    The manifest is not written: ``write_manifest(root, with_index(root, manifest, rows))`` is the commit. Footers are
    read only of shards that the previous locations file does not cover. A million rows take 0.6 GiB of memory.

    Raises:
        KeyError: a row names a latent or text key that no shard of ``manifest`` has.
    """
    generation = next_generation(root, manifest)
    info, located = locations.write_locations(root, manifest.shards, generation, manifest.locations)
    rows = IndexRows.of(rows, manifest.format)
    table = rows.in_format(manifest.format)
    located.check_latents(rows.keys("latent_key", "source_key", "mask_key"))
    located.text_lengths(rows.keys("empty_key"))  # raises
    of_captions = rows.column("caption_keys")
    offsets = pc.subtract(of_captions.offsets, of_captions.offsets[0])
    lengths = pa.ListArray.from_arrays(offsets, located.text_lengths(of_captions.flatten()))
    at = table.schema.get_field_index("caption_lengths")
    table = table.set_column(at, table.schema.field(at), lengths.cast(table.schema.field(at).type))
    return replace(manifest, index=write_index(root, table, generation, manifest.format), locations=info)


def write_index(root: Path, table: pa.Table, generation: int, format: int) -> IndexInfo:
    """Write ``index-<generation>.parquet``. An encode calls ``with_index``, which also writes the locations."""
    table = table.replace_schema_metadata({TABLE_KEYS["index"]: f'{{"format": {format}}}'})
    return tables.write_table(root, table, f"index-{generation:06d}.parquet")


def read_index(root: Path, info: IndexInfo, format: int) -> pa.Table:
    """The whole index of a cache of this format, checked against its sha256. Its columns are fields of ``IndexRow``.

    Raises:
        CacheCorrupt: the file is missing or its bytes are not the bytes that were written.
        CacheError: it is not an index.
    """
    return tables.read_table(tables.open_table(root, info, SCHEMAS[format]))


def index_rows(table: pa.Table) -> IndexRows:
    """Every row of an index."""
    return IndexRows(table)


def row_of(values: Mapping[str, Any]) -> IndexRow:
    """One row of an index, from the dictionary that Arrow's ``to_pylist`` gives."""
    arguments: dict[str, Any] = {name: tuple(value) if name in _LISTS else value for name, value in values.items()}
    return IndexRow(**arguments)


def next_generation(root: Path, manifest: Manifest) -> int:
    """One more than the manifest's, and more if a file has that name already: it may be anyone's.

    Behind a URL other machines write too, and an object would be written over: there a number that nobody else draws.
    """
    if mirror_of(root):
        return secrets.randbelow(10**12 - 10**11) + 10**11
    tables_now = (manifest.index, manifest.locations, manifest.split)
    generation = 1 + max((_generation(info) for info in tables_now if info), default=-1)
    while any(os.path.lexists(root / f"{kind}-{generation:06d}.parquet") for kind in TABLE_KEYS):
        generation += 1
    return generation


def _generation(info: IndexInfo) -> int:
    return int(info.file.rpartition("-")[2].removesuffix(".parquet"))

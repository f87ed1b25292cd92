"""Locations: in which shard and row is each key, and how many tokens has each text? One table, sorted for bisection.

It repeats what the shards' footers say, so that opening a cache of thousands of shards reads none of them. It is not
trusted: a reader compares the key stored in the row with the key it wants.
"""

from __future__ import annotations

import json
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from k5cache.store import columns, tables
from k5cache.store.manifest import IndexInfo, ShardInfo, ShardKind
from k5cache.store.ours import TABLE_KEYS
from k5cache.store.shards import Shard

FILES_KEY = TABLE_KEYS["locations"]
REMEMBERED = 200_000  # look-ups, about 50 MB; in larger caches the rest are bisected each time
SCHEMA = pa.schema(
    [
        pa.field("is_text", pa.bool_(), nullable=False),
        pa.field("key", pa.string(), nullable=False),
        pa.field("shard", pa.int32(), nullable=False),
        pa.field("row", pa.int32(), nullable=False),
        pa.field("n_tokens", pa.int32(), nullable=False),
    ]
)


def write_locations(
    root: Path, shards: Sequence[ShardInfo], generation: int, previous: IndexInfo | None = None
) -> tuple[IndexInfo, Located]:
    """Write ``locations-<generation>.parquet`` for all rows of ``shards``. Returns also what it says.

    Args:
        previous: the last locations file. Footers are read only of shards that it does not cover.
    """
    table = locate(root, shards, previous)
    return tables.write_table(root, table, f"locations-{generation:06d}.parquet"), Located(table)


def locate(root: Path, shards: Sequence[ShardInfo], previous: IndexInfo | None = None) -> pa.Table:
    """The table that ``write_locations`` writes. A key that two shards have is found in the first of them."""
    numbers = {shard.file: i for i, shard in enumerate(shards)}
    parts = []
    known: set[str] = set()
    if previous:
        file = tables.open_table(root, previous, SCHEMA)
        names = file_names(root, previous, file.schema)
        known = numbers.keys() & set(names)
        renumbered = pa.array([numbers.get(name) for name in names], pa.int32())
        old = tables.read_table(file)
        old = old.set_column(2, SCHEMA.field("shard"), pc.take(renumbered, old["shard"]))
        parts.append(old.filter(pc.is_valid(old["shard"])).cast(SCHEMA))
    parts += [_rows_of(Shard(root, shard), numbers[shard.file]) for shard in shards if shard.file not in known]
    order = [("is_text", "ascending"), ("key", "ascending"), ("shard", "ascending"), ("row", "ascending")]
    table = pa.concat_tables(parts).sort_by(order) if parts else SCHEMA.empty_table()
    return table.replace_schema_metadata({FILES_KEY: json.dumps(list(numbers))})


class Located:
    """Where many keys are, at once: what a writer asks of the table of ``locate``."""

    def __init__(self, table: pa.Table) -> None:
        num_latents = len(table) - (pc.sum(table["is_text"]).as_py() or 0)
        self._images, self._texts = table.slice(0, num_latents), table.slice(num_latents)

    def text_lengths(self, keys: pa.Array) -> pa.Array:
        """``n_tokens`` of each of these texts. Raises KeyError for the first that has no row."""
        return pc.take(self._texts["n_tokens"], _places(keys, self._texts["key"])).combine_chunks()

    def check_latents(self, keys: pa.Array) -> None:
        """Raise KeyError for the first of ``keys`` that no row of latents or masks has."""
        _places(keys, self._images["key"])


def _places(keys: pa.Array, known: pa.ChunkedArray) -> pa.Array:
    """The place of each key among those that are known."""
    places = pc.index_in(keys, value_set=known.combine_chunks())
    if places.null_count:
        raise KeyError(keys.filter(places.is_null())[0].as_py())
    return places


Flags = np.ndarray[tuple[int], np.dtype[np.bool_]]
Numbers = np.ndarray[tuple[int], np.dtype[np.int32]]
Buckets = tuple[Numbers, Numbers]
"""Widths and heights in pixels."""


@dataclass(frozen=True)
class Texts:
    """All captions and prompts of a cache, each once, in the order of their keys."""

    keys: pa.StringArray
    n_tokens: Numbers


@dataclass(frozen=True)
class _Columns:
    """The decoded table. Rows of latents and masks come first, then those of texts, each sorted by key."""

    shards: list[ShardInfo | None]
    """By the numbers in ``shard``; None for a shard that the manifest no longer names."""
    num_latents: int
    key: pa.StringArray
    shard: pa.Int32Array
    row: pa.Int32Array
    n_tokens: pa.Int32Array


class Locations:
    """The locations of one manifest, open for look-ups. Thread-safe, because the answers never change.

    Args:
        info: the locations file. If None, the footers of all shards are read instead.

    Raises:
        CacheCorrupt: the file is missing or its bytes are not the bytes that were written.
        CacheError: it is not a table of locations.
    """

    def __init__(self, root: Path, info: IndexInfo | None, shards: Sequence[ShardInfo]) -> None:
        self._root, self._info, self._infos = root, info, shards
        self._remembered: dict[tuple[ShardKind, str], tuple[ShardInfo, int]] = {}
        self._file = tables.open_table(root, info, SCHEMA) if info else None

    @cached_property
    def _table(self) -> _Columns:
        """The table, decoded on the first look-up: 0.4 s for 2 million rows."""
        if self._info and self._file:
            table, names = tables.read_table(self._file), file_names(self._root, self._info, self._file.schema)
        else:
            table, names = locate(self._root, self._infos), [shard.file for shard in self._infos]
        by_name = {shard.file: shard for shard in self._infos}
        is_text, *others = [columns.one_array(table.column(name)) for name in SCHEMA.names]
        num_texts = pc.sum(is_text).as_py() or 0
        return _Columns([by_name.get(name) for name in names], len(is_text) - num_texts, *others)

    def find(self, kind: ShardKind, key: str) -> tuple[ShardInfo, int] | None:
        """The shard and row of ``key``, or None if the cache has no such row. A key's first look-up takes 10 us."""
        location = self._remembered.get((kind, key))
        if location is None:
            location = self._bisect(kind, key)
            if location and len(self._remembered) < REMEMBERED:
                self._remembered[kind, key] = location
        return location

    def _bisect(self, kind: ShardKind, key: str) -> tuple[ShardInfo, int] | None:
        table = self._table
        keys = table.key
        low, high = (table.num_latents, len(keys)) if kind == "text" else (0, table.num_latents)
        at = bisect_left(range(high), key, low, high, key=lambda i: keys[i].as_py())
        if at == high or keys[at].as_py() != key:
            return None
        number, row = table.shard[at].as_py(), table.row[at].as_py()
        shard = table.shards[number] if 0 <= number < len(table.shards) else None
        if shard is None or shard.kind != kind or not 0 <= row < shard.num_rows:
            return None
        return shard, row

    def texts(self) -> Texts:
        """The key and the length of every text: a million take 40 MB."""
        table = self._table
        keys, lengths = table.key[table.num_latents :], table.n_tokens[table.num_latents :]
        if len(distinct := pc.unique(keys)) < len(keys):  # a merged cache may have a text twice
            keys, lengths = distinct, lengths.take(pc.index_in(distinct, value_set=keys))
        return Texts(keys, columns.numbers(lengths))

    def in_bucket(self, kind: ShardKind, keys: pa.StringArray, buckets: Buckets) -> Flags:
        """Whether a shard of its bucket has the row of each key. A key that is null needs none.

        Args:
            buckets: width and height for each key.
        """
        table = self._table
        places = pc.index_in(keys, value_set=table.key[: table.num_latents])
        shards = [shard if shard and shard.kind == kind else None for shard in table.shards]
        # One more for keys that no shard has, and for numbers of shards that there are not.
        sizes = np.array([(shard.bucket or (0, 0)) if shard else (0, 0) for shard in shards] + [(0, 0)], np.int64)
        num_rows = np.array([shard.num_rows if shard else 0 for shard in shards] + [0], np.int64)
        at = columns.numbers(places.fill_null(0))
        number, row = columns.numbers(table.shard)[at], columns.numbers(table.row)[at]
        is_there = ~columns.flags(places.is_null()) & (number >= 0) & (number < len(shards))
        number = np.where(is_there, number, len(shards))
        has_row = (row >= 0) & (row < num_rows[number]) & (sizes[number] == np.stack(buckets, 1)).all(1)
        return has_row | columns.flags(keys.is_null())


def _rows_of(shard: Shard, number: int) -> pa.Table:
    count = len(shard.keys)
    values = {
        "is_text": [shard.info.kind == "text"] * count,
        "key": shard.keys,
        "shard": [number] * count,
        "row": range(count),
        "n_tokens": shard.n_tokens or [0] * count,
    }
    return pa.Table.from_pydict({name: pa.array(v, SCHEMA.field(name).type) for name, v in values.items()}, SCHEMA)


def file_names(root: Path, info: IndexInfo, schema: pa.Schema) -> list[str]:
    """The names of the shards, by the numbers in the ``shard`` column."""
    try:
        names = json.loads((schema.metadata or {})[FILES_KEY])
    except (KeyError, ValueError, RecursionError) as error:
        raise tables.refused(root / info.file, f"it has no list of shards: {error!r}") from None
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise tables.refused(root / info.file, "its list of shards is not a list of names")
    return names

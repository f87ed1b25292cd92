"""The split: to which part of a source does each of its images belong? A table beside the index of a part.

Parts of one source have equal tables, as far as they saw the same images. A merge compares them, and takes the order of
the images from them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from k5cache.shared.errors import CacheError
from k5cache.store import columns, tables
from k5cache.store.index import next_generation
from k5cache.store.manifest import IndexInfo, Manifest
from k5cache.store.ours import TABLE_KEYS

Numbers = np.ndarray[Any, np.dtype[np.uint64]]
SCHEMA = pa.schema([pa.field(name, pa.uint64(), nullable=False) for name in ("path", "file", "content")])
"""A row an image, in the order of the source: hashes of its path, of its file's stat, and of samples of its bytes. The
part is ``1 + content % of``."""


def hash_of(*fields: object) -> int:
    """A hash of 64 bits. Two of a million different files are equal in one source of 30 million."""
    data = "\0".join(map(str, fields)).encode("utf-8", "surrogatepass")
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little")


def path_hashes(paths: Iterable[str]) -> Numbers:
    """The column ``path``."""
    return np.fromiter(map(hash_of, paths), np.uint64)


def table_of(values: Sequence[Numbers]) -> pa.Table:
    """A split of the three columns."""
    return pa.Table.from_arrays([pa.array(column, pa.uint64()) for column in values], schema=SCHEMA)


def columns_of(table: pa.Table) -> list[Numbers]:
    """The three columns."""
    return [columns.numbers(columns.one_array(column)) for column in table.columns]


def write_split(root: Path, manifest: Manifest, table: pa.Table) -> IndexInfo:
    """Write the next split of a cache, unless the one that it has says the same. The manifest is not written.

    One that is damaged is replaced: nothing but the files of the source is needed to make it again.
    """
    if manifest.split and _is(root, manifest.split, table):
        return manifest.split
    generation = next_generation(root, manifest)
    keyed = table.replace_schema_metadata({TABLE_KEYS["split"]: '{"format": 1}'})
    return tables.write_table(root, keyed, f"split-{generation:06d}.parquet")


def _is(root: Path, info: IndexInfo, table: pa.Table) -> bool:
    try:
        return bool(read_split(root, info).equals(table))
    except CacheError:
        return False


def read_split(root: Path, info: IndexInfo) -> pa.Table:
    """The split of a cache.

    Raises:
        CacheCorrupt: the file is missing or its bytes are not the bytes that were written.
        CacheError: it is no such table.
    """
    return tables.read_table(tables.open_table(root, info, SCHEMA)).replace_schema_metadata(None)

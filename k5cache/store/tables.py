"""Table files: how the index and the locations are written, checked and read."""

from __future__ import annotations

import functools
import hashlib
import mmap
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from k5cache.shared.disk_errors import named
from k5cache.shared.errors import CacheError
from k5cache.shared.files import new_file
from k5cache.store import files
from k5cache.store.footer import MAGIC, MAX_FOOTER_BYTES, Element, check_pages, leaves_of, parse_footer
from k5cache.store.manifest import IndexInfo

ROW_GROUP = 1 << 17
_SETTINGS: dict[str, Any] = {
    "compression": "none",
    "use_dictionary": False,
    "write_statistics": False,
    "write_page_checksum": True,
    "store_schema": False,
}


def write_table(root: Path, table: pa.Table, name: str) -> IndexInfo:
    """Write a table file. It is uncompressed and without dictionaries, so a small file cannot claim many rows.

    One row group after another is laid out in one piece and written, so the table is never copied whole.
    """
    with new_file(root / name) as file:
        with pq.ParquetWriter(pa.PythonFile(file, mode="w"), table.schema, **_SETTINGS) as writer:
            for first in range(0, table.num_rows, ROW_GROUP):
                writer.write_table(table.slice(first, ROW_GROUP).combine_chunks(), row_group_size=ROW_GROUP)
            writer.add_key_value_metadata(table.schema.metadata or {})
        return IndexInfo(name, table.num_rows, file.num_bytes, file.sha256.hexdigest())


@dataclass(frozen=True)
class OpenTable:
    """A table file whose bytes and footer are checked. Nothing is decoded yet."""

    path: Path
    file: pq.ParquetFile

    @property
    def schema(self) -> pa.Schema:
        """The columns, and the file's metadata."""
        return self.file.schema_arrow


def open_table(root: Path, info: IndexInfo, schema: pa.Schema) -> OpenTable:
    """Map a table file and check its sha256, which takes 0.7 s per GB, and all that it claims about itself.

    Raises:
        CacheCorrupt: the file is missing or its bytes are not the bytes that were written.
        CacheError: it is not a table of this schema, or it claims more rows than its bytes can hold.
    """
    path = root / info.file
    fd = files.open_inside(root, info.file, info.num_bytes)
    try:
        with named(path):
            mapped = pa.py_buffer(mmap.mmap(fd, 0, access=mmap.ACCESS_READ) if info.num_bytes else b"")
    finally:
        os.close(fd)
    if hashlib.sha256(mapped).hexdigest() != info.sha256:
        raise files.corrupt(root, f"{path} is not the file that was written: its sha256 does not match")
    try:
        _check(memoryview(mapped), info, schema)
        file = pq.ParquetFile(pa.BufferReader(mapped), page_checksum_verification=True)
        if not file.schema_arrow.equals(schema):
            raise ValueError(f"it has the columns {file.schema_arrow.names[:64]}")
    except (ValueError, OSError, pa.ArrowException) as error:
        raise refused(path, str(error)) from None
    return OpenTable(path, file)


def _check(file: memoryview, info: IndexInfo, schema: pa.Schema) -> None:
    """Check everything that pyarrow would believe. Raises ValueError."""
    end = len(file) - 8 - int.from_bytes(file[-8:-4], "little")
    if len(file) < 12 or file[:4] != MAGIC or file[-4:] != MAGIC or end < 4 or len(file) - end > MAX_FOOTER_BYTES:
        raise ValueError("it is not a Parquet file")
    footer = parse_footer(bytes(file[end:-8]), end)
    if footer.num_rows != info.num_rows or footer.num_rows != sum(group.num_rows for group in footer.row_groups):
        raise ValueError(f"the manifest says {info.num_rows} rows, the file {footer.num_rows}")
    expected = _elements(schema.remove_metadata())
    if footer.elements != expected:
        raise ValueError(f"it has the columns {footer.names[:64]}")
    leaves = leaves_of(expected)
    for group in footer.row_groups:
        check_pages(file, group, leaves)


@functools.lru_cache(maxsize=16)
def _elements(schema: pa.Schema) -> tuple[Element, ...]:
    """How a schema stands in the footer of a table file."""
    file = BytesIO()
    with pq.ParquetWriter(file, schema, **_SETTINGS):
        pass
    raw = file.getvalue()
    length = int.from_bytes(raw[-8:-4], "little")
    return parse_footer(raw[-8 - length : -8], len(raw) - 8 - length).elements


def read_table(table: OpenTable, columns: Sequence[str] | None = None) -> pa.Table:
    """Decode an open table file, or some of its columns. Each column of the result is one chunk.

    Raises:
        CacheError: a value is not of the type of its column.
    """
    # For one row group, threads cost more than they save: 5 ms on a busy machine.
    use_threads = table.file.metadata.num_row_groups > 1
    try:
        values = table.file.read(columns=list(columns) if columns is not None else None, use_threads=use_threads)
        values.validate(full=True)
    except (ValueError, OSError, pa.ArrowException) as error:
        raise refused(table.path, str(error)) from None
    return values.combine_chunks()


def by_group(table: OpenTable, numbers: Sequence[int]) -> Iterator[tuple[int, int, list[int]]]:
    """Which row groups have these rows: (number of the group, its first row, the rows in it)."""
    first = 0
    for group in range(table.file.metadata.num_row_groups):
        end = first + table.file.metadata.row_group(group).num_rows
        if wanted := [number for number in numbers if first <= number < end]:
            yield group, first, wanted
        first = end


def read_group(table: OpenTable, group: int) -> pa.Table:
    """Decode one row group of an open table file. Raises as ``read_table``."""
    try:
        values = table.file.read_row_group(group, use_threads=False)
        values.validate(full=True)
    except (ValueError, OSError, pa.ArrowException) as error:
        raise refused(table.path, str(error)) from None
    return values.combine_chunks()


def refused(path: Path, reason: str) -> CacheError:
    """The error for a file that is as it was written, but is not a table of this format."""
    return CacheError(f"{path} is not a table of a cache: {reason}", "Use a cache made by: k5cache encode")

"""Table files: how the index and the locations are written, checked and read."""

from __future__ import annotations

import hashlib
import mmap
import os
from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from k5cache.shared.errors import CacheError
from k5cache.shared.files import new_file
from k5cache.store import files
from k5cache.store.manifest import IndexInfo

ROW_GROUP = 1 << 17


def write_table(root: Path, table: pa.Table, name: str) -> IndexInfo:
    """Write a table file. It is uncompressed and without dictionaries, so a small file cannot claim many rows."""
    with new_file(root / name) as file:
        with pq.ParquetWriter(
            pa.PythonFile(file, mode="w"),
            table.schema,
            compression="none",
            use_dictionary=False,
            write_statistics=False,
            write_page_checksum=True,
            store_schema=False,
        ) as writer:
            writer.write_table(table, row_group_size=ROW_GROUP)
            writer.add_key_value_metadata(table.schema.metadata or {})
        return IndexInfo(name, table.num_rows, file.num_bytes, file.sha256.hexdigest())


def open_table(root: Path, info: IndexInfo, schema: pa.Schema) -> pq.ParquetFile:
    """Map a table file and check its sha256, which takes 0.7 s per GB. Nothing is decoded yet.

    Raises:
        CacheCorrupt: the file is missing or its bytes are not the bytes that were written.
        CacheError: it is not a table of this schema, or it claims more rows than its bytes can hold.
    """
    path = root / info.file
    fd = files.open_inside(root, info.file, info.num_bytes)
    try:
        mapped = pa.py_buffer(mmap.mmap(fd, 0, access=mmap.ACCESS_READ) if info.num_bytes else b"")
    finally:
        os.close(fd)
    if hashlib.sha256(mapped).hexdigest() != info.sha256:
        raise files.corrupt(root, f"{path} is not the file that was written: its sha256 does not match")
    try:
        file = pq.ParquetFile(pa.BufferReader(mapped), page_checksum_verification=True)
    except (OSError, pa.ArrowException) as error:
        raise refused(path, str(error)) from None
    if file.metadata.num_rows != info.num_rows or info.num_rows * len(schema) > 2 * info.num_bytes + 8 * len(schema):
        raise refused(path, f"the manifest says {info.num_rows} rows, the file {file.metadata.num_rows}")
    if not file.schema_arrow.equals(schema):
        raise refused(path, f"it has the columns {file.schema_arrow.names[:64]}")
    for i in range(file.metadata.num_row_groups):
        group = file.metadata.row_group(i)
        if any(group.column(j).has_dictionary_page for j in range(group.num_columns)):
            raise refused(path, "it has dictionary pages")
    return file


def read_table(file: pq.ParquetFile, columns: Sequence[str] | None = None) -> pa.Table:
    """Decode an open table file, or some of its columns. Each column of the result is one chunk."""
    # For one row group, threads cost more than they save: 5 ms on a busy machine.
    use_threads = file.metadata.num_row_groups > 1
    return file.read(columns=list(columns) if columns is not None else None, use_threads=use_threads).combine_chunks()


def refused(path: Path, reason: str) -> CacheError:
    """The error for a file that is as it was written, but is not a table of this format."""
    return CacheError(f"{path} is not a table of a cache: {reason}", "Use a cache made by: k5cache encode")

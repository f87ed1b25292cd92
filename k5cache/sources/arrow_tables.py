"""What do the rows of a Parquet or Arrow file hold? Nothing is copied, and images are read one by one."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.ipc
import pyarrow.parquet as pq

from k5cache.shared.errors import DatasetError
from k5cache.sources.captions import Unusable
from k5cache.sources.items import UnreadableImage
from k5cache.sources.row_groups import Group, GroupReader

_BUFFER = 1 << 20  # without it, pyarrow reads the images of a whole row group at once
_BATCH_BYTES = 4 << 20


@dataclass(frozen=True)
class ParquetRows:
    """The rows of one Parquet file. It is open only while it is read."""

    file: Path
    metadata: pq.FileMetaData
    groups: GroupReader
    """Shared by all files of a table."""

    @cached_property
    def schema(self) -> pa.Schema:
        """Column names and Arrow types."""
        return self.metadata.schema.to_arrow_schema()

    @property
    def num_rows(self) -> int:
        """Of all row groups."""
        return int(self.metadata.num_rows)

    @cached_property
    def _first_rows(self) -> list[int]:
        """The first row of each row group, and the number of all rows."""
        firsts = [0]
        for group in range(self.metadata.num_row_groups):
            firsts.append(firsts[-1] + self.metadata.row_group(group).num_rows)
        return firsts

    def column(self, name: str) -> list[Any]:
        """The values of a column without images."""
        with _errors(self.file), _open(self) as parquet:
            return _values(parquet.read(columns=[name]).column(name))

    def image_names(self, name: str) -> list[str]:
        """The field ``path`` of a column of images."""
        kind = self.schema.field(name).type
        if not pa.types.is_struct(kind) or "path" not in kind.names:
            return [""] * self.num_rows
        with _errors(self.file), _open(self) as parquet:
            return _paths(parquet.read(columns=[f"{name}.path"]).column(name))

    def has_bytes(self, name: str) -> list[bool]:
        """Which rows have an image, from the counts of nulls in the footer if they decide."""
        leaf = self._leaf(name)
        return [is_there for group in range(self.metadata.num_row_groups) for is_there in self._group_has(group, leaf)]

    def read(self, name: str, row: int) -> bytes:
        """One image: the batch that it is in, which is kept for its neighbours, and no other column."""
        number = bisect_right(self._first_rows, row) - 1
        group = self._groups.get((name, number))
        if group is None:
            group = self._groups[name, number] = self._group(name, number)
        return self.groups.read(group, row - self._first_rows[number])

    @cached_property
    def _groups(self) -> dict[tuple[str, int], Group]:
        return {}

    def _group(self, name: str, number: int) -> Group:
        leaf = self._leaf(name)
        bytes_of_row = self._size(number, leaf) // max(self.metadata.row_group(number).num_rows, 1)
        rows_in_batch = max(1, min(_BATCH_BYTES // max(bytes_of_row, 1), 1000))

        def batches() -> Iterator[pa.Array]:
            with _open(self) as parquet:
                yield from _batches(parquet, number, leaf, rows_in_batch)

        return Group((self.file, leaf, number), batches)

    def place(self, row: int) -> str:
        """``#3``."""
        return f"#{row}"

    def _leaf(self, name: str) -> str:
        return f"{name}.bytes" if pa.types.is_struct(self.schema.field(name).type) else name

    def _statistics(self, group: int, leaf: str) -> Any:
        row_group = self.metadata.row_group(group)
        columns = (row_group.column(i) for i in range(row_group.num_columns))
        return next(column for column in columns if column.path_in_schema == leaf)

    def _size(self, group: int, leaf: str) -> int:
        return int(self._statistics(group, leaf).total_uncompressed_size)

    def _group_has(self, group: int, leaf: str) -> list[bool]:
        num_rows = self.metadata.row_group(group).num_rows
        statistics = self._statistics(group, leaf).statistics
        if statistics is not None and statistics.has_null_count and statistics.null_count in (0, num_rows):
            return [statistics.null_count == 0] * num_rows
        with _errors(self.file), _open(self) as parquet:
            return [
                is_there for batch in _batches(parquet, group, leaf, 100) for is_there in batch.is_valid().to_pylist()
            ]


@dataclass(frozen=True)
class ArrowRows:
    """The rows of one Arrow file or stream, mapped from disk."""

    file: Path
    table: pa.Table = field(repr=False)

    @property
    def schema(self) -> pa.Schema:
        """Column names and Arrow types."""
        return self.table.schema

    @property
    def num_rows(self) -> int:
        """Of the whole file."""
        return int(self.table.num_rows)

    def column(self, name: str) -> list[Any]:
        """The values of a column without images."""
        return _values(self.table.column(name))

    def image_names(self, name: str) -> list[str]:
        """The field ``path`` of a column of images."""
        kind = self.schema.field(name).type
        has_paths = pa.types.is_struct(kind) and "path" in kind.names
        return _paths(self.table.column(name)) if has_paths else [""] * self.num_rows

    def has_bytes(self, name: str) -> list[bool]:
        """Which rows have an image."""
        cells = self.table.column(name)
        parts = pc.struct_field(cells, "bytes") if pa.types.is_struct(cells.type) else cells
        are_there: list[bool] = parts.is_valid().to_pylist()
        return are_there

    def read(self, name: str, row: int) -> bytes:
        """One image."""
        cell = self.table.column(name)[row]
        content = (cell["bytes"] if isinstance(cell, pa.StructScalar) and cell.is_valid else cell).as_py()
        if content is None:
            raise UnreadableImage("holds no image")
        return bytes(content)

    def place(self, row: int) -> str:
        """``#3``."""
        return f"#{row}"


def read_parquet(file: Path, groups: GroupReader) -> ParquetRows:
    """Read the footer of a Parquet file.

    Raises:
        DatasetError: it is damaged or not a Parquet file.
    """
    with _errors(file):
        rows = ParquetRows(file, pq.read_metadata(file), groups)
        _check_names(file, rows.schema)
    return rows


def read_arrow(file: Path) -> ArrowRows:
    """Map a file of Arrow's file or stream format.

    Raises:
        DatasetError: it is neither.
    """
    with _errors(file), pa.memory_map(str(file)) as source:
        try:
            table = pa.ipc.open_file(source).read_all()
        except pa.ArrowInvalid:
            source.seek(0)
            table = pa.ipc.open_stream(source).read_all()
    _check_names(file, table.schema)
    return ArrowRows(file, table)


def _check_names(file: Path, schema: pa.Schema) -> None:
    if len(set(schema.names)) < len(schema.names):
        name = next(name for name in schema.names if schema.names.count(name) > 1)
        raise DatasetError(f"{file.name} has two columns with the name {name}", "Give each column a name of its own")


@contextmanager
def _open(rows: ParquetRows) -> Iterator[pq.ParquetFile]:
    # Not mapped: a file that is overwritten while it is mapped ends the process.
    with pq.ParquetFile(rows.file, metadata=rows.metadata, buffer_size=_BUFFER, pre_buffer=False) as parquet:
        yield parquet


def _batches(parquet: pq.ParquetFile, group: int, leaf: str, num_rows: int) -> Iterator[pa.Array]:
    """A column of one row group, a few rows at a time. Of a struct, only the bytes."""
    for batch in parquet.iter_batches(num_rows, row_groups=[group], columns=[leaf], use_threads=False):
        column = batch.column(0)
        yield pc.struct_field(column, "bytes") if pa.types.is_struct(column.type) else column


def _paths(cells: pa.ChunkedArray) -> list[str]:
    return [name if isinstance(name, str) else "" for name in _values(pc.struct_field(cells, "path"))]


def _values(cells: pa.ChunkedArray) -> list[Any]:
    """The cells as Python's values. For one that Python cannot hold, an ``Unusable``."""
    try:
        values: list[Any] = cells.to_pylist()
    except (ValueError, OverflowError):  # Arrow does not check its text, and its dates reach further
        values = [_value(cell) for cell in cells]
    return values


def _value(cell: pa.Scalar) -> Any:
    try:
        return cell.as_py()
    except UnicodeDecodeError:
        return Unusable("its text is not UTF-8")
    except (ValueError, OverflowError) as error:
        return Unusable(f"its value cannot be read ({' '.join(str(error).split())[:100]})")


@contextmanager
def _errors(file: Path) -> Iterator[None]:
    try:
        yield
    except (pa.ArrowException, OSError) as error:
        reason = " ".join(str(error).split())[:300]
        raise DatasetError(f"{file.name} cannot be read: {reason}", "Repair it, or use another source") from None

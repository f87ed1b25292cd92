"""What do the rows of a Parquet or Arrow file hold? Nothing is copied, and images are read one by one."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.ipc
import pyarrow.parquet as pq

from k5cache.shared import plain
from k5cache.shared.errors import DatasetError
from k5cache.sources.arrow_claims import check_messages, unfolded_bytes, validated
from k5cache.sources.captions import Unusable
from k5cache.sources.items import UnreadableImage
from k5cache.sources.parquet_claims import FREE_BYTES, Claims, TooLarge, longest_value, most_bytes, read_claims
from k5cache.sources.row_groups import Group, GroupReader

_BUFFER = 1 << 20  # without it, pyarrow reads the images of a whole row group at once
_BATCH_BYTES = 4 << 20
_MOST_ROWS = 1 << 16  # of a column without images, at once


@dataclass(frozen=True)
class ParquetRows:
    """The rows of one Parquet file. It is open only while it is read."""

    file: Path
    claims: Claims = field(repr=False)
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
        with _errors(self.file):
            return [value for cells in self._cells(name) for value in _values(cells)]

    def image_names(self, name: str) -> list[str]:
        """The field ``path`` of a column of images."""
        kind = self.schema.field(name).type
        if not pa.types.is_struct(kind) or "path" not in kind.names:
            return [""] * self.num_rows
        with _errors(self.file):
            return [path for cells in self._cells(f"{name}.path") for path in _paths(cells)]

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
            return self._batches(number, leaf, rows_in_batch)

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
        with _errors(self.file):
            batches = self._batches(group, leaf, 100, False)
            return [is_there for batch in batches for is_there in batch.is_valid().to_pylist()]

    def _cells(self, name: str) -> Iterator[pa.Array]:
        """A column or a field without images. What a dictionary stands for is not unfolded before it was measured."""
        groups = range(self.metadata.num_row_groups)
        dictionaries: list[str] = []
        longest = 0
        with plain.open_plain(self.file) as file:
            for leaf in self.claims.leaves_of(name):
                value = longest_value(file, self.claims, leaf.path, groups)
                if value.stays_dictionary:
                    dictionaries.append(leaf.path)
                else:
                    self.claims.check_lists(leaf, value.num_bytes)
                    longest = max(longest, value.num_bytes)
        num_rows = num_bytes = 0
        most = most_bytes(self.claims.file_bytes)
        with _open(self, dictionaries) as parquet:
            for group in groups:  # pyarrow does not join the dictionaries of two groups in a struct
                at_once = _at_once(longest, _MOST_ROWS)
                for batch in parquet.iter_batches(at_once, row_groups=[group], columns=[name], use_threads=False):
                    num_rows += batch.num_rows
                    num_bytes += unfolded_bytes(batch.column(0))
                    if num_bytes > most:
                        raise TooLarge(f"the column {name} unfolds to more than {most:,} bytes")
                    yield batch.column(0)
        if num_rows != self.num_rows:
            raise ValueError(f"the column {name} has {num_rows:,} of {self.num_rows:,} rows")

    def _batches(self, group: int, leaf: str, num_rows: int, are_read: bool = True) -> Iterator[pa.Array]:
        """A column of one row group, a few rows at a time. Of a struct, only the bytes.

        Args:
            are_read: whether the values are wanted, or only which of them are there.
        """
        with plain.open_plain(self.file) as file:
            value = longest_value(file, self.claims, leaf, [group])
        is_unfolded = are_read or not value.stays_dictionary
        at_once = _at_once(value.num_bytes, num_rows) if is_unfolded else num_rows
        with _open(self, () if is_unfolded else [leaf]) as parquet:
            for batch in parquet.iter_batches(at_once, row_groups=[group], columns=[leaf], use_threads=False):
                column = batch.column(0)
                yield pc.struct_field(column, "bytes") if pa.types.is_struct(column.type) else column


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
        return _values(self._used(name))

    def image_names(self, name: str) -> list[str]:
        """The field ``path`` of a column of images."""
        kind = self.schema.field(name).type
        has_paths = pa.types.is_struct(kind) and "path" in kind.names
        return _paths(self._used(name)) if has_paths else [""] * self.num_rows

    def has_bytes(self, name: str) -> list[bool]:
        """Which rows have an image."""
        cells = self._used(name)
        parts = pc.struct_field(cells, "bytes") if pa.types.is_struct(cells.type) else cells
        are_there: list[bool] = parts.is_valid().to_pylist()
        return are_there

    def read(self, name: str, row: int) -> bytes:
        """One image."""
        cell = self._used(name)[row]
        content = (cell["bytes"] if isinstance(cell, pa.StructScalar) and cell.is_valid else cell).as_py()
        if content is None:
            raise UnreadableImage("holds no image")
        return bytes(content)

    def place(self, row: int) -> str:
        """``#3``."""
        return f"#{row}"

    def _used(self, name: str) -> pa.ChunkedArray:
        """A column, with offsets that were checked: pyarrow follows them out of the file."""
        if name not in self._checked:
            with _errors(self.file):
                self._checked[name] = validated(self.table.column(name), name, self.file.stat().st_size)
        return self._checked[name]

    @cached_property
    def _checked(self) -> dict[str, pa.ChunkedArray]:
        return {}


def read_parquet(file: Path, groups: GroupReader) -> ParquetRows:
    """Read the footer of a Parquet file.

    Raises:
        DatasetError: it is damaged or not a Parquet file.
    """
    with _errors(file):
        claims = read_claims(file)  # before pyarrow sees any of it
        rows = ParquetRows(file, claims, pq.read_metadata(file), groups)
        _check_names(file, rows.schema)
    return rows


def read_arrow(file: Path) -> ArrowRows:
    """Map a file of Arrow's file or stream format.

    Raises:
        DatasetError: it is neither.
    """
    with _errors(file), pa.memory_map(str(file)) as source:
        check_messages(file)
        try:
            table = pa.ipc.open_file(source).read_all()
        except pa.ArrowInvalid:
            source.seek(0)
            table = pa.ipc.open_stream(source).read_all()
        _check_names(file, table.schema)
    return ArrowRows(file, table)


def _check_names(file: Path, schema: pa.Schema) -> None:
    fields = list(schema)
    while fields:  # a ValueError if a name is not UTF-8, at any depth
        field = fields.pop()
        assert isinstance(field.name, str)
        fields += [field.type.field(i) for i in range(field.type.num_fields)]
    if len(set(schema.names)) < len(schema.names):
        name = next(name for name in schema.names if schema.names.count(name) > 1)
        raise DatasetError(f"{file.name} has two columns with the name {name}", "Give each column a name of its own")


@contextmanager
def _open(rows: ParquetRows, dictionaries: Sequence[str] = ()) -> Iterator[pq.ParquetFile]:
    # Not mapped: a file that is overwritten while it is mapped ends the process.
    with pq.ParquetFile(
        rows.file, metadata=rows.metadata, read_dictionary=dictionaries, buffer_size=_BUFFER, pre_buffer=False
    ) as parquet:
        yield parquet


def _at_once(longest: int, num_rows: int) -> int:
    """How many rows may be decoded at once if any value may have ``longest`` bytes."""
    return max(1, min(num_rows, FREE_BYTES // max(longest, 1)))


def _paths(cells: pa.Array | pa.ChunkedArray) -> list[str]:
    return [name if isinstance(name, str) else "" for name in _values(pc.struct_field(cells, "path"))]


def _values(cells: pa.Array | pa.ChunkedArray) -> list[Any]:
    """The cells as Python's values. For one that Python cannot hold, an ``Unusable``."""
    if isinstance(cells, pa.DictionaryArray):
        cells = cells.dictionary_decode()
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
    except (pa.ArrowException, OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:300]
        again = "write it again without dictionaries or compression, " if isinstance(error, TooLarge) else ""
        fix = f"Repair it, {again}or use another source"
        raise DatasetError(f"{file.name} cannot be read: {reason}", fix) from None

"""May pyarrow read this table? What a Parquet file claims is checked before memory is taken for it.

pyarrow allocates what a footer and the page headers claim, and at some claims it ends the process. A user's table may
be compressed, and may have dictionaries, lists and any number of columns. So nothing is refused here for its kind, only
for its size: what is read may be many times as large as the file, but not more than that. The footers of caches, where
much less is allowed, are read by ``store/footer.py``.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from k5cache.shared import plain
from k5cache.store.footer import MAGIC, MAX_FOOTER_BYTES
from k5cache.store.thrift import STRUCT, Struct, Thrift

FREE_BYTES = 64 << 20
MOST_TIMES = 100
"""A column may unfold to ``FREE_BYTES`` and ``MOST_TIMES`` its size in the file. Images hardly shrink, and text to a
tenth."""
_FREE_ROWS = 100_000
_MOST_VALUES = 500_000  # in one row group of the footer; a column has about 40
_MOST_NODES, _MOST_DEPTH = 10_000, 16  # of the schema
_HEADER_BYTES = (1 << 9, 1 << 13, 1 << 24)  # of a page. Arrow writes 50, and others a whole value as its statistics
_ENCRYPTED = b"PARE"
_NUM_CODECS, _NUM_TYPES = 8, 8
_BYTE_ARRAY, _FIXED = 6, 7
_DATA, _INDEX, _DICTIONARY, _DATA_V2 = range(4)
_STAY = {0, 2, 8}  # encodings: plain, and indices into a dictionary
_DELTA_TEXTS = 7  # a value is written as what it has more than the one before: a byte can stand for a megabyte


class Leaf(NamedTuple):
    """A column of values in the schema."""

    path: str
    """``image.bytes``."""
    physical_type: int
    width: int
    """Bytes of a value of a fixed width; 0 of any other."""
    is_repeated: bool


class Chunk(NamedTuple):
    """One column of one row group."""

    num_values: int
    start: int
    """Of its first page, which may be a dictionary."""
    num_bytes: int
    """In the file."""


@dataclass(frozen=True)
class Claims:
    """What a footer says, checked."""

    num_rows: int
    file_bytes: int
    leaves: tuple[Leaf, ...]
    groups: tuple[tuple[int, tuple[Chunk, ...]], ...]
    """Rows and columns of each row group."""

    def leaves_of(self, name: str) -> list[Leaf]:
        """Those that pyarrow reads for a name of a column or a field."""
        return [leaf for leaf in self.leaves if leaf.path == name or leaf.path.startswith(f"{name}.")]

    def check_lists(self, leaf: Leaf, longest: int) -> None:
        """Refuse lists that would not fit, since the list of a row is decoded at once.

        Args:
            longest: bytes of a value that takes next to none in the file.

        Raises:
            TooLarge: there may be too many.
        """
        number = self.leaves.index(leaf)
        most = max((chunks[number].num_values for _, chunks in self.groups), default=0)
        if leaf.is_repeated and longest * most > most_bytes(self.file_bytes):
            raise TooLarge(f"the lists of the column {leaf.path} may unfold to {longest * most:,} bytes")


class TooLarge(ValueError):
    """A table claims more than its file can hold."""


def most_bytes(file_bytes: int) -> int:
    """What a part of a file may unfold to."""
    return FREE_BYTES + MOST_TIMES * file_bytes


def most_rows(file_bytes: int) -> int:
    """How many rows or values there may be in a file."""
    return _FREE_ROWS + MOST_TIMES * file_bytes


def read_claims(path: Path) -> Claims:
    """Check the footer of a Parquet file.

    Raises:
        ValueError: it is none, or claims what cannot be.
        OSError: it cannot be read.
    """
    with plain.open_plain(path) as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - 8))
        tail = file.read(8)
        length = int.from_bytes(tail[:4], "little") + 8
        if tail[4:] == _ENCRYPTED:
            raise ValueError("it is encrypted")
        if tail[4:] != MAGIC or length + 4 > size:
            raise ValueError("it is not a Parquet file, or was cut off")
        if length > MAX_FOOTER_BYTES:
            raise TooLarge(f"its footer has {length:,} bytes")
        file.seek(size - length)
        return _claims(file.read(length - 8), size - length)


def _claims(raw: bytes, file_bytes: int) -> Claims:
    thrift = Thrift(raw, most_values=_MOST_VALUES)
    fields: Struct = {}
    number, leaves, groups = 0, tuple[Leaf, ...](), list[tuple[int, tuple[Chunk, ...]]]()
    while (header := thrift.field(number)) is not None:
        number, kind = header
        if number in fields:
            raise ValueError(f"field {number} of its footer is there twice")
        fields[number] = None
        if number == 4:  # one group at a time, so that only what is needed of each stays in memory
            groups = list(_groups(thrift, leaves, file_bytes))
            continue
        fields[number] = thrift.value(kind)
        if number == 2:
            leaves = tuple(_leaves(fields[2]))
    num_rows = _whole(fields.get(3), "the number of its rows")
    nested = [leaf.path for leaf in leaves if "." in leaf.path]
    if len(set(nested)) < len(nested):
        raise ValueError("two of its fields have the same name")
    if num_rows != sum(rows for rows, _ in groups):
        raise ValueError(f"it claims {num_rows:,} rows, and its row groups have others")
    if num_rows > most_rows(file_bytes):
        raise TooLarge(f"it claims {num_rows:,} rows in {file_bytes:,} bytes")
    for rows, chunks in groups:
        for leaf, chunk in zip(leaves, chunks, strict=True):
            if chunk.num_values != rows if not leaf.is_repeated else chunk.num_values > most_rows(file_bytes):
                raise TooLarge(f"the column {leaf.path} claims {chunk.num_values:,} values in {rows:,} rows")
    return Claims(num_rows, file_bytes, leaves, tuple(groups))


def _groups(thrift: Thrift, leaves: Sequence[Leaf], file_bytes: int) -> Iterator[tuple[int, tuple[Chunk, ...]]]:
    kind, size = thrift.list_header()
    if kind != STRUCT:
        raise ValueError("its row groups are no structures")
    for _ in range(size):
        group = thrift.struct()
        columns = group.get(1)
        if not isinstance(columns, list) or len(columns) != len(leaves):
            raise ValueError(f"a row group has no columns, or others than the {len(leaves)} of the schema")
        chunks = tuple(_chunk(column, leaf, file_bytes) for column, leaf in zip(columns, leaves, strict=True))
        yield _whole(group.get(3), "the number of rows of a row group"), chunks


def _chunk(column: Any, leaf: Leaf, file_bytes: int) -> Chunk:
    meta = column.get(3) if isinstance(column, dict) else None
    if not isinstance(meta, dict) or column.keys() & {1, 8, 9}:
        raise ValueError("a column is in another file, or encrypted")
    if meta.get(1) != leaf.physical_type or _joined(meta.get(3)) != leaf.path.encode():
        raise ValueError(f"the column {leaf.path} has another name or type in a row group")
    if _whole(meta.get(4), "the codec of a column") >= _NUM_CODECS:
        raise ValueError("a column is compressed with an unknown codec")
    num_bytes, start = (_whole(meta.get(field), "the size or place of a column") for field in (7, 9))
    dictionary = meta.get(11)
    if dictionary is not None and 0 < _whole(dictionary, "the place of a dictionary") < start:
        start = dictionary
    if num_bytes + start > file_bytes:
        raise ValueError("a column is outside the file")
    return Chunk(_whole(meta.get(5), "the number of values of a column"), start, num_bytes)


def _joined(path: Any) -> bytes | None:
    is_path = isinstance(path, list) and all(isinstance(name, bytes) for name in path)
    return b".".join(path) if is_path else None


def _whole(value: Any, name: str) -> int:
    if type(value) is not int or value < 0:
        raise ValueError(f"{name} is missing or negative")
    return value


def _leaves(elements: Any) -> Iterator[Leaf]:
    """The columns of a schema, of which the nodes are given from top to bottom."""
    if not isinstance(elements, list) or not 0 < len(elements) <= _MOST_NODES:
        raise ValueError(f"it has no schema, or one of more than {_MOST_NODES:,} columns")
    above: list[tuple[str, bool, list[int]]] = []
    """(path, whether it repeats, children that are still to come) of the nodes around this one."""
    for i, element in enumerate(elements):
        name = element.get(4) if isinstance(element, dict) else None
        if not isinstance(name, bytes) or (i > 0 and not above):
            raise ValueError("its schema is damaged")
        children = _whole(element.get(5, 0), "the number of children of a column")
        is_repeated = element.get(3) == 2
        path = name.decode()
        if above:
            above[-1][2][0] -= 1
            path = f"{above[-1][0]}.{path}" if len(above) > 1 else path
            is_repeated = is_repeated or above[-1][1]
        if not children and i > 0:
            yield _leaf(element, path, is_repeated)
        else:
            above.append((path, is_repeated and i > 0, [children]))
        if len(above) > _MOST_DEPTH:
            raise ValueError(f"its columns lie in each other more than {_MOST_DEPTH} deep")
        while above and above[-1][2][0] <= 0:
            above.pop()
    if above:
        raise ValueError("its schema is cut off")


def _leaf(element: Struct, path: str, is_repeated: bool) -> Leaf:
    physical_type = _whole(element.get(1), f"the type of the column {path}")
    if physical_type >= _NUM_TYPES:
        raise ValueError(f"the column {path} has an unknown type")
    width = _whole(element.get(2), f"the width of the column {path}") if physical_type == _FIXED else 0
    return Leaf(path, physical_type, width, is_repeated)


# --- pages ---


class Longest(NamedTuple):
    """What pages say about the values in them."""

    num_bytes: int
    """Of a value that takes next to none in the file; 0 if every value takes its own bytes."""
    stays_dictionary: bool
    """Whether pyarrow can give indices and a dictionary, which takes no more memory than the file has."""


@dataclass
class _Sum:
    """Of the pages of a column that were looked at."""

    num_values: int = 0
    num_bytes: int = 0
    """Decompressed."""
    longest: int = 0
    encodings: set[Any] = field(default_factory=set)


def longest_value(file: BinaryIO, claims: Claims, path: str, groups: Sequence[int]) -> Longest:
    """Check the pages of a column before anything in them is decoded.

    Args:
        file: the table, open.
        path: of a leaf.

    Raises:
        ValueError: a page is damaged, or claims more than it has bytes for.
    """
    number = next(number for number, leaf in enumerate(claims.leaves) if leaf.path == path)
    leaf = claims.leaves[number]
    longest, encodings = 0, set[Any]()
    for group in groups:
        chunk = claims.groups[group][1][number]
        if leaf.width * chunk.num_values > most_bytes(claims.file_bytes):  # a null takes its whole width in memory
            raise TooLarge(f"the column {path} claims {chunk.num_values:,} values of {leaf.width:,} bytes")
        total = _Sum(encodings=encodings)
        for header in _pages(file, chunk):
            _add(total, header)
            if total.num_bytes > most_bytes(chunk.num_bytes):
                raise TooLarge(f"the column {path} unfolds to more than {most_bytes(chunk.num_bytes):,} bytes")
        if total.num_values != chunk.num_values:
            raise ValueError(f"the column {path} claims {chunk.num_values:,} values and has pages of others")
        longest = max(longest, total.longest)
    if leaf.physical_type != _BYTE_ARRAY:
        return Longest(0, False)
    return Longest(longest, longest > 0 and encodings <= _STAY)


def _add(total: _Sum, header: Struct) -> None:
    """Add a page to those before it."""
    kind, num_bytes = header[1], header[2]
    total.num_bytes += num_bytes
    if kind == _INDEX:
        return
    page = header.get({_DATA: 5, _DICTIONARY: 7, _DATA_V2: 8}.get(kind, 0))
    if not isinstance(page, dict):
        raise ValueError("a page is of an unknown kind")
    num_values = _whole(page.get(1), "the number of values of a page")
    if kind == _DICTIONARY:
        if num_values > num_bytes or total.num_values:
            raise ValueError("a dictionary claims more values than it has bytes for, or follows its column")
        total.longest = max(total.longest, num_bytes)
        return
    total.num_values += num_values
    encoding = page.get(4 if kind == _DATA_V2 else 2)
    total.encodings.add(encoding)
    if encoding == _DELTA_TEXTS:
        total.longest = max(total.longest, num_bytes)


def _pages(file: BinaryIO, chunk: Chunk) -> Iterator[Struct]:
    """The header of each page of a column, with sizes that lie within it."""
    at, end = chunk.start, chunk.start + chunk.num_bytes
    num_values = 0
    while at < end and num_values < chunk.num_values:  # some writers leave bytes behind the last page
        header, length = _header(file, at, end)
        kind, _, packed = (_whole(header.get(field), "the kind or size of a page") for field in (1, 2, 3))
        if packed > end - at - length:
            raise ValueError("a page ends outside its column")
        page = header.get(8 if kind == _DATA_V2 else 5)
        if kind in (_DATA, _DATA_V2) and isinstance(page, dict):
            num_values += _whole(page.get(1), "the number of values of a page")
        yield header
        at += length + packed


def _header(file: BinaryIO, at: int, end: int) -> tuple[Struct, int]:
    """The page header that begins at a place, and its length."""
    for num_bytes in _HEADER_BYTES:
        file.seek(at)
        thrift = Thrift(file.read(min(num_bytes, end - at)))
        try:
            return thrift.struct(), thrift.at
        except ValueError:
            if num_bytes == _HEADER_BYTES[-1] or num_bytes >= end - at:
                raise
    raise AssertionError

"""What does the footer of a Parquet file say, and is that allowed here? It is checked before a page is read.

The format has no compression, no dictionaries, no encryption and one encoding. So a chunk has about as many bytes as
its values need, and nothing read from a file can be much larger than the file.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, BinaryIO, NamedTuple

from k5cache.store.thrift import STRUCT, Struct, Thrift

MAX_FOOTER_BYTES = 1 << 26  # 64 MiB; each row of a shard adds about 600 bytes to its footer
MAX_HEADER_BYTES = 1 << 10  # of a page; Arrow writes about 30
MAX_COLUMNS = 64
MAGIC = b"PAR1"
_PLAIN, _RLE = 0, 3  # Encoding in parquet.thrift; levels are written in RLE
_DATA_PAGE = 0  # PageType
_WIDTHS = {0: 0, 1: 4, 2: 8, 6: 4}  # least bytes of a value by physical type: boolean, int32, int64, byte array
_PAGE_BYTES, _PAGE_VALUES = 1 << 15, 1 << 10  # a page that is not the last of its chunk has at least one of these


class Chunk(NamedTuple):
    """One column of one row group, as parquet.thrift's ColumnMetaData has it."""

    physical_type: int
    num_values: int
    num_bytes: int
    """With page headers."""
    offset: int
    """Of its first page header."""


class Element(NamedTuple):
    """One node of the schema."""

    name: str
    physical_type: int | None
    repetition: int
    """0 required, 1 optional, 2 repeated; -1 for the root."""
    num_children: int
    converted_type: int | None


class RowGroup(NamedTuple):
    """Rows that lie together."""

    num_rows: int
    chunks: tuple[Chunk, ...]


class Leaf(NamedTuple):
    """A column of values."""

    physical_type: int | None
    is_list: bool
    is_optional: bool


@dataclass(frozen=True)
class Footer:
    """The checked footer of a file."""

    num_rows: int
    elements: tuple[Element, ...]
    row_groups: tuple[RowGroup, ...]
    metadata: dict[bytes, bytes]

    @property
    def names(self) -> list[str]:
        """The columns of a schema without lists."""
        return [element.name for element in self.elements[1:]]


def footer_of(file: BinaryIO) -> Footer:
    """The footer of an open file. Raises ValueError as ``parse_footer``."""
    size = file.seek(0, os.SEEK_END)
    file.seek(max(0, size - 8))
    tail = file.read(8)
    length = int.from_bytes(tail[:4], "little") + 8
    if tail[4:] != MAGIC or length + 4 > size or length > MAX_FOOTER_BYTES:
        raise ValueError("it is not a Parquet file")
    file.seek(size - length)
    return parse_footer(file.read(length - 8), size - length)


def parse_footer(raw: bytes, file_bytes: int) -> Footer:
    """Read a footer, without the length and the magic number that follow it.

    Args:
        file_bytes: the size of the file before the footer. Every chunk lies in it.

    Raises:
        ValueError: the bytes are no footer, or something in it is not allowed in this format.
    """
    thrift = Thrift(raw)
    fields: Struct = {}
    number, groups = 0, list[RowGroup]()
    while (header := thrift.field(number)) is not None:
        number, kind = header
        if number in fields:
            raise ValueError(f"field {number} is there twice")
        if number == 4:  # one group at a time, so that only what is needed of each stays in memory
            fields[4] = None
            groups = list(_row_groups(thrift, file_bytes))
        else:
            fields[number] = thrift.value(kind)
    if not fields.keys() <= {1, 2, 3, 4, 5, 6, 7}:
        raise ValueError("it is encrypted, or has fields that the format does not know")
    if type(fields.get(3)) is not int or not isinstance(fields.get(2), list):
        raise ValueError("it has no schema or no number of rows")
    return Footer(
        num_rows=fields[3],
        elements=tuple(_element(value) for value in fields[2]),
        row_groups=tuple(groups),
        metadata=dict(_pairs(fields.get(5, []))),
    )


def _row_groups(thrift: Thrift, file_bytes: int) -> Iterator[RowGroup]:
    kind, size = thrift.list_header()
    if kind != STRUCT:
        raise ValueError("its row groups are no structures")
    for _ in range(size):
        yield _usual_group(thrift, file_bytes) or _row_group(thrift.struct(), file_bytes)


def _row_group(group: Struct, file_bytes: int) -> RowGroup:
    columns, num_rows = group.get(1), group.get(3)
    if not isinstance(columns, list) or len(columns) > MAX_COLUMNS or type(num_rows) is not int or num_rows < 0:
        raise ValueError("a row group has no columns, too many, or no number of rows")
    return RowGroup(num_rows, tuple(_chunk(column, file_bytes) for column in columns))


_VARINT = rb"[\x80-\xff]{0,4}[\x00-\x7f]"
_USUAL_CHUNK = re.compile(
    rb"&%(v)b\x1c\x15(%(v)b)\x19%%\x06\x00\x19\x18([\x01-\x7f])(\w+?)\x15\x00\x16(%(v)b)\x16(%(v)b)\x16(%(v)b)"
    rb"&(%(v)b)(?:I\x1c\x15%(v)b\x15%(v)b\x15%(v)b\x00)?(?:<\x16%(v)b\x19\x06\x19\x06\x00)?\x00\x00" % {b"v": _VARINT},
    re.DOTALL,
)
_USUAL_END = re.compile(
    rb"\x16%(v)b\x16(%(v)b)&%(v)b\x16%(v)b(?:\x14[\x80-\xff]{0,2}[\x00-\x7f])?\x00" % {b"v": _VARINT}, re.DOTALL
)


def _usual_group(thrift: Thrift, file_bytes: int) -> RowGroup | None:
    """A row group in the bytes that pyarrow writes for one row, read ten times as fast; None if it is any other."""
    data, at = thrift.data, thrift.at
    if data[at : at + 1] != b"\x19" or data[at + 1] & 15 != STRUCT or data[at + 1] >> 4 == 15:
        return None
    at += 2
    chunks: list[Chunk] = []
    for _ in range(data[thrift.at + 1] >> 4):
        match = _USUAL_CHUNK.match(data, at)
        if not match or len(match[3]) != match[2][0]:
            return None
        physical_type, num_values, uncompressed, compressed, offset = map(_decoded, match.group(1, 4, 5, 6, 7))
        chunk = Chunk(physical_type, num_values, compressed, offset)
        chunks.append(_checked(chunk, uncompressed, file_bytes))
        at = match.end()
    end = _USUAL_END.match(data, at)
    num_rows = _decoded(end[1]) if end else -1
    if not end or num_rows < 0:
        return None
    thrift.at = end.end()
    return RowGroup(num_rows, tuple(chunks))


def _decoded(varint: bytes) -> int:
    value = 0
    for byte in reversed(varint):
        value = value << 7 | byte & 127
    return (value >> 1) ^ -(value & 1)


def _chunk(column: Any, file_bytes: int) -> Chunk:
    meta = column.get(3) if isinstance(column, dict) else None
    if not isinstance(meta, dict) or not column.keys() <= {2, 3, 4, 5, 6, 7}:
        raise ValueError("a column is in another file, or encrypted")
    physical_type, codec, num_values, uncompressed, compressed, offset = (_number(meta, f) for f in (1, 4, 5, 6, 7, 9))
    if codec != 0:
        raise ValueError("a column is compressed")
    if 11 in meta or not isinstance(meta.get(2), list) or not {*meta[2]} <= {_PLAIN, _RLE}:
        raise ValueError("a column has dictionary pages or another encoding than PLAIN")
    return _checked(Chunk(physical_type, num_values, compressed, offset), uncompressed, file_bytes)


def _checked(chunk: Chunk, uncompressed: int, file_bytes: int) -> Chunk:
    if min(chunk) < 0:
        raise ValueError("a column has a negative size or position")
    if uncompressed != chunk.num_bytes:
        raise ValueError("a column is compressed")
    if chunk.physical_type not in _WIDTHS:
        raise ValueError(f"a column has the physical type {chunk.physical_type}")
    if chunk.offset < 4 or chunk.offset + chunk.num_bytes > file_bytes:
        raise ValueError("a column is outside the file")
    return chunk


def _number(meta: Struct, field: int) -> int:
    value = meta.get(field)
    if type(value) is not int:
        raise ValueError("a column lacks its type, codec, sizes or position")
    return value


def _element(value: Any) -> Element:
    if not isinstance(value, dict) or not isinstance(value.get(4), bytes):
        raise ValueError("its schema is damaged")
    return Element(value[4].decode(), value.get(1), value.get(3, -1), value.get(5, 0), value.get(6))


def _pairs(values: Any) -> Iterator[tuple[bytes, bytes]]:
    if not isinstance(values, list):
        raise ValueError("its metadata is damaged")
    for pair in values:
        key, value = (pair.get(1), pair.get(2, b"")) if isinstance(pair, dict) else (None, None)
        if not isinstance(key, bytes) or not isinstance(value, bytes) or key.startswith(b"ARROW:"):
            raise ValueError("its metadata is damaged, or describes another schema")
        yield key, value


def check_pages(file: memoryview, group: RowGroup, leaves: Sequence[Leaf]) -> None:
    """Check that the pages of a row group hold what they claim, before anything is decoded.

    Raises:
        ValueError: a page is not plain, or claims more values than it has bytes for.
    """
    if len(group.chunks) != len(leaves):
        raise ValueError(f"a row group has {len(group.chunks)} columns of {len(leaves)}")
    for chunk, leaf in zip(group.chunks, leaves, strict=True):
        if chunk.physical_type != leaf.physical_type or (not leaf.is_list and chunk.num_values != group.num_rows):
            raise ValueError("a column has another type than its schema, or another number of rows than its group")
        num_values = num_bytes = 0
        for num_pages, (values, size) in enumerate(_pages(file, chunk)):
            # A list's element that is not there, and a null, take no bytes but those of their levels.
            least = 0 if leaf.is_list or leaf.is_optional else _least_bytes(chunk.physical_type, values)
            if size < least or num_pages > 16 + num_bytes // _PAGE_BYTES + num_values // _PAGE_VALUES:
                raise ValueError("a page claims more values than it has bytes for, or there are too many pages")
            num_values, num_bytes = num_values + values, num_bytes + size
        if num_values != chunk.num_values:
            raise ValueError(f"a column has pages of {num_values} values and claims {chunk.num_values}")
        if leaf.is_list and num_values > group.num_rows + num_bytes // 4:
            raise ValueError("a list claims more values than it has bytes for")


def leaves_of(elements: Sequence[Element]) -> list[Leaf]:
    """The columns of a schema, of which the elements are given from top to bottom."""
    leaves: list[Leaf] = []
    is_list = is_optional = False
    for element in elements[1:]:
        is_list, is_optional = is_list or element.repetition == 2, is_optional or element.repetition == 1
        if not element.num_children:  # a node has at most one child here, so the next begins at the top again
            leaves.append(Leaf(element.physical_type, is_list, is_optional))
            is_list = is_optional = False
    return leaves


def _least_bytes(physical_type: int, num_values: int) -> int:
    return num_values * _WIDTHS[physical_type] or (num_values + 7) // 8


def _pages(file: memoryview, chunk: Chunk) -> Iterator[tuple[int, int]]:
    """(values, bytes) of each page of a chunk."""
    at, end = chunk.offset, chunk.offset + chunk.num_bytes
    while at < end:
        thrift = Thrift(bytes(file[at : min(end, at + MAX_HEADER_BYTES)]))
        header = thrift.struct()
        page = header.get(5)
        sizes = (header.get(2), header.get(3))
        if header.get(1) != _DATA_PAGE or not isinstance(page, dict) or not header.keys() <= {1, 2, 3, 4, 5}:
            raise ValueError("a page is not a plain data page")
        if [page.get(field) for field in (2, 3, 4)] != [_PLAIN, _RLE, _RLE] or type(page.get(1)) is not int:
            raise ValueError("a page has another encoding than PLAIN")
        if sizes[0] != sizes[1] or type(sizes[0]) is not int or not 0 <= sizes[0] <= end - at - thrift.at:
            raise ValueError("a page is compressed, or ends outside its column")
        if page[1] < 0:
            raise ValueError("a page has a negative number of values")
        yield page[1], sizes[0]
        at += thrift.at + sizes[0]

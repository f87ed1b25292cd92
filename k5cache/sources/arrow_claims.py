"""May pyarrow read this Arrow file? What its messages claim is checked, and the offsets of the columns that are used.

A file of Arrow is mapped, so most of it takes no memory. Three things do or are followed blindly: buffers that are
compressed, a number of rows that no buffer stands for, and offsets. Messages are flatbuffers; what is read here of them
follows the published schemas of Arrow, ``Message.fbs`` and ``File.fbs``.
"""

from __future__ import annotations

import mmap
import struct
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from k5cache.shared import plain
from k5cache.sources.parquet_claims import TooLarge, most_bytes, most_rows

_MAGIC = b"ARROW1"
_CONTINUES = 0xFFFFFFFF
_DICTIONARY_BATCH, _RECORD_BATCH = 2, 3
_BLOCK_BYTES, _PAIR_BYTES = 24, 16


def check_messages(path: Path) -> None:
    """Check what the messages of a file or a stream of Arrow claim, before pyarrow takes memory for it.

    Raises:
        ValueError: they are damaged, or stand for much more than the file has.
        OSError: the file cannot be read.
    """
    with plain.open_plain(path) as file:
        if not path.stat().st_size:
            raise ValueError("it is empty")
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            try:
                _check(_Flat(data), len(data))
            except (struct.error, IndexError):
                raise ValueError("its messages are damaged") from None


def _check(data: _Flat, file_bytes: int) -> None:
    num_rows = num_bytes = 0
    is_file = data.data[: len(_MAGIC)] == _MAGIC
    for body, batch in _batches_of_file(data, file_bytes) if is_file else _batches_of_stream(data, file_bytes):
        nodes, num_nodes = data.vector(batch, 1)
        lengths = [data.long(nodes + _PAIR_BYTES * i) for i in range(min(num_nodes, file_bytes))]
        num_rows += max([data.long_of(batch, 0), *lengths])
        if min([0, *lengths]) < 0 or num_rows > most_rows(file_bytes):
            raise TooLarge(f"it claims {num_rows:,} rows in {file_bytes:,} bytes")
        if data.field(batch, 3):  # compressed: each buffer begins with its size, or -1
            buffers, num_buffers = data.vector(batch, 2)
            for i in range(min(num_buffers, file_bytes)):
                at, length = data.long(buffers + _PAIR_BYTES * i), data.long(buffers + _PAIR_BYTES * i + 8)
                num_bytes += max(data.long(body + at), 0) if length > 0 else 0
            if num_bytes > most_bytes(file_bytes):
                raise TooLarge(f"it unfolds to more than {most_bytes(file_bytes):,} bytes")


class _Flat:
    """Flatbuffers in bytes. Every method raises ``struct.error`` where there are none."""

    def __init__(self, data: mmap.mmap) -> None:
        self.data = data

    def number(self, kind: str, at: int) -> int:
        """One little-endian number."""
        if not 0 <= at < len(self.data):
            raise struct.error
        return int(struct.unpack_from(f"<{kind}", self.data, at)[0])

    def long(self, at: int) -> int:
        """64 bits with a sign."""
        return self.number("q", at)

    def root(self, at: int) -> int:
        """The table that begins a flatbuffer."""
        return at + self.number("I", at)

    def field(self, table: int, number: int) -> int:
        """Where a field of a table is; 0 if it has none."""
        virtual = table - self.number("i", table)
        if 4 + 2 * number >= self.number("H", virtual):
            return 0
        offset = self.number("H", virtual + 4 + 2 * number)
        return table + offset if offset else 0

    def long_of(self, table: int, number: int) -> int:
        """A field of 64 bits; 0 if there is none."""
        at = self.field(table, number)
        return self.long(at) if at else 0

    def table(self, table: int, number: int) -> int:
        """A field that is a table."""
        at = self.field(table, number)
        if not at:
            raise struct.error
        return at + self.number("I", at)

    def vector(self, table: int, number: int) -> tuple[int, int]:
        """(place of the first, number) of the elements of a field."""
        at = self.field(table, number)
        if not at:
            return 0, 0
        at += self.number("I", at)
        return at + 4, self.number("I", at)


def _batches_of_file(data: _Flat, file_bytes: int) -> Iterator[tuple[int, int]]:
    """(place of the body, place of the table ``RecordBatch``) of each message that the footer names."""
    if file_bytes < 18 or data.data[-len(_MAGIC) :] != _MAGIC:
        raise ValueError("it is cut off")
    length = data.number("i", file_bytes - 10)
    footer = data.root(file_bytes - 10 - length)
    for number in (2, 3):
        blocks, num_blocks = data.vector(footer, number)
        for i in range(num_blocks):
            at = data.long(blocks + _BLOCK_BYTES * i)
            found, _ = _message(data, at)
            if found:
                yield found


def _batches_of_stream(data: _Flat, file_bytes: int) -> Iterator[tuple[int, int]]:
    """The same of each message until the end."""
    at = 0
    while at + 8 <= file_bytes:
        if data.number("I", at + 4 * (data.number("I", at) == _CONTINUES)) == 0:
            return
        found, end = _message(data, at)
        if found:
            yield found
        if end <= at:
            raise struct.error
        at = end


def _message(data: _Flat, at: int) -> tuple[tuple[int, int] | None, int]:
    """Its body and its batch, None if it is of another kind; and where the next message begins."""
    at += 4 if data.number("I", at) == _CONTINUES else 0
    body = at + 4 + data.number("i", at)
    message = data.root(at + 4)
    end = body + data.long_of(message, 3)
    kind_at = data.field(message, 1)
    kind = data.number("B", kind_at) if kind_at else 0
    if kind not in (_RECORD_BATCH, _DICTIONARY_BATCH):
        return None, end
    header = data.table(message, 2)
    return (body, data.table(header, 1) if kind == _DICTIONARY_BATCH else header), end


# --- columns ---


def validated(column: pa.ChunkedArray, name: str, file_bytes: int) -> pa.ChunkedArray:
    """A column whose offsets lie within it, and which does not unfold to much more than its file.

    Raises:
        ValueError: it is another.
    """
    for chunk in column.chunks:
        _validate(chunk)
    num_bytes = sum(unfolded_bytes(chunk) for chunk in column.chunks)
    if num_bytes > most_bytes(file_bytes):
        raise TooLarge(f"the column {name} unfolds to {num_bytes:,} bytes")
    return column


def _validate(array: pa.Array) -> None:
    """Check offsets and indices. Text that is not UTF-8 is the matter of its row."""
    array.validate()
    if pa.types.is_struct(array.type):
        for i in range(array.type.num_fields):
            _validate(array.field(i))
        return
    try:
        array.validate(full=True)
    except pa.ArrowInvalid as error:
        if "UTF8" not in str(error) or pa.types.is_nested(array.type):
            raise


def unfolded_bytes(array: pa.Array) -> int:
    """How large an array is as Python's values: a dictionary or a view can stand for much more than it has.

    Raises:
        ValueError: it is of a kind of which this is not known.
    """
    kind = array.type
    if isinstance(array, pa.ExtensionArray):
        return unfolded_bytes(array.storage)
    if isinstance(array, pa.DictionaryArray):
        values = array.dictionary
        if not len(array) or not len(values):
            return 0
        if not (pa.types.is_string(values.type) or pa.types.is_binary(values.type)
                or pa.types.is_large_string(values.type) or pa.types.is_large_binary(values.type)):  # fmt: skip
            return len(array) * max(unfolded_bytes(values), 8)
        total = pc.sum(pc.binary_length(values).take(array.indices)).as_py() or 0
        return int(total) + 8 * len(array)
    if pa.types.is_string_view(kind) or pa.types.is_binary_view(kind):
        views = np.frombuffer(array.buffers()[1] or b"", np.int32).reshape(-1, 4)
        return int(views[array.offset : array.offset + len(array), 0].astype(np.int64).sum()) + 16 * len(array)
    if pa.types.is_struct(kind):
        return sum(unfolded_bytes(array.field(i)) for i in range(kind.num_fields))
    if pa.types.is_map(kind):
        return unfolded_bytes(array.keys) + unfolded_bytes(array.items) + 8 * len(array)
    if pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind):
        return unfolded_bytes(array.values) + 8 * len(array)
    if pa.types.is_nested(kind) or pa.types.is_run_end_encoded(kind):
        raise ValueError(f"a column of the type {str(kind)[:100]} is not read")
    return int(array.nbytes)

"""What do bytes in Thrift's compact protocol say? Parquet's footer and page headers are written in it.

pyarrow allocates what such bytes claim, and ends the process at some of them, for example at an unknown codec. So what
a stranger wrote is read here first, within bounds. It follows the published specification of the compact protocol.
"""

from __future__ import annotations

from typing import Any

MOST_VALUES = 20_000
"""In one structure, unless told otherwise. A row group of the index has about 1,000."""
_MOST_DEPTH = 16
_TRUE, _FALSE, _BYTE, _I16, _I32, _I64, _DOUBLE, _BINARY, _LIST, _SET, _MAP, STRUCT = range(1, 13)
_BITS = {_I16: 16, _I32: 32, _I64: 64}

Struct = dict[int, Any]
"""Field number -> value: bool, int, bytes, a list of values, or another structure."""


class Thrift:
    """A position in bytes that are read from front to back.

    Every method raises ValueError if the bytes are not of the protocol, or claim more than there is.
    """

    def __init__(self, data: bytes, at: int = 0, most_values: int = MOST_VALUES) -> None:
        self.data, self.at = data, at
        self._most = self._left = most_values

    def struct(self, depth: int = 0) -> Struct:
        """The structure that begins here, with at most ``most_values`` values at any depth."""
        if depth == 0:
            self._left = self._most
        fields: Struct = {}
        number = 0
        while (header := self.field(number)) is not None:
            number, kind = header
            if number in fields:
                raise ValueError(f"field {number} is there twice")
            fields[number] = self.value(kind, depth)
        return fields

    def field(self, previous: int) -> tuple[int, int] | None:
        """(number, kind) of the next field of a structure; None at its end."""
        head = self._byte()
        if not head:
            return None
        return (previous + (head >> 4) if head >> 4 else self._integer(_I16)), head & 15

    def value(self, kind: int, depth: int = 0) -> Any:
        """The value of a field."""
        self._left -= 1
        if kind in _BITS:
            return self._integer(kind)
        if kind == _BINARY:
            return self._bytes(self._varint())
        if self._left < 0 or depth > _MOST_DEPTH:
            raise ValueError(f"a structure has more than {self._most} values, or too many in each other")
        if kind == STRUCT:
            return self.struct(depth + 1)
        if kind in (_LIST, _SET):
            return self._list(depth)
        if kind in (_TRUE, _FALSE):
            return kind == _TRUE
        if kind in (_BYTE, _DOUBLE):
            return self._bytes(1 if kind == _BYTE else 8)
        raise ValueError(f"a value has the kind {kind}")  # a map: Parquet has none

    def list_header(self) -> tuple[int, int]:
        """(kind of the elements, their number) of a list. There are at least as many bytes as elements."""
        head = self._byte()
        size = head >> 4 if head >> 4 < 15 else self._varint()
        if size > len(self.data) - self.at:
            raise ValueError(f"a list claims {size} elements")
        return head & 15, size

    def _list(self, depth: int) -> list[Any]:
        kind, size = self.list_header()
        if size > self._left:
            raise ValueError(f"a list has {size} elements")
        if kind in (_TRUE, _FALSE):  # here a byte of its own, in a structure the kind of the field
            return [self._byte() == 1 for _ in range(size)]
        return [self.value(kind, depth) for _ in range(size)]

    def _byte(self) -> int:
        if self.at >= len(self.data):
            raise ValueError("it ends in the middle of a value")
        self.at += 1
        return self.data[self.at - 1]

    def _bytes(self, size: int) -> bytes:
        if size > len(self.data) - self.at:
            raise ValueError(f"a text claims {size} bytes")
        self.at += size
        return self.data[self.at - size : self.at]

    def _varint(self) -> int:
        data, at, end = self.data, self.at, min(len(self.data), self.at + 10)
        value = shift = 0
        while at < end:
            byte = data[at]
            at += 1
            value |= (byte & 127) << shift
            if byte < 128:
                self.at = at
                return value
            shift += 7
        raise ValueError("a number has no end")

    def _integer(self, kind: int) -> int:
        value = self._varint()
        if value >> _BITS[kind]:
            raise ValueError(f"a number does not fit {_BITS[kind]} bits")
        return (value >> 1) ^ -(value & 1)

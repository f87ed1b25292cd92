"""How is a compressed file read that may be a bomb? As long as it does not grow to more than a hundred times its size.

Pictures do not compress, and text to about a tenth. xz makes 15 GB of zeros of one megabyte, and skips them one by one.
"""

from __future__ import annotations

import io
from typing import IO, Any

_FREE_BYTES = 64 << 20
_MOST_TIMES = 100
_PIECE_BYTES = 4 << 20


class Inflated(ValueError):
    """A compressed file has become too large; says how large."""


def bounded(stream: Any, raw: IO[bytes], most: int | None = None) -> IO[bytes]:
    """The bytes of ``stream``, which decompresses ``raw``.

    Args:
        most: bytes that it may have in all.

    Raises:
        Inflated: while reading or seeking, before more of it is in memory.
    """
    return io.BufferedReader(_Bounded(stream, raw, most), 1 << 16)


class _Bounded(io.RawIOBase):
    def __init__(self, stream: Any, raw: IO[bytes], most: int | None) -> None:
        self._stream, self._raw, self._most = stream, raw, most

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return int(self._stream.tell())

    def readinto(self, buffer: Any) -> int:
        data = self._stream.read(min(len(buffer), _PIECE_BYTES))
        buffer[: len(data)] = data
        self._check()
        return len(data)

    def seek(self, place: int, whence: int = io.SEEK_SET) -> int:
        if whence == io.SEEK_CUR:
            place += self.tell()
        elif whence != io.SEEK_SET:
            raise io.UnsupportedOperation("the end of a compressed file is not known")
        if place < self.tell():
            self._stream.seek(place)
        while self.tell() < place and self._stream.read(min(_PIECE_BYTES, place - self.tell())):
            self._check()
        return self.tell()

    def _check(self) -> None:
        size, of_file = self.tell(), max(self._raw.tell(), 1)
        if self._most is not None and size > self._most:
            raise Inflated(f"it decompresses to more than {self._most:,} bytes")
        if size > _FREE_BYTES + _MOST_TIMES * of_file:
            raise Inflated(f"it decompresses to more than {_MOST_TIMES} times its size")

"""What do a PNG's chunks say that Pillow does not, and which of them are damaged?"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass

from PIL import PngImagePlugin

SIGNATURE = b"\x89PNG\r\n\x1a\n"
_DEPTH = 24  # where the number of bits stands, in IHDR

# Pillow refuses a profile or a text of more than 1 MB, which editors and ComfyUI write. The limits stay, because a
# chunk of 64 KB can unpack to 64 MB.
PngImagePlugin.MAX_TEXT_CHUNK = 32 * 2**20
PngImagePlugin.MAX_TEXT_MEMORY = 128 * 2**20


@dataclass(frozen=True)
class _Chunk:
    name: bytes
    start: int
    """Of the chunk, length and name included."""
    end: int
    is_intact: bool

    @property
    def is_ancillary(self) -> bool:
        """Whether an image can be shown without it."""
        return bool(self.name[0] & 0x20)


def without_damage(data: bytes) -> tuple[bytes, list[str]]:
    """The file without the ancillary chunks whose checksum is wrong, and their names. libpng leaves them out too."""
    damaged = [chunk for chunk in _chunks(data) if chunk.is_ancillary and not chunk.is_intact]
    parts, at = [], 0
    for chunk in damaged:
        parts.append(data[at : chunk.start])
        at = chunk.end
    return b"".join((*parts, data[at:])), [chunk.name.decode("ascii") for chunk in damaged]


def key_colour(data: bytes) -> tuple[int, ...]:
    """The transparent grey or colour of a PNG without palette, in the file's own bits; empty if there is none."""
    for chunk in _chunks(data):
        if chunk.name == b"tRNS":
            bits = depth(data)
            body = data[chunk.start + 8 : chunk.end - 4]
            values = struct.unpack(f">{len(body) // 2}H", body[: len(body) // 2 * 2])
            return tuple(value & (2**bits - 1) for value in values)
        if chunk.name == b"IDAT":
            break
    return ()


def depth(data: bytes) -> int:
    """Bits of a sample: 1, 2, 4, 8 or 16."""
    return data[_DEPTH]


def _chunks(data: bytes) -> Iterator[_Chunk]:
    """Every chunk up to the first that is not whole."""
    at = len(SIGNATURE)
    while at + 12 <= len(data):
        (length,) = struct.unpack_from(">I", data, at)
        name, end = data[at + 4 : at + 8], at + 12 + length
        if end > len(data) or not name.isalpha():
            return
        (checksum,) = struct.unpack_from(">I", data, end - 4)
        yield _Chunk(name, at, end, checksum == zlib.crc32(data[at + 4 : end - 4]))
        at = end

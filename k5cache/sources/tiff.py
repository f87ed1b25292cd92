"""Which TIFFs does Pillow read wrongly, and how is such a file written anew so that it reads it right?

Pillow reads uncompressed TIFFs itself and leaves compressed ones to libtiff. Its own reader takes the planes of a file
that stores each colour apart for 8-bit planes, so 16-bit ones become a smear and inverted ones are not inverted. It
does not know either that four pixels of YCbCr may share a colour. libtiff reads both right, so the strips are packed
here without compressing them, and the tags say so.
"""

from __future__ import annotations

import struct
import zlib
from dataclasses import dataclass

from PIL import TiffImagePlugin

from k5cache.sources.items import UnreadableImage

BITS, COMPRESSION, PHOTOMETRIC, SAMPLES, PLANAR, SAMPLE_FORMAT = 258, 259, 262, 277, 284, 339
_WIDTH, _HEIGHT, _YCBCR = 256, 257, 6
_STRIPS, _TILES = (273, 279), (324, 325)  # offsets, numbers of bytes
_SEPARATE, _CHUNKY = 2, 1
_RAW, _DEFLATE = 1, 8
_SHORT, _LONG, _LONG8 = 3, 4, 16
_SIZES = {_SHORT: "H", _LONG: "I", _LONG8: "Q"}
_AS_PNG = "save it as PNG"


def refuse_what_is_read_wrongly(image: TiffImagePlugin.TiffImageFile) -> None:
    """Raise an ``UnreadableImage`` for the rare kinds that neither Pillow nor libtiff as Pillow calls it gets right."""
    is_separate = image.tag_v2.get(PLANAR, _CHUNKY) == _SEPARATE
    if is_separate and image.mode in ("LA", "La", "PA"):
        raise UnreadableImage(f"is a TIFF that stores grey and alpha in separate planes: {_AS_PNG}")
    if image.mode in ("I", "F") and image.tag_v2.prefix == b"MM" and image.info.get("compression") != "raw":
        raise UnreadableImage(f"is a compressed big-endian TIFF of 32-bit or signed numbers: {_AS_PNG}")


def is_misread(image: TiffImagePlugin.TiffImageFile) -> bool:
    """Whether Pillow would read this file's planes as if they had other bits than they have, or colours of fewer pixels
    as if every pixel had its own."""
    if image.info.get("compression") != "raw":
        return False
    if image.tag_v2.get(PHOTOMETRIC) == _YCBCR:
        width, height = image.tag_v2.get(_WIDTH, 0), image.tag_v2.get(_HEIGHT, 0)
        return 0 < sum(image.tag_v2.get(_STRIPS[1], ())) < 3 * width * height
    return image.tag_v2.get(PLANAR, _CHUNKY) == _SEPARATE


def rewritten(data: bytes) -> bytes:
    """The file with planes that Pillow reads right: joined if there is only one, else marked and packed as deflated.

    Raises:
        UnreadableImage: it is truncated, or does not say where its planes end.
    """
    file = _Tags(data)
    if file.value(SAMPLES, 1) == 1:
        file.set(PLANAR, _SHORT, [_CHUNKY])
        return bytes(file.data)
    offsets_tag, counts_tag = _TILES if _TILES[0] in file.entries else _STRIPS
    offsets, counts = file.values(offsets_tag), file.values(counts_tag)
    if not offsets or len(offsets) != len(counts):
        raise UnreadableImage(f"is a TIFF that does not say where its planes end: {_AS_PNG}")
    strips = [data[offset : offset + count] for offset, count in zip(offsets, counts, strict=True)]
    if any(len(strip) < count for strip, count in zip(strips, counts, strict=True)):
        raise UnreadableImage("cannot be read (image file is truncated)")
    packed = [zlib.compress(strip, level=0) for strip in strips]
    kind = _LONG8 if file.is_big else _LONG
    file.set(offsets_tag, kind, [file.append(strip) for strip in packed])
    file.set(counts_tag, kind, [len(strip) for strip in packed])
    file.set(COMPRESSION, _SHORT, [_DEFLATE])
    return bytes(file.data)


def is_apart(data: bytes) -> bool:
    """Whether a file stores several planes, each for itself and uncompressed. Some of these Pillow does not open."""
    try:
        file = _Tags(data)
        how = file.value(PLANAR, _CHUNKY), file.value(COMPRESSION, _RAW)
        return how == (_SEPARATE, _RAW) and file.value(SAMPLES, 1) > 1
    except struct.error:  # not whole
        return False


@dataclass(frozen=True)
class _Entry:
    """One tag of the first page, as it stands in the file."""

    at: int
    """Where its type, count and value are written; the tag's number stands before them."""
    kind: int
    count: int


class _Tags:
    """The tags of a TIFF's first page, to be read and changed in a copy of the file. Numbers only."""

    def __init__(self, data: bytes) -> None:
        self.data = bytearray(data)
        self._order = "<" if data[:2] == b"II" else ">"
        self.is_big = data[2:4] in (b"\x2b\0", b"\0\x2b")
        at = self._read("Q", 8) if self.is_big else self._read("I", 4)
        count, first, size = (self._read("Q", at), at + 8, 20) if self.is_big else (self._read("H", at), at + 2, 12)
        self.entries: dict[int, _Entry] = {}
        for place in range(first, first + count * size, size):
            number, kind = struct.unpack_from(self._order + "HH", self.data, place)
            self.entries[number] = _Entry(place + 2, kind, self._read("Q" if self.is_big else "I", place + 4))

    def value(self, number: int, default: int) -> int:
        return next(iter(self.values(number)), default)

    def values(self, number: int) -> list[int]:
        entry = self.entries.get(number)
        if entry is None or entry.kind not in _SIZES:
            return []
        code = f"{self._order}{entry.count}{_SIZES[entry.kind]}"
        at = self._inline(entry)
        if struct.calcsize(code) > self._room:
            at = self._read("Q" if self.is_big else "I", at)
        return list(struct.unpack_from(code, self.data, at))

    def set(self, number: int, kind: int, values: list[int]) -> None:
        """Replace the values of a tag that the file has."""
        entry = self.entries[number]
        raw = struct.pack(f"{self._order}{len(values)}{_SIZES[kind]}", *values)
        if len(raw) > self._room:
            raw = struct.pack(self._order + ("Q" if self.is_big else "I"), self.append(raw))
        head = struct.pack(self._order + ("HQ" if self.is_big else "HI"), kind, len(values))
        self.data[entry.at : entry.at + len(head) + self._room] = head + raw.ljust(self._room, b"\0")
        self.entries[number] = _Entry(entry.at, kind, len(values))

    def append(self, raw: bytes) -> int:
        """Put bytes behind the file; returns where."""
        self.data += b"\0" * (-len(self.data) % 8)
        at = len(self.data)
        self.data += raw
        return at

    @property
    def _room(self) -> int:
        """How many bytes of values an entry itself can hold."""
        return 8 if self.is_big else 4

    def _inline(self, entry: _Entry) -> int:
        return entry.at + (10 if self.is_big else 6)

    def _read(self, code: str, at: int) -> int:
        return int(struct.unpack_from(self._order + code, self.data, at)[0])

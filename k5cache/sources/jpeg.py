"""Does a JPEG without its end marker lack anything else? Decoders do not say: they fill what is missing with grey."""

from __future__ import annotations

import io
import struct
from collections.abc import Iterator

from PIL import Image

END = b"\xff\xd9"
_SCAN = b"\xff\xda"
_FRAMES = frozenset({*range(0xC0, 0xD0)} - {0xC4, 0xC8, 0xCC})  # SOF0 to SOF15, without DHT, JPG and DAC
_RESTARTS = range(0xD0, 0xD8)
_NUM_COEFFICIENTS = 64
_TAIL_BYTES = 4096


def lacks_end(data: bytes) -> bool:
    """Whether no end marker follows the last scan. Pixels may still be complete."""
    return data.rfind(END) < data.rfind(_SCAN)


def completed(data: bytes) -> bytes | None:
    """The file with its end marker, if that is all it lacks; None if pixels are missing.

    Behind the data different bytes are put, one after another. A decoder that has every pixel reads none of them; one
    that lacks a single code of a single pixel takes it from there, so the pictures differ. Restart markers are among
    these bytes for files that end just before one.
    """
    if not _has_every_coefficient(data):
        return None
    body = data.rstrip(b"\xff")
    tails = [b"\x00" * _TAIL_BYTES, b"\x55" * _TAIL_BYTES, b"\xaa" * _TAIL_BYTES]
    tails += [bytes([0xFF, restart]) + b"\x55" * _TAIL_BYTES for restart in _RESTARTS]
    pixels = _decode(body + END)
    is_complete = all(_decode(body + tail + END) == pixels for tail in tails)
    return body + END if is_complete else None


def _decode(data: bytes) -> bytes:
    with Image.open(io.BytesIO(data), formats=("JPEG",)) as image:
        return image.tobytes()


def _has_every_coefficient(data: bytes) -> bool:
    """Whether there is a scan for each coefficient of each component, to its last bit.

    A progressive file that ends between two scans is whole as far as a decoder can see, only blurred.
    """
    components = b""
    final: dict[int, set[int]] = {}
    for marker, segment in _segments(data):
        if marker in _FRAMES:
            components = segment[6::3]
        elif marker == _SCAN[1]:
            count = segment[0]
            first, last, bits = segment[1 + 2 * count : 4 + 2 * count]
            if bits & 15 == 0:  # otherwise a later scan refines it
                for component in segment[1 : 1 + 2 * count : 2]:
                    final.setdefault(component, set()).update(range(first, last + 1))
    return bool(components) and all(len(final.get(c, ())) == _NUM_COEFFICIENTS for c in components)


def _segments(data: bytes) -> Iterator[tuple[int, bytes]]:
    """Each marker with its segment, without the length; the pixels of a scan are passed over."""
    at = 2
    while (at := data.find(b"\xff", at)) >= 0 and at + 4 <= len(data):
        marker = data[at + 1]
        if marker in (0x00, 0xFF) or marker in _RESTARTS:
            at += 1 if marker == 0xFF else 2
            continue
        if marker == END[1]:
            return
        (length,) = struct.unpack_from(">H", data, at + 2)
        yield marker, data[at + 4 : at + 2 + length]
        at += 2 + length

"""Does a JPEG lack pixels? Decoders do not always say: they fill what is missing with grey, up to an end marker."""

from __future__ import annotations

import io
from collections.abc import Iterator

from PIL import Image

END = b"\xff\xd9"
_SCAN = b"\xff\xda"
_FRAMES = frozenset({*range(0xC0, 0xD0)} - {0xC4, 0xC8, 0xCC})  # SOF0 to SOF15, without DHT, JPG and DAC
_RESTARTS = range(0xD0, 0xD8)
_NUM_COEFFICIENTS = 64
_TAIL_BYTES = 4096
_GREY, _GREY_ROUNDING = 128, 2  # of colours that are converted


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
    return body + END if _is_complete(body) else None


def looks_cut(image: Image.Image) -> bool:
    """Whether a decoded JPEG may have been cut before its end marker was put there: if its last pixel is mid-grey.

    That is what libjpeg gives for every block behind a cut, in each colour. Of progressive files, whose cuts are only
    blurs, it says nothing about the pixels, so each of them may be.
    """
    corner = image.getpixel((image.width - 1, image.height - 1))
    values = corner if isinstance(corner, tuple) else (corner,)
    is_grey = all(value is not None and abs(value - _GREY) <= _GREY_ROUNDING for value in values)
    return is_grey or "progressive" in image.info


def lacks_pixels(data: bytes) -> bool:
    """Whether a JPEG with an end marker was cut before it. Not seen are cuts within the last block, and in a
    progressive file within the last scan, which has the lowest bits.
    """
    end = _end_of(data)
    if end is None:
        return False
    if not _has_every_coefficient(data[:end]):
        return True
    with Image.open(io.BytesIO(data), formats=("JPEG",)) as image:
        return "progressive" not in image.info and not _is_complete(data[:end].rstrip(b"\xff"))


def _is_complete(body: bytes) -> bool:
    """Whether the decoder takes nothing from the bytes behind the data, whatever they are."""
    tails = [b"\x00" * _TAIL_BYTES, b"\x55" * _TAIL_BYTES, b"\xaa" * _TAIL_BYTES]
    tails += [bytes([0xFF, restart]) + b"\x55" * _TAIL_BYTES for restart in _RESTARTS]
    pixels = _decode(body + END)
    return all(_decode(body + tail + END) == pixels for tail in tails)


def _decode(data: bytes) -> bytes:
    with Image.open(io.BytesIO(data), formats=("JPEG",)) as image:
        return image.tobytes()


def _has_every_coefficient(data: bytes) -> bool:
    """Whether there is a scan for each coefficient of each component, to its last bit.

    A progressive file that ends between two scans is whole as far as a decoder can see, only blurred.
    """
    components = b""
    final: dict[int, set[int]] = {}
    for marker, _, segment in _segments(data):
        if marker in _FRAMES:
            components = segment[6::3]
        elif marker == _SCAN[1]:
            count = segment[0] if segment else 0
            if len(segment) < 4 + 2 * count:
                return False
            first, last, bits = segment[1 + 2 * count : 4 + 2 * count]
            if bits & 15 == 0:  # otherwise a later scan refines it
                for component in segment[1 : 1 + 2 * count : 2]:
                    final.setdefault(component, set()).update(range(first, last + 1))
    return bool(components) and all(len(final.get(c, ())) == _NUM_COEFFICIENTS for c in components)


def _end_of(data: bytes) -> int | None:
    """Where the end marker of the first picture is. Others may follow it, and previews are in its segments."""
    return next((at for marker, at, _ in _segments(data) if marker == END[1]), None)


def _segments(data: bytes) -> Iterator[tuple[int, int, bytes]]:
    """Each marker to the end marker, its place, and its segment without the length. Pixels are passed over."""
    at = 2
    while (at := data.find(b"\xff", at)) >= 0 and at + 2 <= len(data):
        marker = data[at + 1]
        if marker in (0x00, 0xFF) or marker in _RESTARTS:
            at += 1 if marker == 0xFF else 2
            continue
        if marker == END[1]:
            yield marker, at, b""
            return
        length = int.from_bytes(data[at + 2 : at + 4])
        yield marker, at, data[at + 4 : at + 2 + length]
        at += 2 + length

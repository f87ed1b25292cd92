"""Picture files that tests write byte by byte, and the pixels that an encode sees in them."""

from __future__ import annotations

import itertools
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from k5cache.buckets import Bucket, cover
from k5cache.sources.images import image_size, load_pixels

RED, GREEN, BLUE, BLACK, WHITE = (255, 0, 0), (0, 255, 0), (0, 0, 255), (0, 0, 0), (255, 255, 255)


def whole(path: Path) -> torch.Tensor:
    """The pixels that are trained on if the bucket has exactly the size of the image."""
    width, height = image_size(path)
    return load_pixels(path, cover(width, height, Bucket(width, height)))


def colour(path: Path, x: int = 0, y: int = 0) -> tuple[int, ...]:
    return tuple(whole(path)[:, y, x].tolist())


def png(path: Path, size: tuple[int, int], depth: int, kind: int, rows: bytes, before: bytes = b"", after: bytes = b""):
    """A PNG of any depth and kind (0 grey, 2 RGB, 4 grey + alpha, 6 RGBA), with chunks before and after the pixels."""
    header = struct.pack(">IIBBBBB", *size, depth, kind, 0, 0, 0)
    data = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + before + chunk(b"IDAT", zlib.compress(rows)) + after
    path.write_bytes(data + chunk(b"IEND", b""))
    return path


def chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def tiff(
    path: Path,
    values: np.ndarray,
    photometric: int,
    *,
    planar: int = 1,
    order: str = "<",
    compression: int = 1,
    block: tuple[int, int] | None = None,
    is_tiled: bool = False,
    predictor: int = 1,
    extra: tuple[int, ...] = (),
    bits: int = 0,
    colours: tuple[int, ...] = (),
    is_big: bool = False,
) -> Path:
    """A TIFF of ``values`` [H, W, samples], whose kind of numbers is the file's.

    Args:
        planar: 1 keeps the samples of a pixel together, 2 stores each in a plane of its own.
        order: ``<`` for II, ``>`` for MM.
        compression: 1 none, 5 LZW, 8 deflate, 32773 PackBits.
        block: (width, height) of a strip or tile; by default one strip.
        predictor: 2 stores the difference to the pixel at the left.
        bits: of a sample, if fewer than ``values`` have.
        is_big: write a BigTIFF.
    """
    height, width, samples = values.shape
    bits, form = bits or values.dtype.itemsize * 8, {"u": 1, "i": 2, "f": 3}[values.dtype.kind]
    planes = np.split(values, samples, axis=2) if planar == 2 else [values]
    block = block or (width, height)
    blocks = [part for plane in planes for part in _blocks(plane, block, is_tiled)]
    data = [_packed(_differences(part) if predictor == 2 else part, order, compression, bits) for part in blocks]
    tags = {256: [width], 257: [height], 258: [bits] * samples, 259: [compression], 262: [photometric], 277: [samples],
            284: [planar], 317: [predictor], 320: list(colours), 338: list(extra), 339: [form] * samples}  # fmt: skip
    tags |= {322: [block[0]], 323: [block[1]]} if is_tiled else {278: [block[1]]}
    places, sizes = (324, 325) if is_tiled else (273, 279)
    tags |= {places: [0] * len(data), sizes: [len(part) for part in data]}
    tags = {number: tags[number] for number in sorted(tags) if tags[number]}
    room, word = (8, "Q") if is_big else (4, "I")
    kinds = {number: ("I", 4) if number in (places, sizes) else ("H", 3) for number in tags}
    raw = {n: struct.pack(f"{order}{len(v)}{kinds[n][0]}", *v) for n, v in tags.items()}
    at = (16 + 8 + 20 * len(tags) + 8) if is_big else (8 + 2 + 12 * len(tags) + 4)
    outside = {}
    for number in raw:
        if len(raw[number]) > room:
            outside[number], at = at, at + len(raw[number]) + len(raw[number]) % 2
    offsets = list(itertools.accumulate([len(part) for part in data[:-1]], initial=at))
    raw[places] = struct.pack(f"{order}{len(data)}I", *offsets)
    mark = b"II" if order == "<" else b"MM"
    file = struct.pack(order + "2sHHHQQ", mark, 43, 8, 0, 16, len(tags)) if is_big else b""
    file = file or struct.pack(order + "2sHIH", mark, 42, 8, len(tags))
    for number, (_, kind) in kinds.items():
        value = struct.pack(order + word, outside[number]) if number in outside else raw[number].ljust(room, b"\0")
        file += struct.pack(f"{order}HH{word}", number, kind, len(tags[number])) + value
    file += struct.pack(order + word, 0) + b"".join(raw[n] + b"\0" * (len(raw[n]) % 2) for n in outside)
    path.write_bytes(file + b"".join(data))
    return path


def _blocks(plane: np.ndarray, block: tuple[int, int], is_tiled: bool) -> Iterator[np.ndarray]:
    """The strips of a plane, or its tiles, which are filled up at the borders."""
    width, height = block
    for top, left in itertools.product(range(0, plane.shape[0], height), range(0, plane.shape[1], width)):
        part = plane[top : top + height, left : left + width]
        missing = ((0, height - part.shape[0]), (0, width - part.shape[1]), (0, 0))
        yield np.pad(part, missing) if is_tiled else part


def _differences(part: np.ndarray) -> np.ndarray:
    differences = part.copy()
    differences[:, 1:] -= part[:, :-1]
    return differences


def _packed(part: np.ndarray, order: str, compression: int, bits: int) -> bytes:
    if bits < 8:
        shifts = np.arange(bits - 1, -1, -1)
        raw = np.packbits((part >> shifts & 1).astype(np.uint8).reshape(len(part), -1), axis=1).tobytes()
    else:
        raw = part.astype(part.dtype.newbyteorder(order)).tobytes()
    if compression == 8:
        return zlib.compress(raw)
    if compression == 5:  # LZW without a table: every code is a byte, and the table is cleared before it grows
        codes = [code for i in range(0, len(raw), 200) for code in (256, *raw[i : i + 200])]
        text = "".join(f"{code:09b}" for code in (*codes, 257))
        return int(text.ljust(-(-len(text) // 8) * 8, "0"), 2).to_bytes(-(-len(text) // 8), "big")
    if compression == 32773:  # PackBits without runs, each row for itself
        rows = np.frombuffer(raw, np.uint8).reshape(len(part), -1)
        runs = [row[i : i + 128].tobytes() for row in rows for i in range(0, len(row), 128)]
        return b"".join(bytes([len(run) - 1]) + run for run in runs)
    return raw


def bmp(path: Path, pixels: np.ndarray, masks: tuple[int, int, int, int], header: int = 124) -> Path:
    """A 32-bit BMP of ``pixels`` uint8 [H, W, 4], with BITFIELDS in a header of that many bytes."""
    height, width = pixels.shape[:2]
    body = pixels[::-1].tobytes()
    head = struct.pack("<IiiHHIIiiII", header, width, height, 1, 32, 3, len(body), 0, 0, 0, 0)
    head = (head + struct.pack("<4I", *masks)).ljust(header, b"\0")
    at = 14 + len(head)
    path.write_bytes(b"BM" + struct.pack("<IHHI", at + len(body), 0, 0, at) + head + body)
    return path

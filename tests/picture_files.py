"""Picture files that tests write byte by byte, and the pixels that an encode sees in them."""

from __future__ import annotations

import struct
import zlib
from pathlib import Path

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


def tiff(path: Path, size: tuple[int, int], bits: int, samples: int, photometric: int, data: bytes, fmt: int = 1):
    """A little-endian TIFF of one uncompressed strip."""
    count, extra, at = 10, b"", 8 + 2 + 10 * 12 + 4
    if samples > 1:
        extra, at = struct.pack(f"<{samples}H", *[bits] * samples), at + 2 * samples
    tags = [
        (256, 4, 1, size[0]), (257, 4, 1, size[1]), (258, 3, samples, bits if samples == 1 else at - 2 * samples),
        (259, 3, 1, 1), (262, 3, 1, photometric), (273, 4, 1, at), (277, 3, 1, samples), (278, 4, 1, size[1]),
        (279, 4, 1, len(data)), (339, 3, 1, fmt),
    ]  # fmt: skip
    head = struct.pack("<2sHIH", b"II", 42, 8, count) + b"".join(struct.pack("<HHII", *tag) for tag in tags)
    path.write_bytes(head + struct.pack("<I", 0) + extra + data)
    return path

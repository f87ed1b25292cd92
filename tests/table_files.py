"""Tables, tars and small pictures for the tests of sources."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from k5cache.options import CacheConfig
from k5cache.sources.find import find

IMAGES = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


def png(shade: int, size: tuple[int, int] = (6, 4)) -> bytes:
    """A PNG of one red."""
    file = io.BytesIO()
    Image.new("RGB", size, (shade, 0, 0)).save(file, "PNG")
    return file.getvalue()


def tar(path: Path, members: dict[str, str | bytes] | list[tuple[str, str | bytes]], mode: str = "w") -> Path:
    """A tar with these members in their order."""
    with tarfile.open(path, mode) as archive:  # type: ignore[call-overload]
        for name, content in members.items() if isinstance(members, dict) else members:
            data = content if isinstance(content, bytes) else content.encode()
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path


def parquet(path: Path, images: list[object], texts: list[object], **options: object) -> Path:
    """A table with the columns ``image`` and ``text``. An image is its bytes, or ``(bytes, path)``."""
    cells = [image if image is None or isinstance(image, tuple) else (image, None) for image in images]
    rows = [None if cell is None else {"bytes": cell[0], "path": cell[1]} for cell in cells]
    pq.write_table(pa.table({"image": pa.array(rows, IMAGES), "text": texts}), path, **options)
    return path


def captions(source: Path, **options: object) -> dict[str, tuple[str, ...]]:
    """Path -> captions of every item."""
    return {item.path: item.captions for item in find(source, CacheConfig(**options)).items}


def skipped(source: Path, **options: object) -> dict[str, str]:
    """Path -> reason of everything that is skipped."""
    return {skip.path: skip.reason for skip in find(source, CacheConfig(**options)).skipped}


def contents(source: Path, **options: object) -> dict[str, bytes]:
    """Path -> bytes of every image and mask."""
    found = find(source, CacheConfig(**options))
    paths = [path for item in found.items for path in (item.path, *([item.mask.path] if item.mask else []))]
    read = ((path, found.read(path)) for path in paths)
    return {path: content if isinstance(content, bytes) else content.read_bytes() for path, content in read}

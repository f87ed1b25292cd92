"""Read tables that somebody changed or made large, as an encode reads them. Run as a program.

``python -m tests.hostile_tables FOLDER FIRST COUNT`` prints what did not end in an honest read or in a sentence. It
prints each number before it tries it, so that the last one is known if it is killed, and at the end how much memory
was taken.
"""

from __future__ import annotations

import io
import random
import resource
import sys
import traceback
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.ipc
import pyarrow.parquet as pq

from k5cache.options import CacheConfig
from k5cache.shared.errors import K5Error
from k5cache.sources.find import find
from k5cache.sources.items import UnreadableImage
from tests.table_files import IMAGES

PARQUET: tuple[dict[str, Any], ...] = (
    {}, {"compression": "zstd"}, {"data_page_version": "2.0"}, {"compression": "none", "row_group_size": 10},
    {"use_dictionary": False, "compression": "gzip", "column_encoding": {
        "text": "DELTA_BYTE_ARRAY", "image.bytes": "DELTA_BYTE_ARRAY", "image.path": "PLAIN", "n": "PLAIN",
        "tags.list.element": "DELTA_LENGTH_BYTE_ARRAY", "code": "PLAIN", "kind": "PLAIN",
    }},
    {"compression": "lz4", "write_page_index": True, "write_page_checksum": True, "store_schema": False},
    {"compression": "brotli", "data_page_size": 100, "dictionary_pagesize_limit": 200},
)  # fmt: skip
ARROW = tuple((kind, codec) for kind in (pa.ipc.new_file, pa.ipc.new_stream) for codec in (None, "lz4", "zstd"))
NUMBERS = (
    b"\0\0\0\0", b"\xff\xff\xff\x7f", b"\xff\xff\xff\xff", b"\0\0\0\x40", b"\0\x10\0\0", b"\0" * 8, b"\xff" * 8,
    b"\xff" * 7 + b"\x7f", b"\0\0\0\0\1\0\0\0", b"\xff\xff\xff\xff\x0f", b"\x80\x80\x80\x80\x02",
)  # fmt: skip
MOST_MORE_BYTES = 300 << 20


def table(num_rows: int = 50) -> pa.Table:
    """Images, and text of every kind that tables have."""
    images = [None if i == 3 else {"bytes": bytes([i % 256]) * 300, "path": f"{i}.png"} for i in range(num_rows)]
    return pa.table({
        "image": pa.array(images, IMAGES),
        "text": [None if i == 5 else f"a cat {i}" * (i % 4) for i in range(num_rows)],
        "tags": [["a", f"b{i}"] for i in range(num_rows)],
        "n": pa.array(range(num_rows)),
        "code": pa.array([b"abcd"] * num_rows, pa.binary(4)),
        "kind": pa.array(["x" if i % 2 else "y" for i in range(num_rows)]).dictionary_encode(),
    })  # fmt: skip


def files(content: pa.Table) -> list[tuple[str, bytes]]:
    """(suffix, bytes) of a table in every way that it can be written."""
    written = []
    for options in PARQUET:
        buffer = io.BytesIO()
        pq.write_table(content, buffer, **options)
        written.append((".parquet", buffer.getvalue()))
    for kind, codec in ARROW:
        buffer = io.BytesIO()
        with kind(buffer, content.schema, options=pa.ipc.IpcWriteOptions(compression=codec)) as writer:
            writer.write_table(content, max_chunksize=20)
        written.append((".arrow", buffer.getvalue()))
    return written


def mutated(raw: bytes, chance: random.Random) -> bytes:
    """``raw`` with a few places changed, most of them where sizes and kinds are written."""
    changed = bytearray(raw)
    for _ in range(chance.choice((1, 1, 1, 2, 5))):
        low, high = chance.choice(((0, len(raw)), (0, 700), (len(raw) * 2 // 3, len(raw))))
        at = chance.randrange(low, min(high, len(raw)))
        how = chance.random()
        if how < 0.6:
            changed[at % len(changed)] = (
                chance.randrange(256) if how < 0.2 else changed[at % len(changed)] ^ (1 << chance.randrange(8))
            )
        elif how < 0.95:
            number = chance.choice(NUMBERS)
            changed[at : at + len(number)] = number
        else:
            del changed[at : at + chance.randrange(1, 9)]
    return bytes(changed)


def read_all(path: Path, column: str) -> int:
    """How many images can be read.

    Raises:
        K5Error: the table cannot be used.
    """
    found = find(path, CacheConfig(caption_column=column))
    num_read = 0
    for item in found.items:
        try:
            num_read += bool(found.read(item.path))
        except UnreadableImage:
            continue
    return num_read


def main(folder: Path, first: int, count: int) -> None:
    """Try as many tables."""
    originals = files(table())
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    honest = 0
    for seed in range(first, first + count):
        print(f"at {seed}", flush=True)
        chance = random.Random(seed)
        suffix, raw = chance.choice(originals)
        path = folder / f"t{suffix}"
        path.write_bytes(mutated(raw, chance))
        try:
            honest += read_all(path, chance.choice(("text", "tags", "kind"))) > 0
        except K5Error:
            continue
        except Exception:
            print(f"traceback {seed}: {traceback.format_exc()}", flush=True)
    more = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory
    print(f"honest {honest}\nmemory {more << 10}")


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))

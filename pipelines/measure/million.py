"""What grows with the number of images? Caches of small rows in as many shards as full-size ones would have.

Rows are written by the store itself, without encoders, so that only what grows with the count is measured: the index,
the locations, the manifest, and the time and memory to open them.
"""

from __future__ import annotations

import hashlib
import json
import resource
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import torch
import typer

from k5cache.shared.console import human_bytes
from k5cache.store.index import IndexRow, with_index
from k5cache.store.manifest import Manifest, ShardInfo, ShardKind, lock, write_manifest
from k5cache.store.shards import ShardWriter
from k5cache.store.tensors import TensorSpec
from pipelines.measure import command_line

LATENTS = {name: TensorSpec("float16", (1, 1, 16)) for name in ("mean", "std")}
TEXT = {"prompt_embeds": TensorSpec("bfloat16", (None, 8)), "pooled": TensorSpec("bfloat16", (8,))}
LATENTS_A_SHARD, TEXT_A_SHARD = 256, 142
"""Rows of 1024x1024 pixels and of 256 tokens in a shard of 256 MB."""
COLUMNS = ("images", "shards", "manifest", "index and locations", "write them", "open", "memory to open", "random row")
OPEN = """
import json, random, re, sys, time
import k5cache.store.reader, torch

def kilobytes(name):
    return int(re.search(rf"{name}:\\s+(\\d+) kB", open("/proc/self/status").read())[1])

before, begin = kilobytes("VmRSS"), time.perf_counter()
cache = k5cache.open(sys.argv[1])
opened, after = time.perf_counter(), kilobytes("VmRSS")
chance = random.Random(0)
for _ in range(1000):
    cache[chance.randrange(len(cache))]
read = time.perf_counter()
print(json.dumps({"open_seconds": opened - begin, "open_bytes": (after - before) * 1024, "peak_bytes":
                  kilobytes("VmHWM") * 1024, "row_seconds": (read - opened) / 1000}))
"""


@dataclass(frozen=True)
class Size:
    """What a cache of so many images takes. Bytes and seconds."""

    num_images: int
    num_shards: int
    manifest_bytes: int
    table_bytes: int
    """Of the index and the locations."""
    index_seconds: float
    """To write both, and the manifest, once the shards are there."""
    write_peak_bytes: int
    """The most host memory of the process that wrote all of it."""
    open_seconds: float
    open_bytes: int
    """Host memory that an open cache takes."""
    read_peak_bytes: int
    """The most host memory of the process that opened it and read 1,000 images in random order."""
    row_seconds: float
    """To read a random image's rows, of 1,000 images."""


def main(
    counts: Annotated[str, typer.Option(help="Numbers of images, ascending.")] = "10000,100000,1000000",
    out: command_line.Out = None,
) -> None:
    """Write, open and read caches of many images. Needs no GPU; a million takes 4 GB of disk and ten minutes."""
    sizes = []
    for count in map(int, counts.split(",")):
        with tempfile.TemporaryDirectory() as folder:
            sizes.append(measure(Path(folder), count))
        command_line.write_json(out, [asdict(size) for size in sizes])
    command_line.print_table("small rows, full-size shards", COLUMNS, list(map(_row, sizes)), numbers=COLUMNS)


def measure(root: Path, count: int) -> Size:
    """Write a cache of ``count`` images at ``root``, and open it in a new process."""
    with lock(root):
        shards = [*_write(root, "latents", LATENTS, count, LATENTS_A_SHARD)]
        shards += _write(root, "text", TEXT, count, TEXT_A_SHARD)
        manifest = Manifest(recipe={}, shards=tuple(shards), created_by={"k5cache": "0"})
        rows = [_index_row(number) for number in range(count)]
        begin = time.perf_counter()
        manifest = with_index(root, manifest, rows)
        write_manifest(root, manifest)
        index_seconds = time.perf_counter() - begin
    done = subprocess.run([sys.executable, "-c", OPEN, str(root)], check=True, capture_output=True, text=True)
    opened = json.loads(done.stdout)
    tables = [path for path in root.iterdir() if path.name.startswith(("index", "locations"))]
    return Size(
        count, len(shards), (root / "manifest.json").stat().st_size, sum(path.stat().st_size for path in tables),
        index_seconds, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        opened["open_seconds"], opened["open_bytes"], opened["peak_bytes"], opened["row_seconds"],
    )  # fmt: skip


def _write(root: Path, kind: ShardKind, specs: dict[str, TensorSpec], count: int, rows_a_shard: int) -> list[ShardInfo]:
    infos = []
    bucket = (1024, 1024) if kind == "latents" else None
    for first in range(0, count, rows_a_shard):
        with ShardWriter(root, kind, specs, bucket) as writer:
            for number in range(first, min(first + rows_a_shard, count)):
                writer.append(_row_of(kind, number))
            infos.append(writer.finish())
    return infos


_NUMBERS = torch.zeros(1, 1, 16, dtype=torch.float16)
_EMBEDS, _POOLED = torch.zeros(1, 8, dtype=torch.bfloat16), torch.zeros(8, dtype=torch.bfloat16)


def _row_of(kind: str, number: int) -> dict[str, object]:
    if kind == "latents":
        return {"key": _key("l", number), "mean": _NUMBERS, "std": _NUMBERS}
    caption = f"picture number {number} of a large collection"
    return {"key": _key("t", number), "prompt_embeds": _EMBEDS, "pooled": _POOLED, "n_tokens": 1, "caption": caption}


def _key(prefix: str, number: int) -> str:
    """As long as a real key, and as random."""
    return hashlib.sha256(f"{prefix}{number}".encode()).hexdigest()[:32]


def _index_row(number: int) -> IndexRow:
    return IndexRow(
        path=f"{number // 1000:06d}/{number:09d}.jpg", content_hash=_key("c", number), num_bytes=300_000,
        mtime_ns=1_700_000_000_000_000_000 + number, inode=number, width=1200, height=1200,
        bucket_width=1024, bucket_height=1024, resized_width=1024, resized_height=1024, left=0, top=0, flipped=False,
        latent_key=_key("l", number), caption_keys=(_key("t", number),), captions_hash=_key("h", number),
    )  # fmt: skip


def _row(size: Size) -> list[str]:
    return [
        f"{size.num_images:,}", f"{size.num_shards:,}", human_bytes(size.manifest_bytes), human_bytes(size.table_bytes),
        f"{size.index_seconds:.1f} s, {human_bytes(size.write_peak_bytes)}", f"{size.open_seconds:.2f} s",
        human_bytes(size.open_bytes), f"{1000 * size.row_seconds:.2f} ms",
    ]  # fmt: skip


if __name__ == "__main__":
    command_line.run(main)

"""What does one process of ``million`` do? Each phase has a process of its own, so that its peak memory is its own.

An encode is the real one: only the encoders are stubs, which write rows of a few numbers. The rows are in as many
shards as rows of full size would fill, so the manifest grows as it does in earnest.
"""

from __future__ import annotations

import hashlib
import json
import random
import resource
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch

from k5cache.encode.encode import encode_source
from k5cache.encode.engine import ShardSink
from k5cache.encode.job import Job, LatentJob, TextJob
from k5cache.encode.request import EncodeOptions
from k5cache.options import CacheConfig
from k5cache.shared import console
from k5cache.shared.model import Drawn, ModelConfig
from k5cache.sources import find
from k5cache.sources.items import UnreadableImage
from k5cache.store.index import IndexRow, with_index
from k5cache.store.manifest import Manifest, ShardInfo, ShardKind, lock, write_manifest
from k5cache.store.reader import open_cache
from k5cache.store.shards import ShardWriter
from k5cache.store.tensors import TensorSpec
from k5cache.upkeep.merge import merge_caches

TEXT = {"prompt_embeds": TensorSpec("bfloat16", (None, 8)), "pooled": TensorSpec("bfloat16", (8,))}
LATENTS = {name: TensorSpec("float16", (1, 1, 16)) for name in ("mean", "std")}
ROWS_A_SHARD: dict[ShardKind, int] = {"latents": 256, "text": 142}
"""Rows of 1024x1024 pixels and of 256 tokens in a shard of 256 MB."""
CONFIG = CacheConfig(resolution=64)
IMAGES_A_FILE = 50_000

_NUMBERS = torch.zeros(1, 1, 16, dtype=torch.float16)
_EMBEDS, _POOLED = torch.zeros(1, 8, dtype=torch.bfloat16), torch.zeros(8, dtype=torch.bfloat16)


class Clock:
    """Seconds and peak memory of the parts of a process, printed as JSON, one line a part."""

    def __init__(self) -> None:
        self._before = time.perf_counter()

    def lap(self, name: str, **numbers: float) -> None:
        """A part has ended."""
        now = time.perf_counter()
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        print(json.dumps({"part": name, "seconds": now - self._before, "peak_bytes": peak, **numbers}), flush=True)
        self._before = time.perf_counter()


# --- an encode with stub encoders ---


def make_source(root: Path, count: int) -> None:
    """Parquet files of tiny PNGs, all different, each with a caption of its own."""
    from PIL import Image

    folder = root / "images"
    folder.mkdir(exist_ok=True)
    for first in range(0, count, IMAGES_A_FILE):
        numbers = range(first, min(first + IMAGES_A_FILE, count))
        pictures = []
        for number in numbers:
            file = BytesIO()
            Image.new("RGB", (64, 64), (number & 255, number >> 8 & 255, number >> 16)).save(file, "png")
            pictures.append({"bytes": file.getvalue(), "path": f"{number}.png"})
        captions = [f"picture number {number} of a large collection" for number in numbers]
        table = pa.table({"image": pictures, "text": captions})
        pq.write_table(table, folder / f"part-{first // IMAGES_A_FILE:05d}.parquet", row_group_size=1000)


class StubEngine:
    """Encoders that write rows of zeros, in shards of as many rows as real ones would have."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self.device = "cpu"

    @contextmanager
    def opened(self, source: Path, root: Path, folder: Path, device: str, bars: object) -> Iterator[StubEngine]:
        """There is nothing to start."""
        self._clock.lap("list")
        yield self

    def announce(self, job: Job, text_jobs: Sequence[TextJob], latent_jobs: Sequence[LatentJob]) -> None:
        """Say nothing."""
        self._clock.lap("plan", texts=len(text_jobs), latents=len(latent_jobs))

    def encode_texts(
        self, job: Job, sink: ShardSink, text_jobs: Sequence[TextJob], failed: dict[str, UnreadableImage]
    ) -> tuple[tuple[str, int], ...]:
        """As ``text_pass.encode_texts``."""
        for start in range(0, len(text_jobs), ROWS_A_SHARD["text"]):
            rows = (text_row(text.key, text.caption) for text in text_jobs[start : start + ROWS_A_SHARD["text"]])
            sink.add([write_shard(job.root, "text", rows)])
        self._clock.lap("shards of text")
        return ()

    def encode_latents(self, job: Job, sink: ShardSink, latent_jobs: Sequence[LatentJob]) -> dict[str, UnreadableImage]:
        """As ``image_pass.encode_latents``."""
        for start in range(0, len(latent_jobs), ROWS_A_SHARD["latents"]):
            rows = (latents_row(image.key) for image in latent_jobs[start : start + ROWS_A_SHARD["latents"]])
            sink.add([write_shard(job.root, "latents", rows)])
        self._clock.lap("shards of latents")
        return {}


def encode(root: Path, model: Path) -> None:
    """Encode the source, all of it or what is new."""
    clock = Clock()
    with console.progress() as bars:
        report = encode_source(
            root / "images", root / "cache", ModelConfig(path=str(model)), CONFIG, Drawn(), bars,
            EncodeOptions(engine=StubEngine(clock)),
        )  # fmt: skip
    clock.lap("commit", items=report.num_items, added=len(report.added))


# --- caches of parts, and a merge of them ---


def write_parts(root: Path, count: int) -> None:
    """Two caches of halves of the images, by the store alone."""
    for name, numbers in (("a", range(count // 2)), ("b", range(count // 2, count))):
        cache = root / name
        with lock(cache):
            shards = [
                write_shard(cache, kind, (_row_of(kind, number) for number in numbers[first : first + num_rows]))
                for kind, num_rows in ROWS_A_SHARD.items() for first in range(0, len(numbers), num_rows)
            ]  # fmt: skip
            clock = Clock()
            manifest = Manifest(recipe={}, shards=tuple(shards), created_by={"k5cache": "0"})
            write_manifest(cache, with_index(cache, manifest, map(_index_row, numbers)))
            clock.lap(f"index of part {name}")


def merge(root: Path) -> None:
    """Join the parts."""
    clock = Clock()
    merged = merge_caches([root / "a", root / "b"], root / "cache")
    clock.lap("merge", items=merged.num_items)


def open_and_read(root: Path) -> None:
    """Open a cache and read the rows of 1,000 images."""
    clock = Clock()
    cache = open_cache(root / "cache")
    clock.lap("open")
    chance = random.Random(0)
    for _ in range(1000):
        cache[chance.randrange(len(cache))]
    clock.lap("1,000 random images")


def write_shard(root: Path, kind: ShardKind, rows: Iterator[dict[str, Any]]) -> ShardInfo:
    """A shard of these rows."""
    specs, size = (LATENTS, (64, 64)) if kind == "latents" else (TEXT, None)
    with ShardWriter(root, kind, specs, size) as writer:
        for row in rows:
            writer.append(row)
        return writer.finish()


def latents_row(key: str) -> dict[str, Any]:
    """Latents of one number a channel."""
    return {"key": key, "mean": _NUMBERS, "std": _NUMBERS}


def text_row(key: str, caption: str) -> dict[str, Any]:
    """A text of one token."""
    return {"key": key, "prompt_embeds": _EMBEDS, "pooled": _POOLED, "n_tokens": 1, "caption": caption}


def _row_of(kind: ShardKind, number: int) -> dict[str, Any]:
    key = _key(kind, number)
    return latents_row(key) if kind == "latents" else text_row(key, f"picture number {number} of a large collection")


def _key(kind: str, number: int) -> str:
    """As long as a real key, and as random."""
    return hashlib.sha256(f"{kind}{number}".encode()).hexdigest()[:32]


def _index_row(number: int) -> IndexRow:
    return IndexRow(
        path=f"{number // 1000:06d}/{number:09d}.jpg", content_hash=_key("content", number), num_bytes=300_000,
        mtime_ns=1_700_000_000_000_000_000 + number, inode=number, width=1200, height=1200,
        bucket_width=64, bucket_height=64, resized_width=64, resized_height=64, left=0, top=0, flipped=False,
        latent_key=_key("latents", number), caption_keys=(_key("text", number),),
        captions_hash=_key("captions", number)[:16],
    )  # fmt: skip


def list_only(root: Path) -> None:
    """List the source."""
    clock = Clock()
    listing = find.find(root / "images", CONFIG)
    clock.lap("list alone", items=len(listing.items))


def main(phase: str, root: str, *rest: str) -> None:
    """Run one phase."""
    folder = Path(root)
    if phase == "source":
        make_source(folder, int(rest[0]))
    elif phase == "list":
        list_only(folder)
    elif phase == "encode":
        encode(folder, Path(rest[0]))
    elif phase == "parts":
        write_parts(folder, int(rest[0]))
    elif phase == "merge":
        merge(folder)
    else:
        open_and_read(folder)


if __name__ == "__main__":
    main(*sys.argv[1:])

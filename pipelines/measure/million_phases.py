"""What does one process of ``million`` do? Each phase has a process of its own, so that its peak memory is its own.

An encode is the real one: only the encoders are stubs, which write rows of a few numbers. The rows are in as many
shards as rows of full size would fill, so the manifest grows as it does in earnest.
"""

from __future__ import annotations

import hashlib
import json
import resource
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from io import BytesIO
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch

from k5cache.encode.encode import encode_source
from k5cache.encode.engine import ShardSink
from k5cache.encode.job import Job, LatentJob, TextJob
from k5cache.encode.plan import make_plan
from k5cache.encode.request import EncodeOptions
from k5cache.encode.wanted import Probes, Stored, Wanted
from k5cache.options import CacheConfig
from k5cache.shared import console
from k5cache.shared.model import Drawn, ModelConfig
from k5cache.sources.items import SourceItem, UnreadableImage
from k5cache.store import locations, tables
from k5cache.store.index import IndexRow, with_index
from k5cache.store.keys import Keys
from k5cache.store.manifest import Manifest, ShardInfo, ShardKind, lock, read_manifest, write_manifest
from k5cache.store.reader import open_cache
from k5cache.store.shards import ShardWriter
from k5cache.store.tensors import TensorSpec
from k5cache.upkeep.merge import merge_rows

TEXT = {"prompt_embeds": TensorSpec("bfloat16", (None, 8)), "pooled": TensorSpec("bfloat16", (8,))}
LATENTS = {name: TensorSpec("float16", (1, 1, 16)) for name in ("mean", "std")}
ROWS_A_SHARD: dict[ShardKind, int] = {"latents": 256, "text": 142}
"""Rows of 1024x1024 pixels and of 256 tokens in a shard of 256 MB."""
CONFIG = CacheConfig(resolution=64)
IMAGES_A_FILE = 50_000

_NUMBERS = torch.ones(1, 1, 16, dtype=torch.float16)
_EMBEDS, _POOLED = torch.ones(1, 8, dtype=torch.bfloat16), torch.ones(8, dtype=torch.bfloat16)


class Clock:
    """Seconds, seconds of CPU and peak memory of the parts of a process, printed as JSON, one line a part."""

    def __init__(self) -> None:
        self._before, self._cpu_before = time.perf_counter(), time.process_time()

    def lap(self, name: str, **numbers: float) -> None:
        """A part has ended."""
        now = time.perf_counter()
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        of_cpu = time.process_time() - self._cpu_before
        numbers_of_part = {"seconds": now - self._before, "cpu_seconds": of_cpu, "peak_bytes": peak, **numbers}
        print(json.dumps({"part": name, **numbers_of_part}), flush=True)
        self._before, self._cpu_before = time.perf_counter(), time.process_time()


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
    """Encoders that write rows of ones, in shards of as many rows as real ones would have."""

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


def encode(root: Path) -> None:
    """Encode the source, all of it or what is new, with the fingerprints of a toy model."""
    from pipelines.demo.make_checkpoint import make

    if not (root / "model").exists():
        make(root / "model")
    clock = Clock()
    with console.progress() as bars:
        report = encode_source(
            root / "images", root / "cache", ModelConfig(path=str(root / "model")), CONFIG, Drawn(), bars,
            EncodeOptions(engine=StubEngine(clock)),
        )  # fmt: skip
    clock.lap("commit", items=report.num_items, added=len(report.added))


# --- what grows with the count, without images and rows ---


def plan(count: int) -> None:
    """Plan an encode of new images, and of the same images again, with one that is new."""
    clock = Clock()
    items = [
        SourceItem(_path(number), 300_000, 1_700_000_000_000_000_000 + number, number, (f"picture number {number}",))
        for number in range(count + 1)
    ]
    clock.lap("list")
    probes = Probes(lambda item: (key_of("content", item.inode), 1200, 1200), _no_mask, str.strip)
    wanted = Wanted(items[:count], (), ("",), CONFIG.framing, {}, {})
    first = make_plan(wanted, Stored(), probes)
    clock.lap("plan", texts=len(first.text_jobs), latents=len(first.latent_jobs))
    stored = Stored(
        rows=first.rows, prompts=first.prompts,
        latents=Keys(first.rows.latent_keys.take(pc.sort_indices(first.rows.latent_keys))),
        texts=Keys(pa.array(sorted([*first.rows.text_keys.to_pylist(), first.prompts[""]]))),
    )  # fmt: skip
    clock.lap("what the cache has")
    again = make_plan(replace(wanted, items=items), stored, probes)
    assert (len(again.latent_jobs), again.added) == (1, (_path(count),))
    clock.lap("plan again")


def write_tables(root: Path, count: int) -> None:
    """The index, the locations and the manifest of an encode that has written its shards."""
    cache = root / "cache"
    with lock(cache):
        manifest = _manifest_of_shards(cache, range(count))
        clock = Clock()
        manifest = with_index(cache, manifest, map(_index_row, range(count)))
        write_manifest(cache, manifest)
        clock.lap("index")


def write_halves(root: Path, count: int) -> None:
    """Two caches of half of the images each."""
    halves = [root / "a", root / "b"]
    for cache, numbers in zip(halves, (range(count // 2), range(count // 2, count)), strict=True):
        with lock(cache):
            write_manifest(cache, with_index(cache, _manifest_of_shards(cache, numbers), map(_index_row, numbers)))


def join_tables(root: Path, count: int) -> None:
    """Merge what ``write_halves`` has written."""
    clock = Clock()
    halves = [root / "a", root / "b"]
    rows, _ = merge_rows(halves, [read_manifest(half) for half in halves])
    assert len(rows) == count
    clock.lap("rows of two caches as one")


def open_cache_of(root: Path) -> None:
    """Open a cache, and find the row of an image."""
    clock = Clock()
    cache = open_cache(root / "cache")
    clock.lap("open", items=len(cache))
    assert cache.row(len(cache) // 2).path == _path(len(cache) // 2)
    clock.lap("decode the index")


def _manifest_of_shards(root: Path, numbers: range) -> Manifest:
    """A manifest of as many shards as rows of full size would fill, and locations that know their rows."""
    shards, tables_of = list[ShardInfo](), list[pa.Table]()
    for kind, num_rows in ROWS_A_SHARD.items():
        for first in range(0, len(numbers), num_rows):
            rows = numbers[first : first + num_rows]
            name = hashlib.sha256(f"{kind} {rows}".encode()).hexdigest()
            folder = "text/" if kind == "text" else "latents/64x64-"
            size = None if kind == "text" else (64, 64)
            shards.append(ShardInfo(f"{folder}{name[:16]}.parquet", kind, len(rows), 1 << 28, name, name, size))
            here = len(rows)
            values = {
                "is_text": [kind == "text"] * here, "key": [key_of(kind, number) for number in rows],
                "shard": [len(shards) - 1] * here, "row": range(here), "n_tokens": [int(kind == "text")] * here,
            }  # fmt: skip
            tables_of.append(pa.table(values, locations.SCHEMA))
    table = pa.concat_tables(tables_of).sort_by([("is_text", "ascending"), ("key", "ascending")])
    table = table.replace_schema_metadata({locations.FILES_KEY: json.dumps([shard.file for shard in shards])})
    known = tables.write_table(root, table, "locations-000000.parquet")
    return Manifest(recipe={}, shards=tuple(shards), locations=known, created_by={"k5cache": "0"})


def _no_mask(item: SourceItem, width: int, height: int) -> str:
    raise LookupError(item.path)


def _path(number: int) -> str:
    return f"{number // 1000:06d}/{number:09d}.jpg"


# --- rows ---


def write_shard(root: Path, kind: ShardKind, rows: Iterator[dict[str, Any]], side: int = 64) -> ShardInfo:
    """A shard of these rows; of latents, in the square bucket of this side."""
    specs, size = (LATENTS, (side, side)) if kind == "latents" else (TEXT, None)
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


def key_of(kind: str, number: int) -> str:
    """As long as a real key, and as random."""
    return hashlib.sha256(f"{kind}{number}".encode()).hexdigest()[:32]


def _index_row(number: int) -> IndexRow:
    return IndexRow(
        path=_path(number), content_hash=key_of("content", number), num_bytes=300_000,
        mtime_ns=1_700_000_000_000_000_000 + number, inode=number, width=1200, height=1200,
        bucket_width=64, bucket_height=64, resized_width=64, resized_height=64, left=0, top=0, flipped=False,
        latent_key=key_of("latents", number), caption_keys=(key_of("text", number),),
        captions_hash=key_of("captions", number)[:16],
    )  # fmt: skip


PHASES: dict[str, Callable[[Path, int], None]] = {
    "source": make_source,
    "plan": lambda root, count: plan(count),
    "tables": write_tables,
    "halves": write_halves,
    "merge": join_tables,
    "open": lambda root, count: open_cache_of(root),
    "encode": lambda root, count: encode(root),
}


if __name__ == "__main__":
    PHASES[sys.argv[1]](Path(sys.argv[2]), int(sys.argv[3]))

"""How fast is a random row read, and how large is it on disk? Our store and what others use, in one run.

Rows are those of 1024x1024 images: mean and std ``[128, 128, 16]`` float16, 256 tokens ``[256, 3584]`` bfloat16, 2.9 MB
of random values. All readers but one (named so) end with every byte in memory of their own, as a trainer needs it. The
page cache is warm and there is one core, so times are CPU times: nothing waits for a disk, and what else runs on the
machine does not count. Nothing here is pickled but the ``.pt`` baseline.
"""

from __future__ import annotations

import json
import random
import shutil
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from k5cache.shared import console, system
from k5cache.shared.units import count_of
from k5cache.store.index import IndexRow, with_index
from k5cache.store.manifest import Manifest, lock, write_manifest
from k5cache.store.reader import open_cache
from k5cache.store.shards import ShardWriter
from k5cache.store.tensors import TensorSpec, to_bytes

if TYPE_CHECKING:
    import torch

    Row = dict[str, torch.Tensor]

LATENTS = {name: TensorSpec("float16", (128, 128, 16)) for name in ("mean", "std")}
TEXT = {"prompt_embeds": TensorSpec("bfloat16", (None, 3584)), "pooled": TensorSpec("bfloat16", (768,))}
NUM_TOKENS = 256
ROUNDS = 15
OURS = "k5cache, checksums on"
MAPPED = "safetensors, load_file alone"
BASELINE = "safetensors, read whole"
SLOW = "datasets, torch format"


@dataclass(frozen=True)
class Reading:
    """A file format, and how fast random rows are read from it."""

    name: str
    ms_a_row: float
    """CPU time, the median of the rounds."""
    rows_a_second: float
    disk_over_raw: float
    over_ours: float
    """Its time over ours in the same round, the median of the rounds. A machine that slows down slows both."""
    note: str = ""


@dataclass(frozen=True)
class Packing:
    """A codec's compression and speed on the bytes of a row."""

    codec: str
    latents: float
    """Packed size over raw size."""
    text: float
    row: float
    unpack_ms: float
    """Milliseconds for a whole row, in addition to reading it."""


@dataclass(frozen=True)
class StoreBench:
    """Everything that was measured."""

    num_rows: int
    raw_bytes: int
    """Of all rows."""
    readings: tuple[Reading, ...]
    packings: tuple[Packing, ...]
    machine: str
    targets: dict[str, bool] = field(default_factory=dict)


def bench_store(num_rows: int = 200, folder: Path | None = None) -> StoreBench:
    """Write ``num_rows`` rows in every format, then read a fifth of them at random, each format in turn, 15 times.

    Args:
        folder: where to write about 12 MB a row; by default a temporary folder. All of it is deleted.
    """
    import torch

    with TemporaryDirectory(prefix="k5-bench-", dir=folder) as name, _one_core():
        root = Path(name)
        rows = [make_row(i) for i in range(num_rows)]
        raw = sum(t.nbytes for row in rows for t in row.values())
        makers: dict[str, Callable[[Path, Sequence[Row]], Callable[[int], Row]]] = {
            OURS: _ours, "torch.load of a .pt an item": _pt, BASELINE: _safetensors, MAPPED: _mapped,
            "safetensors, load_file and clone": _cloned, SLOW: _datasets,
        }  # fmt: skip
        readers: dict[str, Callable[[int], Row]] = {}
        sizes: dict[str, int] = {}
        for format_name, make in makers.items():
            where = root / str(len(readers))
            where.mkdir()
            readers[format_name] = make(where, rows)
            sizes[format_name] = sum(p.stat().st_size for p in where.rglob("*") if p.is_file())
        for format_name, read in readers.items():
            for i, row in enumerate(rows):  # also warms the page cache
                assert all(torch.equal(row[k], v) for k, v in read(i).items()), format_name
        packings = tuple(_pack(codec, level, rows[:8]) for codec, level in CODECS)
        del rows
        seconds: dict[str, list[float]] = {name: [] for name in readers}
        for round_number in range(ROUNDS):
            order = random.Random(round_number).sample(range(num_rows), max(1, num_rows // 5))
            # A new order each round, so that a format does not always follow the same other one in the caches.
            for format_name in random.Random(round_number).sample(list(readers), len(readers)):
                positions = order if format_name != SLOW else order[: max(1, len(order) // 10)]
                seconds[format_name].append(_seconds_a_row(readers[format_name], positions))
        readings = tuple(_reading(name, times, seconds[OURS], sizes[name] / raw) for name, times in seconds.items())
    return StoreBench(num_rows, raw, readings, packings, _machine(), targets(readings))


def _seconds_a_row(read: Callable[[int], Row], order: Sequence[int]) -> float:
    """CPU time of this process, so that other processes do not count."""
    started = time.process_time()
    for i in order:
        read(i)
    return (time.process_time() - started) / len(order)


def _reading(name: str, seconds: Sequence[float], ours: Sequence[float], disk_over_raw: float) -> Reading:
    """Sum up the ``seconds`` a row of every round; ``ours`` are those of our store in the same rounds."""
    a_row = statistics.median(seconds)
    over_ours = statistics.median(theirs / own for theirs, own in zip(seconds, ours, strict=True))
    return Reading(
        name, 1e3 * a_row, 1 / a_row, disk_over_raw, over_ours, "maps, reads nothing" if name == MAPPED else ""
    )


def targets(readings: Sequence[Reading]) -> dict[str, bool]:
    """What the store must reach, and whether it did."""
    by_name = {reading.name: reading for reading in readings}
    ours = by_name[OURS]
    safetensors_over_ours = min(
        reading.over_ours for name, reading in by_name.items() if "safetensors" in name and name != MAPPED
    )
    return {
        "at least 400 rows/s on one core": ours.rows_a_second >= 400,
        "at most 1.3 times a safetensors file that is really read": 1 / safetensors_over_ours <= 1.3,
        "at most 1.02 of the raw bytes on disk": ours.disk_over_raw <= 1.02,
    }


def print_bench(bench: StoreBench) -> None:
    """Print the tables."""
    columns = ("ms/row", "rows/s", "time over ours", "disk over raw")
    title = (
        f"Random reads, {count_of(bench.num_rows, 'row')} of {console.human_bytes(bench.raw_bytes / bench.num_rows)}"
    )
    table = console.table(f"{title}, {bench.machine}", "format", *columns, "", numbers=columns)
    for reading in bench.readings:
        numbers = (f"{reading.ms_a_row:.2f}", f"{reading.rows_a_second:.0f}", f"{reading.over_ours:.2f}")
        table.add_row(reading.name, *numbers, f"{reading.disk_over_raw:.4f}", reading.note)
    console.out.print(table)
    names = ("latents", "text", "row", "unpack ms/row")
    table = console.table("Compression, packed over raw (the default is none)", "codec", *names, numbers=names)
    for packing in bench.packings:
        sizes = (f"{packing.latents:.3f}", f"{packing.text:.3f}", f"{packing.row:.3f}")
        table.add_row(packing.codec, *sizes, f"{packing.unpack_ms:.2f}")
    console.out.print(table)
    for target, is_met in bench.targets.items():
        console.out.print(f"{'yes' if is_met else 'NO '}  {target}", markup=False, style="green" if is_met else "red")


def make_row(seed: int) -> Row:
    """A row of random values that spread as real ones: mean N(0, 1), std small and positive, embeddings N(0, 1)."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    mean, std = torch.randn(2, 128, 128, 16, generator=generator)
    return {
        "mean": mean.half(),
        "std": (std - 5).exp().half(),
        "prompt_embeds": torch.randn(NUM_TOKENS, 3584, generator=generator).bfloat16(),
        "pooled": torch.randn(768, generator=generator).bfloat16(),
    }


def _ours(root: Path, rows: Sequence[Row]) -> Callable[[int], Row]:
    """A cache, in which an item is a row of latents and a row of text."""
    with lock(root):
        shards = []
        for first in range(0, len(rows), 64):
            part = range(first, min(first + 64, len(rows)))
            with ShardWriter(root, "latents", LATENTS, (1024, 1024)) as writer:
                for i in part:
                    writer.append({"key": f"{i:032}", "mean": rows[i]["mean"], "std": rows[i]["std"]})
                shards.append(writer.finish())
            with ShardWriter(root, "text", TEXT) as writer:
                for i in part:
                    text = {name: rows[i][name] for name in TEXT}
                    writer.append({"key": f"{i:032}", **text, "n_tokens": NUM_TOKENS, "caption": f"caption {i}"})
                shards.append(writer.finish())
        manifest = Manifest(recipe={}, shards=tuple(shards))
        write_manifest(root, with_index(root, manifest, [_index_row(i) for i in range(len(rows))]))
    cache = open_cache(root)

    def read(i: int) -> Row:
        item = cache[i]
        (text,) = item["captions"]
        return {
            "mean": item["mean"], "std": item["std"], "prompt_embeds": text.prompt_embeds, "pooled": text.pooled,
        }  # fmt: skip

    return read


def _index_row(i: int) -> IndexRow:
    return IndexRow(
        path=f"{i}.png", content_hash="0" * 32, num_bytes=1, mtime_ns=1, inode=i, width=1024, height=1024,
        bucket_width=1024, bucket_height=1024, resized_width=1024, resized_height=1024, left=0, top=0, flipped=False,
        latent_key=f"{i:032}", caption_keys=(f"{i:032}",),
    )  # fmt: skip


def _pt(root: Path, rows: Sequence[Row]) -> Callable[[int], Row]:
    import torch

    for i, row in enumerate(rows):
        torch.save(row, root / f"{i}.pt")
    return lambda i: torch.load(root / f"{i}.pt", weights_only=True)


def _safetensors(root: Path, rows: Sequence[Row]) -> Callable[[int], Row]:
    from safetensors.torch import load, save_file

    for i, row in enumerate(rows):
        save_file(row, root / f"{i}.safetensors")
    return lambda i: load((root / f"{i}.safetensors").read_bytes())


def _mapped(root: Path, rows: Sequence[Row]) -> Callable[[int], Row]:
    from safetensors.torch import load_file, save_file

    for i, row in enumerate(rows):
        save_file(row, root / f"{i}.safetensors")
    return lambda i: load_file(root / f"{i}.safetensors")


def _cloned(root: Path, rows: Sequence[Row]) -> Callable[[int], Row]:
    mapped = _mapped(root, rows)
    return lambda i: {name: tensor.clone() for name, tensor in mapped(i).items()}


def _datasets(root: Path, rows: Sequence[Row]) -> Callable[[int], Row]:
    """Arrow files with typed arrays. They have no bfloat16, so text is stored as its bits."""
    import torch
    from datasets import Array2D, Array3D, Dataset, Features, Sequence, Value, disable_progress_bars, load_from_disk

    disable_progress_bars()
    features = Features(
        mean=Array3D((128, 128, 16), "float16"),
        std=Array3D((128, 128, 16), "float16"),
        prompt_embeds=Array2D((NUM_TOKENS, 3584), "int16"),
        pooled=Sequence(Value("int16"), 768),
    )

    def plain() -> Iterator[dict[str, Any]]:
        for row in rows:
            yield {k: (v if v.dtype == torch.float16 else v.view(torch.int16)).numpy() for k, v in row.items()}

    dataset = Dataset.from_generator(plain, features=features, cache_dir=str(root / "generated"))
    dataset.save_to_disk(root / "saved")
    del dataset
    shutil.rmtree(root / "generated")
    opened = load_from_disk(str(root / "saved")).with_format("torch")

    def read(i: int) -> Row:
        row = opened[i]
        bits = {name: row[name].to(torch.int16).view(torch.bfloat16) for name in TEXT}
        return {"mean": row["mean"].half(), "std": row["std"].half(), **bits}

    return read


CODECS = (("none", None), ("lz4", None), ("zstd", 1), ("zstd", 3), ("zstd", 9))


def _pack(codec: str, level: int | None, rows: Sequence[Row]) -> Packing:
    """Compress these rows with one codec, a tensor at a time as Parquet does."""
    import pyarrow as pa

    name = codec if level is None else f"{codec} {level}"
    tensors = [(key in LATENTS, to_bytes(tensor)) for row in rows for key, tensor in row.items()]
    raw = [sum(len(b) for is_latents, b in tensors if is_latents is kind) for kind in (True, False)]
    if codec == "none":
        return Packing(name, 1.0, 1.0, 1.0, 0.0)
    compressor = pa.Codec(codec, compression_level=level) if level is not None else pa.Codec(codec)
    packed = [(is_latents, compressor.compress(data, asbytes=True), len(data)) for is_latents, data in tensors]
    sizes = [sum(len(p) for is_latents, p, _ in packed if is_latents is kind) for kind in (True, False)]
    started = time.process_time()
    for _, data, length in packed:
        compressor.decompress(data, length)
    unpack = (time.process_time() - started) / len(rows)
    return Packing(name, sizes[0] / raw[0], sizes[1] / raw[1], sum(sizes) / sum(raw), 1e3 * unpack)


@contextmanager
def _one_core() -> Iterator[None]:
    """Run on one core with one thread, and restore both afterwards."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with system.on_one_core():
            yield
    finally:
        torch.set_num_threads(threads)


def _machine() -> str:
    """The name of the processor."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return "one core"


def as_json(bench: StoreBench) -> dict[str, Any]:
    """The measurements as JSON takes them."""
    return dict(json.loads(json.dumps(asdict(bench))))

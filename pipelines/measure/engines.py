"""How many images a second does ``--engine ray`` encode, beside the embedded engine on one of the same GPUs?

The VAE has full size and random weights; the pass is the one of an encode: images are read and decoded, encoded,
written and committed. A rate is counted from the first image that is done to the last, so that loading is left out; the
seconds of the whole pass have it in.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated

import torch
import typer
from rich.progress import Progress

from k5cache.bench.measurements import Sizes
from k5cache.buckets import Bucket, cover
from k5cache.encode.commit import Committer
from k5cache.encode.image_pass import encode_latents
from k5cache.encode.job import Job, LatentJob
from k5cache.encoders.random_model import FULL_TEXT, write_model, write_pictures
from k5cache.engines.ray_engine import RayEngine
from k5cache.options import CacheConfig
from k5cache.shared.gpus import visible_gpus
from k5cache.store.manifest import Manifest, lock
from k5train.commands.bench import gpu_to_measure
from pipelines.measure import command_line

COLUMNS = ("engine", "GPUs", "images/s", "of the embedded engine's", "seconds of the pass")


@dataclass(frozen=True)
class Rate:
    """What one engine did."""

    engine: str
    num_gpus: int
    images_a_second: float
    """From the first image that was done to the last."""
    seconds: float
    """Of the whole pass, with what it loads."""


@dataclass(frozen=True)
class TimedJob(Job):
    """A job that notes when its progress advances."""

    done: tuple[list[tuple[float, int]], ...] = ([],)
    """A list of (time, images done)."""

    @contextmanager
    def progress_bar(self, description: str, total: int, unit: str) -> Iterator[Callable[..., None]]:
        """Note the progress instead of showing it."""

        def advance(count: int, description: str | None = None) -> None:
            times = self.done[0]
            if count:
                times.append((time.perf_counter(), count + (times[-1][1] if times else 0)))

        yield advance


def main(
    images: Annotated[int, typer.Option(help="So many images a GPU.")] = 512,
    side: Annotated[int, typer.Option(help="Pixels of the square bucket.")] = 1024,
    out: command_line.Out = None,
) -> None:
    """Encode images with the VAE on one GPU, on one by Ray and on all by Ray. Needs a GPU, and two for the last."""
    device = str(gpu_to_measure(out))
    sizes = replace(Sizes(), text={**FULL_TEXT, "num_hidden_layers": 1}, num_images=64, side=side)
    with TemporaryDirectory(prefix="k5-engines-") as folder, torch.no_grad():
        root = Path(folder)
        write_model(root, sizes, device)
        write_pictures(root / "pictures", sizes)
        rates = [measure(root, sizes, images, None, device)]
        rates += [measure(root, sizes, images * count, count, "cuda") for count in sorted({1, len(visible_gpus())})]
    rows = [_row(rate, rates[0]) for rate in rates]
    command_line.print_table(f"VAE of full size, {side}x{side}", COLUMNS, rows, numbers=COLUMNS[1:])
    command_line.write_json(out, [asdict(rate) for rate in rates])


def measure(model: Path, sizes: Sizes, num_images: int, num_gpus: int | None, device: str) -> Rate:
    """One pass over so many images. ``num_gpus``: of Ray; None: the embedded engine."""
    root = model / f"cache-{num_gpus}"
    files = sorted((model / "pictures").iterdir())
    geometry = cover(*sizes.source, Bucket(sizes.side, sizes.side))
    jobs = [LatentJob(f"{i:032x}", str(files[i % len(files)]), geometry) for i in range(num_images)]
    silent = Progress(disable=True)
    job = TimedJob(Path, root, model, CacheConfig(resolution=sizes.side), device, silent, done=([],))
    committer = Committer(root, Manifest(recipe={}), job.config.shard_mb * 2**20)
    with lock(root):
        if num_gpus is None:
            started = time.perf_counter()
            encode_latents(job, committer, jobs)
        else:
            with RayEngine(gpus=num_gpus).opened(model / "pictures", root, model, device, silent) as passes:
                started = time.perf_counter()
                passes.encode_latents(job, committer, jobs)
    seconds = time.perf_counter() - started
    num_rows = sum(shard.num_rows for shard in committer.manifest.shards)
    assert num_rows == num_images, f"{num_rows} of {num_images} were written"
    return Rate("ray" if num_gpus else "embedded", num_gpus or 1, _rate(job.done[0]), seconds)


def _rate(done: Sequence[tuple[float, int]]) -> float:
    """Images a second from the first note to the last."""
    (begin, first), (end, last) = done[0], done[-1]
    return (last - first) / (end - begin) if end > begin else 0.0


def _row(rate: Rate, embedded: Rate) -> tuple[str, ...]:
    share = rate.images_a_second / embedded.images_a_second
    return rate.engine, str(rate.num_gpus), f"{rate.images_a_second:.2f}", f"{share:.2f}x", f"{rate.seconds:.1f}"


if __name__ == "__main__":
    command_line.run(main)

"""How many images a second does ``--engine ray`` encode, beside the embedded engine on one of the same GPUs?

    python -m pipelines.measure.engines --only embedded,ray-2 -o engines.json

The VAE has full size and random weights; the pass is the one of an encode: images are read and decoded, encoded,
written and committed. A rate is counted from the first image that is done to the last, so that loading is left out; the
seconds of the whole pass have it in. Each engine is printed, and written to -o, as soon as it is measured.
"""

from __future__ import annotations

import faulthandler
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
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
from k5cache.engines.cluster import LOGS
from k5cache.engines.ray_engine import RayEngine
from k5cache.options import CacheConfig
from k5cache.shared import console, system
from k5cache.shared.errors import RunError
from k5cache.shared.gpus import choose_gpus, visible_gpus
from k5cache.store.manifest import Manifest, lock
from k5train.commands.bench import gpu_to_measure
from pipelines.measure import command_line

COLUMNS = ("engine", "GPUs", "images", "images/s", "of the embedded engine's", "seconds: start", "first image", "pass")
_SECONDS_A_LINE = 10.0
_SECONDS_TO_STOP = 30.0
"""So long may an engine take to end when it is stopped; then this process ends at once."""


@dataclass(frozen=True)
class Rate:
    """What one engine did."""

    engine: str
    num_gpus: int
    num_images: int
    """That were written."""
    images_a_second: float
    """From the first image that was done to the last."""
    seconds_to_start: float
    """Until Ray was there, its machines had been asked and a worker had planned. 0 for the embedded engine."""
    seconds_to_first: float | None
    """From there to the first image: processes start and load. None: there was none."""
    seconds: float
    """Of the pass, with what it loads."""


@dataclass
class Course:
    """How far a measurement is."""

    began: float = field(default_factory=time.monotonic)
    started: float | None = None
    """When the pass began."""
    done: list[tuple[float, int]] = field(default_factory=list)
    """(time, images done)."""
    is_given_up: bool = False

    def words(self, num_images: int) -> str:
        """How far it is, for a line."""
        seconds = time.monotonic() - (self.started or self.began)
        if self.started is None:
            return f"not started after {seconds:.0f} s"
        return f"{self.done[-1][1] if self.done else 0} of {num_images} images after {seconds:.0f} s"


@dataclass(frozen=True)
class TimedJob(Job):
    """A job that notes when its progress advances."""

    course: Course = field(default_factory=Course)

    @contextmanager
    def progress_bar(self, description: str, total: int, unit: str) -> Iterator[Callable[..., None]]:
        """Note the progress instead of showing it."""

        def advance(count: int, description: str | None = None) -> None:
            times = self.course.done
            if count:
                times.append((time.monotonic(), count + (times[-1][1] if times else 0)))

        yield advance


def main(
    images: Annotated[int, typer.Option(help="So many images a GPU.")] = 512,
    side: Annotated[int, typer.Option(help="Pixels of the square bucket.")] = 1024,
    only: Annotated[
        str | None, typer.Option(help="What to measure, in this order, as embedded,ray-2. [default: all]")
    ] = None,
    limit: Annotated[float, typer.Option(help="Give an engine up after so many seconds.")] = 300.0,
    out: command_line.Out = None,
) -> None:
    """Encode images with the VAE on one GPU, on one by Ray and on all by Ray. Needs a GPU, and two for the last."""
    device = str(gpu_to_measure(out))
    wanted = engines(only, len(visible_gpus()))
    choose_gpus(max(count or 1 for count in wanted))
    sizes = replace(Sizes(), text={**FULL_TEXT, "num_hidden_layers": 1}, num_images=64, side=side)
    with TemporaryDirectory(prefix="k5-engines-") as folder, torch.no_grad():
        root = Path(folder)
        write_model(root, sizes, device)
        write_pictures(root / "pictures", sizes)
        rates = measure_all(root, sizes, images, wanted, device, limit, out)
    rows = table_rows(rates)
    command_line.print_table(f"VAE of full size, {side}x{side}", COLUMNS, rows, numbers=COLUMNS[1:])


def engines(only: str | None, num_gpus: int) -> list[int | None]:
    """What to measure: None for the embedded engine, a number of GPUs for Ray.

    Args:
        only: names with commas between them; None: all on this machine.

    Raises:
        RunError: a name is not one of these.
    """
    if only is None:
        return [None, *sorted({1, num_gpus})]
    wanted: list[int | None] = []
    for name in only.split(","):
        kind, _, count = name.strip().partition("-")
        if name.strip() == "embedded":
            wanted.append(None)
        elif kind == "ray" and count.isdecimal() and int(count):
            wanted.append(int(count))
        else:
            raise RunError(f"--only {only}: {name.strip()!r} is not an engine", "Name embedded, ray-1, ray-2 ...")
    return wanted


def measure_all(
    model: Path,
    sizes: Sizes,
    num_images: int,
    wanted: Sequence[int | None],
    device: str,
    limit: float,
    out: Path | None,
) -> list[Rate]:
    """Measure each engine; print and write what there is after each. One that is given up ends the measurement.

    Args:
        num_images: a GPU.
        limit: seconds for each.
    """
    rates: list[Rate] = []
    for num_gpus in wanted:
        rate, is_given_up = measure(model, sizes, num_images * (num_gpus or 1), num_gpus, device, limit)
        rates.append(rate)
        console.note("  ".join(f"{name} {value}" for name, value in zip(COLUMNS, table_rows(rates)[-1], strict=True)))
        command_line.write_json(out, [asdict(rate) for rate in rates])
        if is_given_up:
            console.warn(f"{name_of(num_gpus)} was given up, and what was to follow is left out. {LOGS}")
            break
    return rates


def measure(
    model: Path, sizes: Sizes, num_images: int, num_gpus: int | None, device: str, limit: float
) -> tuple[Rate, bool]:
    """One pass over so many images, and whether it was given up.

    Args:
        num_gpus: of Ray; None: the embedded engine.
    """
    root = model / f"cache-{name_of(num_gpus)}"
    files = sorted((model / "pictures").iterdir())
    geometry = cover(*sizes.source, Bucket(sizes.side, sizes.side))
    jobs = [LatentJob(f"{i:032x}", str(files[i % len(files)]), geometry) for i in range(num_images)]
    silent, course = Progress(disable=True), Course()
    job = TimedJob(Path, root, model, CacheConfig(resolution=sizes.side), device, silent, course=course)
    committer = Committer(root, Manifest(recipe={}), job.config.shard_mb * 2**20)
    with lock(root), _watched(name_of(num_gpus), course, num_images, limit):
        if num_gpus is None:
            course.started = time.monotonic()
            encode_latents(job, committer, jobs)
        else:
            with RayEngine(gpus=num_gpus).opened(model / "pictures", root, model, "cuda", silent) as passes:
                passes.announce(job, [], jobs)
                course.started = time.monotonic()
                passes.encode_latents(job, committer, jobs)
    ended = time.monotonic()
    num_rows = sum(shard.num_rows for shard in committer.manifest.shards)
    assert course.is_given_up or num_rows == num_images, f"{num_rows} of {num_images} were written"
    started = course.started or ended
    first = course.done[0][0] - started if course.done else None
    start = started - course.began if num_gpus else 0.0
    name = "ray" if num_gpus else "embedded"
    rate = Rate(name, num_gpus or 1, num_rows, _rate(course.done), start, first, ended - started)
    return rate, course.is_given_up


@contextmanager
def _watched(name: str, course: Course, num_images: int, limit: float) -> Iterator[None]:
    """Print how far it is every ten seconds. At the limit, print where each thread waits, and stop it as by Ctrl-C."""
    is_ended = threading.Event()

    def watch() -> None:
        while not is_ended.wait(min(_SECONDS_A_LINE, max(0.0, limit - (time.monotonic() - course.began)))):
            console.note(f"{name}: {course.words(num_images)}")
            if time.monotonic() - course.began >= limit:
                break
        else:
            return
        course.is_given_up = True
        console.warn(f"{name} is given up: {course.words(num_images)}. This is where it waits:")
        faulthandler.dump_traceback(sys.__stderr__ or 2, all_threads=True)
        system.interrupt()
        if not is_ended.wait(_SECONDS_TO_STOP):
            console.warn(f"{name} does not stop, so this process ends. {LOGS}")
            os._exit(1)

    watching = threading.Thread(target=watch, daemon=True, name="k5-watch")
    watching.start()
    try:
        yield
    except KeyboardInterrupt:
        if not course.is_given_up:
            raise
    finally:
        is_ended.set()
        watching.join()


def name_of(num_gpus: int | None) -> str:
    """As in ``--only``."""
    return f"ray-{num_gpus}" if num_gpus else "embedded"


def _rate(done: Sequence[tuple[float, int]]) -> float:
    """Images a second from the first note to the last."""
    if not done:
        return 0.0
    (begin, first), (end, last) = done[0], done[-1]
    return (last - first) / (end - begin) if end > begin else 0.0


def table_rows(rates: Sequence[Rate]) -> list[tuple[str, ...]]:
    """Results as rows of text. They are compared with the embedded engine, if it was measured."""
    embedded = next((rate.images_a_second for rate in rates if rate.engine == "embedded"), 0.0)
    return [
        (rate.engine, str(rate.num_gpus), str(rate.num_images), f"{rate.images_a_second:.2f}",
         f"{rate.images_a_second / embedded:.2f}x" if embedded else "-", f"{rate.seconds_to_start:.1f}",
         "-" if rate.seconds_to_first is None else f"{rate.seconds_to_first:.1f}", f"{rate.seconds:.1f}")
        for rate in rates
    ]  # fmt: skip


if __name__ == "__main__":
    command_line.run(main)

"""What does a process of Ray do for an encode? It decodes images, or holds an encoder and writes shards.

Everything here runs in Ray's processes, on any machine of the cluster. An order of jobs is one row of an Arrow table,
since Ray Data hands workers on GPUs a number of rows that must be said. Its report is one too.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import SpooledTemporaryFile
from typing import TYPE_CHECKING, Any

import pyarrow as pa
from rich.progress import Progress

from k5cache.buckets import Bucket
from k5cache.encode import estimate
from k5cache.encode.commit import Committer
from k5cache.encode.image_pass import Vae, encode_bucket, load_pixels
from k5cache.encode.job import Job
from k5cache.encode.one_encoder import when_memory_ends
from k5cache.encode.sink import Append
from k5cache.encode.text_pass import encode_pooled, encode_prompts, load_clip, load_qwen, sources_of
from k5cache.encoders import memory_plan
from k5cache.engines import wire
from k5cache.engines.wire import Report
from k5cache.options import CacheConfig
from k5cache.shared import vram
from k5cache.shared.errors import EngineError, K5Error
from k5cache.shared.template import version
from k5cache.sources.items import Content, UnreadableImage
from k5cache.store.manifest import Manifest, ShardInfo, ShardKind
from k5cache.store.ours import LOCK
from k5cache.store.tensors import TensorSpec

if TYPE_CHECKING:
    import torch

    from k5cache.encode.source_pass import Sources
    from k5cache.encode.text_pass import FirstChunk
    from k5cache.encoders.clip import Clip
    from k5cache.encoders.qwen import Qwen

Order = dict[str, pa.Scalar]
"""Its number, its jobs, and what ``Decoder`` adds, by the names of the columns."""
_SECONDS_TO_TELL = 0.5
_POOLED_BYTES = 2**26  # CLIP's vectors of an order in memory


@dataclass(frozen=True)
class Place:
    """Where an encode reads and writes, on all machines alike."""

    folder: str
    """In which the command runs: other paths may be relative to it."""
    source: str
    """Empty if it is no file or folder: a pattern, or a dataset of the hub."""
    root: Path
    """Of the cache."""
    lock: str
    """What is in the file of the cache's lock, by which a process knows that it sees the same folder."""
    model: Path
    version: str
    """Of this package."""


@dataclass(frozen=True)
class Setup:
    """What every process of an encode is told."""

    place: Place
    config: CacheConfig
    device: str
    """``cuda`` or ``cpu``."""
    vram: int | None
    num_threads: int
    """Of torch on a CPU: with another number it may round differently."""


@dataclass(frozen=True)
class Readers:
    """How images are read."""

    read: Callable[[str], Content]
    read_source: Callable[[str], Content]


def package_version() -> str:
    """Of this package, on this machine."""
    return version("kandinsky5-lora") or "none"


def problem_here(place: Place) -> str:
    """Why this machine cannot work on the encode; empty if it can. Asked before any work, and once in a process."""
    if place.version != package_version():
        return f"has kandinsky5-lora {package_version()}, and the command is of {place.version}"
    try:
        os.chdir(place.folder)
    except OSError as error:
        return f"has no folder {place.folder} ({error.strerror})"
    if place.source and not os.path.exists(place.source):  # noqa: PTH110 (as it was written)
        return f"does not see the images: there is no {place.source}"
    try:
        text = (place.root / LOCK).read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        return f"does not see the cache: {place.root / LOCK} cannot be read ({error.strerror})"
    if text != place.lock:
        return f"sees another folder at {place.root}, not the cache that this command writes"
    if not os.access(place.root, os.W_OK):
        return f"may not write the cache {place.root}"
    if not (place.model / "vae" / "config.json").exists():
        return f"does not see the model: there is no {place.model / 'vae' / 'config.json'}"
    return ""


def check_here(place: Place) -> None:
    """Raises ``EngineError`` if this machine cannot work on the encode: it may have joined after it began."""
    if problem := problem_here(place):
        raise EngineError(f"{socket.gethostname()} {problem}", SHARE)


SHARE = "All machines of a cluster need the images, the cache and the model under the same paths: share the folders"


def plan_here(
    setup: Setup, num_tokens: int, has_sources: bool, latent_jobs: Sequence[str]
) -> tuple[memory_plan.TextPlan | None, memory_plan.VaePlan | None]:
    """How the encoders fit this machine's card. Raises ``DoesNotFit``.

    Args:
        num_tokens: of all texts; 0: there are none.
        latent_jobs: those on which the plan depends.
    """
    check_here(setup.place)
    at = (setup.place.model, setup.config, setup.device, setup.vram)
    jobs = [wire.latent_job(text) for text in latent_jobs]
    text = estimate.plan_text(*at, [num_tokens], has_sources) if num_tokens else None
    return text, estimate.plan_vae(*at, jobs) if jobs else None


class Decoder:
    """Reads and decodes the images of orders. A task of Ray Data: it may run anywhere, and again."""

    def __init__(self, setup: Setup, readers: Any, ledger: Any, num_threads: int) -> None:
        """``readers``: a reference to ``Readers``. ``ledger``: to ``Ledger``."""
        self.setup, self.readers, self.ledger, self.num_threads = setup, readers, ledger, num_threads

    def __call__(self, orders: pa.Table) -> pa.Table:
        """The order, with the pixels of each image or the reason why there are none."""
        (number,), (texts,) = orders["order"].to_pylist(), orders["jobs"].to_pylist()
        _note(self.ledger.decode, number)
        problem = ""
        pixels: list[bytes | None] = []
        failures: list[str] = []
        try:
            job = job_of(self.setup, self.readers)
            jobs = [wire.latent_job(text) for text in texts]
            with when_memory_ends("cpu", "Decoding images", 0):
                for loaded in load_pixels(job, jobs, self.num_threads):
                    pixels.append(None if isinstance(loaded, UnreadableImage) else loaded.numpy().tobytes())
                    failures.append(wire.json_of_failure(loaded) if isinstance(loaded, UnreadableImage) else "")
        except (K5Error, OSError) as error:
            problem = wire.json_of_report(Report(number, error=error))
            pixels, failures = [], []
        decoded = {
            "pixels": pa.array([pixels], pa.large_list(pa.large_binary())),
            "failures": pa.array([failures], pa.list_(pa.string())),
            "problem": [problem],
        }
        return pa.table({name: orders[name] for name in orders.column_names} | decoded)


def _note(begin: Any, order: int) -> None:
    """Have the ledger know that this process begins an order, before it can die of it."""
    import ray

    ray.get(begin.remote(order, os.getpid()))


_jobs: dict[tuple[Setup, str], Job] = {}
"""Of this process: that of the encode for which it works."""


def job_of(setup: Setup, readers: Any, note: Callable[[str], object] = lambda _: None) -> Job:
    """The job as the passes want it, the same object from order to order. Raises ``EngineError``."""
    import ray

    encode = (setup, str(readers))
    if encode not in _jobs:
        check_here(setup.place)
        import torch

        torch.set_num_threads(setup.num_threads)
        found = ray.get(readers)
        silent = Progress(disable=True)
        _jobs.clear()
        place = setup.place
        _jobs[encode] = Job(found.read, place.root, place.model, setup.config, setup.device, silent, setup.vram,
                           found.read_source, note)  # fmt: skip
    return _jobs[encode]


class Shards(Committer):
    """The sink of one order: its shards are reported, and named in the manifest by the process that has the lock."""

    def __init__(self, job: Job, written: list[ShardInfo], tell: Callable[[int], object]) -> None:
        """``written`` gets each shard that is whole on disk."""
        super().__init__(job.root, Manifest(recipe={}), job.config.shard_mb * 2**20)
        self._written, self._tell = written, tell
        self._num_rows, self._told = 0, time.monotonic()

    def add(self, shards: Sequence[ShardInfo]) -> None:
        """Keep them for the report."""
        self._written += shards

    @contextmanager
    def shards(self, kind: ShardKind, specs: dict[str, TensorSpec], bucket: Bucket | None = None) -> Iterator[Append]:
        """As ``Committer.shards``; says now and then how many rows there are."""
        with super().shards(kind, specs, bucket) as append:

            def counted(row: dict[str, Any]) -> None:
                append(row)
                self._num_rows += 1
                if time.monotonic() - self._told > _SECONDS_TO_TELL:
                    self._told = time.monotonic()
                    self._tell(self._num_rows)

            yield counted


class _Worker:
    """Holds an encoder, and encodes one order after another."""

    name = ""

    def __init__(self, setup: Setup, readers: Any, ledger: Any) -> None:
        self.setup, self.readers, self.ledger = setup, readers, ledger
        self.notes: list[str] = []
        self.planned = 0

    def __call__(self, orders: pa.Table) -> Iterator[pa.Table]:
        """Encode the orders of a table. Yields a report of each."""
        for i in range(len(orders)):
            order = {name: orders[name][i] for name in orders.column_names}
            report = self._report(order["order"].as_py(), order)
            yield pa.table({"report": [wire.json_of_report(report)]})

    def _report(self, number: int, order: Order) -> Report:
        _note(self.ledger.begin, number)
        written: list[ShardInfo] = []
        try:
            job = job_of(self.setup, self.readers, self.notes.append)
            if job.device.startswith("cuda"):
                vram.limit_to_card(job.device, job.vram)
            sink = Shards(job, written, lambda count: self.ledger.tell.remote(number, count))
            with when_memory_ends(job.device, self.name, self.planned):
                report = self.encode(job, sink, order)
        except (K5Error, OSError) as error:  # the shards before it are whole
            return Report(number, tuple(written), error=error)
        notes, self.notes[:] = tuple(self.notes), []
        return replace(report, order=number, shards=tuple(written), notes=notes)

    def encode(self, job: Job, sink: Shards, order: Order) -> Report:
        """The rows of an order, into the sink."""
        raise NotImplementedError


class VaeWorker(_Worker):
    """Has the VAE. Its orders come from ``Decoder``."""

    name = "The VAE"

    def __init__(self, setup: Setup, readers: Any, ledger: Any, latent_jobs: Sequence[str]) -> None:
        """``latent_jobs``: those on which the plan depends."""
        super().__init__(setup, readers, ledger)
        self._planned_for = [wire.latent_job(text) for text in latent_jobs]
        self._vae: Vae | None = None

    def encode(self, job: Job, sink: Shards, order: Order) -> Report:
        """The latents of an order, which is of one bucket."""
        if problem := order["problem"].as_py():
            return wire.report_of(problem)
        if self._vae is None:
            self._vae = Vae(job, self._planned_for)
        latent_jobs = [wire.latent_job(text) for text in order["jobs"].as_py()]
        failed: dict[str, UnreadableImage] = {}
        bucket = latent_jobs[0].geometry.bucket
        encode_bucket(job, sink, bucket, latent_jobs, self._vae, failed, _no_bar, _loaded(order, bucket))
        return Report(0, failed=failed)


def _no_bar(count: int, description: str | None = None) -> None: ...


def _loaded(order: Order, bucket: Bucket) -> Iterator[torch.Tensor | UnreadableImage]:
    import numpy as np
    import torch

    for pixels, failure in zip(order["pixels"].values, order["failures"].values, strict=True):
        if failure.as_py():
            yield wire.failure_of(failure.as_py())
        else:
            values = np.frombuffer(pixels.as_buffer(), np.uint8).reshape(3, bucket.height, bucket.width)
            yield torch.from_numpy(values.copy())  # the buffer is Ray's, and may not be written


class TextWorker(_Worker):
    """Has CLIP and Qwen, which it keeps from order to order where they fit."""

    name = "Qwen2.5-VL"

    def __init__(self, setup: Setup, readers: Any, ledger: Any, num_tokens: int, has_sources: bool) -> None:
        """``num_tokens``: of all texts."""
        super().__init__(setup, readers, ledger)
        self._num_tokens, self._has_sources = num_tokens, has_sources
        self._clip: Clip | None = None
        self._qwen: Qwen | None = None
        self._sources: Sources | None = None
        self._plan: memory_plan.TextPlan | None = None

    def encode(self, job: Job, sink: Shards, order: Order) -> Report:
        """The texts of an order."""
        if self._clip is None:
            self._clip = load_clip(job)
        plan = self._plan = self._plan or self._planned(job, self._clip)
        if self._has_sources and self._sources is None:
            self._sources = sources_of(job)
            self._sources.is_kept = plan.mode == "resident"
        text_jobs = [wire.text_job(text) for text in order["jobs"].as_py()]
        failed: dict[str, UnreadableImage] = {}

        def load(first_chunk: FirstChunk) -> Qwen:
            self._qwen = self._qwen or load_qwen(job, plan, self._sources, first_chunk)
            return self._qwen

        with SpooledTemporaryFile(_POOLED_BYTES, dir=str(job.root)) as file:
            pooled = encode_pooled(job, self._clip, text_jobs, file)
            texts = encode_prompts(job, sink, text_jobs, plan, pooled, self._sources, failed, load)
        return Report(0, failed=failed, truncated=texts.truncated, lost=texts.lost)

    def _planned(self, job: Job, clip: Clip) -> memory_plan.TextPlan:
        """The plan of what CLIP leaves of the card."""
        card = job.vram or vram.free_card(job.device)
        if card is not None:
            card -= sum(p.numel() * p.element_size() for p in clip.model.parameters())
        plan = estimate.plan_text(job.folder, job.config, job.device, card, [self._num_tokens], self._has_sources)
        self.planned = plan.vram
        return plan


class Ledger:
    """How far a pass is, as its workers tell. An actor of Ray."""

    def __init__(self) -> None:
        self._rows: dict[int, int] = {}
        self._begun: dict[int, list[int]] = {}
        self._decoded: dict[int, list[int]] = {}

    def decode(self, order: int, process: int) -> None:
        """The images of an order begin to be decoded, perhaps again."""
        self._decoded.setdefault(order, []).append(process)

    def begin(self, order: int, process: int) -> None:
        """An order begins, perhaps again, since the worker that had it is gone."""
        self._rows[order] = 0
        self._begun.setdefault(order, []).append(process)

    def tell(self, order: int, num_rows: int) -> None:
        """So many rows of an order are encoded."""
        self._rows[order] = num_rows

    def end(self, orders: Sequence[int]) -> None:
        """They are reported: the caller counts them from here on."""
        for order in orders:
            self._rows.pop(order, None)
            self._begun.pop(order, None)
            self._decoded.pop(order, None)

    def state(self, ended: Sequence[int]) -> tuple[int, dict[int, list[int]], dict[int, list[int]]]:
        """Rows of the orders in work, without those that have ended. And by which processes each was begun, and by
        which it was decoded; of those that have ended, this once more.
        """
        begun, decoded = dict(self._begun), dict(self._decoded)
        self.end(ended)
        return sum(self._rows.values()), begun, decoded

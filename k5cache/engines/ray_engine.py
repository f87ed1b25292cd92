"""``--engine ray``: Ray Data decodes on all processors, its actors hold an encoder each, and this process commits.

The plan of an encode is the same as on one machine, and so are the passes over it; only the work is divided, into
orders. An order whose worker dies is encoded again by another. What is committed stays, whatever happens.
"""

from __future__ import annotations

import functools
import math
import os
import re
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.progress import Progress

from k5cache.encode import estimate
from k5cache.encode.engine import ShardSink
from k5cache.encode.job import Job, LatentJob, TextJob
from k5cache.encoders.memory_plan import SECONDS_AT_RISK, TextArchitecture, TextPlan
from k5cache.engines import cluster, orders
from k5cache.engines.cluster import Cluster
from k5cache.engines.running import Pass, Running
from k5cache.engines.wire import Report, json_of
from k5cache.shared import console, interrupt
from k5cache.shared.checkpoint import read_config
from k5cache.shared.errors import EngineError
from k5cache.shared.loading import begin_to_collect
from k5cache.shared.units import count_of
from k5cache.sources.items import UnreadableImage
from k5cache.store import files
from k5cache.store.manifest import ShardInfo
from k5cache.store.ours import LOCK

if TYPE_CHECKING:
    from k5cache.engines.workers import Place, Setup

SHARDS_A_COMMIT = 16
SECONDS_A_COMMIT = 30.0
"""The manifest is written after so many shards or so long: it grows with the cache, so not after each shard."""
_SECONDS_OF_A_LOOK = 180.0  # a machine may import torch from a slow disk


@dataclass(frozen=True)
class RayEngine:
    """An ``Engine`` on Ray."""

    address: str | None = None
    """Of a cluster; None: this machine."""
    gpus: int | None = None
    """How many to use; None: all."""
    cpu_workers: int | None = None
    """Processes that encode where there is no GPU; None: one a machine."""

    @contextmanager
    def opened(self, source: Path, root: Path, folder: Path, device: str, bars: Progress) -> Iterator[RayPasses]:
        """Start Ray or join the cluster, and have each machine look whether it sees all that it needs.

        Raises:
            EngineError: there is no Ray, or not so many GPUs, or a machine does not see the images or the cache.
        """
        with ExitStack() as stack:
            stack.callback(files.remove_leftovers, root)  # of workers that are ended
            activity = f"joining Ray at {self.address}" if self.address else "starting Ray"
            with console.doing(bars, activity):
                of_cluster = stack.enter_context(cluster.joined(self.address, self.gpus, device))
            with console.doing(bars, f"looking at {count_of(len(of_cluster.nodes), 'machine')} of Ray"):
                place = _place(source, root, folder)
                _look(of_cluster, place)
            yield RayPasses(of_cluster, place, self.cpu_workers)


class RayPasses:
    """The ``Passes`` of one encode."""

    def __init__(self, of_cluster: Cluster, place: Place, cpu_workers: int | None) -> None:
        self._cluster, self._place = of_cluster, place
        self.num_workers = of_cluster.num_gpus or cpu_workers or len(of_cluster.nodes)
        self._text_plan: TextPlan | None = None
        self._readers: Any = None
        self._num_tokens = 0
        self._seconds: dict[str, float] = {}
        """Of one text and of one image; only where there is no GPU."""

    @property
    def device(self) -> str:
        """Of the workers."""
        return "cuda" if self._cluster.num_gpus else "cpu"

    def announce(self, job: Job, text_jobs: Sequence[TextJob], latent_jobs: Sequence[LatentJob]) -> None:
        """Have a worker plan for its card, and print the plan."""
        import ray

        from k5cache.engines import workers

        self._sent(job)
        self._num_tokens = sum(estimate.token_counts(job.config, text_jobs)) if text_jobs else 0
        if self.device == "cpu":
            with console.doing(job.bars, "measuring this machine"):
                on_cpu = estimate.estimate(job.folder, job.config, "cpu", None, text_jobs, latent_jobs)
            self._seconds = {
                "text": (on_cpu.text_seconds or 0.0) / max(1, len(text_jobs)),
                "image": (on_cpu.vae_seconds or 0.0) / max(1, len(latent_jobs)),
            }
        with console.doing(job.bars, "having a worker look at its card"):
            plan = ray.remote(num_gpus=min(1, self._cluster.num_gpus), num_cpus=0)(workers.plan_here)
            setup, largest = self._setup(job), [json_of(each) for each in orders.extremes(latent_jobs)]
            plans = _answer(plan.remote(setup, self._num_tokens, estimate.has_sources(text_jobs), largest))
        self._text_plan, vae_plan = plans
        modes = [f"text encoder {self._text_plan.mode}"] if self._text_plan else []
        modes += [f"VAE {vae_plan.mode}"] if vae_plan else []
        kind = "GPU" if self._cluster.num_gpus else "CPU worker"
        console.note(f"Planned on {count_of(self.num_workers, kind)} of Ray: {', then '.join(modes)}")

    def encode_texts(
        self, job: Job, sink: ShardSink, text_jobs: Sequence[TextJob], failed: dict[str, UnreadableImage]
    ) -> tuple[tuple[str, int], ...]:
        """As ``text_pass.encode_texts``; each worker has CLIP and Qwen."""
        from k5cache.encode.text_pass import encodable, warn_of_lost
        from k5cache.engines import workers

        text_jobs, _ = encodable(job, text_jobs, failed)
        if not text_jobs:
            return ()
        assert self._text_plan, "announced"
        is_resident = self._text_plan.mode == "resident"
        parts = orders.text_orders(text_jobs, self.num_workers, self._texts_an_order(job, len(text_jobs)), is_resident)
        arguments = (self._num_tokens, estimate.has_sources(text_jobs))
        found: dict[int, Report] = {}

        def take(report: Report) -> None:
            failed.update(report.failed)
            if report.truncated or report.lost:
                found[report.order] = report

        self._run(job, sink, "Qwen2.5-VL", "caption", parts, workers.TextWorker, arguments, take)
        in_order = [found[order] for order in sorted(found)]  # and not as they came
        warn_of_lost(list(dict.fromkeys(caption for report in in_order for caption in report.lost)))
        return tuple(cut for report in in_order for cut in report.truncated)

    def encode_latents(self, job: Job, sink: ShardSink, latent_jobs: Sequence[LatentJob]) -> dict[str, UnreadableImage]:
        """As ``image_pass.encode_latents``; images are decoded on all processors, and each worker has the VAE."""
        from k5cache.engines import workers

        if not latent_jobs:
            return {}
        most_rows = _at_risk(self._seconds.get("image"))
        num_machines = len(self._cluster.nodes)
        pixel_bytes = orders.pixel_bytes(self.num_workers, num_machines, num_machines * self._cluster.object_bytes)
        parts = orders.latent_orders(latent_jobs, self.num_workers, most_rows, pixel_bytes)
        arguments = ([json_of(each) for each in orders.extremes(latent_jobs)],)
        failed: dict[str, UnreadableImage] = {}

        def take(report: Report) -> None:
            failed.update(report.failed)

        self._run(job, sink, "VAE", "image", parts, workers.VaeWorker, arguments, take, pixel_bytes)
        return failed

    def _run(
        self,
        job: Job,
        sink: ShardSink,
        name: str,
        unit: str,
        parts: Iterator[Sequence[LatentJob | TextJob]],
        worker: type,
        arguments: tuple[Any, ...],
        take: Callable[[Report], object],
        pixel_bytes: int = 0,
    ) -> None:
        """Have workers encode the orders, commit their shards, and hand each report to ``take``.

        Args:
            pixel_bytes: the most that an order's images take, which other processes decode. 0: it has none.
        """
        import ray

        from k5cache.engines import workers

        sizes: list[int] = []
        names: list[str] = []
        rows: list[dict[str, Any]] = []
        for number, part in enumerate(parts):
            sizes.append(len(part))
            names.append(part[0].path if isinstance(part[0], LatentJob) else repr(part[0].caption[:40]))
            rows.append({"order": number, "jobs": [json_of(each) for each in part]})
        readers = self._sent(job)
        ledger = _beside_this_process(ray.remote(workers.Ledger))
        num_workers = min(self.num_workers, len(rows))
        dataset = self._dataset(job, rows, readers, ledger, worker, arguments, num_workers, pixel_bytes)
        rows.clear()  # they are in Ray's memory now
        commits = _Commits(sink)
        seen: set[str] = set()
        with job.progress_bar(f"{name}: starting {count_of(num_workers, 'worker')}", sum(sizes), unit) as advance:
            work = Pass(sizes, names, unit, functools.partial(advance, description=name))
            with Running(dataset, ledger, work, commits.look) as running:
                try:
                    for report in running:
                        commits.add(report.shards)
                        if report.error:
                            raise report.error
                        take(report)
                        for note in report.notes:
                            if not seen:  # each worker measures the error of int8 on other captions
                                job.note(note)
                            seen.add(note)
                finally:
                    with interrupt.deferred():
                        commits.add([shard for report in running.arrived() for shard in report.shards])
                        commits.end()

    def _sent(self, job: Job) -> Any:
        """A reference to what reads the images, by which other processes find it.

        Raises:
            EngineError: it holds an open file or a connection.
        """
        import ray

        from k5cache.engines import workers

        if self._readers is None:
            try:
                self._readers = ray.put(workers.Readers(job.read, job.read_source))
            except (TypeError, AttributeError) as error:  # Ray adds a page of its own to the reason
                raise EngineError(
                    f"The images of {self._place.source or 'this source'} cannot be read by other processes: "
                    f"{error.__cause__ or type(error).__name__}",
                    "Leave --engine out, or write the images into a folder",
                ) from error
        return self._readers

    def _dataset(
        self,
        job: Job,
        rows: list[dict[str, Any]],
        readers: Any,
        ledger: Any,
        worker: type,
        arguments: tuple[Any, ...],
        num_workers: int,
        pixel_bytes: int,
    ) -> Any:
        """The orders, and what is done with each. Nothing runs yet."""
        import ray.data

        from k5cache.engines import workers

        context = ray.data.DataContext.get_current()
        context.enable_progress_bars = context.print_on_execution_start = False
        context.target_max_block_size = None  # what becomes of an order is one block
        # Large orders are decoded longer than small ones. If each was encoded as soon as it is decoded, a large one
        # would be the last, while other workers have nothing to do.
        options = context.execution_options
        options.preserve_order = bool(pixel_bytes)
        most_bytes = orders.bytes_to_allow(pixel_bytes, self.num_workers, len(self._cluster.nodes)) or math.inf
        options.resource_limits = options.resource_limits.copy(object_store_memory=most_bytes)
        setup = self._setup(job)
        shape = {"batch_size": 1, "batch_format": "pyarrow"}  # an order is a row
        # Not from_arrow: it has tasks measure the tables, which waits for a process that imports Ray Data.
        dataset = ray.data.from_items(rows, override_num_blocks=len(rows))
        if pixel_bytes:
            # A quarter of a machine's processors an order: others are decoded meanwhile, and few wait in memory.
            num_cpus = min(8.0, self._cluster.num_cpus / 4)
            decoder = workers.Decoder(setup, readers, ledger, max(1, round(num_cpus)))
            dataset = dataset.map_batches(decoder, num_cpus=num_cpus, **shape)
        # Actors that take whole processors leave none to those that decode for them. And another number than theirs,
        # since Ray Data makes one step of two that want the same.
        beside = -(-self.num_workers // len(self._cluster.nodes))
        num_cpus = 0 if self._cluster.num_gpus else self._cluster.num_cpus * 0.4 / beside
        return dataset.map_batches(
            worker,
            fn_constructor_args=(setup, readers, ledger, *arguments),
            compute=ray.data.ActorPoolStrategy(size=num_workers, max_tasks_in_flight_per_actor=2),
            num_gpus=1 if self._cluster.num_gpus else None,
            num_cpus=num_cpus,
            **shape,
        )

    def _setup(self, job: Job) -> Setup:
        import torch

        from k5cache.engines.workers import Setup

        begin_to_collect()  # this process waits for workers, perhaps for days

        return Setup(self._place, job.config, self.device, job.vram, torch.get_num_threads())

    def _texts_an_order(self, job: Job, count: int) -> int:
        """As many as fill a shard or, where each order reads all weights, as may wait for that between layers."""
        assert self._text_plan, "announced"
        num_tokens = max(1, self._num_tokens // count)
        if self._text_plan.mode == "streamed":
            return max(1, min(self._text_plan.chunk_tokens // num_tokens, _at_risk(self._seconds.get("text"))))
        hidden_size = TextArchitecture.of(read_config(job.folder, "text_encoder")).hidden_size
        of_a_shard = job.config.shard_mb * 2**20 // (2 * hidden_size * num_tokens)
        return max(1, min(of_a_shard, _at_risk(self._seconds.get("text"))))


class _Commits:
    """Names shards in the manifest, several at once."""

    def __init__(self, sink: ShardSink) -> None:
        self._sink = sink
        self._shards: list[ShardInfo] = []
        self._last = time.monotonic()

    def add(self, shards: Sequence[ShardInfo]) -> None:
        self._shards += shards
        self.look()

    def look(self) -> None:
        """Write the manifest if there are enough shards, or if it is long since it was written."""
        if len(self._shards) >= SHARDS_A_COMMIT or time.monotonic() - self._last >= SECONDS_A_COMMIT:
            self.end()

    def end(self) -> None:
        if self._shards:
            self._sink.add(self._shards)
        self._shards, self._last = [], time.monotonic()


def _at_risk(seconds: float | None) -> int:
    """How many rows that take so long each may be lost if a worker dies. None or 0: any number."""
    return max(1, int(SECONDS_AT_RISK / seconds)) if seconds else 2**31


def _place(source: Path, root: Path, folder: Path) -> Place:
    from k5cache.engines.workers import Place, package_version

    lock = (root / LOCK).read_text(encoding="utf-8", errors="replace")
    there = str(source) if source.exists() else ""
    return Place(os.getcwd(), there, root, lock, folder, package_version())  # noqa: PTH109 (as workers change to it)


def _look(of_cluster: Cluster, place: Place) -> None:
    """Ask each machine whether it sees what it needs. Raises ``EngineError``, which names those that do not."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    from k5cache.engines import workers

    look = ray.remote(num_cpus=0)(workers.problem_here)
    asked = {
        node.name: look.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node.id, soft=False)).remote(place)
        for node in of_cluster.nodes
    }
    problems = {name: _answer(ref, name) for name, ref in asked.items()}
    if blind := [f"{name} {problem}" for name, problem in problems.items() if problem]:
        more = f", and so do {count_of(len(blind) - 3, 'more machine')}" if len(blind) > 3 else ""
        raise EngineError("; ".join(blind[:3]) + more, workers.SHARE)


def _beside_this_process(actor: Any) -> Any:
    """Start an actor on this machine: it is not lost with another one. If it is killed, it starts anew."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    return actor.options(num_cpus=0, max_restarts=-1, max_task_retries=-1, scheduling_strategy=here).remote()


def _answer(reference: Any, who: str = "A worker") -> Any:
    """What a task returned, waited for within bounds. Raises what it raised, as it was.

    Args:
        who: works on it, for messages.
    """
    import ray
    from ray.exceptions import GetTimeoutError, RayError, RayTaskError

    try:
        return ray.get(reference, timeout=_SECONDS_OF_A_LOOK)
    except GetTimeoutError:
        raise EngineError(
            f"{who} did not answer within {_SECONDS_OF_A_LOOK:.0f} s",
            "See with `ray status` whether other jobs have the machines",
        ) from None
    except RayError as error:
        if missing := _MISSING.search(str(error)):  # found by Ray before the task began
            raise EngineError(f"{who} has no module {missing[1]}", f"Install it there: {cluster.INSTALL}") from None
        cause = error.cause if isinstance(error, RayTaskError) else None
        if isinstance(cause, Exception) and not isinstance(cause, RayError):
            raise cause from None
        raise EngineError(f"Ray ended a task: {cluster.words_of(str(error))}", cluster.CHECK) from None


_MISSING = re.compile(r"No module named '([\w.]+)'")

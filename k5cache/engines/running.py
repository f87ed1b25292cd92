"""How does one pass run on Ray? A dataset of orders is executed; its reports arrive here, and its progress is shown."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from queue import Empty, SimpleQueue
from threading import Event, Thread
from threading import enumerate as threads
from types import TracebackType
from typing import Any, Self

from k5cache.engines import cluster
from k5cache.engines.wire import Report, report_of
from k5cache.shared import console
from k5cache.shared.errors import EngineError, K5Error
from k5cache.shared.units import count_of

MOST_ATTEMPTS = 3
"""So often is an order begun. If its worker died each time, it is the order that kills them."""
SECONDS_OF_SILENCE = 1200.0
"""So long may no worker encode a row: loading an encoder from a slow disk takes minutes."""
SECONDS_AFTER_A_LOSS = 120.0
"""The same once a machine is gone."""
_SECONDS_A_TICK = 0.5
_SECONDS_TO_SEE_RAY = 2.0
"""Ray ends this process, without a word, 10 s after its process on this machine has died."""
_SECONDS_A_LOOK = 15.0
_SECONDS_TO_STOP = 10.0
AGAIN = "What was finished is kept. To go on, run the same command"


@dataclass
class Pass:
    """What is to be done, and how far it is."""

    sizes: Sequence[int]
    """Rows of each order."""
    names: Sequence[str]
    """What each order begins with, for messages."""
    unit: str
    advance: Callable[[int], object]
    num_done: int = 0
    """Rows of orders that are reported."""
    done: set[int] = field(default_factory=set)
    """Those orders."""
    shown: int = 0
    heard: float = field(default_factory=time.monotonic)
    """When a worker last had something new to say."""
    said: set[tuple[str, int, int]] = field(default_factory=set)

    def show(self, num_rows: int) -> None:
        """So many rows are encoded."""
        if num_rows != self.shown:
            self.advance(num_rows - self.shown)
            self.shown, self.heard = num_rows, time.monotonic()

    def ended(self, report: Report) -> None:
        """An order is reported."""
        self.num_done += self.sizes[report.order]
        self.done.add(report.order)
        self.heard = time.monotonic()
        self.show(max(self.shown, self.num_done))

    def begun(self, processes: dict[int, list[int]], done: str = "encoded") -> None:
        """Say that workers died, if orders were begun again. Raises ``EngineError`` if one order kills them all.

        Args:
            processes: by which each order was begun.
            done: what they do with it, ``encoded`` or ``decoded``.
        """
        for order, pids in processes.items():
            rows = count_of(self.sizes[order], self.unit)
            if len(pids) > MOST_ATTEMPTS and order not in self.done:
                raise EngineError(
                    f"{MOST_ATTEMPTS} workers died one after another while they {done} {rows} from {self.names[order]} "
                    "on",
                    f"Look for `out of memory` in the system's log (dmesg). {AGAIN}",
                )
            if (done, order, len(pids)) in self.said:
                continue
            self.said.add((done, order, len(pids)))
            self.heard = time.monotonic()
            if len(pids) > 1:
                console.warn(f"A worker died. The {rows} that it had are {done} again")


class Running:
    """A dataset that is executed by a thread. Iterate over it for the reports, in the order in which they arrive."""

    def __init__(self, dataset: Any, ledger: Any, work: Pass, on_tick: Callable[[], object] = lambda: None) -> None:
        """``on_tick`` is called about twice a second."""
        self._dataset, self._ledger, self._work, self._on_tick = dataset, ledger, work, on_tick
        self._arrived: SimpleQueue[Report | BaseException | None] = SimpleQueue()
        self._is_stopped = Event()
        self._ended: list[int] = []
        """Orders that are reported, and the ledger does not know it yet."""
        self._asked: Any = None
        self._looked = self._saw_ray = time.monotonic()
        self._machines = _alive()
        self._thread = Thread(target=self._execute, daemon=True, name="k5-ray-data")
        self._executors = _executors()

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._is_stopped.set()
        if error is None or cluster.missing():
            return
        # Ray is shut down next. A thread of Ray Data's that asks it for something then would end this process.
        for executor in _executors() - self._executors:
            executor.shutdown(force=True)
        self._thread.join(_SECONDS_TO_STOP)

    def __iter__(self) -> Iterator[Report]:
        from ray.exceptions import RayError

        while True:
            self._on_tick()
            try:
                arrived = self._arrived.get(timeout=_SECONDS_A_TICK)
            except Empty:
                try:
                    self._tick()
                except RayError as error:
                    raise _understood(error) from error
                continue
            if arrived is None:
                self._end()
                return
            if isinstance(arrived, BaseException):
                raise _understood(arrived)
            yield self._noted(arrived)

    def arrived(self) -> Iterator[Report]:
        """Reports that are here, without waiting for more."""
        while not self._arrived.empty():
            arrived = self._arrived.get()
            if isinstance(arrived, Report):
                yield self._noted(arrived)

    def _noted(self, report: Report) -> Report:
        self._ended.append(report.order)
        self._work.ended(report)
        return report

    def _execute(self) -> None:
        try:
            batches = self._dataset.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0)
            for batch in batches:
                for text in batch["report"].to_pylist():
                    self._arrived.put(report_of(text))
                if self._is_stopped.is_set():
                    break
        except BaseException as error:
            self._arrived.put(error)
        else:
            self._arrived.put(None)

    def _tick(self) -> None:
        """Ask the workers how far they are, and show what they answered before."""
        import ray

        self._look_for_ray()
        if self._asked is None:
            self._asked = self._ledger.state.remote(self._ended)
            self._ended = []
        elif ray.wait([self._asked], timeout=0)[0]:
            num_rows, begun, decoded = ray.get(self._asked)
            self._asked = None
            self._work.begun(begun, "encoded")
            self._work.begun(decoded, "decoded")
            if not self._ended:
                self._work.show(self._work.num_done + num_rows)
        self._look_at_machines()

    def _end(self) -> None:
        """Say who died of the last orders, which may end before the next tick, and end the ledger."""
        import ray
        from ray.exceptions import RayError

        with suppress(RayError):  # all that was to be encoded is
            asked = [self._asked] if self._asked else []
            for state in ray.get([*asked, self._ledger.state.remote(self._ended)], timeout=_SECONDS_A_LOOK):
                self._work.begun(state[1], "encoded")
                self._work.begun(state[2], "decoded")
            ray.kill(self._ledger)

    def _look_for_ray(self) -> None:
        """Raises ``EngineError`` if the Ray of this machine has ended: then nothing more may be asked of it."""
        if time.monotonic() - self._saw_ray < _SECONDS_TO_SEE_RAY:
            return
        self._saw_ray = time.monotonic()
        if what := cluster.missing():
            raise EngineError(f"Ray has ended: {what} does not answer", f"{cluster.LOGS}. {AGAIN}")

    def _look_at_machines(self) -> None:
        now = time.monotonic()
        silence = now - self._work.heard
        if now - self._looked < _SECONDS_A_LOOK:
            return
        self._looked = now
        lost = sorted({*self._machines.values()} - {*_alive().values()})
        if lost and silence > SECONDS_AFTER_A_LOSS:
            raise EngineError(f"Ray lost {' and '.join(lost)}, and nothing is encoded since", AGAIN)
        if silence > SECONDS_OF_SILENCE:
            raise EngineError(
                f"No worker has encoded anything for {console.human_seconds(silence)}",
                f"See with `ray status` whether other jobs have the GPUs. {AGAIN}",
            )


def _alive() -> dict[str, str]:
    """The machines of the cluster: id -> name."""
    import ray

    return {node["NodeID"]: node["NodeManagerHostname"] for node in ray.nodes() if node["Alive"]}


def _executors() -> set[Any]:
    """The threads of Ray Data that each execute a dataset. A dataset itself names its own only after a first result."""
    return {thread for thread in threads() if type(thread).__name__ == "StreamingExecutor"}


def _understood(error: BaseException) -> BaseException:
    """An error of a worker as it was raised there, or what it means that Ray ended the work."""
    from ray.exceptions import RayError, RayTaskError

    if isinstance(error, RayTaskError):
        return error.cause if isinstance(error.cause, K5Error) else error
    if isinstance(error, RayError):
        return EngineError(f"Ray ended the work: {cluster.words_of(str(error)) or type(error).__name__}", AGAIN)
    return error

"""How does one pass run on Ray? A dataset of orders is executed; its reports arrive here, and its progress is shown."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from queue import Empty, SimpleQueue
from threading import Event, Thread
from types import TracebackType
from typing import Any, Self

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
_SECONDS_A_LOOK = 15.0
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
    shown: int = 0
    heard: float = field(default_factory=time.monotonic)
    """When a worker last had something new to say."""
    said: set[tuple[int, int]] = field(default_factory=set)

    def show(self, num_rows: int) -> None:
        """So many rows are encoded."""
        if num_rows != self.shown:
            self.advance(num_rows - self.shown)
            self.shown, self.heard = num_rows, time.monotonic()

    def ended(self, report: Report) -> None:
        """An order is reported."""
        self.num_done += self.sizes[report.order]
        self.heard = time.monotonic()
        self.show(max(self.shown, self.num_done))

    def begun(self, processes: dict[int, list[int]]) -> None:
        """Say that workers died, if orders were begun again. Raises ``EngineError`` if one order kills them all."""
        for order, pids in processes.items():
            if len(pids) > MOST_ATTEMPTS:
                raise EngineError(
                    f"{MOST_ATTEMPTS} workers died one after another while they encoded "
                    f"{count_of(self.sizes[order], self.unit)} from {self.names[order]} on",
                    f"Look for `out of memory` in the system's log (dmesg). {AGAIN}",
                )
            if (order, len(pids)) in self.said:
                continue
            self.said.add((order, len(pids)))
            self.heard = time.monotonic()
            if len(pids) > 1:
                rows = count_of(self.sizes[order], self.unit)
                console.warn(f"A worker died. The {rows} that it had are encoded again")


class Running:
    """A dataset that is executed by a thread. Iterate over it for the reports, in the order in which they arrive."""

    def __init__(self, dataset: Any, ledger: Any, work: Pass) -> None:
        self._dataset, self._ledger, self._work = dataset, ledger, work
        self._arrived: SimpleQueue[Report | BaseException | None] = SimpleQueue()
        self._is_stopped = Event()
        self._ended: list[int] = []
        """Orders that are reported, and the ledger does not know it yet."""
        self._asked: Any = None
        self._looked = time.monotonic()
        self._machines = _alive()

    def __enter__(self) -> Self:
        Thread(target=self._execute, daemon=True, name="k5-ray-data").start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._is_stopped.set()

    def __iter__(self) -> Iterator[Report]:
        while True:
            try:
                arrived = self._arrived.get(timeout=_SECONDS_A_TICK)
            except Empty:
                self._tick()
                continue
            if arrived is None:
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

        if self._asked is None:
            self._asked = self._ledger.state.remote(self._ended)
            self._ended = []
        elif ray.wait([self._asked], timeout=0)[0]:
            num_rows, processes = ray.get(self._asked)
            self._asked = None
            gone = {*self._ended}
            self._work.begun({order: pids for order, pids in processes.items() if order not in gone})
            if not gone:
                self._work.show(self._work.num_done + num_rows)
        self._look_at_machines()

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


def _understood(error: BaseException) -> BaseException:
    """An error of a worker as it was raised there, or what it means that Ray ended the work."""
    from ray.exceptions import RayError, RayTaskError

    if isinstance(error, RayTaskError):
        return error.cause if isinstance(error.cause, K5Error) else error
    if isinstance(error, RayError):
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        return EngineError(f"Ray ended the work: {lines[0][:300] if lines else type(error).__name__}", AGAIN)
    return error

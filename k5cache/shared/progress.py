"""How far is long work? Bars on a terminal; a line a minute in a pipe, a log file or a notebook's output."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import Event, Thread
from types import TracebackType
from typing import Any, Self

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    Task,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)
from rich.text import Text

from k5cache.shared.progress_file import reporter
from k5cache.shared.units import count_of, human_bytes, human_seconds

SECONDS_A_LINE = 60.0
SECONDS_TO_THE_FIRST = 1.0
"""A log says at once what is being done; what is done within a second needs no line."""


class Bars(Progress):
    """Bars with a rate and the time left. Each task has ``unit="image"`` or another, and a ``note``."""

    def __init__(self, console: Console) -> None:
        super().__init__(
            SpinnerColumn(),
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=28),
            _Count(),
            _Rate(),
            TimeRemainingColumn(compact=True),
            TextColumn("{task.fields[note]}", style="dim", markup=False),
            console=console,
            refresh_per_second=4,
        )

    def start(self) -> None:
        """Begin to draw."""
        super().start()
        if report := reporter():
            report.add(self)

    def stop(self) -> None:
        """Draw nothing more."""
        if report := reporter():
            report.remove(self)
        super().stop()


class _Rate(TextColumn):
    def __init__(self) -> None:
        super().__init__("")

    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        return Text(rated(speed, task.fields.get("unit", "")) if speed else "", style="dim")


class _Count(MofNCompleteColumn):
    """Empty for a task that counts nothing."""

    def render(self, task: Task) -> Text:
        return Text("") if task.total is None and not task.completed else super().render(task)


class Lines(Progress):
    """The same tasks where nothing can be drawn over: a line a minute says what is being done.

    Args:
        say: prints a line.
        seconds: from line to line.
    """

    def __init__(self, say: Callable[[str], object], seconds: float | None = None) -> None:
        super().__init__(disable=True)
        self.say, self.seconds = say, SECONDS_A_LINE if seconds is None else seconds
        self._before: dict[TaskID, tuple[float, float]] = {}  # time and count of each task at its last line
        self._ended = Event()
        self._thread: Thread | None = None

    def add_task(
        self, description: str, start: bool = True, total: float | None = 100.0, completed: int = 0,
        visible: bool = True, **fields: Any,
    ) -> TaskID:  # fmt: skip
        """Add a task, and note how far it is: a run that goes on does not begin at 0."""
        task = super().add_task(description, start, total, completed, visible, **fields)
        self._before[task] = (time.monotonic(), completed)
        return task

    def start(self) -> None:
        """Begin to print."""
        if report := reporter():
            report.add(self)
        if self._thread is None:
            self._thread = Thread(target=self._print, daemon=True)
            self._thread.start()

    def stop(self) -> None:
        """Print nothing more."""
        if report := reporter():
            report.remove(self)
        self._ended.set()
        if self._thread is not None:
            self._thread.join()

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def _print(self) -> None:
        seconds = min(SECONDS_TO_THE_FIRST, self.seconds)
        while not self._ended.wait(seconds):
            seconds = self.seconds
            if line := self.line():
                self.say(line)

    def line(self) -> str:
        """What is being done now, and how far it is: the work of longest standing first."""
        with self._lock:
            return "; ".join(self._of(task) for task in self.tasks if task.visible and not task.finished)

    def _of(self, task: Task) -> str:
        now, unit = time.monotonic(), str(task.fields.get("unit", ""))
        since, count = self._before[task.id]
        self._before[task.id] = (now, task.completed)
        parts = [counted(task.completed, task.total, unit)] if task.total is not None or task.completed else []
        speed = (task.completed - count) / (now - since) if now > since else 0.0
        if speed > 0:
            parts.append(rated(speed, unit))
            if task.total is not None:
                parts.append(f"{human_seconds((task.total - task.completed) / speed)} left")
        else:
            parts.append(f"for {human_seconds(task.elapsed or 0.0)}")
        parts.append(str(task.fields.get("note", "")))
        return f"{task.description}: {', '.join(filter(None, parts))}"


def counted(completed: float, total: float | None, unit: str) -> str:
    """``620 of 2,000 steps``."""
    if unit == "byte":
        return human_bytes(completed) + (f" of {human_bytes(total)}" if total is not None else "")
    number = round(completed if total is None else total)
    of = count_of(number, unit) if unit else f"{number:,}"
    return of if total is None else f"{completed:,.0f} of {of}"


def rated(speed: float, unit: str) -> str:
    """``2.0 step/s``, or ``3.0 s/step``."""
    if unit == "byte":
        return f"{human_bytes(speed)}/s"
    return f"{speed:.1f} {unit}/s" if speed >= 1 else f"{1 / speed:.1f} s/{unit}"


@contextmanager
def doing(bars: Progress | None, activity: str) -> Iterator[None]:
    """Show ``activity`` beside a spinner while the block runs."""
    task = bars.add_task(activity, total=None, unit="", note="") if bars else None
    try:
        yield
    finally:
        if bars and task is not None:
            bars.remove_task(task)

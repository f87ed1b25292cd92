"""Which runs and sweeps does a project have, and how does each go? A page of them, read from as little as is needed."""

from __future__ import annotations

import json
import os
import re
import tomllib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from k5cache.shared.plain import UnfitFile, open_plain, read_plain
from k5train.pictures.saved import files_of
from k5train.runs.folder import Run
from k5train.ui import listing
from k5train.ui.jobs import queue
from k5train.ui.jobs.job import Job
from k5train.ui.listing import Entry
from k5train.ui.project import Project
from k5train.ui.runs.stamps import Stamp, stamps
from k5train.ui.runs.state import BADGES, RunState, read_state

PAGE = 24
"""Runs on a page."""
SORTS = {"newest": "Newest first", "name": "By name"}
_TAIL = 64 << 10  # bytes at the end of metrics.jsonl in which the last step is
_WHOLE = 4 << 20  # bytes of a metrics.jsonl up to which all of it is searched
_PLACES = 48  # of a curve that is read at places apart
_STEP = re.compile(rb'{"step": (\d+)')
_MEASURED = re.compile(rb'"held_out_loss": ([-\d.e+]+)')
_LOSS = re.compile(rb'"step": (\d+), "loss": ([-\d.e+]+)')


@dataclass(frozen=True)
class Facts:
    """What a run's files say of how it goes."""

    step: int = 0
    steps: int | None = None
    """How many there will be."""
    loss: float | None = None
    """The lowest held-out loss; without one, None."""
    at: int | None = None
    """Its step; 0 is the base model."""
    training: float | None = None
    """The last training loss."""
    curve: tuple[tuple[float, float], ...] = ()
    """Some points of the held-out loss, or else of the training loss."""
    is_held_out: bool = False
    """Whether ``curve`` is of the held-out loss."""
    picture: Path | None = None
    """The newest picture."""


@dataclass(frozen=True)
class Item:
    """A run or a sweep of the list."""

    entry: Entry
    is_sweep: bool
    changed: float
    state: RunState | None = None
    """Of a run."""
    facts: Facts = Facts()
    """Of a sweep, those of the run with the lowest held-out loss."""
    lowest: Entry | None = None
    """That run."""
    counts: tuple[tuple[str, int], ...] = ()
    """Of a sweep: word -> how many runs."""

    @property
    def href(self) -> str:
        """Its page."""
        return f"/{'sweeps' if self.is_sweep else 'runs'}/{self.entry.id}"


@dataclass(frozen=True)
class RunList:
    """A page of the list."""

    items: tuple[Item, ...]
    num_all: int
    num_chosen: int
    """Those that the filters leave."""
    page: int
    """From 1."""
    num_pages: int


def read_list(project: Project, search: str = "", word: str = "", sort: str = "newest", page: int = 1) -> RunList:
    """A page of the runs and sweeps.

    Args:
        search: what their names must contain, in any case.
        word: a state; of a sweep any of its runs must have it. Empty: any.
        sort: a key of ``SORTS``; what runs comes first in any case.
    """
    jobs = jobs_of(project)
    entries = [(entry, False) for entry in listing.runs(project)] + [(entry, True) for entry in listing.sweeps(project)]
    named = [(entry, is_sweep) for entry, is_sweep in entries if search.lower() in entry.name.lower()]
    items = [_item(project, entry, is_sweep, jobs) for entry, is_sweep in named]
    chosen = [item for item in items if not word or word in _words(item)]
    chosen.sort(key=lambda item: item.entry.name.lower() if sort == "name" else -item.changed)
    chosen.sort(key=lambda item: "running" not in _words(item))
    num_pages = max(1, -(-len(chosen) // PAGE))
    page = min(max(1, page), num_pages)
    shown = chosen[(page - 1) * PAGE : page * PAGE]
    return RunList(tuple(_with_facts(project, item) for item in shown), len(entries), len(chosen), page, num_pages)


def jobs_of(project: Project) -> dict[str, Job]:
    """Path of a run in the project -> the newest job about it."""
    newest: dict[str, Job] = {}
    for job in queue.jobs(project):
        newest.setdefault(job.about, job)
    return newest


def _item(project: Project, entry: Entry, is_sweep: bool, jobs: Mapping[str, Job]) -> Item:
    if not is_sweep:
        state = read_state(entry.path, jobs.get(entry.relative))
        return Item(entry, False, _changed(entry), state)
    runs = listing.runs_of(project, entry)
    words = [read_state(run.path).word for run in runs]
    counts = tuple((word, words.count(word)) for word in BADGES if word in words)
    return Item(entry, True, max([entry.changed, *map(_changed, runs)]), counts=counts)


def _words(item: Item) -> list[str]:
    return [item.state.word] if item.state else [word for word, _ in item.counts]


def _changed(entry: Entry) -> float:
    """When a run last wrote a line."""
    with suppress(OSError):
        return max(entry.changed, (entry.path / "metrics.jsonl").stat().st_mtime)
    return entry.changed


def _with_facts(project: Project, item: Item) -> Item:
    if not item.is_sweep:
        return replace(item, facts=read_facts(item.entry.path))
    read = [(run, read_facts(run.path)) for run in listing.runs_of(project, item.entry)]
    measured = [(facts.loss, run, facts) for run, facts in read if facts.loss is not None]
    if not measured:
        return item
    _, lowest, facts = min(measured, key=lambda entry: entry[0])
    return replace(item, facts=facts, lowest=lowest)


def read_facts(root: Path) -> Facts:
    """How a run goes. Remembered until its files change."""
    return _facts(root, stamps(root, "metrics.jsonl", "recipe.toml", "samples"))


@lru_cache(512)
def _facts(root: Path, stamps: tuple[Stamp, ...]) -> Facts:
    run = Run(root)
    step, training, held_out, losses = _read_metrics(run.metrics)
    best = min(((loss, at) for at, loss in held_out), default=(None, None))
    curve = held_out if len(held_out) > 1 else losses
    every = max(1, len(curve) // _PLACES)
    return Facts(
        step,
        _steps(root / "recipe.toml"),
        best[0],
        best[1],
        training,
        (*curve[:-1:every], *curve[-1:]),
        len(held_out) > 1,
        _newest_picture(run),
    )


def _read_metrics(path: Path) -> tuple[int, float | None, list[tuple[int, float]], list[tuple[int, float]]]:
    """The last step, its training loss, the held-out losses, and some training losses, each with its step."""
    try:
        with open_plain(path) as file:
            size = os.fstat(file.fileno()).st_size
            if size <= _WHOLE:
                parts = [file.read()]
            else:
                parts = [_at(file, size * i // _PLACES, _TAIL // 16) for i in range(_PLACES)]
                parts.append(_at(file, size - _TAIL, _TAIL))
    except (OSError, UnfitFile):
        return 0, None, [], []
    held_out = sorted({step: loss for part in parts for step, loss in _points(_measured_in(part))}.items())
    losses = sorted({step: loss for part in parts for step, loss in _points(_LOSS.findall(part))}.items())
    last: dict[str, Any] = {}
    for line in reversed(parts[-1].split(b"\n")):
        with suppress(ValueError, RecursionError):
            row = json.loads(line)
            if isinstance(row, dict) and type(row.get("step")) is int:
                last = row
                break
    return last.get("step", 0), losses[-1][1] if losses else None, held_out, losses


def _at(file: Any, place: int, num_bytes: int) -> bytes:
    """Whole lines after a place of a file."""
    file.seek(max(0, place))
    text: bytes = file.read(num_bytes)
    return text.partition(b"\n")[2] if place > 0 else text


def _measured_in(part: bytes) -> Iterator[tuple[bytes, bytes]]:
    """Step and held-out loss of each line that has one."""
    for match in _MEASURED.finditer(part):
        step = _STEP.match(part, part.rfind(b"\n", 0, match.start()) + 1)
        if step:
            yield step[1], match[1]


def _points(found: Iterable[tuple[bytes, bytes]]) -> Iterator[tuple[int, float]]:
    for step, value in found:
        with suppress(ValueError):
            yield int(step), float(value)


def _steps(recipe: Path) -> int | None:
    with suppress(OSError, ValueError, KeyError, TypeError, RecursionError):
        steps = tomllib.loads(read_plain(recipe).decode("utf-8"))["train"]["steps"]
        return steps if type(steps) is int else None
    return None


def _newest_picture(run: Run) -> Path | None:
    """The first picture of the last step that has any."""
    try:
        names = [entry.name.removeprefix("step-") for entry in os.scandir(run.root / "samples")]
    except OSError:
        return None
    for step in sorted((int(name) for name in names if name.isdecimal()), reverse=True)[:3]:
        files: Sequence[Path] = files_of(run.samples(step))
        if files:
            return files[0]
    return None


def read_again(project: Project, listed: RunList) -> list[Item]:
    """The items of a page as they are now. Those that were removed are left out."""
    jobs = jobs_of(project)
    there = [item for item in listed.items if item.entry.path.is_dir()]
    return [_with_facts(project, _item(project, item.entry, item.is_sweep, jobs)) for item in there]

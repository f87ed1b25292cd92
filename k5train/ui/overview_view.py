"""What runs, how it goes, what to do next? Values for the first page, from a few files of the newest runs."""

from __future__ import annotations

import functools
import tomllib
from collections.abc import Collection, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import islice

from k5cache.shared.inside import is_inside
from k5cache.shared.plain import read_text
from k5train.pictures.saved import files_of
from k5train.runs.folder import Run
from k5train.ui import listing
from k5train.ui.jobs import view as jobs_view
from k5train.ui.jobs.job import Job
from k5train.ui.listing import Entry
from k5train.ui.project import Project
from k5train.ui.run_pictures import picture_src
from k5train.ui.runs.metrics import last_lines
from k5train.ui.runs.stamps import Stamp, stamps
from k5train.ui.runs.state import read_state

MOST_RUNS = 6
MOST_STEPS = 3
_TAIL_BYTES = 64 << 10
_AVERAGED = 50


@dataclass(frozen=True)
class RunCard:
    """One of the newest runs."""

    entry: Entry
    state: str
    """A word of ``runs.state.BADGES``."""
    step: int | None
    steps: int | None
    loss: float | None
    """The mean of the last steps."""
    held_out: float | None
    picture: str | None
    """The URL of its newest sample."""
    changed: float


@dataclass(frozen=True)
class Step:
    """Something to do next."""

    words: str
    label: str
    """On its button."""
    href: str


@dataclass(frozen=True)
class Overview:
    """The first page."""

    queue: jobs_view.Queue
    runs: tuple[RunCard, ...]
    num_runs: int
    folders: tuple[Entry, ...]
    caches: tuple[Entry, ...]
    sweeps: tuple[Entry, ...]
    steps: tuple[Step, ...]
    leading_out: tuple[str, ...]
    """Links that are not followed."""

    @property
    def is_empty(self) -> bool:
        """Whether the project has nothing yet."""
        return not (self.folders or self.caches or self.num_runs or self.sweeps)


def read_overview(project: Project) -> Overview:
    """The project as it is now."""
    folders, caches = listing.folders(project), listing.caches(project)
    runs, sweeps = listing.runs(project), listing.sweeps(project)
    queue = jobs_view.queue_view(project)
    newest = sorted(((changed(run), run) for run in runs), key=lambda pair: pair[0], reverse=True)[:MOST_RUNS]
    jobs = _newest_jobs(queue)
    cards = tuple(read_card(project, run, at, jobs.get(run.relative)) for at, run in newest)
    return Overview(
        queue=queue,
        runs=cards,
        num_runs=len(runs),
        folders=tuple(folders),
        caches=tuple(caches),
        sweeps=tuple(sweeps),
        steps=tuple(islice(next_steps(folders, caches, cards, queue), MOST_STEPS)),
        leading_out=tuple(listing.leading_out(project)),
    )


def changed(run: Entry) -> float:
    """When a run last did something: seconds since 1970."""
    with suppress(OSError):
        return max(run.changed, (run.path / "metrics.jsonl").stat().st_mtime)
    return run.changed


def _newest_jobs(queue: jobs_view.Queue) -> dict[str, Job]:
    """Run -> the newest job that trains it."""
    jobs = [*reversed(queue.ended), *(job for job, _ in queue.going), *(waiting.job for waiting in queue.waiting)]
    return {job.about: job for job in jobs if job.kind in ("run", "resume")}


def read_card(project: Project, entry: Entry, at: float, job: Job | None = None) -> RunCard:
    """One run. What cannot be read is left out: its own page says why."""
    card = _read_card(project, entry, at, stamps(entry.path, "metrics.jsonl", "samples", "result.json"))
    return replace(card, state=read_state(entry.path, job).word)


@functools.lru_cache(maxsize=64)
def _read_card(project: Project, entry: Entry, at: float, stamps: tuple[Stamp, ...]) -> RunCard:
    """A run that is not running. Only read again when its files have changed."""
    run = Run(entry.path)
    rows = last_lines(run.metrics, _TAIL_BYTES) if is_inside(project.root, run.metrics) else []
    losses = [row["loss"] for row in rows if isinstance(row.get("loss"), float | int)][-_AVERAGED:]
    held_out = [row["held_out_loss"] for row in rows if isinstance(row.get("held_out_loss"), float | int)]
    return RunCard(
        entry=entry,
        state="stopped",  # until ``read_card`` asks
        step=next((row["step"] for row in reversed(rows) if isinstance(row.get("step"), int)), None),
        steps=_steps(project, run),
        loss=sum(losses) / len(losses) if losses else None,
        held_out=held_out[-1] if held_out else None,
        picture=_newest_picture(project, run),
        changed=at,
    )


def _steps(project: Project, run: Run) -> int | None:
    """How many steps its recipe asks for."""
    path = run.root / "recipe.toml"
    with suppress(OSError, ValueError, KeyError, TypeError, RecursionError):
        steps = tomllib.loads(read_text(path))["train"]["steps"] if is_inside(project.root, path) else None
        return steps if isinstance(steps, int) else None
    return None


def _newest_picture(project: Project, run: Run) -> str | None:
    with suppress(OSError, ValueError):
        folders = sorted(path for path in (run.root / "samples").glob("step-*") if path.name[5:].isdigit())
        for folder in reversed(folders):
            for path in files_of(folder) if is_inside(project.root, folder) else ():
                return picture_src(project)(path, small=True)
    return None


def next_steps(
    folders: Sequence[Entry], caches: Sequence[Entry], runs: Sequence[RunCard], queue: jobs_view.Queue
) -> Iterator[Step]:
    """What a person would do next, the most urgent first."""
    going = {job.about for job, _ in queue.going} | {waiting.job.about for waiting in queue.waiting}
    yield from _about_jobs(queue, going)
    if not folders and not caches:
        words = "There are no pictures yet. Drop some on the page Data, or put them into datasets/NAME"
        yield Step(words, "Add pictures", "/data")
    encoded = {cache.name for cache in caches}
    for folder in folders:
        if folder.name not in encoded and f"cache/{folder.name}" not in going:
            yield Step(f"{folder.name} is not encoded yet", "Look at it and encode it", f"/data/f/{folder.id}")
    trained = {run.entry.name for run in runs}
    for cache in sorted(caches, key=lambda cache: -cache.changed):
        if cache.name not in trained and not going:
            yield Step(f"The cache {cache.name} can be trained on", "Train a LoRA", f"/new?cache={cache.id}")
    yield from _about_runs(runs, going)


def _about_jobs(queue: jobs_view.Queue, going: Collection[str]) -> Iterator[Step]:
    seen = set(going)
    for job in queue.ended[:MOST_RUNS]:
        if job.state in ("failed", "lost") and job.about not in seen:
            words = f"{job.label} {'failed' if job.state == 'failed' else 'was killed'}"
            yield Step(words, "See why", f"/jobs/{job.id}")
        seen.add(job.about)
    if queue.is_due:
        yield Step("A job could run, and nothing has begun it", "Begin it", "/queue")


def _about_runs(runs: Sequence[RunCard], going: Collection[str]) -> Iterator[Step]:
    for run in runs:
        if run.state == "stopped" and run.entry.relative not in going:
            yield Step(f"{run.entry.name} has not ended, and can go on", "Look at it", f"/runs/{run.entry.id}")
    finished = [run.entry for run in runs if run.state == "finished"]
    if len(finished) > 1:
        asked = "&".join(f"run={run.id}" for run in finished[:3])
        yield Step("See which run is better", "Compare the newest runs", f"/compare?{asked}")
    elif finished:
        yield Step(f"{finished[0].name} is trained", "See its pictures", f"/runs/{finished[0].id}")

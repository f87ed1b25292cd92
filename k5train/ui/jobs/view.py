"""What do the pages of the queue show? Values made of the jobs; no HTML, no request."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from k5cache.shared.foreign import visible
from k5train.ui import listing
from k5train.ui.jobs import queue, slots, waits
from k5train.ui.jobs.again import following
from k5train.ui.jobs.job import Job, Progress, error_of, progress, tail
from k5train.ui.project import Project

MOST_ENDED = 50
MOST_LOG_BYTES = 32 << 10
WORDS = {
    "waiting": ("waiting", "waits"), "running": ("running", "runs"), "finished": ("done", "finished"),
    "failed": ("failed", "failed"), "stopped": ("stopped", "stopped"), "lost": ("failed", "lost"),
}  # fmt: skip
"""State -> the class of its badge, and the word in it."""


@dataclass(frozen=True)
class Place:
    """A GPU, or the processor, and what is on it."""

    words: str
    name: str
    job: Job | None
    others: tuple[str, ...]
    """Commands that are no jobs, started in a terminal."""


@dataclass(frozen=True)
class Waiting:
    """A job that waits, and why."""

    job: Job
    wait: waits.Wait
    is_first: bool
    is_last: bool


@dataclass(frozen=True)
class Queue:
    """The whole queue."""

    places: tuple[Place, ...]
    aside: tuple[Job, ...]
    """Jobs that run and need no GPU."""
    waiting: tuple[Waiting, ...]
    ended: tuple[Job, ...]
    """The newest of those that have ended."""
    num_ended: int
    going: tuple[tuple[Job, Progress | None], ...]
    """Every job that runs, and how far it is."""

    @property
    def is_empty(self) -> bool:
        """Whether there was never a job, and no command runs."""
        return not (self.waiting or self.ended or self.going or any(place.others for place in self.places))

    @property
    def is_due(self) -> bool:
        """Whether a job could run and nobody begins it."""
        return any(waiting.wait.is_due for waiting in self.waiting)


def queue_view(project: Project) -> Queue:
    """The queue as it is now."""
    all_jobs = queue.jobs(project)
    all_slots = slots.slots()
    others = waits.others(project, all_jobs, all_slots)
    going = [job for job in reversed(all_jobs) if job.state != "waiting" and not job.is_over]
    on = {key: job for job in going for key in job.slots}
    places = [Place(slot.words, slot.name, on.get(slot.key), tuple(others.get(slot.key, ()))) for slot in all_slots]
    waited = waits.waits_for(project, all_jobs, waits.in_use(project, all_jobs, all_slots, others))
    waiting = sorted((job for job in all_jobs if job.state == "waiting"), key=waits.place_of)
    ended = sorted((job for job in all_jobs if job.is_over), key=lambda job: (-(job.last or 0), -job.order))
    return Queue(
        tuple(places),
        tuple(job for job in going if job not in on.values()),
        tuple(
            Waiting(job, waited[job.id], number == 0, number == len(waiting) - 1) for number, job in enumerate(waiting)
        ),
        tuple(ended[:MOST_ENDED]),
        len(ended),
        tuple((job, progress(job)) for job in going),
    )


@dataclass(frozen=True)
class Link:
    """Where to go on."""

    words: str
    href: str


@dataclass(frozen=True)
class JobView:
    """One job."""

    job: Job
    about: Link | None
    """What it makes, if that is there."""
    wait: waits.Wait | None
    error: tuple[str, str] | None
    """The two lines with which its command ended."""
    ended: str
    """How it ended, in a sentence."""
    next: tuple[Link, ...]
    is_done_again: bool
    """Whether another job does its work already."""
    progress: Progress | None
    log: str


def job_view(project: Project, id: str) -> JobView:
    """One job as it is now. Raises as ``queue.find``."""
    job = queue.find(project, id)
    jobs = queue.jobs(project)
    waited = waits.waits_for(project, jobs) if job.state == "waiting" else {}
    about, follower = link_to(project, job.about), following(job, jobs) if job.is_over else None
    return JobView(
        job, about, waited.get(job.id), error_of(job), _how_it_ended(job, about), _next(job, about, follower),
        follower is not None, progress(job), readable(tail(job, MOST_LOG_BYTES)),
    )  # fmt: skip


def readable(log: str) -> str:
    """A log as text: of a line that was written over, its last state; control characters as escapes."""
    return visible("\n".join(line.rstrip("\r").rpartition("\r")[2] for line in log.split("\n")))


def link_to(project: Project, about: str) -> Link | None:
    """The page of a run, a sweep, a cache or a folder; None if it is not there (yet)."""
    for entries, href, words in (
        (listing.runs, "/runs", "run"), (listing.sweeps, "/sweeps", "sweep"), (listing.caches, "/data/c", "cache"),
        (listing.folders, "/data/f", "folder"),
    ):  # fmt: skip
        for entry in entries(project) if about else ():
            if entry.relative == about:
                return Link(f"the {words} {entry.name}", f"{href}/{entry.id}")
    if about.count("/") > 1:
        return next(
            (Link(f"the run {e.name}", f"/runs/{e.id}") for e in _in_sweeps(project) if e.relative == about), None
        )
    return None


def _in_sweeps(project: Project) -> Sequence[listing.Entry]:
    return [run for sweep in listing.sweeps(project) for run in listing.runs_of(project, sweep)]


def _how_it_ended(job: Job, about: Link | None) -> str:
    if job.state == "waiting" or job.state == "running":
        return ""
    if job.problem:
        return job.problem
    if job.signal is not None:
        by = "It was ended at once" if job.state == "stopped" else f"It was killed by signal {job.signal}"
        out_of_memory = ", as the system does when memory runs out" if job.state == "failed" and job.signal == 9 else ""
        return by + out_of_memory
    if job.state == "stopped":
        is_kept = about and job.kind in ("run", "resume", "sweep")  # a run that had not begun to train leaves no folder
        return "It was stopped, and what it had was saved" if is_kept else "It was stopped"
    return f"Exit code {job.exit_code}"


def _next(job: Job, about: Link | None, follower: Job | None) -> tuple[Link, ...]:
    """What a person may want after a job has ended."""
    if not job.is_over:
        return ()
    links = [Link(f"Look at {about.words}", about.href)] if about else []
    if follower:
        links.append(Link("Look at the job that goes on with it", f"/jobs/{follower.id}"))
    if about and job.state == "finished" and job.kind == "encode" and about.href.startswith("/data/c/"):
        links.append(Link("Train a LoRA on it", f"/new?cache={about.href.rpartition('/')[2]}"))
    return tuple(links)

"""What is being done with a cache by jobs of the page, and what did the last one say?"""

from __future__ import annotations

from dataclasses import dataclass

from k5cache.shared.errors import RunError
from k5train.ui.ids import id_of
from k5train.ui.jobs import queue
from k5train.ui.jobs.job import Job, Progress
from k5train.ui.project import Project

KINDS = ("encode", "diff")
_MOST_BYTES = 8000


@dataclass(frozen=True)
class Panel:
    """The newest job about a cache."""

    job: Job
    progress: Progress | None
    text: str
    """The end of what it printed, once it has ended."""
    error: tuple[str, str] | None
    """The problem and what to do, if it failed with these two lines."""
    waits_for: str = ""

    @property
    def cache_url(self) -> str:
        """The page of the cache."""
        return f"/data/c/{id_of(self.job.about)}"

    @property
    def badge(self) -> str:
        """The class of its badge."""
        return {"finished": "done", "lost": "failed"}.get(self.job.state, self.job.state)


def panel_of(project: Project, about: str) -> Panel | None:
    """The newest job that encodes a cache, or says what an encode would do.

    Args:
        about: the cache's place in the project.
    """
    all_jobs = queue.jobs(project)
    job = next((job for job in all_jobs if job.about == about and job.kind in KINDS), None)
    if job is None:
        return None
    wait = queue.waits_for(project, all_jobs).get(job.id) if job.state == "waiting" else None
    text = queue.tail(job, _MOST_BYTES) if job.is_over else ""
    return Panel(
        job, queue.progress(job), text, queue.error_of(job) if job.is_over else None, wait.words if wait else ""
    )


def under_way(project: Project, about: str) -> frozenset[str]:
    """What of ``KINDS`` is being done with a cache, or waits in the queue."""
    return frozenset(
        job.kind for job in queue.jobs(project) if job.about == about and job.kind in KINDS and not job.is_over
    )


def check_not_under_way(project: Project, about: str, kind: str) -> None:
    """Refuse to do a second time what is being done, as after a double click.

    Raises:
        RunError: such a job runs or waits.
    """
    if kind in under_way(project, about):
        what = "is encoded already" if kind == "encode" else "is compared with its folder already"
        raise RunError(
            f"{about} {what}, or that waits in the queue", "Wait until it has ended, or stop it in the queue"
        )

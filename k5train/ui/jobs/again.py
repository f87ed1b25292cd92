"""How is a job done again? As a new one with the same command, label and files."""

from __future__ import annotations

from collections.abc import Iterable

from k5cache.shared.errors import RunError
from k5train.ui.jobs import folder as files
from k5train.ui.jobs import queue
from k5train.ui.jobs.job import Job
from k5train.ui.project import Project

TRAINS = ("run", "resume")
_MOST_BYTES = 4 << 20


def again(project: Project, id: str) -> Job:
    """Put a job that has ended into the queue once more. A run that was stopped goes on where it was.

    Raises:
        RunError: it has not ended, is being done again already, or its files are damaged.
    """
    job = queue.find(project, id)
    if not job.is_over:
        raise RunError(f"{job.label} has not ended", "Reload the page")
    if following(job, queue.jobs(project)):
        raise RunError(f"{job.label} was asked for again already", "Look at the queue")
    if not job.is_ours:
        raise RunError(
            f"{job.label} was not put in on this machine, or was changed since", f"Start it in a terminal: {job.line}"
        )
    document = files.read(job.folder, files.JOB) or {}
    texts: dict[str, str] = {}
    try:
        for name in document.get("files", ()):
            if files.NOTED_NAME.fullmatch(name):
                texts[name] = files.read_bytes(job.folder / name, _MOST_BYTES).decode("utf-8")
    except (OSError, ValueError, TypeError):
        job = queue.find(project, id)
        raise RunError(f"The files of {job.label} cannot be read", "Start it anew") from None
    if not job.argv:
        raise RunError(f"{job.label}: its command is not known", "Start it anew")
    here = f".k5/queue/{job.id}/"
    argv = ["{job}/" + word.removeprefix(here) if word.startswith(here) else word for word in job.argv]
    return queue.add(project, argv, job.label, job.kind, job.about, texts, job.uses)


def following(job: Job, jobs: Iterable[Job]) -> Job | None:
    """The job that does the work of one that has ended, and has not ended itself."""
    kinds = TRAINS if job.kind in TRAINS else (job.kind,)
    same = (other for other in jobs if other.about == job.about and other.kind in kinds)
    return next((other for other in same if other.id != job.id and not other.is_over), None) if job.about else None

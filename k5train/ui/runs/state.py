"""Is a run trained now, finished, or what else? From its lock, its result and its job: a few ``stat`` calls."""

from __future__ import annotations

import socket
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from k5cache.shared.lock import holder
from k5train.runs.folder import Run
from k5train.ui.jobs.job import Job, error_of

Word = Literal["running", "waiting", "finished", "stopped", "failed", "damaged"]
BADGES: dict[str, str] = {
    "running": "running", "waiting": "waiting", "finished": "done", "stopped": "stopped", "failed": "failed",
    "damaged": "failed",
}  # fmt: skip
"""Word -> the class of its badge."""


@dataclass(frozen=True)
class RunState:
    """How a run stands."""

    word: Word
    error: tuple[str, str] | None = None
    """The two lines of its job, of a run that failed, or that had finished and could not be resumed."""
    elsewhere: str = ""
    """The machine that trains it, if it is another one: it cannot be stopped from here."""
    begins_again: bool = False
    """It had ended, and is resumed, but nothing of it has changed yet."""


def read_state(root: Path, job: Job | None = None) -> RunState:
    """How the run in a folder stands.

    Args:
        job: the newest job about this run.
    """
    run = Run(root)
    if held := holder(root / ".lock"):
        is_elsewhere = not held.is_here and held.host != socket.gethostname()
        return RunState(
            "running", elsewhere=held.host if is_elsewhere else "", begins_again=_ended_before(run, _locked_at(run))
        )
    if not (root / "run.json").is_file():
        return RunState("damaged")
    if job and job.state == "running" and job.kind in ("run", "resume"):
        return RunState("running", begins_again=_ended_before(run, job.since))
    if job and job.state == "waiting":
        return RunState("waiting")
    if job and job.state == "failed" and job.kind in ("run", "resume"):
        if not run.is_finished:
            return RunState("failed", error_of(job))
        if _ended_before(run, job.since):
            return RunState("finished", error_of(job))
    return RunState("finished" if run.is_finished else "stopped")


def _locked_at(run: Run) -> float | None:
    """When its lock was taken: who takes it writes into it."""
    try:
        return (run.root / ".lock").stat().st_mtime
    except OSError:
        return None


def _ended_before(run: Run, since: float | None) -> bool:
    """Whether a run has a result from before this time, in seconds since 1970."""
    try:
        return since is not None and run.result.stat().st_mtime < since
    except OSError:
        return False

"""What was a run asked to do between two steps? Empty files in its folder, which the loop removes and answers.

Neither changes a bit of the training: a save writes what the run has, and pictures are drawn as those that are due.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Literal

from k5cache.shared.errors import RunError
from k5cache.shared.lock import holder
from k5train.runs.folder import REQUESTS, Run

Request = Literal["save", "sample"]
"""``save``: the state and a checkpoint. ``sample``: pictures as at a step at which they are due."""


def ask(run: Path, request: Request) -> None:
    """Ask the process that trains a run for something after the step that it is at.

    Raises:
        RunError: nothing trains this run.
    """
    if holder(run / ".lock") is None:
        raise RunError(f"{run} is not being trained", "Resume it first")
    (run / REQUESTS[request]).touch()


def take(run: Run) -> set[Request]:
    """What the run was asked for since the last time. The caller has the run's lock."""
    return {request for request in _requests() if _take(run.root / REQUESTS[request])}


def drop(run: Run) -> None:
    """Forget what was asked for before a crash: whoever asked did not mean a later step."""
    take(run)


def _requests() -> Iterable[Request]:
    return ("save", "sample")


def _take(path: Path) -> bool:
    with suppress(FileNotFoundError):
        path.lstat()  # a call that succeeds hardly ever, in a run's every step
        path.unlink()
        return True
    return False

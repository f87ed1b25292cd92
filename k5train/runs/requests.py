"""What was a run asked to do between two steps? Empty files in its folder, which the loop removes and answers.

Neither changes a bit of the training: a save writes what the run has, and pictures are drawn as those that are due.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Literal

from k5cache.shared.command_line import command
from k5cache.shared.errors import K5Error, RunError
from k5cache.shared.kind import kind_at_hand
from k5cache.shared.lock import holder
from k5train.runs.folder import REQUESTS, Run, open_run

Request = Literal["save", "sample"]
"""``save``: the state and a checkpoint. ``sample``: pictures as at a step at which they are due."""


def ask(run: Path, request: Request) -> None:
    """Ask the process that trains a run for something after the step that it is at.

    Raises:
        RunError: nothing trains this run, or its recipe has nothing to draw.
    """
    if holder(run / ".lock") is None:
        raise RunError(f"{run} is not being trained", "Resume it first")
    if request == "sample" and not _may_draw(run):
        example = command("k5train", "resume", run, set='train.validation.prompts=["A PROMPT"]')
        raise RunError(
            f"{run} draws no pictures: its recipe has no prompts in train.validation",
            f"Put a prompt into its cache with k5cache prompts add, stop the run, and give it the prompt: {example}",
        )
    (run / REQUESTS[request]).touch()


def take(run: Run) -> set[Request]:
    """What the run was asked for since the last time. The caller has the run's lock."""
    return {request for request in _requests() if _take(run.root / REQUESTS[request])}


def drop(run: Run) -> None:
    """Forget what was asked for before a crash: whoever asked did not mean a later step."""
    take(run)


def _may_draw(run: Path) -> bool:
    """Whether a recipe may have something to draw. One that cannot be read, or is for image-to-image, may."""
    try:
        _, model, config, _ = open_run(run)
        return bool(config.validation.prompts) or kind_at_hand(model) == "i2i"
    except (K5Error, OSError, ValueError):
        return True


def _requests() -> Iterable[Request]:
    return ("save", "sample")


def _take(path: Path) -> bool:
    with suppress(FileNotFoundError):
        path.lstat()  # a call that succeeds hardly ever, in a run's every step
        path.unlink()
        return True
    return False

"""What was a run asked to do between two steps? Empty files in its folder, which the loop removes and answers.

Neither changes a bit of the training: a save writes what the run has, and pictures are drawn as those that are due.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Literal

from k5cache.shared import system
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
    path = run / REQUESTS[request]
    try:
        os.close(system.open_bytes(path, os.O_WRONLY | os.O_CREAT, is_followed=False, may_wait=False))
    except OSError as error:
        raise RunError(
            f"{path} cannot be written, by which the run is asked: {error.strerror}",
            "Make its folder writable, or remove what has this name",
        ) from error


def take(run: Run) -> set[Request]:
    """What the run was asked for since the last time. The caller has the run's lock.

    What is no file under such a name asks for nothing and stays, as does a file that cannot be removed: it would ask
    again at every step.
    """
    return {request for request in _requests() if _take(run.root / REQUESTS[request])}


@contextmanager
def dropped(run: Run) -> Iterator[None]:
    """Forget what was asked for before the block, and what it leaves: whoever asked did not mean a later step."""
    take(run)
    try:
        yield
    finally:
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
    with suppress(OSError):
        if stat.S_ISREG(path.lstat().st_mode):  # a call that succeeds hardly ever, in a run's every step
            path.unlink()
            return True
    return False

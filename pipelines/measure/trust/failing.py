"""What happens if one call of a command on the disk fails? The walk of tests/failing_calls.py, dealt out as trials."""

from __future__ import annotations

import ctypes
import errno
import os
from pathlib import Path
from typing import Any

from pipelines.measure.trust.trial import Place, Trial, Wrong
from tests import failing_calls
from tests.failing_calls import ERRORS

ROW = "failing calls"


def is_loaded() -> bool:
    """Whether this process was started with failing_calls.c as LD_PRELOAD."""
    return hasattr(ctypes.CDLL(None), "fail_calls")


def trials(place: Place) -> list[Trial]:
    """A trial for every call of every command and every error with which it can fail."""
    listed = []
    for name, command in failing_calls.commands(place.model).items():
        for error in ERRORS:
            calls = failing_calls.numbers(place.scratch, place.template, app_of(name), command, error, 1, 0)
            listed += [Trial(ROW, name, number, error=error) for number in calls]
    return listed


def expected(place: Place) -> dict[str, Any]:
    """What every command leaves without a failing call."""
    return {
        name: failing_calls.undisturbed(place.scratch, place.template, app_of(name), command)
        for name, command in failing_calls.commands(place.model).items()
    }


def fail(place: Place, trial: Trial, results: dict[str, Any]) -> bool:
    """Let one call fail. Returns whether the command finished all the same.

    Raises:
        Wrong: it did not end in a sentence, something was lost, or the next command ends otherwise.
    """
    command = failing_calls.commands(place.model)[trial.case]
    try:
        problem, tolerated = failing_calls.trial(
            place.scratch, place.template, app_of(trial.case), command, trial.error, trial.seed, results[trial.case]
        )
    except AssertionError as error:
        raise Wrong("lost", f"{errno.errorcode[trial.error]}: {error!r}") from error
    finally:
        os.environ.pop("K5_HOME", None)
    if problem:
        verdicts = {"another result": "silent", "the command does": "lost"}
        verdict = next((v for begin, v in verdicts.items() if problem.startswith(begin)), "traceback")
        raise Wrong(verdict, f"{errno.errorcode[trial.error]}: {problem}")  # type: ignore[arg-type]
    return tolerated


def app_of(name: str) -> Any:
    """The program that has a command of ``failing_calls.commands``."""
    from k5cache.cli import app as k5cache
    from k5train.cli import app as k5train

    return k5cache if name in failing_calls.OF_CACHES else k5train


def build(folder: Path) -> Path:
    """Compile failing_calls.c."""
    return failing_calls.build(folder)

"""Make many trials in several processes, note what each found, and stop in time."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pipelines.measure.trust.trial import Place, Trial, Wrong

_REPORT_SECONDS = 10.0


@dataclass(frozen=True)
class Found:
    """What a trial found."""

    trial: Trial
    verdict: str | None
    """None: nothing is wrong. ``unknown``: the trial itself failed."""
    problem: str
    tolerated: bool
    seconds: float


Make = Callable[[Place, Trial, dict[str, float]], bool]
"""Makes a trial. The third is a dictionary that a worker keeps from trial to trial."""


def make_all(
    make: Make, trials: Sequence[Trial], place: Place, workers: int, until: float, report: Callable[[str], None]
) -> list[Found]:
    """Make the trials in order, in ``workers`` forked processes, until all are made or the clock is at ``until``.

    Args:
        place: its scratch folder gets a folder for each worker.
        until: of ``time.monotonic``.

    Returns:
        what the trials found that were made.
    """
    fork = multiprocessing.get_context("fork")
    taken = fork.Value("l", 0)
    children = {}
    for number in range(workers):
        folder = place.scratch / f"worker-{number}"
        child = os.fork()
        if not child:
            _work(make, trials, Place(place.model, place.template, folder), taken, until)
        children[child] = folder
    died = _watch(children, place.scratch, len(trials), report)
    found = _read(place.scratch)
    return found + [Found(trials[0], "unknown", f"a worker died: {problem}", False, 0) for problem in died]


def _work(make: Make, trials: Sequence[Trial], place: Place, taken: Any, until: float) -> None:
    code = 1
    try:
        place.scratch.mkdir(parents=True, exist_ok=True)
        kept: dict[str, float] = {}
        parent = os.getppid()
        with place.scratch.with_suffix(".jsonl").open("a", encoding="utf-8") as file:
            while time.monotonic() < until and os.getppid() == parent:  # or nobody waits for the trials
                with taken.get_lock():
                    number = taken.value
                    taken.value += 1
                if number >= len(trials):
                    break
                place.scratch.with_suffix(".now").write_text(str(trials[number]), encoding="utf-8")
                file.write(json.dumps(asdict(_one(make, trials[number], place, kept))) + "\n")
                file.flush()
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def _one(make: Make, trial: Trial, place: Place, kept: dict[str, float]) -> Found:
    begin = time.monotonic()
    verdict: str | None = None
    problem, tolerated = "", False
    try:
        tolerated = make(place, trial, kept)
    except Wrong as wrong:
        verdict, problem = wrong.verdict, str(wrong)
    except Exception:
        verdict, problem = "unknown", traceback.format_exc()
    return Found(trial, verdict, problem, tolerated, time.monotonic() - begin)


def _watch(children: dict[int, Path], scratch: Path, total: int, report: Callable[[str], None]) -> list[str]:
    """Wait for the workers and report how far they are. Returns what those that died were doing."""
    died, next_report = [], time.monotonic() + _REPORT_SECONDS
    while children:
        child, status = os.waitpid(-1, os.WNOHANG)
        if child in children:
            folder = children.pop(child)
            if status:
                died.append(f"{os.waitstatus_to_exitcode(status)} in {folder.with_suffix('.now').read_text()}")
            shutil.rmtree(folder, ignore_errors=True)
        elif time.monotonic() > next_report:
            found = _read(scratch)
            report(f"{len(found)} of {total} trials, {sum(f.verdict is not None for f in found)} wrong")
            next_report += _REPORT_SECONDS
        time.sleep(0.05)
    return died


def _read(scratch: Path) -> list[Found]:
    lines = [line for path in sorted(scratch.glob("*.jsonl")) for line in path.read_text(encoding="utf-8").splitlines()]
    documents = [json.loads(line) for line in lines if line.endswith("}")]
    return [Found(**{**document, "trial": Trial(**document["trial"])}) for document in documents]

"""What is left after a command was killed, and does the same command go on to the result of an undisturbed one?"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipelines.measure.trust.template import EMA, ENCODE, EXACT, INT8_RUN, TINY, options
from pipelines.measure.trust.trial import (
    Place,
    Trial,
    Wrong,
    checked_run,
    finished_base,
    finished_cache,
    finished_run,
    rows_of,
    run,
)

CACHES, RUNS = "kills of cache commands", "kills of runs"
_COPIES = 30
"""Copies of the template in which a trial may try to be in time with its kills."""

Committed = Any


@dataclass(frozen=True)
class Case:
    """A command that is killed."""

    line: tuple[str, ...]
    result: Callable[[Path], Any]
    """What it leaves when it has finished."""
    committed: Callable[[Path, Committed], Committed]
    """Called with the trial's folder before the command and after every kill, and with its previous value. Returns
    what must not be lost from then on.

    Raises:
        Wrong: it is.
    """
    kept: Callable[[Path, Committed, str], None]
    """Called at the end with the last ``committed`` and what the last command said. Raises as ``committed``."""


def cases(row: str, model: Path) -> dict[str, Case]:
    """The commands of a row of the table."""
    return _cache_cases(model) if row == CACHES else _run_cases(model)


def kill(place: Place, trial: Trial, expected: Any, seconds: dict[str, float]) -> None:
    """Kill a command ``trial.count`` times, each time while it goes on from the kill before.

    Args:
        seconds: how long a command takes at present; follows the speed of the machine.

    Raises:
        Wrong: something was lost, or the end is another than without kills.
    """
    case, chance = cases(trial.row, place.model)[trial.case], random.Random(trial.seed)
    killed = 0
    for _ in range(_COPIES):
        with place.copy() as root:
            committed = case.committed(root, None)
            while True:
                wait = chance.uniform(0, seconds[trial.case]) if killed < trial.count else None
                done = run(root, case.line, wait)
                if done is not None:
                    break
                killed += 1
                seconds[trial.case] *= 1.03
                committed = case.committed(root, committed)
            if wait is not None:
                seconds[trial.case] *= 0.8  # about one kill in seven comes too late
            is_done = done.code == 2 and ("already" in done.err or "is finished" in done.err)  # killed after its end
            if done.code and not is_done:
                raise Wrong("lost", f"the command does not go on: {done.err[-1500:]}")
            case.kept(root, committed, done.err if not is_done else "")
            if (result := case.result(root)) != expected:
                raise Wrong("silent", f"another result than without kills: {_differing(result, expected)}")
        if killed >= trial.count:
            return
    raise AssertionError(f"{trial.case} is too fast to be killed {trial.count} times")


def _differing(result: Any, expected: Any) -> list[str]:
    return [name for name in {**result, **expected} if result.get(name) != expected.get(name)][:5]


def _cache_cases(model: Path) -> dict[str, Case]:
    encode = ("k5cache", "encode", "pictures", "--model", str(model), *ENCODE, "-o")

    def case(folder: str, *line: str, begins_whole: bool = True, keeps_shards: bool = True) -> Case:
        def committed(root: Path, before: Committed) -> Committed:
            return _committed_rows(root / folder, before, begins_whole)

        def kept(root: Path, shards: Committed, said: str) -> None:
            if keeps_shards:
                _check_shards_kept(root / folder, shards)

        return Case(line, lambda root: finished_cache(root / folder), committed, kept)

    return {
        "encode": case("cache/new", *encode, "cache/new", begins_whole=False),
        "encode again": case("cache/before", *encode, "cache/before"),
        "encode --repair": case(
            "cache/damaged", *encode, "cache/damaged", "--repair", begins_whole=False, keeps_shards=False
        ),
        "prompts add": case(
            "cache/whole", "k5cache", "prompts", "add", "cache/whole", "a fox", "a very long way", "--device", "cpu"
        ),
        "gc": case("cache/garbage", "k5cache", "gc", "cache/garbage", keeps_shards=False),
        "merge": case(
            "cache/merged", "k5cache", "merge", "cache/half-a", "cache/half-b", "-o", "cache/merged", begins_whole=False
        ),
    }


def _committed_rows(root: Path, before: Committed, begins_whole: bool) -> Committed:
    """The shards that the manifest names, once every row that was there before the command is found in place."""
    from k5cache.shared.errors import CacheError
    from k5cache.store.manifest import read_manifest

    if not (root / "manifest.json").exists():
        if before and before["shards"]:
            raise Wrong("lost", f"{root.name} has lost its manifest")
        return {"shards": {}, "rows": {}}
    try:
        shards = {shard.file: shard.sha256 for shard in read_manifest(root).shards}
    except CacheError as error:
        raise Wrong("lost", error.problem) from None
    if not begins_whole:
        return {"shards": shards, "rows": {}}
    try:
        rows = rows_of(root)
    except CacheError as error:
        raise Wrong("lost", f"a cache that was whole cannot be read: {error.problem}") from None
    for name, bits in (before or {"rows": {}})["rows"].items():
        if rows.get(name, bits) != bits:
            raise Wrong("silent", f"{name} has other bits after the kill")
    return {"shards": shards, "rows": rows}


def _check_shards_kept(root: Path, committed: Committed) -> None:
    from k5cache.store.manifest import read_manifest

    now = {shard.file: shard.sha256 for shard in read_manifest(root).shards}
    if lost := committed["shards"].items() - now.items():
        raise Wrong("lost", f"shards that were committed before the kill were encoded again: {lost}")


def _run_cases(model: Path) -> dict[str, Case]:
    def case(folder: str, *line: str) -> Case:
        return Case(
            ("k5train", *line),
            lambda root: finished_run(root / folder),
            lambda root, before: _committed_steps(root / folder, before),
            _check_went_on,
        )

    new = ("run", "cache/whole", "--model", str(model))
    held_out = options(**TINY, **EXACT, steps=4, gradient_accumulation_steps=2, optim__optimizer="adafactor",
                       validation__split=0.3, validation__held_out_every=2, validation__held_out_sigmas=1)  # fmt: skip
    return {
        "run": case("runs/new", *new, *EMA, "-o", "runs/new"),
        "run, int8-quanto": case("runs/int8", *new, *INT8_RUN, "-o", "runs/int8"),
        "run, held-out": case("runs/held", *new, *held_out, "-o", "runs/held"),
        "run, dora": case("runs/dora", *new, *options(**TINY, **EXACT, steps=3, lora__algo="dora"), "-o", "runs/dora"),
        "base prepare": Case(
            ("k5train", "base", "prepare", "--model", str(model)), finished_base, lambda root, before: None, _nothing
        ),
        "sweep": Case(
            (
                "k5train",
                "sweep",
                "cache/whole",
                "--model",
                str(model),
                "--grid",
                "train.optim.lr=0.01,0.02",
                *options(**TINY, **EXACT, steps=2),
                "-o",
                "sweeps/two",
            ),
            lambda root: {run.name: finished_run(run) for run in _runs_of_sweep(root)},
            lambda root, before: _committed_runs(root, before),
            _nothing,
        ),
        "resume": case("runs/first", "resume", "runs/first", *options(steps=4)),
        "resume --step": case("runs/four", "resume", "runs/four", "--step", "3"),
    }


def _committed_steps(root: Path, before: Committed) -> Committed:
    """The newest step that is saved."""
    step = checked_run(root) if root.exists() else 0
    if before and step < before and not (root.name == "four" and step == 3):  # which goes back to step 3
        raise Wrong("lost", f"the state of step {before} is gone: the newest is {step}")
    return step


def _runs_of_sweep(root: Path) -> list[Path]:
    return sorted(path.parent for path in root.glob("sweeps/two/*/recipe.toml"))


def _committed_runs(root: Path, before: Committed) -> Committed:
    """The newest step of every run of the sweep that is not finished; a finished one has no state any more."""
    known = before or {}
    runs = _runs_of_sweep(root)
    if gone := known.keys() - {run.name for run in runs}:
        raise Wrong("lost", f"runs of the sweep are gone: {gone}")
    return {
        run.name: _committed_steps(run, None if (run / "result.json").exists() else known.get(run.name)) for run in runs
    }


def _nothing(root: Path, committed: Committed, said: str) -> None:
    """A base is made as a whole, and ``committed`` has looked at the runs of a sweep."""


def _check_went_on(root: Path, step: Committed, said: str) -> None:
    if "Going on from step" not in said or "Going back to step" in said:  # it had ended, or was told where to begin
        return
    if step and f"Going on from step {step}" not in said:
        raise Wrong("lost", f"step {step} was saved, and the run did not go on from it: {said[-500:]}")

"""The command: ``python -m pipelines.measure.trust``. Makes the trials of ``--only``, or all, and prints the table."""

from __future__ import annotations

import gc
import json
import os
import pkgutil
import random
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

import k5cache
import k5train
from k5cache.shared import console
from pipelines.demo.make_checkpoint import make as make_checkpoint
from pipelines.measure import command_line
from pipelines.measure.trust import failing, flips, kills, template
from pipelines.measure.trust.trial import Place, Trial, finished_cache, finished_run, must
from pipelines.measure.trust.workers import Found, make_all
from tests import failing_calls

ROWS = (kills.CACHES, kills.RUNS, flips.CACHES, flips.STATES, flips.LORAS, flips.BASES, failing.ROW)
VERDICTS = ("lost", "silent", "traceback", "unknown")
_KILLS_AT_ONCE, _FLIPS_AT_ONCE = 2, 25
_SHARES = {flips.CACHES: 0.4, flips.STATES: 0.3, flips.LORAS: 0.15, flips.BASES: 0.15}


def main(
    cache_kills: Annotated[int, typer.Option(help="Kills of cache commands.")] = 1000,
    run_kills: Annotated[int, typer.Option(help="Kills of runs.")] = 1000,
    num_flips: Annotated[int, typer.Option("--flips", help="Flipped bits.")] = 10_000,
    every: Annotated[int, typer.Option(help="Let every N-th call of a command fail; 0: none.")] = 1,
    workers: Annotated[int, typer.Option(help="Processes.")] = os.cpu_count() or 1,
    minutes: Annotated[float, typer.Option(help="Begin no trial later than this.")] = 60,
    seed: Annotated[int, typer.Option(help="Another seed makes other trials.")] = 0,
    shim: Annotated[
        Path | None, typer.Option(help="tests/failing_calls.c as a shared library. Default: compile it.")
    ] = None,
    folder: Annotated[Path | None, typer.Option(help="Where to work, best in memory. Default: a new one.")] = None,
    repeat: Annotated[
        Path | None, typer.Option(help="Make only the trials again that went wrong in this -o of before.")
    ] = None,
    out: command_line.Out = None,
) -> None:
    """Kill commands, flip bits and let calls fail, and count what is lost, silent or no sentence. Needs no GPU."""
    begin = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="k5-trust-", dir=folder) as name:
        _load_shim(shim, Path(name))
        place, expected, seconds = prepare(Path(name))
        if repeat:
            trials = [Trial(**wrong["trial"]) for wrong in json.loads(repeat.read_text(encoding="utf-8"))["wrong"]]
        else:
            trials = plan(place, cache_kills, run_kills, num_flips, every, seed)
        console.note(f"Prepared in {time.monotonic() - begin:.0f} s; {len(trials)} trials in {workers} processes")

        def make(where: Place, trial: Trial, kept: dict[str, float]) -> bool:
            return make_one(where, trial, expected, kept or kept.update(seconds) or kept)

        found = make_all(make, trials, place, workers, begin + 60 * minutes, console.note)
    print_found(found, len(trials), time.monotonic() - begin)
    command_line.write_json(out, document(found, len(trials), seed, time.monotonic() - begin))
    if len(found) < len(trials) or any(f.verdict for f in found):
        sys.exit(1)


def _load_shim(shim: Path | None, folder: Path) -> None:
    """Start this process again with the failing calls loaded, unless they are."""
    if failing.is_loaded():
        return
    os.environ["LD_PRELOAD"] = str(shim.resolve() if shim else failing.build(Path(tempfile.mkdtemp())))
    os.environ.update(CUDA_VISIBLE_DEVICES="", HF_HUB_OFFLINE="1", OMP_NUM_THREADS="1", TOKENIZERS_PARALLELISM="false")
    sys.stdout.flush()
    folder.rmdir()
    os.execv(sys.executable, sys.orig_argv)


def prepare(folder: Path) -> tuple[Place, dict[str, Any], dict[str, float]]:
    """The checkpoint, the template, what every command leaves when it is not disturbed, and how long it takes."""
    torch.set_num_threads(1)
    place = Place(folder / "model", folder / "template", folder / "scratch")
    place.model.mkdir()
    place.scratch.mkdir()
    failing_calls.load_once()
    import_all()
    make_checkpoint(place.model)
    os.environ["K5_HOME"] = str(folder / flips.HOME)
    template.make(place.template, place.model)
    shutil.copytree(place.template, root := folder / "once")
    for line in (
        ("base", "prepare", "--model", str(place.model)),
        ("run", "cache/whole", "--model", str(place.model), *template.INT8_RUN, "-o", "runs/int8"),
    ):  # in this process, which so imports all that a run imports
        done = failing_calls.Cli(root)(failing.app_of(line[0]), *line)
        assert done.code == 0, done.err
    gc.collect()
    gc.freeze()
    expected, seconds = {}, {}
    for row in (kills.CACHES, kills.RUNS):
        for name, case in kills.cases(row, place.model).items():
            with place.copy() as root:
                started = time.monotonic()
                must(root, *case.line)
                seconds[name] = time.monotonic() - started
                expected[name] = case.result(root)
    return place, {
        **expected, "whole": finished_cache(place.template / "cache" / "whole"), "base": expected["base prepare"],
        "four": finished_run(place.template / "runs" / "four"), failing.ROW: failing.expected(place),
    }, seconds  # fmt: skip


def import_all() -> None:
    """Import every module of both packages, so that no trial has to, and none is of another version if files change."""
    for package in (k5cache, k5train):
        for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
            if not module.name.endswith(".__main__"):
                with suppress(ImportError):  # what needs a library that is not installed
                    import_module(module.name)


def plan(place: Place, cache_kills: int, run_kills: int, num_flips: int, every: int, seed: int) -> list[Trial]:
    """All trials, in a random order, so that whoever stops early has some of each kind."""
    chance = random.Random(seed)
    trials: list[Trial] = []
    for row, count in ((kills.CACHES, cache_kills), (kills.RUNS, run_kills)):
        trials += _dealt(row, list(kills.cases(row, place.model)), count, _KILLS_AT_ONCE, chance)
    for row, share in _SHARES.items():
        trials += _dealt(row, list(flips.cases(row)), round(share * num_flips), _FLIPS_AT_ONCE, chance)
    calls = failing.trials(place) if every else []
    chance.shuffle(calls)
    trials += calls[:: every or 1]
    chance.shuffle(trials)
    return trials


def _dealt(row: str, names: Sequence[str], count: int, at_once: int, chance: random.Random) -> list[Trial]:
    trials: list[Trial] = []
    while count > 0:
        trials.append(Trial(row, names[len(trials) % len(names)], chance.getrandbits(32), min(count, at_once)))
        count -= at_once
    return trials


def make_one(place: Place, trial: Trial, expected: dict[str, Any], seconds: dict[str, float]) -> bool:
    """Make a trial. Returns whether a failing call was tolerated."""
    if trial.row == failing.ROW:
        return failing.fail(place, trial, expected[failing.ROW])
    if trial.row in (kills.CACHES, kills.RUNS):
        kills.kill(place, trial, expected[trial.case], seconds)
    else:
        flips.flips(place, trial, expected)
    return False


def counts_of(found: Sequence[Found]) -> list[dict[str, Any]]:
    """A line of the table for every row: trials, and how many of them went wrong in which way."""
    lines = []
    for row in ROWS:
        of_row = [f for f in found if f.trial.row == row]
        wrong = Counter(f.verdict for f in of_row)
        lines.append({
            "row": row, "trials": sum(f.trial.count for f in of_row), **{v: wrong[v] for v in VERDICTS},
            "tolerated": sum(f.tolerated for f in of_row), "cases": dict(_by_case(of_row)),
        })  # fmt: skip
    return lines


def _by_case(found: Sequence[Found]) -> Counter[str]:
    cases: Counter[str] = Counter()
    for f in found:
        cases[f.trial.case] += f.trial.count
    return cases


def print_found(found: Sequence[Found], planned: int, seconds: float) -> None:
    """The table, and the first problems."""
    title = f"{len(found)} of {planned} planned trials in {seconds:.0f} s"
    columns = ("trials", "lost", "silent", "tracebacks", "unknown")
    table = console.table(title, "what", *columns, numbers=columns)
    for line in counts_of(found):
        table.add_row(line["row"], *(f"{line[name]:,}" for name in ("trials", *VERDICTS)))
    console.out.print(table)
    for wrong in [f for f in found if f.verdict][:20]:
        console.err.print(f"{wrong.verdict}: {wrong.trial}\n  {wrong.problem[-1500:]}", markup=False, highlight=False)


def document(found: Sequence[Found], planned: int, seed: int, seconds: float) -> dict[str, Any]:
    """The counts, and every trial that went wrong with all that is needed to make it again."""
    return {
        "planned": planned, "made": len(found), "seed": seed, "seconds": round(seconds, 1), "torch": torch.__version__,
        "processors": os.cpu_count(), "rows": counts_of(found), "wrong": [asdict(f) for f in found if f.verdict],
        "work_seconds": {row: round(sum(f.seconds for f in found if f.trial.row == row)) for row in ROWS},
    }  # fmt: skip


if __name__ == "__main__":
    command_line.run(main)

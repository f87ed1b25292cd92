"""Several runs beside each other: which settings differ, whose losses measure the same thing, and which run is best?

Only files of the runs are read. ``Comparison`` is plain values: the table, the picture and ``--json`` show it.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from k5cache.shared import console
from k5cache.shared.errors import RunError
from k5cache.shared.outputs import HARMLESS, kind_of
from k5train.runs.outcomes import read_outcomes
from k5train.runs.record import UNRECORDED, Loss, Record, read_record

_MOST_NAMED = 3
_ROSE = 1.01  # times the best: two seeds differ by about as much


@dataclass(frozen=True)
class Setting:
    """An option that is not the same in all runs."""

    name: str
    values: Mapping[str, Any]
    """For each run whose recipe can be read; None where it is not set."""


@dataclass(frozen=True)
class Comparison:
    """Runs, and what can be said of them together."""

    runs: tuple[Record, ...]
    settings: tuple[Setting, ...]
    """What differs. Empty for one run."""
    groups: tuple[tuple[str, ...], ...]
    """Names of runs whose held-out losses were measured on the same rows, at the same sigmas, with the same noise."""
    probe_groups: tuple[tuple[str, ...], ...]
    """The same for the loss on images that are trained on."""
    best: str | None
    """The run with the lowest held-out loss. None if the losses cannot be compared, or none is below its base's."""
    reason: str = ""
    """Why no run is called the best; empty if one is."""

    def __getitem__(self, name: str) -> Record:
        return next(run for run in self.runs if run.name == name)

    def ranked(self) -> list[Record]:
        """The runs from the lowest to the highest loss, held out or else of the probe; those without one at the end."""
        infinite = float("inf")

        def loss(run: Record) -> float:
            measured = run.best.loss if run.best else run.last("probe")
            return infinite if measured is None else measured

        return sorted(self.runs, key=loss)


def compare(folders: Sequence[Path], read: Callable[[Path], Record] = read_record) -> Comparison:
    """Compare runs.

    Args:
        folders: runs, or folders of runs such as sweeps, which stand for all runs in them.
        read: reads a run; a page remembers those that have not changed.

    Raises:
        RunError: one of the folders does not exist, or there is no run among them.
    """
    runs = _named(_with_reasons([read(root) for root in find_runs(folders)]))
    best, reason = _best_of(runs)
    return Comparison(runs, _settings(runs), _groups(runs, "held_out"), _groups(runs, "probe"), best, reason)


def _with_reasons(runs: Sequence[Record]) -> list[Record]:
    """The records, with the errors that ended runs of sweeps, which only the sweep's own file has."""
    sweeps = dict.fromkeys(run.root.parent for run in runs if not run.is_finished)
    outcomes = {folder / outcome.label: outcome for folder in sweeps for outcome in read_outcomes(folder)}
    return [
        replace(run, problems=(*run.problems, outcome.error))
        if not run.is_finished and (outcome := outcomes.get(run.root)) and outcome.error
        else run
        for run in runs
    ]


def find_runs(folders: Sequence[Path]) -> list[Path]:
    """The folders of the runs that are meant, each once, in the order given. Others are named in a warning.

    Raises:
        RunError: as ``compare``.
    """
    missing = [folder for folder in folders if not os.path.exists(folder)]  # noqa: PTH110 (False for any name)
    if missing:
        raise RunError(f"There is no {missing[0]}", "Give folders made by `k5train run` or `k5train sweep`")
    found: dict[Path, Path] = {}
    for folder in folders:
        runs = []
        try:
            runs = list(_runs_of(folder))
            problem = "is not a run, nor a folder that holds runs"
        except OSError as error:
            problem = f"cannot be read ({error.strerror})"
        if not runs:
            console.warn(f"{folder} {problem}: it is left out")
        for run in runs:
            found.setdefault(run.resolve(), run)
    if not found:
        raise RunError(
            f"There is no run in {some([str(folder) for folder in folders])}",
            "Give folders made by `k5train run`, or the folder of a sweep",
        )
    return list(found.values())


def _runs_of(folder: Path) -> Iterator[Path]:
    if _is_run(folder):
        yield folder
    elif folder.is_dir() and kind_of(folder) != "cache":
        inside = [entry for entry in folder.iterdir() if not HARMLESS.fullmatch(entry.name)]
        yield from (entry for entry in sorted(inside, key=in_order) if _is_run(entry))


def _is_run(folder: Path) -> bool:
    if kind_of(folder) == "run":
        return True
    # A run that lost one of the two is shown, with what is wrong with it.
    has_either = (folder / "run.json").is_file() or (folder / "recipe.toml").is_file()
    return has_either and (folder / "metrics.jsonl").is_file()


def in_order(path: Path) -> list[tuple[float, str]]:
    """Sorts names by their numbers: ``rank=8`` before ``rank=16``, ``lr=3e-05`` before ``lr=0.0001``."""
    parts = re.split(r"(\d+(?:\.\d+)?(?:e[+-]?\d+)?)", path.name)
    return [(float(part), "") if i % 2 else (-1.0, part) for i, part in enumerate(parts)]


def _named(runs: Sequence[Record]) -> tuple[Record, ...]:
    """The runs, each with a name of its own: as much of its path as tells it from the others."""
    names = [run.name for run in runs]
    paths = [run.root.resolve() for run in runs]
    depth = 1
    while len(set(names)) < len(names):
        depth += 1
        often = Counter(names)
        names = [n if often[n] == 1 else "/".join(p.parts[-depth:]) for n, p in zip(names, paths, strict=True)]
    return tuple(replace(run, name=name) for run, name in zip(runs, names, strict=True))


def _settings(runs: Sequence[Record]) -> tuple[Setting, ...]:
    known = [run for run in runs if run.settings]
    names = dict.fromkeys(name for run in known for name in run.settings)
    settings = [Setting(name, {run.name: run.settings.get(name) for run in known}) for name in names]
    return tuple(setting for setting in settings if any(v != next(iter(setting.values.values()))
                                                        for v in setting.values.values()))  # fmt: skip


def _groups(runs: Sequence[Record], measured: str) -> tuple[tuple[str, ...], ...]:
    by_key: dict[str, list[str]] = {}
    for run in runs:
        if measured in run.curves:
            by_key.setdefault(run.keys.get(measured, run.name), []).append(run.name)
    return tuple(sorted(map(tuple, by_key.values()), key=len, reverse=True))


def _best_of(runs: Sequence[Record]) -> tuple[str | None, str]:
    """The name of the best run, or why there is none. Runs that did not begin, or cannot be read, do not count."""
    trained = [run for run in runs if run.steps]
    groups = _groups(trained, "held_out")
    without = [run.name for run in trained if "held_out" not in run.curves]
    if not trained:
        return None, "No run has made a step yet"
    if without:
        lowest = _lowest_probe(trained)
        return None, (
            f"No run is called the best, because {some(without)} held no images out. To compare runs by a held-out "
            f"loss, train them with --set train.validation.split=0.1{lowest}"
        )
    if len(groups) > 1:
        what = "the held-out losses were not measured on the same images in the same way"
        if any(run.keys["held_out"].startswith(UNRECORDED) for run in trained):
            what = (
                "earlier versions did not record what they measured on, so that not all held-out losses can be compared"
            )
        listed = "; ".join(f"{number}. {some(group)}" for number, group in enumerate(groups, 1))
        return None, f"No run is called the best, because {what}: {listed}"
    measured = [(run.best.loss, run) for run in trained if run.best and run.best.loss is not None and run.best.step]
    if not measured:
        return None, "No run is called the best: no held-out loss was below the base's"
    return min(measured, key=lambda entry: entry[0])[1].name, ""


def _lowest_probe(runs: Sequence[Record]) -> str:
    losses = [(loss, run.name) for run in runs if (loss := run.last("probe")) is not None]
    if len(losses) < len(runs) or len(_groups(runs, "probe")) != 1 or len(runs) == 1:
        return ""
    loss, name = min(losses)
    return f". On images that were trained on, {name} has the lowest loss, {loss:.4f}"


def remarks(run: Record) -> list[str]:
    """What a person should know of a run's ending, each in a few words."""
    said = list(run.problems)
    wanted = run.settings.get("train.steps")
    if not run.is_finished and run.settings:
        said.append(f"not finished: step {run.steps}" + (f" of {wanted}" if isinstance(wanted, int) else ""))
    if run.ended_by == "patience":
        said.append("stopped early")
    if run.ended_by == "max_hours":
        said.append("stopped at train.max_hours")
    if run.final and run.final.loss is None:
        said.append("the last held-out loss is not finite")
    elif run.ended_worse_than_base:
        said.append("ended worse than the base")
    elif run.best and run.best.step == 0:
        said.append("never below the base")
    elif run.best and run.best.loss and run.final and run.final.loss and run.final.loss > _ROSE * run.best.loss:
        said.append("ended above its best")
    return said


def which(run: Record) -> str:
    """The LoRA with a run's best loss, as ``k5train sample --which`` calls it. Empty if the base is better than all."""
    if run.best is None or run.best.step == 0:
        return ""
    if run.best.file is None:
        return "not kept"
    if run.best.file.parent.name == "checkpoints":
        return str(run.best.step)
    return "final" if run.best == run.final else "best"


def averages(comparison: Comparison, best: Loss) -> list[str]:
    """The average that is lower than the best, if one is."""
    averages = [(run.ema.loss, run) for run in comparison.runs if run.ema and run.ema.loss is not None and run.ema.file]
    if not averages or best.loss is None:
        return []
    loss, run = min(averages, key=lambda entry: entry[0])
    assert run.ema is not None
    return [f"lower    the EMA of {run.name}, {loss:.4f}, {run.ema.file}"] if loss < best.loss else []


def some(names: Sequence[str]) -> str:
    """The first few of ``names``, and how many more there are."""
    more = f" and {len(names) - _MOST_NAMED} more" if len(names) > _MOST_NAMED else ""
    return ", ".join(names[:_MOST_NAMED]) + more


def as_json(comparison: Comparison) -> dict[str, Any]:
    """The comparison as plain values, for scripts and pages. Of the settings it has those that differ."""
    best = comparison[comparison.best].best if comparison.best else None
    return {
        "runs": [_run_as_json(run) for run in comparison.runs],
        "settings": {setting.name: dict(setting.values) for setting in comparison.settings},
        "held_out_groups": comparison.groups,
        "probe_groups": comparison.probe_groups,
        "best": None if best is None else {"run": comparison.best, **vars(best)},
        "reason": comparison.reason,
    }


def _run_as_json(run: Record) -> dict[str, Any]:
    losses = {name: None if loss is None else dict(vars(loss)) for name, loss in _losses(run).items()}
    return {
        "name": run.name,
        "folder": run.root,
        "is_finished": run.is_finished,
        "ended_by": run.ended_by,
        "steps": run.steps,
        **losses,
        "probe": _ends(run, "probe"),
        "regularisation": _ends(run, "held_out_prior"),
        "seconds": run.seconds,
        "seconds_per_step": run.seconds_per_step,
        "peak_gib": run.peak_gib,
        "curves": run.curves,
        "measured_on": run.keys,
        "remarks": remarks(run),
    }


def _ends(run: Record, name: str) -> dict[str, float | None] | None:
    return {"base": run.first(name), "final": run.last(name)} if name in run.curves else None


def _losses(run: Record) -> dict[str, Loss | None]:
    return {"base": run.base, "final": run.final, "best": run.best, "ema": run.ema}


def shown_value(value: Any) -> str:
    """The value of a setting for a table."""
    if value is None:
        return "not set"
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, Mapping | Sequence) and not isinstance(value, str):
        return ", ".join(map(shown_value, value.values() if isinstance(value, Mapping) else value)) or "none"
    return str(value).lower() if isinstance(value, bool) else str(value)

"""How does a comparison of runs look on a terminal? Two tables, and lines that say what they mean."""

from __future__ import annotations

from typing import Any

from rich.table import Table
from rich.text import Text

from k5cache.shared import console
from k5cache.shared.foreign import shown
from k5cache.shared.units import count_of
from k5train.pictures.compared import ComparedPictures
from k5train.runs.compared import Comparison, averages, remarks, shown_value, some, which
from k5train.runs.record import Loss

_MOST_RUNS_ACROSS = 6
"""Runs that have a column each in the table of settings. More have a row each, the best first."""
_MOST_SETTINGS_ACROSS = 8
_MOST_VALUE = 32  # characters


def print_comparison(comparison: Comparison, pictures: ComparedPictures) -> None:
    """Print it on stdout."""
    if comparison.settings:
        console.out.print(_settings_table(comparison))
        console.out.print()
    console.out.print(_losses_table(comparison))
    for line in _lines(comparison, pictures):
        console.out.print(Text(shown(line)))


def _settings_table(comparison: Comparison) -> Table:
    """A column for each run; of many runs, a row for each."""
    runs = [run.name for run in comparison.runs if run.settings]
    settings = comparison.settings
    title = "Settings that differ"
    if len(runs) <= _MOST_RUNS_ACROSS:
        table = console.table(title, "", *map(shown, runs))
        for setting in settings:
            table.add_row(setting.name, *(_value(value) for value in setting.values.values()))
        return table
    columns = settings[:_MOST_SETTINGS_ACROSS]
    if len(settings) > len(columns):
        title += f" (the first {len(columns)} of {len(settings)}; --json has all)"
    endings = [setting.name.rpartition(".")[2] for setting in columns]
    names = [end if endings.count(end) == 1 else c.name for end, c in zip(endings, columns, strict=True)]
    table = console.table(title, "run", *names)
    for run in runs:
        table.add_row(shown(run), *(_value(setting.values[run]) for setting in columns))
    return table


def _losses_table(comparison: Comparison) -> Table:
    """A row for each run, of many the best first; a column only for what at least one of them has."""
    runs = list(comparison.runs) if len(comparison.runs) <= _MOST_RUNS_ACROSS else comparison.ranked()
    columns: dict[str, list[str]] = {
        "steps": [str(run.steps) for run in runs],
        "base": [_loss(run.base) for run in runs],
        "final": [_loss(run.final) for run in runs],
        "best": [_loss(run.best) for run in runs],
        "at": [str(run.best.step) if run.best else "" for run in runs],
        "file": [which(run) for run in runs],
        "EMA": [_loss(run.ema) for run in runs],
        "prior": [_number(run.last("held_out_prior")) for run in runs],
        "probe": [_number(run.last("probe")) for run in runs],
        "s/step": [_number(run.seconds_per_step, 2) for run in runs],
        "GiB": [_number(run.peak_gib, 1) for run in runs],
    }
    kept = {name: cells for name, cells in columns.items() if any(cells)}
    table = console.table("Held-out loss, time and memory", "run", *kept, numbers=tuple(kept))
    for column in table.columns[1:]:
        column.no_wrap = True  # a narrow terminal folds the names
    for run, cells in zip(runs, zip(*kept.values(), strict=True), strict=True):
        table.add_row(shown(run.name), *cells)
    return table


def _lines(comparison: Comparison, pictures: ComparedPictures) -> list[str]:
    """What the tables mean."""
    lines = []
    if comparison.best:
        run = comparison[comparison.best]
        assert run.best is not None
        file = run.best.file or "the LoRA of that step was not kept"
        lines.append(f"best     {run.name}, step {run.best.step}, held-out loss {_loss(run.best)}, {file}")
        lines += averages(comparison, run.best)
    else:
        lines.append(comparison.reason)
    lines += _by_remark(comparison)
    drawn = list(dict.fromkeys(row.run for row in pictures.rows if row.kind == "run"))
    if drawn:
        lines.append(f"pictures of {count_of(len(drawn), 'run')}, on the same noise")
    without: dict[str, list[str]] = {}
    for name, why in pictures.left_out.items():
        without.setdefault(why, []).append(name)
    return [*lines, *(f"no pictures of {some(names)}: {why}" for why, names in without.items())]


def _by_remark(comparison: Comparison) -> list[str]:
    """A line for each remark, with the runs that it is about."""
    names: dict[str, list[str]] = {}
    for run in comparison.runs:
        for remark in remarks(run):
            names.setdefault(remark, []).append(run.name)
    return [f"{some(about)}: {remark}" for remark, about in names.items()]


def _value(value: Any) -> str:
    return shown(shown_value(value), _MOST_VALUE)


def _loss(loss: Loss | None) -> str:
    if loss is None:
        return ""
    return "not finite" if loss.loss is None else f"{loss.loss:.4f}"


def _number(number: float | None, decimals: int = 4) -> str:
    return "" if number is None else f"{number:.{decimals}f}"

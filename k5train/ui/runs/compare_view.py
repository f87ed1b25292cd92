"""What does a comparison of runs say? The values of the compare page and of a report, from the runs' own files."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from k5cache.shared.errors import K5Error
from k5cache.shared.foreign import shown
from k5cache.shared.units import human_seconds
from k5train.pictures.compared import ComparedPictures, Kind, compare_pictures, shared_steps
from k5train.pictures.saved import files_of
from k5train.runs.compared import Comparison, averages, compare, remarks, shown_value, some, which
from k5train.runs.compared_panels import Course, course_of, part_rows, step_rows, time_rows
from k5train.runs.metrics import read_metrics
from k5train.runs.panels import Row
from k5train.runs.record import Loss, Record, read_record
from k5train.ui.runs.stamps import Stamp, stamp, stamps

_MOST_VALUE = 120  # characters
_MOST_REMEMBERED = 64  # runs whose curves are kept between two looks at a page


@dataclass(frozen=True)
class Result:
    """A row of the table of results."""

    name: str
    root: Path
    is_finished: bool
    is_best: bool
    cells: tuple[str, ...]
    remarks: tuple[str, ...]


@dataclass(frozen=True)
class Table:
    """Cells under headings."""

    columns: tuple[str, ...]
    rows: tuple[tuple[str, tuple[str, ...]], ...]
    """The heading of each row, and its cells."""


@dataclass(frozen=True)
class Tile:
    """A picture with what it is of."""

    label: str
    kind: Kind
    path: Path


@dataclass(frozen=True)
class PictureStep:
    """The pictures of all runs at a step, beside each other for each prompt."""

    key: str
    """The step as a number; of the last pictures of runs that ended apart, ``last``."""
    label: str
    prompts: tuple[tuple[str, tuple[Tile, ...]], ...]


@dataclass(frozen=True)
class CompareView:
    """A comparison, ready to be shown."""

    names: tuple[str, ...]
    best: str | None
    verdict: str
    """Which run is best, or why none is."""
    notes: tuple[str, ...]
    columns: tuple[str, ...]
    results: tuple[Result, ...]
    """The best run first."""
    settings: Table | None
    """What differs. None: nothing."""
    by_step: tuple[Row, ...]
    by_time: tuple[Row, ...]
    by_part: tuple[Row, ...]
    """Of the held-out loss in each part of sigma."""
    pictures: tuple[PictureStep, ...]
    """From the first step that all runs share to their last pictures."""
    without_pictures: tuple[str, ...]
    """Which runs have no pictures beside the others, and why."""


def view_of(folders: Sequence[Path]) -> CompareView:
    """Compare runs, or the runs of sweeps and other folders.

    Raises:
        RunError: a folder is not there, or there is no run in them.
    """
    comparison = compare(folders, _record)
    courses = {run.name: _course(run.root / "metrics.jsonl") for run in comparison.runs if run.is_ours}
    last = compare_pictures(comparison.runs)
    columns, results = _results(comparison)
    verdict, notes = _verdict(comparison)
    return CompareView(
        tuple(run.name for run in comparison.runs),
        comparison.best,
        verdict,
        tuple(notes),
        columns,
        results,
        _settings(comparison),
        tuple(step_rows(comparison, courses)),
        tuple(time_rows(comparison, courses)),
        tuple(part_rows(comparison, courses)),
        tuple(step_pictures(comparison.runs, last)),
        tuple(_without(last)),
    )


def _verdict(comparison: Comparison) -> tuple[str, list[str]]:
    """Which run is best, or why none is; and of which runs something should be known."""
    notes = []
    verdict = comparison.reason
    if comparison.best:
        run = comparison[comparison.best]
        assert run.best is not None
        assert run.best.loss is not None
        file = f"in {run.best.file.relative_to(run.root)}" if run.best.file else "whose LoRA was not kept"
        verdict = f"The best is {run.name} at step {run.best.step:,}: held-out loss {run.best.loss:.4f}, {file}"
        notes = [line.removeprefix("lower").strip() + ", is lower still" for line in averages(comparison, run.best)]
    return verdict, notes


def _results(comparison: Comparison) -> tuple[tuple[str, ...], tuple[Result, ...]]:
    """The table, with a column only for what at least one run has."""
    runs = comparison.ranked()
    columns = {
        "Steps": [f"{run.steps:,}" for run in runs],
        "Base": [_loss(run.base) for run in runs],
        "Final": [_loss(run.final) for run in runs],
        "Best": [_loss(run.best) for run in runs],
        "At step": [f"{run.best.step:,}" if run.best else "" for run in runs],
        "LoRA": [which(run) for run in runs],
        "EMA": [_loss(run.ema) for run in runs],
        "Regularisation": [_number(run.last("held_out_prior")) for run in runs],
        "Probe": [_number(run.last("probe")) for run in runs],
        "Time": ["" if run.seconds is None else human_seconds(run.seconds) for run in runs],
        "Seconds a step": [_number(run.seconds_per_step, 2) for run in runs],
        "VRAM, GiB": [_number(run.peak_gib, 1) for run in runs],
    }
    kept = {name: cells for name, cells in columns.items() if any(cells)}
    return tuple(kept), tuple(
        Result(run.name, run.root, run.is_finished, run.name == comparison.best, cells, tuple(remarks(run)))
        for run, *cells_of_run in zip(runs, *kept.values(), strict=True)
        for cells in [tuple(cells_of_run)]
    )


def _settings(comparison: Comparison) -> Table | None:
    """A row for each setting, or, if there are more runs than settings, for each run."""
    settings = comparison.settings
    if not settings:
        return None
    runs = [run.name for run in comparison.runs if run.settings]
    values = [[shown(shown_value(setting.values[name]), _MOST_VALUE) for name in runs] for setting in settings]
    names = [setting.name for setting in settings]
    if len(runs) > len(names):
        return Table(tuple(names), tuple(zip(runs, zip(*values, strict=True), strict=True)))
    return Table(tuple(runs), tuple((name, tuple(cells)) for name, cells in zip(names, values, strict=True)))


def step_pictures(runs: Sequence[Record], last: ComparedPictures) -> list[PictureStep]:
    """The pictures of the steps that the runs share, and those of their ends where these lie apart."""
    together = [run for run in runs if run.name not in last.left_out]
    ends = {row.step for row in last.rows if row.kind == "run"}
    steps = []
    for step in shared_steps(together):
        pictures = compare_pictures(together, step)
        if not pictures.left_out:
            steps.append(_at(f"{step}", f"Step {step:,}", pictures))
    if len(ends) != 1 and last.rows:
        label = "The last of each run" if ends else "The base model"
        steps.append(_at("last" if ends else "0", label, last))
    return [step for step in steps if step.prompts]


def _at(key: str, label: str, pictures: ComparedPictures) -> PictureStep:
    files = [(row, files_of(row.folder)) for row in pictures.rows]
    prompts = []
    for i, prompt in enumerate(pictures.columns):
        tiles = [Tile(row.label, row.kind, paths[i]) for row, paths in files if i < len(paths)]
        prompts.append((prompt, tuple(tiles)))
    return PictureStep(key, label, tuple(prompts) if any(tiles for _, tiles in prompts) else ())


def _without(pictures: ComparedPictures) -> list[str]:
    by_reason: dict[str, list[str]] = {}
    for name, why in pictures.left_out.items():
        by_reason.setdefault(why, []).append(name)
    return [f"No pictures of {some(names)}: {why}" for why, names in by_reason.items()]


def _record(root: Path) -> Record:
    """A run as its files tell it, read again when one of them has changed."""
    names = "metrics.jsonl", "result.json", "run.json", "recipe.toml", ".", "checkpoints"
    return _record_of(root, stamps(root, *names))


@lru_cache(_MOST_REMEMBERED)
def _record_of(root: Path, stamps: tuple[Stamp, ...]) -> Record:
    return read_record(root)


def _course(path: Path) -> Course:
    """The curves of a run; none if they cannot be read, which its remarks say."""
    try:
        return _course_of(path, stamp(path))
    except (K5Error, OSError):
        return Course()


@lru_cache(_MOST_REMEMBERED)
def _course_of(path: Path, stamp: Stamp) -> Course:
    return course_of(read_metrics(path))


def _loss(loss: Loss | None) -> str:
    if loss is None:
        return ""
    return "not finite" if loss.loss is None else f"{loss.loss:.4f}"


def _number(number: float | None, decimals: int = 4) -> str:
    return "" if number is None else f"{number:,.{decimals}f}"

"""How does a sweep stand? Its runs as a grid over the options that it varies, the best of them, and what failed."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

from k5train.pictures.saved import files_of
from k5train.runs.compared import compare
from k5train.runs.folder import Run
from k5train.runs.outcomes import FILE, read_outcomes
from k5train.runs.record import Record, read_record
from k5train.ui.runs.stamps import Stamp, stamp, stamps
from k5train.ui.runs.state import BADGES

_AXIS = re.compile(r"([\w.-]+)=(.*)", re.DOTALL)
_BETWEEN = re.compile(r",(?=[\w.-]+=)")
_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)(e[+-]?\d+)?", re.IGNORECASE)


@dataclass(frozen=True)
class Cell:
    """A run of the sweep."""

    label: str
    root: Path
    word: str
    """A key of ``BADGES``."""
    step: int = 0
    steps: int | None = None
    """How many steps it will have made. None: its recipe cannot be read."""
    loss: float | None = None
    """The lowest held-out loss."""
    at: int | None = None
    """The step that has it; 0 is the base model."""
    final: float | None = None
    why: str = ""
    """Why it failed, or is damaged."""
    picture: Path | None = None
    """Its last picture of the first prompt."""
    is_best: bool = False


@dataclass(frozen=True)
class SweepView:
    """A sweep, ready to be shown."""

    name: str
    axes: tuple[tuple[str, tuple[str, ...]], ...]
    """Option -> its values, in order. Empty for a sweep over a list, whose runs have names of their own."""
    columns: tuple[str, ...]
    """The values of the last axis."""
    rows: tuple[tuple[str, tuple[Cell | None, ...]], ...]
    """The values of the other axes, and a cell for each column; None where there is no run yet."""
    verdict: str
    """Which run is best, or why none is."""
    counts: tuple[tuple[str, int], ...]
    """Word -> how many runs."""

    @property
    def cells(self) -> list[Cell]:
        """All runs."""
        return [cell for _, cells in self.rows for cell in cells if cell]


def read_sweep(root: Path, runs: Sequence[Path], is_running: Callable[[Path], bool]) -> SweepView:
    """A sweep's folder as its files tell it.

    Args:
        runs: the folders of its runs.
        is_running: whether a process trains the run in a folder.
    """
    read = [_cell(run, _stamps(run)) for run in runs]
    errors = _errors(root, stamp(root / FILE))
    cells = [_with_word(cell, errors.get(cell.label, ""), is_running(cell.root)) for cell in read]
    # A run that began and left no folder, or whose folder was removed, is only on the list.
    there = {cell.label for cell in cells}
    cells += [Cell(label, root / label, "failed", why=why) for label, why in errors.items() if label not in there]
    finished = tuple((cell.root, _stamps(cell.root)) for cell in cells if cell.word == "finished")
    best, verdict = _best(finished) if finished else (None, "No run is finished yet")
    cells = [replace(cell, is_best=cell.root.name == best) for cell in cells]
    words = [cell.word for cell in cells]
    counts = tuple((word, words.count(word)) for word in BADGES if word in words)
    return SweepView(root.name, *_grid(cells), verdict, counts)


def axes_of(labels: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """The options of a grid and their values, as its labels name them: ``rank=8,lr=0.0001``. Empty for other labels."""
    parsed = [_values(label) for label in labels]
    if not parsed or any(values is None or [*values] != [*(parsed[0] or {})] for values in parsed):
        return {}
    known = [values for values in parsed if values]
    return {name: tuple(sorted({values[name] for values in known}, key=_in_order)) for name in known[0]}


def _values(label: str) -> dict[str, str] | None:
    """``rank=8,lr=0.0001`` -> its values by option. None if it is another kind of label."""
    parts = [_AXIS.fullmatch(part) for part in _BETWEEN.split(label)]
    return {part[1]: part[2] for part in parts if part} if all(parts) else None


def _in_order(value: str) -> tuple[int, float, str]:
    return (0, float(value), "") if _NUMBER.fullmatch(value) else (1, 0.0, value)


def _grid(
    cells: Sequence[Cell],
) -> tuple[
    tuple[tuple[str, tuple[str, ...]], ...],
    tuple[str, ...],
    tuple[tuple[str, tuple[Cell | None, ...]], ...],
]:
    """The axes, the columns and the rows."""
    axes = axes_of([cell.label for cell in cells])
    if not axes:
        return (), (), (("", tuple(cells)),)
    *above, across = axes
    by_place: dict[tuple[tuple[str, ...], str], Cell] = {}
    for cell in cells:
        values = _values(cell.label) or {}
        by_place[tuple(values[name] for name in above), values[across]] = cell
    order = {name: {value: i for i, value in enumerate(values)} for name, values in axes.items()}
    places = sorted(
        dict.fromkeys(place for place, _ in by_place),
        key=lambda place: [order[name][value] for name, value in zip(above, place, strict=True)],
    )
    rows = tuple(
        (
            ", ".join(f"{name}={value}" for name, value in zip(above, place, strict=True)),
            tuple(by_place.get((place, value)) for value in axes[across]),
        )
        for place in places
    )
    return tuple(axes.items()), tuple(f"{across}={value}" for value in axes[across]), rows


def _with_word(cell: Cell, error: str, is_running: bool) -> Cell:
    if is_running:
        return replace(cell, word="running", why="")
    if cell.word in ("finished", "damaged") or not error:
        return cell
    return replace(cell, word="failed", why=error)


@lru_cache(512)
def _cell(root: Path, stamp: object) -> Cell:
    """A run, as long as its files have not changed."""
    record = read_record(root)
    total = record.settings.get("train.steps")
    return Cell(
        root.name,
        root,
        "damaged" if record.problems else "finished" if record.is_finished else "stopped",
        record.steps,
        total if isinstance(total, int) else None,
        record.best.loss if record.best else None,
        record.best.step if record.best else None,
        record.final.loss if record.final else None,
        "; ".join(record.problems),
        _last_picture(record),
    )


def _last_picture(record: Record) -> Path | None:
    if not record.is_ours:
        return None
    run = Run(record.root)
    names = [path.name.removeprefix("step-") for path in (record.root / "samples").glob("step-*")]
    for step in sorted((int(name) for name in names if name.isdecimal() and int(name)), reverse=True):
        files = files_of(run.samples(step))
        if files:
            return files[0]
    return None


@lru_cache(64)
def _best(finished: tuple[tuple[Path, object], ...]) -> tuple[str | None, str]:
    """The name of the best of the finished runs, and a sentence about it."""
    comparison = compare([root for root, _ in finished])
    if comparison.best is None:
        return None, comparison.reason
    best = comparison[comparison.best]
    assert best.best is not None
    assert best.best.loss is not None
    return (
        best.root.name,
        f"The best is {best.root.name} at step {best.best.step:,}: held-out loss {best.best.loss:.4f}",
    )


@lru_cache(64)
def _errors(root: Path, stamp: object) -> dict[str, str]:
    """What ended runs before their last step."""
    return {outcome.label: outcome.error for outcome in read_outcomes(root) if outcome.error}


def _stamps(root: Path) -> tuple[Stamp, ...]:
    """Changes when a run goes on."""
    return stamps(root, "metrics.jsonl", "result.json", "recipe.toml", "samples")

"""Which pictures of several runs show the same prompts on the same noise, so that they may stand in one grid?"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from k5train.pictures.saved import read_drawn
from k5train.runs.folder import Run
from k5train.runs.record import Record

Kind = Literal["source", "base", "run", "ema", "target"]


@dataclass(frozen=True)
class PictureRow:
    """One row of the grid."""

    label: str
    run: str
    """The name of the run whose folder has the pictures."""
    step: int
    kind: Kind
    folder: Path


@dataclass(frozen=True)
class ComparedPictures:
    """The pictures that may stand in one grid, and why others may not."""

    columns: tuple[str, ...] = ()
    """The prompts, or the pairs."""
    rows: tuple[PictureRow, ...] = ()
    left_out: Mapping[str, str] = field(default_factory=dict)
    """Run -> why its pictures do not share the columns."""


@dataclass(frozen=True)
class _Drawn:
    """The pictures of a run at a step."""

    record: Record
    step: int
    how: dict[str, Any]

    @property
    def run(self) -> Run:
        return Run(self.record.root)

    @property
    def base(self) -> str:
        """What decides the pictures of the base model, as one text. Empty if it is not known."""
        names = ("train.base_model_precision", "train.mixed_precision")
        settings = self.record.settings
        return str({n: v for n, v in settings.items() if n in names or n.startswith("model.")}) if settings else ""


def compare_pictures(runs: Sequence[Record], step: int | None = None) -> ComparedPictures:
    """The base model once, then for each run its pictures and those of its average.

    Runs that drew the same prompts, or pairs, in the same way share the columns. If there are several such groups, the
    largest is taken.

    Args:
        step: whose pictures. None: the last of each run.
    """
    drawn = [of_run for run in runs if run.is_ours and (of_run := _drawn(run, step))]
    have_drawn = {last.record.name for last in drawn}
    left_out = {run.name: "it has none that can be read" for run in runs if run.name not in have_drawn}
    groups: dict[str, list[_Drawn]] = {}
    for last in drawn:
        groups.setdefault(json.dumps(last.how, sort_keys=True), []).append(last)
    if not groups:
        return ComparedPictures(left_out=left_out)
    group = max(groups.values(), key=len)
    first = group[0]
    left_out |= {
        other.record.name: _difference(first.how, other.how) for other in drawn if not any(other is d for d in group)
    }
    rows = [*_references(first, "source"), *_base_rows(group), *_own_rows(group), *_references(first, "target")]
    return ComparedPictures(tuple(map(str, first.how["prompts"])), tuple(rows), left_out)


def shared_steps(runs: Sequence[Record]) -> list[int]:
    """The steps after step 0 at which every run that drew has pictures. Whether they can be read is not looked at."""
    each = [steps for run in runs if run.is_ours and (steps := {step for step in _steps(run) if step})]
    return sorted(set.intersection(*each)) if each else []


def _steps(record: Record) -> list[int]:
    """The steps at which a run drew, from the last to the first."""
    names = [path.name.removeprefix("step-") for path in (record.root / "samples").glob("step-*")]
    return sorted((int(name) for name in names if name.isdecimal()), reverse=True)


def _drawn(record: Record, at: int | None) -> _Drawn | None:
    for step in _steps(record) if at is None else [at]:
        how = read_drawn(Run(record.root).samples(step))
        if how is not None:
            return _Drawn(record, step, how)
    return None


def _difference(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> str:
    """Why pictures that were drawn like ``theirs`` are not beside ours."""
    what = "pairs" if "pairs" in theirs else "prompts"
    if ours["prompts"] != theirs["prompts"]:
        return f"it drew other {what}"
    names = [name for name in {**ours, **theirs} if ours.get(name) != theirs.get(name) and name != "pairs"]
    if not names:
        return "it drew the pairs in another way"
    return "it drew with " + " and ".join(f"{name} {theirs.get(name)} instead of {ours.get(name)}" for name in names)


def _base_rows(group: Sequence[_Drawn]) -> list[PictureRow]:
    """The base model's pictures, once for each base: runs of two checkpoints do not have the same."""
    rows: dict[str, PictureRow] = {}
    for drawn in group:
        folder = drawn.run.samples(0)
        if drawn.base not in rows and (drawn.base or not rows) and read_drawn(folder) == drawn.how:
            label = f"base of {drawn.record.name}" if rows else "base model"
            rows[drawn.base] = PictureRow(label, drawn.record.name, 0, "base", folder)
    return list(rows.values())


def _own_rows(group: Sequence[_Drawn]) -> list[PictureRow]:
    trained = [drawn for drawn in group if drawn.step]
    are_alike = len({drawn.step for drawn in trained}) == 1
    rows = []
    for drawn in trained:
        folder, name = drawn.run.samples(drawn.step), drawn.record.name
        at = "" if are_alike else f", step {drawn.step}"
        rows.append(PictureRow(f"{name}{at}", name, drawn.step, "run", folder))
        if read_drawn(folder / "ema") == drawn.how:
            rows.append(PictureRow(f"{name} EMA{at}", name, drawn.step, "ema", folder / "ema"))
    return rows


def _references(drawn: _Drawn, kind: Literal["source", "target"]) -> list[PictureRow]:
    """The sources of pairs, or what the edits should become, if the run has them."""
    folder = drawn.record.root / "samples" / "pairs" / kind
    is_there = "pairs" in drawn.how and read_drawn(folder) == drawn.how
    return [PictureRow(kind, drawn.record.name, 0, kind, folder)] if is_there else []

"""Which curves of several runs share a panel? Losses that measure the same thing, of all runs or of the best."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any, TypeVar

from k5cache.shared.foreign import shown
from k5train.runs.compared import Comparison, some
from k5train.runs.metrics import curve
from k5train.runs.panels import COLOURS, GREY, Level, Line, Mark, Panel, Point, Row
from k5train.runs.record import Record

MOST_LINES, MOST_PANELS = 7, 3
"""What a person can tell apart on one sheet. Of more runs the best are shown, and it says how many are not."""
_MOST_NAME = 40  # characters
NOTE = "measured on the same images, sigmas and noise each time"
_TRAINING_NOTE = "Running means. Comparable between runs with the same images, captions and objective"
_MOST_PARTS, _MOST_POINTS = 4, 3000
T = TypeVar("T")
_TIMES = ((180.0, 1, "seconds"), (5 * 3600.0, 60, "minutes"), (float("inf"), 3600, "hours"))
"""Up to how many seconds each unit is used."""


@dataclass(frozen=True)
class Course:
    """What the charts need of the lines of a run's ``metrics.jsonl`` beside its ``Record``."""

    loss: Sequence[Point] = ()
    """The training loss, smoothed."""
    rate: Sequence[Point] = ()
    parts: Sequence[Sequence[Point]] = ()
    """The held-out loss in each part of sigma, from the least noise to the most."""
    steps: Sequence[int] = ()
    seconds: Sequence[float] = ()
    """Of training at the end of each of ``steps``, without measurements and pictures."""

    def time(self, step: float) -> float:
        """Seconds of training until a step."""
        place = bisect_right(self.steps, step)
        return self.seconds[place - 1] if place else 0.0


def course_of(rows: Sequence[dict[str, Any]]) -> Course:
    """Read the lines of ``metrics.jsonl``, of any version."""
    from k5train.runs.loss_panels import smooth  # numpy, which pages without charts do not need

    lists = [row["held_out_by_sigma"] for row in rows if isinstance(row.get("held_out_by_sigma"), list)]
    num_parts = max(map(len, lists), default=0)
    timed = [(row["step"], row["seconds"]) for row in rows if isinstance(row.get("seconds"), int | float)]
    seconds = accumulate(max(0.0, seconds) for _, seconds in timed)
    times = _sparse([(step, total) for (step, _), total in zip(timed, seconds, strict=True)])
    return Course(
        _sparse(smooth(curve(rows, "loss"))),
        _sparse(curve(rows, "lr")),
        [curve(rows, "held_out_by_sigma", part) for part in range(num_parts)],
        [step for step, _ in times],
        [total for _, total in times],
    )


def _sparse(entries: Sequence[T]) -> list[T]:
    """Every so many of the entries, with the last one: more than a chart has pixels for, and small in memory."""
    every = len(entries) // _MOST_POINTS + 1
    return [*entries[:-1:every], *entries[-1:]]


def measured_rows(comparison: Comparison) -> list[Row]:
    """Held-out losses, and those on images that are trained on."""
    colours = colours_of(comparison)
    held_out = _panels(comparison, "held_out", comparison.groups, colours)
    probes = _panels(comparison, "probe", comparison.probe_groups, colours)
    if len(held_out) + len(probes) <= MOST_PANELS:
        kinds = [([*held_out, *probes], 380)]
    else:
        kinds = [(held_out, 380), (probes, 300)]
    return [Row(panels, height) for panels, height in kinds if panels]


def step_rows(comparison: Comparison, courses: Mapping[str, Course]) -> list[Row]:
    """All curves over the steps: what was measured, the training loss and the learning rate."""
    lines = {
        what: _courses(comparison, courses, points)
        for what, points in (("loss", lambda c: c.loss), ("rate", lambda c: c.rate))
    }
    training = Panel("training loss", lines["loss"], _TRAINING_NOTE, x_label="steps", y_label="mean squared error")
    rate = Panel("learning rate", lines["rate"], x_label="steps", may_be_logarithmic=False)
    drawn = [panel for panel in (training, rate) if panel.lines]
    return [*measured_rows(comparison), *([Row(drawn, 300)] if drawn else [])]


def time_rows(comparison: Comparison, courses: Mapping[str, Course]) -> list[Row]:
    """The held-out and the training loss over the time of training, for runs whose steps take different times."""
    longest = max((course.seconds[-1] for course in courses.values() if course.seconds), default=0.0)
    each, unit = next((each, unit) for most, each, unit in _TIMES if longest < most)
    if not longest:
        return []

    def over_time(line: Line, name: str) -> Line:
        return replace(line, points=[(courses[name].time(x) / each, y) for x, y in line.points])

    colours = colours_of(comparison)
    timed = [
        run for run in comparison.runs if run.name in colours and run.name in courses and courses[run.name].seconds
    ]
    held_out = [run for run in timed if run.name in (comparison.groups or [()])[0]]
    lines = [
        over_time(line, run.name)
        for run in held_out
        for line in lines_of([run], "held_out", colours)
        if not line.is_dashed
    ]
    label = f"{unit} of training, without measurements and pictures"
    panels = [Panel("held-out loss", lines, NOTE, x_label=label, y_label="mean squared error")] if lines else []
    training = [
        over_time(line, run.name) for run in timed for line in _courses(comparison, courses, lambda c: c.loss, [run])
    ]
    panels += [Panel("training loss", training, _TRAINING_NOTE, x_label=label, y_label="mean squared error")]
    return [Row(panels, 330)]


def part_rows(comparison: Comparison, courses: Mapping[str, Course]) -> list[Row]:
    """The held-out loss by part of sigma: most noise decides the composition, least noise the texture.

    Of the largest group of runs whose held-out losses can be compared.
    """
    group = [comparison[name] for name in (comparison.groups or [()])[0]]
    counts = [len(courses[run.name].parts) for run in group if run.name in courses]
    num = max(counts, default=0)
    panels = []
    for part in range(num if num > 1 else 0):
        noise = {0: ", least noise", num - 1: ", most noise"}.get(part, "")
        title = f"sigma {part / num:.3g} to {(part + 1) / num:.3g}{noise}"
        at = [run for run in group if run.name in courses and part < len(courses[run.name].parts)]
        parts = {run.name: replace(courses[run.name], loss=courses[run.name].parts[part]) for run in at}
        lines = [replace(line, has_dots=True) for line in _courses(comparison, parts, lambda c: c.loss, at)]
        panels.append(Panel(title, lines, x_label="steps", y_label="squared error" if part % _MOST_PARTS == 0 else ""))
    return [Row(panels[i : i + _MOST_PARTS], 260) for i in range(0, len(panels), _MOST_PARTS)]


def _courses(
    comparison: Comparison,
    courses: Mapping[str, Course],
    points: Callable[[Course], Sequence[Point]],
    runs: Sequence[Record] | None = None,
) -> list[Line]:
    """A curve of each run that has one; of runs that have no colour pale, behind the others."""
    colours = colours_of(comparison)
    known = [run for run in (comparison.runs if runs is None else runs) if run.name in courses]
    lines = [(run.name in colours, Line(named(run.name) if run.name in colours else "", points(courses[run.name]),
                                        colours.get(run.name, GREY), 2 if run.name in colours else 1))
             for run in known]  # fmt: skip
    return [line for _, line in sorted(lines, key=lambda entry: entry[0]) if line.points]


def colours_of(comparison: Comparison) -> dict[str, str]:
    """The colour of each run that is named in the charts."""
    return {run.name: COLOURS[i] for i, run in enumerate(_chosen(comparison, MOST_LINES))}


def named(name: str, most: int = _MOST_NAME) -> str:
    """A name in one line. A long one loses its middle, because names of a sweep differ at their ends."""
    line = shown(name)
    return line if len(line) <= most else f"{line[: most // 2 - 2]}...{line[-(most // 2 - 2) :]}"


def _chosen(comparison: Comparison, most: int) -> list[Record]:
    """The runs that are shown: all in their order, or of many the best."""
    measured = [run for run in comparison.runs if run.curves]
    if len(measured) <= most:
        return measured
    best = {run.name for run in comparison.ranked()[:most]}
    return [run for run in measured if run.name in best]


def _panels(
    comparison: Comparison, measured: str, groups: Sequence[Sequence[str]], colours: Mapping[str, str]
) -> list[Panel]:
    """One for all runs, or one for each group of runs whose losses can be compared."""
    what = "held-out loss" if measured == "held_out" else "loss on images that are trained on (probe)"
    panels = []
    for number, group in enumerate(groups[:MOST_PANELS], 1):
        title = f"{what}, {number}: {some([named(name) for name in group])}" if len(groups) > 1 else what
        runs = [comparison[name] for name in group]
        lines = lines_of(runs, measured, colours)
        levels, marks = _levels(runs, measured), _marks(comparison, runs, measured)
        panels.append(
            Panel(title, lines, note=NOTE, levels=levels, marks=marks, x_label="steps", y_label="mean squared error")
        )
    return panels


def lines_of(runs: Sequence[Record], measured: str, colours: Mapping[str, str]) -> list[Line]:
    """The curves. Of runs that have no colour they are pale, behind the others."""
    mine = [run for run in runs if run.name in colours]
    others = [run for run in runs if run.name not in colours]
    lines = [
        Line(f"{len(others)} more" if i == 0 else "", run.curves[measured], GREY, 1) for i, run in enumerate(others)
    ]
    lines += [Line(named(run.name), run.curves[measured], colours[run.name], has_dots=True) for run in mine]
    averaged = [run for run in mine if "ema_held_out" in run.curves and measured == "held_out"]
    if len(mine) <= 4:
        lines += [
            Line(f"{named(run.name)} EMA", run.curves["ema_held_out"], colours[run.name], is_dashed=True)
            for run in averaged
        ]
    return lines


def _levels(runs: Sequence[Record], measured: str) -> list[Level]:
    """A line at the base model's loss, if the runs agree about it."""
    bases = [run.first(measured) for run in runs]
    known = [base for base in bases if base is not None]
    is_one = len(known) == len(bases) and max(known) - min(known) <= 1e-3 * max(known)
    return [Level("base", known[0])] if known and is_one else []


def _marks(comparison: Comparison, runs: Sequence[Record], measured: str) -> list[Mark]:
    best = next((run.best for run in runs if run.name == comparison.best), None)
    if measured != "held_out" or best is None or best.loss is None:
        return []
    return [Mark(f"lowest: {best.loss:.4f} at step {best.step}", best.step, best.loss)]

"""Which curves of several runs share a panel? Losses that measure the same thing, of all runs or of the best."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from k5cache.shared.foreign import shown
from k5train.runs.compared import Comparison, some
from k5train.runs.panels import COLOURS, PALE_GREY, Level, Line, Mark, Panel, Row
from k5train.runs.record import Record

MOST_LINES, MOST_PANELS = 7, 3
"""What a person can tell apart on one sheet. Of more runs the best are shown, and it says how many are not."""
_MOST_NAME = 40  # characters
NOTE = "measured on the same images, sigmas and noise each time"


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
        Line(f"{len(others)} more" if i == 0 else "", run.curves[measured], PALE_GREY, 1)
        for i, run in enumerate(others)
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

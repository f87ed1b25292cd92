"""Which curves of a run are in which panel? Made of ``metrics.jsonl`` alone, for ``loss.png`` and for pages."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from k5cache.shared.units import count_of
from k5train.runs.metrics import curve
from k5train.runs.panels import COLOURS, PALE_BLUE, PALE_GREY, Level, Line, Mark, Panel, Point, Row

if TYPE_CHECKING:
    from k5train.options.train import TrainConfig

TRAINING, HELD_OUT, PROBE, EMA, PRIOR = COLOURS[:5]
STEPS = "steps (updates of the adapter)"
MEASURED = "Same images, noise and sigmas (evenly 0 to 1) each time"
MOST_PALE = 250  # points of a pale curve
MOST_PARTS = 16
PARTS_IN_A_ROW = 4


def loss_rows(rows: Sequence[dict[str, Any]], objective: str = "", steps_per_row: int = 1) -> list[Row]:
    """The panels of ``metrics.jsonl``. What was not measured has no panel.

    Training and held-out losses have panels of their own, because each weighs sigma in its own way: on one axis, the
    base would look overfitted. They are comparable within a part of sigma, where they share a panel.

    Args:
        rows: of any version.
        objective: from ``objective_of``, shown over the training loss.
        steps_per_row: how many steps a row is the mean of, for the counts of steps that are named.
    """
    last = _last(rows)
    sheet = [Row([_training(rows, objective, last, steps_per_row), *_measured(rows, last)], 330)]
    parts = _parts(rows, last)
    sheet += [Row(parts[i : i + PARTS_IN_A_ROW], 230) for i in range(0, len(parts), PARTS_IN_A_ROW)]
    return [*sheet, Row([_rate(rows, last), _gradients(rows, last)], 190)]


def summary(rows: Sequence[dict[str, Any]]) -> str:
    """The run in a line: how long it is, and where its losses began, ended and were lowest."""
    last = _last(rows)
    parts = [count_of(last, "step")]
    for name, field in (("held-out loss", "held_out_loss"), ("probe loss", "probe_loss")):
        values = [(value, step) for step, value in curve(rows, field) if value is not None]
        if values:
            begin = f"{values[0][0]:.4g}{' (base)' if not values[0][1] else ''}"
            parts.append(f"{name} {begin}" + (f", last {values[-1][0]:.4g}" if len(values) > 1 else ""))
    return "; ".join(parts)


def _last(rows: Sequence[dict[str, Any]]) -> int:
    return max((row["step"] for row in rows), default=0)


def objective_of(config: TrainConfig) -> str:
    """Which sigmas a recipe trains on and how it counts an error."""
    objective = config.objective
    drawn = {
        "sigmoid": f"sigmoid({objective.sigmoid_scale:g} x N(0, 1))",
        "logit_normal": f"sigmoid(N({objective.logit_mean:g}, {objective.logit_std:g}))",
        "mode": f"SD3's mode distribution, scale {objective.mode_scale:g}",
        "beta": f"Beta({objective.beta_schedule_alpha:g}, {objective.beta_schedule_beta:g})",
        "uniform": "0 to 1 evenly",
    }[objective.sigma_sampling].replace("(1 x N", "(N")
    shift = "shifted by the size of each bucket" if objective.flow_schedule_auto_shift else ""
    if not shift and config.flow_schedule_shift != 1:
        shift = f"shift {config.flow_schedule_shift:g}"
    counted = [f"weighted by {objective.weighting}"] * (objective.weighting != "none")
    counted += ["Huber's error"] * (objective.loss_type == "huber")
    counted += ["within masks"] * objective.masked_loss
    return "; ".join([f"sigma drawn from {drawn}{shift and ', ' + shift}", *counted])


def smooth(points: Sequence[Point], share: float = 0.05) -> list[Point]:
    """The running mean over a number of values: ``share`` of all of them, but at least 10. Skips None.

    Where there are many values it begins with half of that number, because the mean of a few jumps as they do.
    """
    given = [(x, y) for x, y in points if y is not None]
    if not given:
        return []
    count = _window(len(given), share)
    sums = np.concatenate([[0.0], np.cumsum([y for _, y in given])])
    ends = np.arange(count // 2 if len(given) >= 2 * count else 1, len(given) + 1)
    starts = np.maximum(ends - count, 0)
    means = (sums[ends] - sums[starts]) / (ends - starts)
    return [(given[end - 1][0], mean) for end, mean in zip(ends.tolist(), means.tolist(), strict=True)]


def _window(num_values: int, share: float = 0.05) -> int:
    return max(10, math.ceil(num_values * share))


def _training(rows: Sequence[dict[str, Any]], objective: str, last: int, steps_per_row: int) -> Panel:
    points = curve(rows, "loss")
    mean = f"mean of the last {_window(len(points)) * steps_per_row:,} steps" if len(points) > 1 else "loss"
    lines = [_pale(points, PALE_BLUE, steps_per_row), Line(mean, smooth(points), TRAINING)]
    unit = "error of the velocity" if ";" in objective else "mean squared error of the velocity"
    return Panel("Training loss", lines, objective[:1].upper() + objective[1:], x_label=STEPS, y_label=unit,
                 last_step=last)  # fmt: skip


def _pale(points: Sequence[Point], colour: str, steps_per_row: int = 1) -> Line:
    """The values behind their running mean: each step's, or means of as many as would fill the panel with ink."""
    every = math.ceil(len(points) / MOST_PALE)
    groups = [[y for _, y in points[i : i + every] if y is not None] for i in range(0, len(points), every or 1)]
    means = [sum(group) / len(group) if group else None for group in groups]
    steps = [x for x, _ in points[every - 1 :: every]] if every else []
    num_steps = every * steps_per_row
    name = "each step" if num_steps < 2 else f"means of {num_steps} steps"
    return Line(name, list(zip([*steps, *(x for x, _ in points[-1:])], means, strict=False)), colour, 1,
                is_shown_whole=len(points) < 50)  # fmt: skip


def _measured(rows: Sequence[dict[str, Any]], last: int) -> list[Panel]:
    """Held-out and probe losses, and beside them that of regularisation data, whose level is another."""
    held_out, probe = curve(rows, "held_out_loss"), curve(rows, "probe_loss")
    ema, prior = curve(rows, "ema_held_out_loss"), curve(rows, "held_out_prior_loss")
    panels = []
    if held_out or probe:
        named = [("held out", held_out, HELD_OUT), ("EMA, held out", ema, EMA)]
        named += [("probe: images that are trained on", probe, PROBE)]
        lines = [Line(name, points, colour, has_dots=True) for name, points, colour in named if points]
        levels = [
            *_base("base (dashed)", held_out, HELD_OUT),
            *_base("" if held_out else "base (dashed)", probe, PROBE),
        ]
        title = " and ".join(["Held-out loss"] * bool(held_out) + ["probe loss"] * bool(probe))
        panels.append(_measured_panel(title[0].upper() + title[1:], MEASURED, lines, levels, _best(held_out), last))
    if prior:
        lines = [Line("held out", prior, PRIOR, has_dots=True)]
        title, note = "Held-out loss of regularisation data", "It rises where the adapter makes the base forget"
        panels.append(_measured_panel(title, note, lines, _base("base (dashed)", prior, PRIOR), [], last))
    return panels


def _measured_panel(
    title: str, note: str, lines: list[Line], levels: list[Level], marks: list[Mark], last: int
) -> Panel:
    return Panel(title, lines, note, levels, marks, STEPS, "mean squared error of the velocity", last_step=last)


def _base(name: str, points: Sequence[Point], colour: str) -> list[Level]:
    """The level of the model without an adapter, which is measured at step 0."""
    return [Level(name, value, colour) for step, value in points if step == 0 and value is not None][:1]


def _best(points: Sequence[Point]) -> list[Mark]:
    """The first of the lowest values, if there are several to choose from."""
    values = [(value, step) for step, value in points if value is not None]
    if len(values) < 2:
        return []
    value, step = min(values)
    return [Mark(f"best: {value:.4g} at step {step:,.0f}" if step else f"best: the base, {value:.4g}", step, value)]


def _parts(rows: Sequence[dict[str, Any]], last: int) -> list[Panel]:
    """A small panel for each part of sigma, in which training, held-out and probe loss are comparable.

    None for a single part: over all sigmas they are not.
    """
    fields = ("loss_by_sigma", "held_out_by_sigma", "probe_by_sigma")
    count = max((len(row[f]) for row in rows for f in fields if isinstance(row.get(f), list)), default=0)
    panels = []
    for i in range(min(count, MOST_PARTS) if count > 1 else 0):
        training = smooth(curve(rows, fields[0], i), 0.1)  # there are fewer values in a part
        measured = [curve(rows, field, i) for field in fields[1:]]
        lines = [Line("training", training, TRAINING)] if training else []
        for name, points, colour in zip(("held out", "probe"), measured, (HELD_OUT, PROBE), strict=True):
            lines += [Line(name, points, colour, has_dots=len(points) <= 30)] if points else []
        noise = {0: ", least noise", count - 1: ", most noise"}.get(i, "")
        panels.append(
            Panel(f"Sigma {i / count:.3g} to {(i + 1) / count:.3g}{noise}", lines, x_label="steps",
                  y_label="" if i % PARTS_IN_A_ROW else "squared error, no weights", last_step=last)
        )  # fmt: skip
    return panels


def _rate(rows: Sequence[dict[str, Any]], last: int) -> Panel:
    rates, factors = curve(rows, "lr"), curve(rows, "prodigy_d")
    if factors and len(rates) == len(factors):
        points = [(x, r * d if r is not None and d is not None else None) for (x, r), (_, d)
                  in zip(rates, factors, strict=True)]  # fmt: skip
        return Panel(
            "Learning rate times Prodigy's d", [Line("", points, COLOURS[-1])], x_label="steps", last_step=last
        )
    lines = [Line("", rates, COLOURS[-1])]
    return Panel("Learning rate", lines, x_label="steps", last_step=last, may_be_logarithmic=False)


def _gradients(rows: Sequence[dict[str, Any]], last: int) -> Panel:
    points = curve(rows, "grad_norm")
    lines = [replace(_pale(points, PALE_GREY), name=""), Line("", smooth(points), COLOURS[-1])]
    return Panel("Norm of the gradients before clipping, and its running mean", lines, x_label="steps", last_step=last)

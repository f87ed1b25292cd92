"""Where in a panel do its curves lie? Places in pixels, thinned to what can be seen. Pure arithmetic."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from k5train.runs.axis import Axis, axis_for, steps_axis
from k5train.runs.panels import Line, Panel

INSET = 6  # pixels between a panel's edge and its first and last step, so that dots there are whole
X_APART, Y_APART = 75, 26  # pixels between two ticks, at least


@dataclass(frozen=True)
class Plot:
    """The inside of a panel: its axes, and its size in the units in which it is drawn."""

    axes: tuple[Axis, Axis]
    """Of the steps, and of the values."""
    width: int
    height: int
    fine: int = 1
    """Units in a pixel of the finished picture."""

    def x(self, steps: NDArray[np.float64]) -> NDArray[np.float64]:
        """Places of steps, from the left."""
        inset = INSET * self.fine
        return inset + self.axes[0].shares(steps) * (self.width - 2 * inset)

    def y(self, values: NDArray[np.float64]) -> NDArray[np.float64]:
        """Places of values, from the top."""
        return (1 - self.axes[1].shares(values)) * self.height

    def place(self, step: float, value: float) -> tuple[float, float]:
        """The place of one point."""
        return float(self.x(np.array([step]))[0]), float(self.y(np.array([value]))[0])

    def runs(self, curve: Curve) -> list[list[tuple[float, float]]]:
        """Places of the points between gaps. Of many points in a column of pixels, the lowest and the highest."""
        x = self.x(curve.steps)
        y = np.clip(self.y(curve.values), -self.height, 2 * self.height)
        cut = np.split(np.arange(len(y)), np.flatnonzero(np.isnan(y)))
        parts = (part[~np.isnan(y[part])] for part in cut)
        return [thinned(x[part], y[part], self.width, self.fine) for part in parts if len(part)]


@dataclass(frozen=True)
class Curve:
    """A line's points as arrays; NaN where there is no value."""

    line: Line
    steps: NDArray[np.float64]
    values: NDArray[np.float64]

    @classmethod
    def of(cls, line: Line) -> Curve:
        """The points of a line. What is not finite is a gap."""
        steps = np.array([x for x, _ in line.points], np.float64)
        values = np.array([y for _, y in line.points], np.float64)  # None becomes NaN
        return cls(line, steps, np.where(np.isfinite(values), values, np.nan))

    def extremes(self) -> list[float]:
        """The lowest and the highest value, none without values."""
        values = self.values[np.isfinite(self.values)]
        return [float(values.min()), float(values.max())] if len(values) else []


def axes_of(panel: Panel, curves: Sequence[Curve], width: int, height: int) -> tuple[Axis, Axis] | None:
    """The axes of a panel whose inside has this size in pixels. None if it has no value yet."""
    values = [v for curve in curves if curve.line.is_shown_whole for v in curve.extremes()]
    values += [level.value for level in panel.levels if math.isfinite(level.value)]
    if not values:
        return None
    last = panel.last_step
    if last is None:
        last = float(max((c.steps.max() for c in curves if len(c.steps)), default=panel.first_step))
    x_axis = steps_axis(panel.first_step, float(last), max(3, width // X_APART))
    return x_axis, axis_for(values, max(3, height // Y_APART), panel.may_be_logarithmic)


def thinned(
    x: NDArray[np.float64], y: NDArray[np.float64], width: int, fine: int = 1
) -> list[tuple[float, float]]:  # fmt: skip
    """At most two points for each column of pixels of the finished picture."""
    if len(x) > 2 * width / fine:
        column = (x / fine).astype(np.int64)
        starts = np.flatnonzero(np.diff(column, prepend=column[0] - 1))
        low, high = np.minimum.reduceat(y, starts), np.maximum.reduceat(y, starts)
        x, y = np.repeat(x[starts], 2), np.stack([low, high], 1).flatten()
    return list(zip(x.tolist(), y.tolist(), strict=True))

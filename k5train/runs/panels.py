"""What is on a chart? Rows of panels with lines, levels and marks, as plain values, whoever draws them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#4d4d4d")
"""Okabe and Ito's, which people with every kind of colour blindness tell apart, with dark grey for their black."""
INK, PALE_INK, GRID = "#1a1a1a", "#5c5c5c", "#e4e4e4"
PALE_BLUE, PALE_GREY = "#c9dcea", "#d4d4d4"
"""For single values behind their mean, which says what they say."""
GREY = "#8c8c8c"
"""For curves beside those with a colour, such as runs that are not named. 3.4:1 on white; to be seen it takes 3:1."""

Point = tuple[float, float | None]
"""A step and its value; None where there is none, which leaves a gap."""


@dataclass(frozen=True)
class Line:
    """A curve of a panel."""

    name: str
    """In the legend. Empty: not in the legend."""
    points: Sequence[Point]
    colour: str = COLOURS[0]
    width: int = 2
    has_dots: bool = False
    """Whether every point has a dot, as measurements do that lie apart."""
    is_dashed: bool = False
    is_shown_whole: bool = True
    """Whether the axis covers all of it. False: it may leave the panel, as the pale curve behind its mean does."""


@dataclass(frozen=True)
class Level:
    """A dashed line at one value, across the panel."""

    name: str
    value: float
    colour: str = PALE_INK


@dataclass(frozen=True)
class Mark:
    """A ring around one point, explained in the legend."""

    name: str
    step: float
    value: float
    colour: str = INK


@dataclass(frozen=True)
class Panel:
    """One pair of axes."""

    title: str
    lines: Sequence[Line]
    note: str = ""
    """Under the title, small: what the lines are."""
    levels: Sequence[Level] = ()
    marks: Sequence[Mark] = ()
    x_label: str = ""
    y_label: str = ""
    first_step: float = 0
    last_step: float | None = None
    """Where the axis of steps ends. None: at the last point of the panel."""
    may_be_logarithmic: bool = True
    """Whether the axis of values becomes logarithmic where they differ by far."""

    @property
    def legend(self) -> list[Line | Level | Mark]:
        """What has a name, in the order of the legend."""
        every: list[Line | Level | Mark] = [*self.lines, *self.levels, *self.marks]
        return [entry for entry in every if entry.name]

    @property
    def has_values(self) -> bool:
        """Whether there is anything to draw."""
        values = [level.value for level in self.levels]
        values += [y for line in self.lines for _, y in line.points if y is not None]
        return any(map(math.isfinite, values))


@dataclass(frozen=True)
class Row:
    """Panels beside each other."""

    panels: Sequence[Panel]
    height: int = 300
    """Pixels, all of it: title, legend, axes and their names."""

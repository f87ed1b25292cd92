"""How is a chart drawn? Panels with axes, lines and a legend, on one sheet, by Pillow."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from k5cache.shared.fonts import Font, fitting, font_for, write
from k5train.runs.axis import Axis, axis_for, steps_axis

WIDTH = 1200
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#4d4d4d")
"""Okabe and Ito's, which people with every kind of colour blindness tell apart, with dark grey for their black."""
INK, PALE_INK, GRID = "#1a1a1a", "#5c5c5c", "#e4e4e4"
LEFT, RIGHT, GAP, TICKS, LINE, SAMPLE = (
    66,
    14,
    16,
    20,
    17,
    20,
)  # pixels: margins of a panel, heights of tick labels and text
INSET = 6  # pixels between a panel's edge and its first and last step, so that dots there are whole
FINE = 2  # lines are drawn at this multiple and reduced, which smooths their edges

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


@dataclass(frozen=True)
class Row:
    """Panels beside each other."""

    panels: Sequence[Panel]
    height: int = 300
    """Pixels, all of it: title, legend, axes and their names."""


def draw_chart(title: str, rows: Sequence[Row], subtitle: str = "", width: int = WIDTH) -> Image.Image:
    """Rows of panels under a title. Where there is no value yet, a panel says so."""
    top = 52 + (LINE + 3) * bool(subtitle)
    sheet = Image.new("RGB", (width, top + sum(row.height + GAP for row in rows)), "white")
    draw = ImageDraw.Draw(sheet)
    written(draw, (GAP, 14), title, width - 2 * GAP, 22)
    written(draw, (GAP, 44), subtitle, width - 2 * GAP, 14, PALE_INK)
    for row in rows:
        each = (width - GAP) // max(1, len(row.panels))
        boxes = [(GAP + i * each, top, i * each + each, top + row.height) for i in range(len(row.panels))]
        tops = [_draw_head(draw, panel, box) for panel, box in zip(row.panels, boxes, strict=True)]
        for panel, (left, _, right, bottom) in zip(row.panels, boxes, strict=True):
            _draw_axes(sheet, draw, panel, (left, max(tops), right, bottom))
        top += row.height + GAP
    return sheet


def font(size: int) -> Font:
    """The font of numbers and of what we write ourselves, the same on every machine."""
    return font_for("", size)


def written(
    draw: ImageDraw.ImageDraw, at: tuple[float, float], text: str, width: float, size: int, colour: str = INK
) -> None:
    """Draw a text in one line, cut if it is wider than ``width`` pixels."""
    of_font = font_for(text, size)
    write(draw, at, [fitting(text, of_font, width)], colour, of_font, LINE)


Box = tuple[int, int, int, int]


def _draw_head(draw: ImageDraw.ImageDraw, panel: Panel, box: Box) -> int:
    """Title, note and legend: names beside samples of their lines, in as many rows as they need; returns its end."""
    left, top, right, _ = box
    written(draw, (left, top), panel.title, right - left, 15)
    top += LINE + 5
    if panel.note:
        written(draw, (left, top), panel.note, right - left, 12, PALE_INK)
        top += LINE
    every: list[Line | Level | Mark] = [*panel.lines, *panel.levels, *panel.marks]
    entries = [entry for entry in every if entry.name]
    x = left
    for entry in entries:
        of_font, most = font_for(entry.name, 13), right - left - SAMPLE - 6
        width = SAMPLE + 6 + int(of_font.getlength(fitting(entry.name, of_font, most)))
        if x > left and x + width > right:
            x, top = left, top + LINE
        _draw_sample(draw, entry, x, top + 8)
        written(draw, (x + SAMPLE + 6, top), entry.name, most, 13)
        x += width + 14
    return top + LINE * bool(entries) + 5


def _draw_sample(draw: ImageDraw.ImageDraw, entry: Line | Level | Mark, x: int, y: int) -> None:
    """A short piece of a line, or a ring, for the legend."""
    if isinstance(entry, Mark):
        draw.ellipse((x + 4, y - 6, x + 16, y + 6), outline=entry.colour, width=2)
        return
    if isinstance(entry, Level) or entry.is_dashed:
        for start in range(0, SAMPLE, 8):
            draw.line((x + start, y, x + start + 4, y), entry.colour, 2)
        return
    draw.line((x, y, x + SAMPLE, y), entry.colour, max(2, entry.width))
    if entry.has_dots:
        draw.ellipse((x + SAMPLE // 2 - 4, y - 4, x + SAMPLE // 2 + 4, y + 4), entry.colour)


def _draw_axes(sheet: Image.Image, draw: ImageDraw.ImageDraw, panel: Panel, box: Box) -> None:
    """A panel without its head."""
    left, top, right, bottom = box
    bottom -= TICKS + LINE * bool(panel.x_label)
    plot = (left + LEFT, top, right - RIGHT, bottom)
    curves = [_Curve.of(line) for line in panel.lines]
    values = [v for curve in curves if curve.line.is_shown_whole for v in curve.extremes()]
    values += [level.value for level in panel.levels if math.isfinite(level.value)]
    if not values:
        draw.rectangle(plot, outline=GRID)
        draw.text(((plot[0] + plot[2]) / 2, (top + bottom) / 2), "no value yet", PALE_INK, font(13), anchor="mm")
        return
    last = panel.last_step if panel.last_step is not None else max(c.steps.max() for c in curves if len(c.steps))
    x_axis = steps_axis(panel.first_step, float(last), max(3, (plot[2] - plot[0]) // 75))
    y_axis = axis_for(values, max(3, (plot[3] - plot[1]) // 26), panel.may_be_logarithmic)
    label = panel.y_label + ", logarithmic" * y_axis.is_logarithmic if panel.y_label else ""
    _draw_sideways(sheet, fitting(label, font(12), bottom - top), (left, (top + bottom) // 2))
    _draw_plot(sheet, panel, curves, (x_axis, y_axis), plot)
    _draw_ticks(draw, (x_axis, y_axis), plot)
    for mark in panel.marks:
        _draw_mark(draw, mark, (x_axis, y_axis), plot)
    if panel.x_label:
        draw.text(((plot[0] + plot[2]) / 2, bottom + TICKS + 2), panel.x_label, PALE_INK, font(12), anchor="ma")


def _draw_sideways(sheet: Image.Image, text: str, at: tuple[int, int]) -> None:
    """Text that is read from below, centred at the height ``at[1]``."""
    if not text:
        return
    size = (int(font(12).getlength(text)) + 4, LINE)
    label = Image.new("RGB", size, "white")
    ImageDraw.Draw(label).text((2, 1), text, PALE_INK, font(12))
    sheet.paste(label.rotate(90, expand=True), (at[0], at[1] - size[0] // 2))


def _draw_plot(
    sheet: Image.Image, panel: Panel, curves: Sequence[_Curve], axes: tuple[Axis, Axis], plot: Box
) -> None:  # fmt: skip
    """The grid, the curves and the levels. What lies beyond the axes is cut off at the panel's edge."""
    size = (plot[2] - plot[0]) * FINE, (plot[3] - plot[1]) * FINE
    layer = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(layer)
    for y in axes[1].ticks:
        height = float(_place(axes[1], np.array([y]), size[1])[0])
        draw.line((0, height, size[0], height), GRID, FINE)
    for level in panel.levels:
        height = float(_place(axes[1], np.array([level.value]), size[1])[0])
        _draw_dashed(draw, [(0.0, height), (float(size[0]), height)], level.colour, 2 * FINE)
    for curve in curves:
        for run in curve.runs(axes, size):
            _draw_run(draw, curve.line, run)
    sheet.paste(layer.reduce(FINE), plot[:2])
    ImageDraw.Draw(sheet).line((plot[0], plot[1], plot[0], plot[3], plot[2], plot[3]), PALE_INK)


def _draw_run(draw: ImageDraw.ImageDraw, line: Line, points: list[tuple[float, float]]) -> None:
    """The part of a curve between two gaps."""
    width = line.width * FINE
    if line.is_dashed:
        _draw_dashed(draw, points, line.colour, width)
    elif len(points) > 1:
        draw.line(points, line.colour, width, joint="curve" if len(points) < 300 else None)
    radius = FINE * (3.5 if len(points) <= 50 else line.width)
    for x, y in points if line.has_dots or len(points) == 1 else ():
        draw.ellipse((x - radius, y - radius, x + radius, y + radius), line.colour)


def _draw_dashed(
    draw: ImageDraw.ImageDraw, points: Sequence[tuple[float, float]], colour: str, width: int, dash: float = 8.0 * FINE
) -> None:
    """A polyline in dashes, which go on around its corners."""
    walked = 0.0
    for (x0, y0), (x1, y1) in pairwise(points):
        length = math.hypot(x1 - x0, y1 - y0)
        start = walked - walked % (2 * dash)
        while length and start < walked + length:
            a, b = max(start, walked) - walked, min(start + dash, walked + length) - walked
            if a < b:
                at = [(x0 + (x1 - x0) * s / length, y0 + (y1 - y0) * s / length) for s in (a, b)]
                draw.line(at, colour, width)
            start += 2 * dash
        walked += length


def _draw_ticks(draw: ImageDraw.ImageDraw, axes: tuple[Axis, Axis], plot: Box) -> None:
    left, top, right, bottom = plot
    for tick, label in zip(axes[0].ticks, axes[0].labels(), strict=True):
        x = left + INSET + axes[0].share(tick) * (right - left - 2 * INSET)
        draw.line((x, bottom, x, bottom + 4), PALE_INK)
        draw.text((x, bottom + 6), label, INK, font(12), anchor="ma")
    for tick, label in zip(axes[1].ticks, axes[1].labels(), strict=True):
        y = bottom - axes[1].share(tick) * (bottom - top)
        draw.text((left - 6, y), label, INK, font(12), anchor="rm")


def _draw_mark(draw: ImageDraw.ImageDraw, mark: Mark, axes: tuple[Axis, Axis], plot: Box) -> None:
    left, top, right, bottom = plot
    x = left + INSET + axes[0].share(mark.step) * (right - left - 2 * INSET)
    y = bottom - min(max(axes[1].share(mark.value), 0.0), 1.0) * (bottom - top)
    draw.ellipse((x - 7, y - 7, x + 7, y + 7), outline=mark.colour, width=2)


@dataclass(frozen=True)
class _Curve:
    """A line's points as arrays; NaN where there is no value."""

    line: Line
    steps: NDArray[np.float64]
    values: NDArray[np.float64]

    @classmethod
    def of(cls, line: Line) -> _Curve:
        points = np.array([(x, math.nan if y is None else y) for x, y in line.points], np.float64).reshape(-1, 2)
        return cls(line, points[:, 0], np.where(np.isfinite(points[:, 1]), points[:, 1], np.nan))

    def extremes(self) -> list[float]:
        """The lowest and the highest value, none without values."""
        values = self.values[np.isfinite(self.values)]
        return [float(values.min()), float(values.max())] if len(values) else []

    def runs(self, axes: tuple[Axis, Axis], size: tuple[int, int]) -> list[list[tuple[float, float]]]:
        """Places of the points between gaps. Of many points in a column of pixels, the lowest and the highest."""
        x = INSET * FINE + axes[0].shares(self.steps) * (size[0] - 2 * INSET * FINE)
        y = np.clip(_place(axes[1], self.values, size[1]), -size[1], 2 * size[1])
        gaps = np.flatnonzero(np.isnan(y))
        cut = np.split(np.arange(len(y)), gaps)
        return [_thinned(x[part], y[part], size[0]) for part in (p[~np.isnan(y[p])] for p in cut) if len(part)]


def _place(axis: Axis, values: NDArray[np.float64], height: int) -> NDArray[np.float64]:
    return (1 - axis.shares(values)) * height


def _thinned(x: NDArray[np.float64], y: NDArray[np.float64], width: int) -> list[tuple[float, float]]:
    """At most two points for each column of pixels of the finished sheet."""
    if len(x) > 2 * width / FINE:
        column = (x / FINE).astype(np.int64)
        starts = np.flatnonzero(np.diff(column, prepend=column[0] - 1))
        low, high = np.minimum.reduceat(y, starts), np.maximum.reduceat(y, starts)
        x, y = np.repeat(x[starts], 2), np.stack([low, high], 1).flatten()
    return list(zip(x.tolist(), y.tolist(), strict=True))

"""How is a chart drawn? Panels with axes, lines and a legend, on one sheet, by Pillow."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

from PIL import Image, ImageDraw

from k5cache.shared.fonts import Font, fitting, font_for, write
from k5train.runs.axis import Axis
from k5train.runs.panels import GRID, INK, PALE_INK, Level, Line, Mark, Panel, Row
from k5train.runs.plot import INSET, Curve, Plot, axes_of

WIDTH = 1200
LEFT, RIGHT, GAP, TICKS, LINE, SAMPLE = (
    66,
    14,
    16,
    20,
    17,
    20,
)  # pixels: margins of a panel, heights of tick labels and text
FINE = 2  # lines are drawn at this multiple and reduced, which smooths their edges


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
    entries = panel.legend
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
    curves = [Curve.of(line) for line in panel.lines]
    axes = axes_of(panel, curves, plot[2] - plot[0], plot[3] - plot[1])
    if axes is None:
        draw.rectangle(plot, outline=GRID)
        draw.text(((plot[0] + plot[2]) / 2, (top + bottom) / 2), "no value yet", PALE_INK, font(13), anchor="mm")
        return
    label = panel.y_label + ", logarithmic" * axes[1].is_logarithmic if panel.y_label else ""
    _draw_sideways(sheet, fitting(label, font(12), bottom - top), (left, (top + bottom) // 2))
    _draw_plot(sheet, panel, curves, axes, plot)
    _draw_ticks(draw, axes, plot)
    for mark in panel.marks:
        _draw_mark(draw, mark, axes, plot)
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
    sheet: Image.Image, panel: Panel, curves: Sequence[Curve], axes: tuple[Axis, Axis], plot: Box
) -> None:  # fmt: skip
    """The grid, the curves and the levels. What lies beyond the axes is cut off at the panel's edge."""
    inside = Plot(axes, (plot[2] - plot[0]) * FINE, (plot[3] - plot[1]) * FINE, FINE)
    layer = Image.new("RGB", (inside.width, inside.height), "white")
    draw = ImageDraw.Draw(layer)
    for y in axes[1].ticks:
        height = inside.place(0, y)[1]
        draw.line((0, height, inside.width, height), GRID, FINE)
    for level in panel.levels:
        height = inside.place(0, level.value)[1]
        _draw_dashed(draw, [(0.0, height), (float(inside.width), height)], level.colour, 2 * FINE)
    for curve in curves:
        for run in inside.runs(curve):
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

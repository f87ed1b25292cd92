"""The picture of a run's losses over its steps: training, smoothed, and held out. Pillow draws it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from PIL import Image, ImageDraw, ImageFont

WIDTH, HEIGHT, MARGIN = 960, 540, 60
TRAINING, SMOOTH, HELD_OUT = "#c8d6ea", "#2b5fa8", "#d1495b"

Point = tuple[float, float]


def draw_losses(rows: Sequence[dict[str, Any]], title: str) -> Image.Image:
    """A chart of ``metrics.jsonl``: the loss of every step pale, its running mean blue, the held-out loss red."""
    training = _points(rows, "loss")
    held_out = _points(rows, "held_out_loss")
    lines = [(TRAINING, training, 1), (SMOOTH, smooth(training), 3), (HELD_OUT, held_out, 3)]
    sheet = Image.new("RGB", (WIDTH, HEIGHT), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(14)
    draw.text((MARGIN, 18), title, "black", font)
    legend = [("training, smoothed", SMOOTH)] + ([("held out", HELD_OUT)] if held_out else [])
    for i, (name, colour) in enumerate(legend):
        draw.text((WIDTH - 190, 14 + 18 * i), name, colour, font)
    everything = [point for _, points, _ in lines for point in points]
    if not everything:
        return sheet
    last = max(max(x for x, _ in everything), 1)
    axis = nice_axis([y for points in (smooth(training), held_out) for _, y in points])
    for value in axis:
        y = _place((0, value), last, axis)[1]
        draw.line([(MARGIN, y), (WIDTH - 20, y)], "#e6e6e6")
        draw.text((8, y - 9), f"{value:.4g}", "black", font)
    every = max(1.0, _round_up(last / 5))
    for i in range(int(last / every) + 1):
        x = _place((every * i, 0), last, axis)[0]
        draw.text((x, HEIGHT - MARGIN + 10), f"{every * i:.0f}", "black", font, anchor="ma")
    for colour, points, width in lines:
        placed = [_place(point, last, axis) for point in points]
        draw.line(placed, colour, width)
        if colour == HELD_OUT:
            for x, y in placed:
                draw.ellipse((x - 4, y - 4, x + 4, y + 4), colour)
    return sheet


def smooth(points: Sequence[Point], share: float = 0.05) -> list[Point]:
    """The running mean over a number of points: ``share`` of all of them, but at least 10."""
    count = max(10, math.ceil(len(points) * share))
    total, result = 0.0, []
    for i, (x, y) in enumerate(points):
        total += y - (points[i - count][1] if i >= count else 0.0)
        result.append((x, total / min(i + 1, count)))
    return result


def _points(rows: Sequence[dict[str, Any]], name: str) -> list[Point]:
    return [(row["step"], row[name]) for row in rows if row.get(name) is not None]


def _place(point: Point, last: float, axis: Sequence[float]) -> Point:
    """Where a point lies on the sheet. A value beyond the axis lies at its edge."""
    share = (point[1] - axis[0]) / (axis[-1] - axis[0])
    x = MARGIN + (WIDTH - 20 - MARGIN) * point[0] / last
    return x, HEIGHT - MARGIN - (HEIGHT - 2 * MARGIN) * min(max(share, 0.0), 1.0)


def nice_axis(values: Sequence[float], room: float = 0.25) -> list[float]:
    """Ticks that are 1, 2 or 5 times a power of ten apart, around ``values`` with a quarter of their span on each side.

    The axis does not start at 0, because the curve must show a held-out loss that rises from 0.412 to 0.420: a sign of
    overfitting.
    """
    low, high = min(values), max(values)
    span = max(high - low, 0.05 * abs(high), 1e-6)
    low, high = max(0.0, low - room * span), high + room * span
    step = _round_up((high - low) / 5)
    first, last = math.floor(low / step), math.ceil(high / step)
    return [step * i for i in range(first, last + 1)]


def _round_up(value: float) -> float:
    """Up to 1, 2 or 5 times a power of ten."""
    power = 10.0 ** math.floor(math.log10(max(value, 1e-9)))
    return power * min(n for n in (1, 2, 5, 10) if n * power >= value * (1 - 1e-9))

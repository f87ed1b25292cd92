"""How do panels look on a page? SVG that CSS colours, with text to select and values to hover, without any script.

The panels and the places of their points are those of ``loss.png``. Colours are classes, of which a style sheet says
what they are in light and in dark; curves differ in dashes or in the shapes of their points too.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from typing import TYPE_CHECKING

from markupsafe import Markup

from k5cache.shared.foreign import shown
from k5train.runs.panels import COLOURS, GREY, INK, PALE_BLUE, PALE_GREY, PALE_INK, Level, Line, Mark, Panel, Row

if TYPE_CHECKING:
    from k5train.runs.plot import Curve, Plot

GAP = 16
LEFT, RIGHT, TOP, TICKS, LABEL = 56, 20, 8, 20, 18  # around the inside of a panel
HEAD = 46  # of a row's height: title, legend and unit, which are HTML above the picture
DOTS_APART = 9  # pixels between two points that have a shape
MOST_LARGE = 50  # points of a curve up to which their shapes are large
HOVERED_APART = 12, 28  # pixels between two points with a value to hover: of measurements, and of every step
CLASSES = {
    **{colour: f"c{i}" for i, colour in enumerate(COLOURS)},
    PALE_BLUE: "pale-blue",
    PALE_GREY: "pale-grey",
    GREY: "pale-curve",
    INK: "ink",
    PALE_INK: "pale-ink",
}
DASHES = ("", "9 4", "2 3", "9 3 2 3", "14 4", "5 3", "1 4")
"""Of the curves of a panel whose points have no shape."""
SHAPES = (
    "m-3.5 0a3.5 3.5 0 1 0 7 0a3.5 3.5 0 1 0-7 0z",  # disc
    "m-3.2-3.2h6.4v6.4h-6.4z",  # square
    "m0-4.4l4.2 7.4h-8.4z",  # triangle
    "m0-4.6l4.2 4.6l-4.2 4.6l-4.2-4.6z",  # diamond
    "m0 4.4l4.2-7.4h-8.4z",  # triangle, down
    "m-1.3-4.2h2.6v2.9h2.9v2.6h-2.9v2.9h-2.6v-2.9h-2.9v-2.6h2.9z",  # cross
    "m0-4.6l1.2 3.4h3.4l-2.7 2.1l1 3.5l-2.9-2l-2.9 2l1-3.5l-2.7-2.1h3.4z",  # star
)
MOST_REMEMBERED = 64
"""Figures of up to some 20 KB, which are drawn again only once they change."""
Place = tuple[float, float]


def svg(rows: Sequence[Row], title: str = "", width: int = 960, is_final: bool = False) -> Markup:
    """Rows of panels as HTML: a figure for each panel, so that they stand below each other where there is no room.

    Args:
        title: of all of them, for readers of screens.
        width: for which a row is drawn; it scales with the page.
        is_final: nothing will be added, so that a panel without a value is left out instead of waiting for one.
    """
    if is_final:
        rows = [replace(row, panels=[panel for panel in row.panels if panel.has_values]) for row in rows]
        rows = [row for row in rows if row.panels]
    label = Markup(' role="group" aria-label="{}"').format(shown(title)) if title else ""
    return Markup('<div class="charts"{}>{}</div>').format(label, _joined(_row(row, width) for row in rows))


def _row(row: Row, width: int) -> Markup:
    num = max(1, len(row.panels))
    each = max(200, (width - GAP * (num - 1)) // num)
    figures = _joined(_figure(_hashable(panel), each, max(120, row.height - HEAD)) for panel in row.panels)
    return Markup('<div class="chart-row of-{}">{}</div>').format(min(num, 4), figures)


def _hashable(panel: Panel) -> Panel:
    """The panel with tuples for lists, so that what was drawn of it is found again."""
    lines = tuple(replace(line, points=tuple(line.points)) for line in panel.lines)
    return replace(panel, lines=lines, levels=tuple(panel.levels), marks=tuple(panel.marks))


@lru_cache(MOST_REMEMBERED)
def _figure(panel: Panel, width: int, height: int) -> Markup:
    note = Markup("<small>{}</small>").format(shown(panel.note)) if panel.note else ""
    dashes = _dashes(panel)
    entries = _joined(
        Markup("<li>{}{}</li>").format(_sample(entry, dashes), shown(entry.name)) for entry in panel.legend
    )
    legend = Markup('<ul class="legend">{}</ul>').format(entries) if entries else ""
    drawing, is_logarithmic = _drawing(panel, width, height, dashes)
    unit = panel.y_label + ", logarithmic" * is_logarithmic if panel.y_label else "logarithmic" * is_logarithmic
    beside = Markup('<span class="unit">{}</span>').format(unit) if unit else ""
    return Markup('<figure class="chart"><figcaption><strong>{}</strong>{}</figcaption>{}{}{}</figure>').format(
        shown(panel.title), note, legend, beside, drawing
    )


def _dashes(panel: Panel) -> dict[str, str]:
    """The dashes of each colour, for curves whose points have no shape: the first of them is drawn through."""
    plain = dict.fromkeys(line.colour for line in panel.lines if line.name and not line.has_dots and not line.is_dashed)
    dark = [colour for colour in plain if not CLASSES.get(colour, "").startswith("pale")]
    return {colour: DASHES[i % len(DASHES)] for i, colour in enumerate(dark)}


def _sample(entry: Line | Level | Mark, dashes: Mapping[str, str]) -> Markup:
    """A short piece of a line, or a ring, for the legend."""
    if isinstance(entry, Mark):
        inner = _ring((12, 6), entry)
    elif isinstance(entry, Level):
        inner = _stroke("M0 6h24", entry.colour, 1.5, "6 4")
    else:
        inner = _stroke("M0 6h24", entry.colour, entry.width, _dash(entry, dashes))
        inner += _shapes([(12.0, 6.0)], entry) if entry.has_dots else Markup()
    return Markup('<svg class="sample" width="24" height="12" viewBox="0 0 24 12" aria-hidden="true">{}</svg>').format(
        inner
    )


def _drawing(panel: Panel, width: int, height: int, dashes: Mapping[str, str]) -> tuple[Markup, bool]:
    """A panel without its head, and whether its values are on a logarithmic axis."""
    from k5train.runs.plot import Curve, Plot, axes_of  # numpy, which pages without charts do not need

    size = width - LEFT - RIGHT, height - TOP - TICKS - LABEL * bool(panel.x_label)
    curves = [Curve.of(line) for line in panel.lines]
    axes = axes_of(panel, curves, *size)
    if axes is None:
        empty = Markup('<text class="pale-ink" x="{}" y="{}" text-anchor="middle">no value yet</text>')
        text = empty.format(LEFT + size[0] // 2, TOP + size[1] // 2)
        return _svg(panel, width, height, Markup(), text), False
    plot = Plot(axes, *size)
    inside = [
        _stroke("".join(f"M0 {_number(plot.place(0, y)[1])}h{size[0]}" for y in axes[1].ticks), "rules", 1),
        *(_stroke(f"M0 {_number(plot.place(0, x.value)[1])}h{size[0]}", x.colour, 1.5, "6 4") for x in panel.levels
          if math.isfinite(x.value)),
        *(_curve(curve, plot, dashes) for curve in curves),
        *(_hovered(curve, plot, panel) for curve in curves),
    ]  # fmt: skip
    nested = Markup('<svg class="inside" x="{}" y="{}" width="{}" height="{}">{}</svg>')
    frame = _stroke(f"M{LEFT} {TOP}v{size[1]}h{size[0]}", PALE_INK, 1)
    marks = _joined(_ring(_inside(plot, mark), mark) for mark in panel.marks)
    parts = [nested.format(LEFT, TOP, *size, _joined(inside)), frame, _ticks(plot), marks, _below(panel, size)]
    description = Markup("<desc>{}</desc>").format(described(panel))
    return _svg(panel, width, height, description, _joined(parts)), axes[1].is_logarithmic


def _svg(panel: Panel, width: int, height: int, description: Markup, inner: Markup) -> Markup:
    return Markup('<svg role="img" viewBox="0 0 {} {}"><title>{}</title>{}{}</svg>').format(
        width, height, shown(panel.title), description, inner
    )


def described(panel: Panel) -> str:
    """What a panel shows, in words: where each of its named curves begins, ends and is lowest."""
    said = []
    for line in panel.lines:
        values = [(y, x) for x, y in line.points if y is not None and math.isfinite(y)]
        if values and (line.name or len(panel.lines) == 1):
            (first, begin), (last, end), (low, lowest) = values[0], values[-1], min(values)
            name = f"{shown(line.name)}: " if line.name else ""
            said.append(
                f"{name}{first:.4g} at {_at(panel, begin)}, {last:.4g} at {_at(panel, end)}, "
                f"lowest {low:.4g} at {_at(panel, lowest)}."
            )
    said += [f"{shown(level.name)}: {level.value:.4g}." for level in panel.levels if level.name]
    return " ".join(said)


def _at(panel: Panel, x: float) -> str:
    """A place on the axis of steps, or of time."""
    is_time = panel.x_label and not panel.x_label.startswith("steps")
    return f"{x:.4g} {panel.x_label.partition(' ')[0]}" if is_time else f"step {x:,.0f}"


def _curve(curve: Curve, plot: Plot, dashes: Mapping[str, str]) -> Markup:
    """The line between gaps, and the shapes of its points."""
    line, runs = curve.line, plot.runs(curve)
    drawn = _stroke("".join(_path(run) for run in runs), line.colour, line.width, _dash(line, dashes))
    alone = [run[0] for run in runs if len(run) == 1]
    points = [place for run in runs for place in run] if line.has_dots else alone
    chosen = [points[i] for i in _apart([x for x, _ in points], DOTS_APART)]
    return drawn + _shapes(chosen, line, is_large=len(points) <= MOST_LARGE)


def _hovered(curve: Curve, plot: Plot, panel: Panel) -> Markup:
    """Unseen discs over points, which say their values where a pointer rests."""
    name = f"{shown(curve.line.name)}: " if curve.line.name else ""
    known = [i for i, y in enumerate(curve.values.tolist()) if math.isfinite(y)]
    if not known or CLASSES.get(curve.line.colour, "").startswith("pale"):
        return Markup()
    steps, values = curve.steps[known], curve.values[known]
    x, y = plot.x(steps).tolist(), plot.y(values).tolist()
    disc = Markup('<circle class="value" cx="{}" cy="{}" r="6"><title>{}{} at {}</title></circle>')
    discs = _joined(
        disc.format(_number(x[i]), _number(y[i]), name, f"{values[i]:.4g}", _at(panel, float(steps[i])))
        for i in _apart(x, HOVERED_APART[0 if curve.line.has_dots and plot.width > 250 else 1])
    )
    return Markup('<g fill="none" pointer-events="all" class="{}">{}</g>').format(_class(curve.line.colour), discs)


def _apart(across: Sequence[float], apart: float) -> list[int]:
    """Which of some places from left to right to show, with the last: two of them at least ``apart`` pixels apart."""
    chosen: list[int] = []
    for i, x in enumerate(across[:-1]):
        if (not chosen or x - across[chosen[-1]] >= apart) and (not chosen or across[-1] - x >= apart):
            chosen.append(i)
    return [*chosen, *([len(across) - 1] if across else [])]


def _inside(plot: Plot, mark: Mark) -> Place:
    x, y = plot.place(mark.step, mark.value)
    return LEFT + x, TOP + min(max(y, 0.0), float(plot.height))


def _ring(place: Place, mark: Mark) -> Markup:
    return Markup(
        '<circle class="{}" cx="{}" cy="{}" r="5.5" fill="none" stroke="currentColor" stroke-width="2">'
        "<title>{}</title></circle>"
    ).format(_class(mark.colour), _number(place[0]), _number(place[1]), shown(mark.name))


def _ticks(plot: Plot) -> Markup:
    bottom = TOP + plot.height
    texts = []
    for tick, label in zip(plot.axes[0].ticks, plot.axes[0].labels(), strict=True):
        x = LEFT + plot.place(tick, plot.axes[1].low)[0]
        texts.append(_text(x, bottom + 15, label, "middle"))
    for tick, label in zip(plot.axes[1].ticks, plot.axes[1].labels(), strict=True):
        texts.append(_text(LEFT - 6, TOP + plot.place(0, tick)[1] + 4, label, "end"))
    marks = "".join(
        f"M{_number(LEFT + plot.place(tick, plot.axes[1].low)[0])} {bottom}v4" for tick in plot.axes[0].ticks
    )
    return _stroke(marks, PALE_INK, 1) + _joined(texts)


def _below(panel: Panel, size: tuple[int, int]) -> Markup:
    """The name of the axis of steps."""
    if not panel.x_label:
        return Markup()
    label = Markup('<text class="pale-ink" text-anchor="middle" x="{}" y="{}">{}</text>')
    return label.format(LEFT + size[0] // 2, TOP + size[1] + 33, panel.x_label)


def _text(x: float, y: float, text: str, anchor: str) -> Markup:
    return Markup('<text x="{}" y="{}" text-anchor="{}">{}</text>').format(_number(x), _number(y), anchor, text)


def _stroke(path: str, colour: str, width: float, dashes: str = "") -> Markup:
    if not path:
        return Markup()
    dashed = Markup(' stroke-dasharray="{}"').format(dashes) if dashes else ""
    return Markup(
        '<path class="{}" d="{}" fill="none" stroke="currentColor" stroke-width="{}" stroke-linejoin="round"{}/>'
    ).format(_class(colour), path, f"{width:g}", dashed)


def _shapes(places: Sequence[Place], line: Line, is_large: bool = True) -> Markup:
    """The shape of a curve's colour at each of some places, as one path."""
    if not places:
        return Markup()
    shape = SHAPES[_index(line.colour)] if is_large else "m-2 0a2 2 0 1 0 4 0a2 2 0 1 0-4 0z"
    path = "".join(f"M{_number(x)} {_number(y)}{shape}" for x, y in places)
    return Markup('<path class="{}" d="{}" fill="currentColor"/>').format(_class(line.colour), path)


def _dash(line: Line, dashes: Mapping[str, str]) -> str:
    if line.is_dashed:
        return "3 3"
    return "" if line.has_dots else dashes.get(line.colour, "")


def _index(colour: str) -> int:
    return COLOURS.index(colour) if colour in COLOURS else 0


def _class(colour: str) -> str:
    return "rules" if colour == "rules" else CLASSES.get(colour, "ink")


def _path(places: Sequence[Place]) -> str:
    """A polyline in tenths of a pixel, each point from the one before, which is the shortest way to write it."""
    x, y = (round(10 * value) for value in places[0])
    parts = [f"M{_tenths(x)} {_tenths(y)}"]
    across = 0  # a level stretch that has not been written yet
    for place in places[1:]:
        to_x, to_y = (round(10 * value) for value in place)
        dx, dy = to_x - x, to_y - y
        x, y = to_x, to_y
        if dy == 0:
            across += dx
            continue
        if across:
            parts.append(f"h{_tenths(across)}")
            across = 0
        parts.append(f"l{_tenths(dx)}{'' if dy < 0 else ' '}{_tenths(dy)}" if dx else f"v{_tenths(dy)}")
    return "".join([*parts, f"h{_tenths(across)}"] if across else parts)


def _tenths(value: int) -> str:
    return _number(value / 10)


def _number(value: float) -> str:
    """``12.0`` -> ``12``; ``0.5`` -> ``.5``."""
    text = f"{value:.1f}".removesuffix(".0")
    if text.startswith(("0.", "-0.")):
        return text.replace("0.", ".", 1)
    return "0" if text == "-0" else text


def _joined(parts: Iterable[Markup]) -> Markup:
    return Markup().join(parts)


def spark(points: Sequence[tuple[float, float]], label: str, width: int = 132, height: int = 34) -> Markup:
    """A curve without axes, for a table."""
    if len(points) < 2:
        return Markup()
    left, right = points[0][0], max(points[-1][0], points[0][0] + 1e-9)
    low, high = min(y for _, y in points), max(y for _, y in points)
    span = (high - low) or 1.0
    places = [(2 + (x - left) / (right - left) * (width - 4), 3 + (high - y) / span * (height - 6)) for x, y in points]
    drawing = _stroke(_path(places), COLOURS[0], 1.5)
    return Markup(
        '<svg class="spark" role="img" viewBox="0 0 {} {}" width="{}" height="{}"><title>{}</title>{}</svg>'
    ).format(width, height, width, height, shown(label), drawing)

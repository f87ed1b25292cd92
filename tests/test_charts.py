"""SVG of charts: where points lie, that text stays text, and that a long run stays small."""

from __future__ import annotations

import math
import random
import re
import xml.etree.ElementTree as ElementTree

import pytest

from k5train.runs.axis import axis_for, steps_axis
from k5train.runs.loss_panels import loss_rows
from k5train.runs.panels import COLOURS, GREY, INK, PALE_BLUE, PALE_GREY, PALE_INK, Level, Line, Mark, Panel, Row
from k5train.runs.plot import INSET
from k5train.ui.charts import CLASSES, HEAD, LEFT, RIGHT, SHAPES, TICKS, TOP, svg
from k5train.ui.runs.report import STATIC

WIDTH, HEIGHT = 400, 300
INSIDE = WIDTH - LEFT - RIGHT, HEIGHT - HEAD - TOP - TICKS


def parsed(*lines: Line, **values: object) -> ElementTree.Element:
    """The HTML of one panel, which is well-formed XML."""
    html = svg([Row([Panel("panel", lines, **values)], HEIGHT)], "a run", WIDTH)  # type: ignore[arg-type]
    return ElementTree.fromstring(str(html))


def walked(path: str) -> list[tuple[float, float]]:
    """The absolute points of a path of moves and lines."""
    number = r"-?(?:\d+\.?\d*|\.\d+)"
    x = y = 0.0
    points = []
    for command, values in re.findall(rf"([Mlhv])((?:\s*{number})+)", path):
        numbers = [float(value) for value in re.findall(number, values)]
        if command == "M":
            x, y = numbers
        else:
            x += numbers[0] if command in "lh" else 0.0
            y += numbers[-1] if command in "lv" else 0.0
        points.append((x, y))
    return points


def path_of(drawing: ElementTree.Element, colour: str) -> str:
    return drawing.find(f".//svg[@class='inside']/path[@class='{CLASSES[colour]}'][@fill='none']").get("d")


def test_a_curve_goes_through_the_places_that_its_axes_say():
    points = [(0, 1.0), (30, 4.0), (70, 2.0), (100, 2.5)]
    drawing = parsed(Line("loss", points))
    across, up = steps_axis(0, 100), axis_for([1.0, 4.0], INSIDE[1] // 26)
    expected = [
        (INSET + x / 100 * (INSIDE[0] - 2 * INSET), (up.high - y) / (up.high - up.low) * INSIDE[1]) for x, y in points
    ]
    for place, (x, y) in zip(walked(path_of(drawing, COLOURS[0])), expected, strict=True):
        assert place == pytest.approx((x, y), abs=0.06)  # written in tenths of a pixel
    texts = [text.text for text in drawing.iter("text")]
    assert texts == [*steps_axis(0, 100, INSIDE[0] // 75).labels(), *up.labels()]
    assert across.low == 0


def test_gaps_part_a_curve_and_a_value_between_two_gaps_is_a_shape():
    drawing = parsed(Line("loss", [(0, 1.0), (1, 2.0), (2, None), (3, 1.5), (4, math.nan), (5, 1.0), (6, 1.2)]))
    assert path_of(drawing, COLOURS[0]).count("M") == 3
    (shape,) = drawing.findall(".//svg[@class='inside']/path[@fill='currentColor']")
    assert shape.get("d").count(SHAPES[0]) == 1
    assert [title.text for title in drawing.iterfind(".//g/circle/title")][-1] == "loss: 1.2 at step 6"


def test_curves_differ_without_their_colours():
    """Measurements by the shapes of their points, others by their dashes; levels are dashed and the best has a ring."""
    measured = parsed(*(Line(str(i), [(0, i), (1, i)], c, has_dots=True) for i, c in enumerate(COLOURS)))
    shapes = measured.findall(".//svg[@class='inside']/path[@fill='currentColor']")
    assert [shape.get("d").count(SHAPES[i]) for i, shape in enumerate(shapes)] == [2] * 7
    plain = parsed(*(Line(str(i), [(0, i), (1, i)], c) for i, c in enumerate(COLOURS)))
    dashes = [plain.find(f".//path[@class='{CLASSES[c]}']").get("stroke-dasharray") for c in COLOURS]
    assert dashes[0] is None
    assert len(set(dashes)) == 7
    legend = [path.get("stroke-dasharray") for path in plain.iterfind(".//svg[@class='sample']/path")]
    assert legend == dashes
    marked = parsed(Line("", [(0, 1.0), (1, 3.0)]), levels=[Level("base", 2.0)], marks=[Mark("best", 1, 3.0)])
    level = marked.find(f".//svg[@class='inside']/path[@class='{CLASSES[PALE_INK]}']")
    assert level.get("stroke-dasharray")
    # 2 is in the middle between 1 and 3, and the room above and below is the same.
    assert walked(level.get("d"))[0][1] == pytest.approx(INSIDE[1] / 2, abs=0.06)
    (ring,) = (c for c in marked.iterfind("./div/figure/svg/circle"))
    assert (ring.find("title").text, float(ring.get("cx"))) == ("best", LEFT + INSIDE[0] - INSET)


def test_a_panel_says_in_words_what_it_shows_and_one_without_values_says_that():
    line = Line("held out", [(0, 0.45), (10, 0.41), (20, 2.56)], COLOURS[1], has_dots=True)
    (drawing,) = parsed(line, levels=[Level("base", 0.45)]).findall("./div/figure/svg")
    assert (drawing.get("role"), drawing.find("title").text) == ("img", "panel")
    assert drawing.find("desc").text == (
        "held out: 0.45 at step 0, 2.56 at step 20, lowest 0.41 at step 10. base: 0.45."
    )
    minutes = parsed(Line("", [(0, 1.0), (2.5, 0.5)]), x_label="minutes of training")
    assert minutes.find(".//desc").text == "1 at 0 minutes, 0.5 at 2.5 minutes, lowest 0.5 at 2.5 minutes."
    for points in ([], [(3, None)]):
        (text,) = parsed(Line("x", points)).iter("text")
        assert text.text == "no value yet"
    bare, full = (Panel(title, [Line("", points)]) for title, points in (("bare", [(3, None)]), ("full", [(3, 1.0)])))
    final = str(svg([Row([bare, full]), Row([bare])], is_final=True))
    assert (final.count("<figure"), "full" in final, "no value yet" in final) == (1, True, False)
    assert svg([]) == '<div class="charts"></div>'
    parsed(Line("wild", [(0, 0.0), (1, -1e300), (2, 1e300), (3, math.inf), (4, 5e-324)], has_dots=True))


@pytest.mark.parametrize("hostile", ["<script>alert(1)</script>", "\"'/><b>&amp;", "\x1b[31m\n\u202egnp", "x" * 5000])
def test_names_are_text(hostile):
    panel = Panel(hostile, [Line(hostile, [(0, 1.0), (1, 2.0)], has_dots=True)], hostile, [Level(hostile, 1.0)],
                  [Mark(hostile, 1, 2.0)])  # fmt: skip
    html = str(svg([Row([panel])], hostile))
    drawing = ElementTree.fromstring(html)
    tags = {element.tag for element in drawing.iter()}
    assert tags == {"div", "figure", "figcaption", "strong", "small", "ul", "li", "svg", "title", "desc", "path", "g",
                    "circle", "text"}  # fmt: skip
    assert not re.search(r"[\x00-\x08\x0b-\x1f\u202e]", html)
    assert drawing.find(".//strong").text.startswith(hostile[0] if hostile.isprintable() else "\\x1b")


def test_there_is_no_style_and_no_script_and_every_colour_of_the_charts_has_a_class():
    html = str(svg(loss_rows(metrics(40, 10))))
    assert not re.search(r"style=|<script|href|url\(|on\w+=|#[0-9a-f]{3}", html)
    colours = {line.colour for row in loss_rows(metrics(40, 10)) for p in row.panels for line in p.lines}
    assert colours | {INK, PALE_INK, PALE_BLUE, PALE_GREY, GREY} <= set(CLASSES)


def test_the_curve_of_a_run_without_a_colour_can_be_seen_on_its_ground():
    """WCAG 2.2, 1.4.11: 3:1. On the page it is a mix of two variables, in light and in dark."""
    assert contrast(channels(GREY), channels("#ffffff")) >= 3
    css = (STATIC / "page.css").read_text()
    mix = re.search(r"\.pale-curve \{ color: color-mix\(in srgb, var\(--muted\) (\d+)%, var\(--surface\)\)", css)
    share = int(mix[1]) / 100
    for muted, surface in zip(*(re.findall(rf"--{name}: (#\w+);", css) for name in ("muted", "surface")), strict=True):
        ground = channels(surface)
        mixed = [share * a + (1 - share) * b for a, b in zip(channels(muted), ground, strict=True)]
        assert contrast(mixed, ground) >= 3


def channels(colour: str) -> list[float]:
    return [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]


def contrast(one: list[float], other: list[float]) -> float:
    def light(colour: list[float]) -> float:
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in colour]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    low, high = sorted((light(one), light(other)))
    return (high + 0.05) / (low + 0.05)


def metrics(num_steps: int, every: int) -> list[dict]:
    """A run that is measured every so many steps, with four parts of sigma."""
    draw = random.Random(0)
    rows = []
    for step in range(num_steps + 1):
        if step:
            parts = [draw.random() for _ in range(4)]
            rows.append({"step": step, "loss": draw.random(), "loss_by_sigma": parts, "grad_norm": 0.1, "lr": 1e-4})
        if step % every == 0:
            parts = [0.4 + 0.1 * draw.random() for _ in range(4)]
            measured = {"held_out_loss": parts[0], "held_out_by_sigma": parts, "ema_held_out_loss": parts[1]}
            rows.append({"step": step, **measured, "probe_loss": parts[2], "probe_by_sigma": parts})
    return rows


def test_a_long_run_is_as_small_as_one_with_a_point_for_each_pixel_and_drawn_the_same_each_time():
    """Of 100,000 steps it is 76 kB; from 5,000 steps on there are more values than pixels."""
    html = str(svg(loss_rows(metrics(15_000, 75))))
    assert len(html) < 100_000
    short = metrics(200, 50)
    assert svg(loss_rows(short)) == svg(loss_rows(short))

"""Charts: where axes lie, and which pixels a curve, a gap, a level and a mark have."""

import math

import numpy as np
import pytest
from PIL import Image

from k5train.runs.axis import axis_for, steps_axis
from k5train.runs.chart import FINE, WIDTH, draw_chart
from k5train.runs.panels import COLOURS, Level, Line, Mark, Panel, Row
from k5train.runs.plot import thinned


def pixels_of(picture: Image.Image, colour: str) -> np.ndarray:
    """``[H, W]``: where a picture has exactly this colour."""
    return (np.asarray(picture) == [int(colour[i : i + 2], 16) for i in (1, 3, 5)]).all(-1)


def drawn(*lines: Line, **values) -> Image.Image:
    return draw_chart("title", [Row([Panel("panel", lines, **values)])])


@pytest.mark.parametrize(
    ("values", "ends", "labels"),
    [
        ([0.412, 0.420], (0.4042, 0.4278), ["0.405", "0.410", "0.415", "0.420", "0.425"]),  # a rise of 2 % can be seen
        ([1.0, 2.0], (0.94, 2.06), ["1.0", "1.2", "1.4", "1.6", "1.8", "2.0"]),
        ([0.5], (0.4860, 0.5140), ["0.490", "0.495", "0.500", "0.505", "0.510"]),
        ([0.0, 0.0], (0.0, 5.6e-10), ["0", "1e-10", "2e-10", "3e-10", "4e-10", "5e-10"]),
        ([-1.0, 1.0], (-1.12, 1.12), ["-1.0", "-0.5", "0.0", "0.5", "1.0"]),
        ([1e-5, 1e-4], (4.6e-6, 1.054e-4), ["2e-5", "4e-5", "6e-5", "8e-5", "1e-4"]),
        ([0, 12000], (0, 12720), ["0", "2,000", "4,000", "6,000", "8,000", "10,000", "12,000"]),
        ([0.4, 40.0], (0.3034, 52.73), ["1", "3", "10", "30"]),  # logarithmic: it diverged
        ([0.4, 4e9], (0.1005, 1.591e10), ["10", "1,000", "1e5", "1e7", "1e9"]),
    ],
)
def test_an_axis_lies_around_its_values_and_names_round_ones(values, ends, labels):
    axis = axis_for(values)
    assert (axis.low, axis.high) == pytest.approx(ends, rel=2e-3)
    assert axis.labels() == labels
    assert axis.share(axis.low) == pytest.approx(0)
    assert axis.share(axis.high) == pytest.approx(1)


@pytest.mark.parametrize(
    ("last", "labels"),
    [(0, ["0", "1"]), (1, ["0", "1"]), (2500, ["0", "500", "1,000", "1,500", "2,000", "2,500"])],
)  # fmt: skip
def test_the_axis_of_steps_names_whole_steps(last, labels):
    assert steps_axis(0, last).labels() == labels


def test_a_logarithmic_axis_places_what_has_no_logarithm_below_its_beginning():
    axis = axis_for([0.1, 100.0])
    assert axis.is_logarithmic
    assert axis.share(0.0) < 0


def test_a_missing_value_leaves_a_gap_and_a_lone_value_is_a_dot():
    whole = [(i, 1.0) for i in range(11)]
    gap = [(i, None if i in (4, 6) else math.nan if i == 8 else 1.0) for i in range(11)]
    columns = [pixels_of(drawn(Line("", points)), COLOURS[0]).any(0) for points in (whole, gap)]
    missing = np.flatnonzero(columns[0] & ~columns[1])
    runs = np.split(missing, np.flatnonzero(np.diff(missing) > 1) + 1)
    # From 3 to the dot at 5, from there to the dot at 7, and on to 9: two, two and two steps less a dot.
    assert [len(run) / columns[0].sum() * 10 for run in runs] == pytest.approx([2, 2, 2], abs=0.15)


def test_a_chart_of_nothing_says_so_and_no_value_and_no_text_breaks_it():
    assert draw_chart("nothing", []).size == (WIDTH, 52)
    wild = [(0, 0.0), (1, -1e300), (2, 1e300), (3, math.inf), (4, 5e-324)]
    for points in ([], [(3, None)], [(0, 1.0)], [(7, 0.0)], wild):
        assert drawn(Line("x" * 300, points, has_dots=True)).size == (WIDTH, 52 + 300 + 16)
    assert pixels_of(drawn(Line("", [(0, None)])), COLOURS[0]).sum() == 0
    assert pixels_of(drawn(Line("", [(0, None)], is_shown_whole=False)), COLOURS[0]).sum() == 0


def test_levels_and_marks_are_in_the_panel_and_the_axis_covers_levels():
    line = Line("curve", [(0, 1.0), (10, 1.01)], COLOURS[0])
    picture = drawn(line, levels=[Level("base", 3.0, COLOURS[1])], marks=[Mark("best", 10, 1.01, COLOURS[2])])
    height = {c: np.flatnonzero(pixels_of(picture, c)[95:, 70:].any(1)).mean() for c in COLOURS[:2]}
    assert height[COLOURS[1]] < height[COLOURS[0]] - 100
    ring = np.argwhere(pixels_of(picture, COLOURS[2]))
    assert ring[:, 1].max() < WIDTH  # inside the sheet


def test_many_points_keep_the_lowest_and_the_highest_of_each_column_of_pixels():
    y = np.random.default_rng(0).random(50_000)
    x = np.linspace(0, 2 * FINE * 100, 50_000, endpoint=False)
    points = np.array(thinned(x, y, 2 * FINE * 100, FINE))
    assert len(points) == 2 * 2 * 100
    for column in range(200):
        of_column = y[(x / FINE).astype(int) == column]
        assert sorted(points[2 * column : 2 * column + 2, 1]) == [of_column.min(), of_column.max()]

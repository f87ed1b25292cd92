"""How does a comparison of runs look on one sheet? Their curves above, their last pictures below."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from PIL import Image, ImageDraw

from k5cache.shared.foreign import shown
from k5train.pictures import sheet
from k5train.pictures.compared import ComparedPictures, PictureRow
from k5train.pictures.saved import read_pictures
from k5train.runs import chart
from k5train.runs.compared import Comparison, some
from k5train.runs.record import Record

MOST_LINES, MOST_PANELS, MOST_ROWS, MOST_COLUMNS = 7, 3, 14, 6
"""What a person can tell apart on one sheet. Of more runs the best are shown, and it says how many are not."""
_MOST_NAME = 40  # characters
_WIDTH = 1200
_MOST_WIDTH = 2400
NOTE = "measured on the same images, sigmas and noise each time"
_OTHERS = "#d0d0d0"


def draw(comparison: Comparison, pictures: ComparedPictures) -> Image.Image:
    """One picture of a comparison, at most 2,400 pixels wide."""
    rows = _rows_shown(comparison, pictures.rows)
    grid = _grid(pictures, rows)
    width = max(_WIDTH, min(grid.width, 1600)) if grid else _WIDTH
    top = _curves(comparison, width)
    lines = _about_pictures(pictures, rows)
    parts = [top, _written(lines, width), *([grid] if grid else [])]
    picture = Image.new("RGB", (max(part.width for part in parts), sum(part.height for part in parts)), "white")
    height = 0
    for part in parts:
        picture.paste(part, (0, height))
        height += part.height
    return picture


def named(name: str, most: int = _MOST_NAME) -> str:
    """A name in one line. A long one loses its middle, because names of a sweep differ at their ends."""
    line = shown(name)
    return line if len(line) <= most else f"{line[: most // 2 - 2]}...{line[-(most // 2 - 2) :]}"


def _curves(comparison: Comparison, width: int) -> Image.Image:
    chosen = _chosen(comparison, MOST_LINES)
    colours = {run.name: chart.COLOURS[i] for i, run in enumerate(chosen)}
    held_out = _panels(comparison, "held_out", comparison.groups, colours)
    probes = _panels(comparison, "probe", comparison.probe_groups, colours)
    if len(held_out) + len(probes) <= MOST_PANELS:
        kinds = [([*held_out, *probes], 380)]
    else:
        kinds = [(held_out, 380), (probes, 300)]
    rows = [chart.Row(panels, height) for panels, height in kinds if panels]
    return chart.draw_chart(_title(comparison), rows, _subtitle(comparison), width)


def _chosen(comparison: Comparison, most: int) -> list[Record]:
    """The runs that are shown: all in their order, or of many the best."""
    measured = [run for run in comparison.runs if run.curves]
    if len(measured) <= most:
        return measured
    best = {run.name for run in comparison.ranked()[:most]}
    return [run for run in measured if run.name in best]


def _title(comparison: Comparison) -> str:
    names = ", ".join(named(run.name) for run in comparison.runs)
    return names if len(comparison.runs) <= 4 else f"{len(comparison.runs)} runs"


def _subtitle(comparison: Comparison) -> str:
    if comparison.best is None:
        return shown(comparison.reason)
    best = comparison[comparison.best].best
    assert best is not None
    assert best.loss is not None
    name = f"{named(comparison.best)}, " if len(comparison.runs) > 1 else ""
    return f"lowest held-out loss: {name}step {best.step}, {best.loss:.4f}"


def _panels(
    comparison: Comparison, measured: str, groups: Sequence[Sequence[str]], colours: Mapping[str, str]
) -> list[chart.Panel]:
    """One for all runs, or one for each group of runs whose losses can be compared."""
    what = "held-out loss" if measured == "held_out" else "loss on images that are trained on (probe)"
    panels = []
    for number, group in enumerate(groups[:MOST_PANELS], 1):
        title = f"{what}, {number}: {some([named(name) for name in group])}" if len(groups) > 1 else what
        runs = [comparison[name] for name in group]
        lines = _lines(runs, measured, colours)
        levels, marks = _levels(runs, measured), _marks(comparison, runs, measured)
        panels.append(
            chart.Panel(
                title, lines, note=NOTE, levels=levels, marks=marks, x_label="steps", y_label="mean squared error"
            )
        )
    return panels


def _lines(runs: Sequence[Record], measured: str, colours: Mapping[str, str]) -> list[chart.Line]:
    """The curves. Of runs that have no colour they are pale, behind the others."""
    mine = [run for run in runs if run.name in colours]
    others = [run for run in runs if run.name not in colours]
    lines = [
        chart.Line(f"{len(others)} more" if i == 0 else "", run.curves[measured], _OTHERS, 1)
        for i, run in enumerate(others)
    ]
    lines += [chart.Line(named(run.name), run.curves[measured], colours[run.name], has_dots=True) for run in mine]
    averaged = [run for run in mine if "ema_held_out" in run.curves and measured == "held_out"]
    if len(mine) <= 4:
        lines += [
            chart.Line(f"{named(run.name)} EMA", run.curves["ema_held_out"], colours[run.name], is_dashed=True)
            for run in averaged
        ]
    return lines


def _levels(runs: Sequence[Record], measured: str) -> list[chart.Level]:
    """A line at the base model's loss, if the runs agree about it."""
    bases = [run.first(measured) for run in runs]
    known = [base for base in bases if base is not None]
    is_one = len(known) == len(bases) and max(known) - min(known) <= 1e-3 * max(known)
    return [chart.Level("base", known[0])] if known and is_one else []


def _marks(comparison: Comparison, runs: Sequence[Record], measured: str) -> list[chart.Mark]:
    best = next((run.best for run in runs if run.name == comparison.best), None)
    if measured != "held_out" or best is None or best.loss is None:
        return []
    return [chart.Mark(f"lowest: {best.loss:.4f} at step {best.step}", best.step, best.loss)]


def _about_pictures(pictures: ComparedPictures, rows: Sequence[PictureRow]) -> list[str]:
    """Which pictures are below, and which are not."""
    mine = {row.run for row in rows if row.kind == "run"}
    others = {row.run for row in pictures.rows if row.kind == "run"} - mine
    lines = ["The last pictures of each run, on the same noise"] if mine else []
    if others:
        lines = [f"The last pictures of the {len(mine)} runs with the lowest loss, on the same noise"]
    if len(pictures.columns) > MOST_COLUMNS and rows:
        lines[0] += f"; the first {MOST_COLUMNS} of {len(pictures.columns)}"
    without: dict[str, list[str]] = {}
    for name, why in pictures.left_out.items():
        without.setdefault(why, []).append(named(name))
    return [*lines, *(f"no pictures of {some(names)}: {why}" for why, names in without.items())]


def _written(lines: Sequence[str], width: int) -> Image.Image:
    strip = Image.new("RGB", (width, 22 * len(lines) + 8), "white")
    pen = ImageDraw.Draw(strip)
    for i, line in enumerate(lines):
        chart.written(pen, (chart.GAP, 22 * i), line, width - 2 * chart.GAP, 14)
    return strip


def _grid(pictures: ComparedPictures, chosen: Sequence[PictureRow]) -> Image.Image | None:
    columns = [shown(text) for text in pictures.columns[:MOST_COLUMNS]]
    rows = []
    for row in chosen:
        read = read_pictures(row.folder)
        if read and len(read) == len(pictures.columns):
            rows.append((named(row.label), read[:MOST_COLUMNS]))
    if not rows:
        return None
    most = 512 if len(columns) <= 4 and len(rows) <= 6 else 288 if len(rows) <= 8 else 192
    grid = sheet.grid([(label, [_small(picture, most) for picture in read]) for label, read in rows], columns)
    if grid.width > _MOST_WIDTH:
        grid = grid.resize((_MOST_WIDTH, grid.height * _MOST_WIDTH // grid.width), Image.Resampling.LANCZOS)
    return grid


def _rows_shown(comparison: Comparison, rows: Sequence[PictureRow]) -> list[PictureRow]:
    """All rows, or those of the best runs if there are too many."""
    runs = {row.run for row in rows if row.kind == "run"}
    ranked = [run.name for run in comparison.ranked() if run.name in runs]
    most = MOST_ROWS - 1 if len(rows) > MOST_ROWS else len(rows)
    are_averages_shown = len(rows) <= MOST_ROWS
    best = set(ranked[:most])
    return [
        row
        for row in rows
        if row.kind not in ("run", "ema") or (row.run in best and (row.kind == "run" or are_averages_shown))
    ]


def _small(picture: Image.Image, most: int) -> Image.Image:
    """A copy whose longer side is at most ``most`` pixels."""
    small = picture.copy()
    small.thumbnail((most, most), Image.Resampling.LANCZOS)
    return small

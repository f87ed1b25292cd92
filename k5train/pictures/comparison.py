"""How does a comparison of runs look on one sheet? Their curves above, their last pictures below."""

from __future__ import annotations

from collections.abc import Sequence

from PIL import Image, ImageDraw

from k5cache.shared.foreign import shown
from k5train.pictures import sheet
from k5train.pictures.compared import ComparedPictures, PictureRow
from k5train.pictures.saved import read_pictures
from k5train.runs import chart
from k5train.runs.compared import Comparison, some
from k5train.runs.compared_panels import measured_rows, named

MOST_ROWS, MOST_COLUMNS = 14, 6
"""What a person can tell apart on one sheet. Of more runs the best are shown, and it says how many are not."""
_WIDTH = 1200
_MOST_WIDTH = 2400


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


def _curves(comparison: Comparison, width: int) -> Image.Image:
    return chart.draw_chart(_title(comparison), measured_rows(comparison), _subtitle(comparison), width)


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

"""``k5train compare``: runs beside each other, from their files alone."""

from __future__ import annotations

from itertools import count
from pathlib import Path
from typing import Annotated

import typer

from k5cache.shared import console


def compare(
    runs: Annotated[
        list[Path], typer.Argument(help="Runs, and sweeps or other folders, which stand for the runs in them.")
    ],
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="The PNG to write. Default: a new compare.png here.")
    ] = None,
    is_json: Annotated[
        bool, typer.Option("--json", help="Print JSON instead of tables. Then a PNG is written only with -o.")
    ] = False,
) -> None:
    """Compare runs: settings that differ, held-out losses, speed, and pictures on the same noise.

    Reads only the runs' own files: it loads no model, takes a second or two, and may be called while runs are training.
    """
    from k5cache.shared.drawn import check_picture, write_picture
    from k5train.commands.comparison_table import print_comparison
    from k5train.pictures.compared import compare_pictures
    from k5train.pictures.comparison import draw
    from k5train.runs.compared import as_json, which
    from k5train.runs.compared import compare as compare_runs

    named = out or (None if is_json else _free_name())
    target = check_picture(named) if named else None
    comparison = compare_runs(runs)
    pictures = compare_pictures(comparison.runs)
    if not is_json:
        print_comparison(comparison, pictures)
    if target:
        write_picture(draw(comparison, pictures), target, "k5train compare")
    if is_json:
        console.print_json({**as_json(comparison), "pictures": pictures, "png": named})
        return
    console.out.print(f"Wrote {named}", markup=False)
    if comparison.best:
        run = comparison[comparison.best]
        chosen = which(run) if run.best and run.best.file else "final"
        more = console.command("k5train", "sample", run.root, which=None if chosen == "final" else chosen)
        console.next_step("Next, draw more with the best", more)


def _free_name() -> Path:
    return next(path for n in count(1) if not (path := Path(f"compare-{n}.png" if n > 1 else "compare.png")).exists())

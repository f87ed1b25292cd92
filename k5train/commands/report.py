"""``k5train report``: runs as one HTML file, to look at anywhere and to send."""

from __future__ import annotations

from itertools import count
from pathlib import Path
from typing import Annotated

import typer

from k5cache.shared import console
from k5cache.shared.errors import RecipeError
from k5cache.shared.units import count_of


def report(
    runs: Annotated[
        list[Path], typer.Argument(help="Runs, and sweeps or other folders, which stand for the runs in them.")
    ],
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="The HTML file to write. Default: a new RUN.html here.")
    ] = None,
    max_size: Annotated[
        str,
        typer.Option(
            help="The size that the file may have. Beyond it pictures become smaller, then steps are left out."
        ),
    ] = "18MB",
) -> None:
    """Write one HTML file about runs: curves, settings, pictures. It opens anywhere and loads nothing.

    One run is shown whole. Several are compared too: settings that differ, losses, the same prompts on the same noise.
    """
    from k5cache.shared.drawn import check_replaceable
    from k5cache.shared.files import make_folder, write_whole
    from k5cache.shared.outputs import check_file
    from k5train.ui.runs.report import is_ours, make_report

    max_bytes = _bytes(max_size)
    named = out or _free_name(runs)
    target = check_replaceable(check_file(named, ".html"), named, is_ours, "was not written by k5train report")
    with console.working("reading the runs"):
        made = make_report(runs, max_bytes)
    make_folder(target.parent)
    write_whole(target, lambda path: path.write_text(made.html, encoding="utf-8", errors="backslashreplace"))
    if made.said:
        console.note(made.said)
    about = f"{count_of(made.num_runs, 'run')}, {count_of(made.num_pictures, 'picture')}"
    console.out.print(f"Wrote {named}: {about}, {console.human_bytes(target.stat().st_size)}", markup=False)
    console.next_step("Open it in a browser, or send it", target.as_uri())


def _bytes(text: str) -> int:
    try:
        return console.parse_bytes(f"{text}MB" if text.strip().replace(".", "", 1).isdecimal() else text)
    except ValueError:
        raise RecipeError(f"--max-size {text} is not a size", "Write it like --max-size 18MB") from None


def _free_name(runs: list[Path]) -> Path:
    from k5train.runs.folder import name_of

    stem = name_of(runs[0]) if len(runs) == 1 else "compare"
    return next(path for n in count(1) if not (path := Path(f"{stem}-{n}.html" if n > 1 else f"{stem}.html")).exists())

"""What is in ``k5train report``? The views of runs and of their comparison as one HTML file that needs nothing else.

It is rendered with a placeholder for each picture first. What is left of the size is theirs: they are reduced, and if
that is not enough, steps are left out.
"""

from __future__ import annotations

import base64
import hashlib
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path

from markupsafe import Markup

from k5cache.shared.credentials import without_credentials
from k5cache.shared.errors import OutputError
from k5cache.shared.units import human_bytes
from k5train.runs.compared import find_runs
from k5train.runs.folder import name_of
from k5train.runs.panels import Row
from k5train.ui.charts import svg
from k5train.ui.runs import report_pictures
from k5train.ui.runs.compare_view import CompareView, view_of
from k5train.ui.runs.state import BADGES
from k5train.ui.runs.view import RunView, read_run
from k5train.ui.templating import fragment

STATIC = Path(__file__).parents[1] / "static"
BEGINS = b"<!doctype html>\n<!-- k5train report -->\n"
MAX_BYTES = 18 * 2**20
"""Mails may have 25 MB, and an attachment grows by a third on its way."""
SCRIPTS = ("compare.js",)
_MOST_SAID = 400  # bytes of the line about it
_PLACE = re.compile(r'(?<= src=")picture:(\d+)(?=")')


@dataclass(frozen=True)
class Report:
    """A finished report."""

    html: str
    num_runs: int
    num_pictures: int
    said: str
    """What was done to keep it small. Empty: nothing."""


def make_report(folders: Sequence[Path], max_bytes: int = MAX_BYTES) -> Report:
    """The report of some runs, or of the runs of sweeps and other folders.

    Raises:
        RunError: a folder is not there, or there is no run among them.
        OutputError: it has more than ``max_bytes`` even without pictures.
    """
    view = view_of(find_runs(folders))
    runs = [read_run(result.root) for result in view.results]
    title = name_of(folders[0]) if len(folders) == 1 else _title(view.names)
    every, charts = 1, _Charts()
    while True:
        shown, num_left = _thinned(view, every)
        html, paths = _rendered(shown, runs, title, "", charts)
        counts = Counter(paths)
        room = max_bytes - len(html.encode()) - _MOST_SAID
        if room < 0 and not num_left:
            raise OutputError(
                f"The report has {human_bytes(max_bytes - room)} without any picture, which is more than --max-size",
                "Give a larger --max-size" + f", or fewer than these {len(view.names)} runs" * (len(view.names) > 1),
            )
        sides = report_pictures.SIDES + report_pictures.LEAST_SIDES * (num_left == 1)
        fitted = report_pictures.fitting(counts, room, sides)
        if fitted:
            break
        every = every * 2 if num_left > 1 else 0
    sources, side = fitted
    said = _said(side, len(view.pictures), num_left, max_bytes)
    html, paths = _rendered(shown, runs, title, said, charts)
    html = _PLACE.sub(lambda match: sources[paths[int(match[1])]], html)
    return Report(html, len(view.names), len(counts), said)


def is_ours(begins: bytes) -> bool:
    """Whether a file that begins so is a report, which another report may replace."""
    return begins.startswith(BEGINS)


def _title(names: Sequence[str]) -> str:
    return " and ".join(names) if len(names) == 2 else f"{names[0]} and {len(names) - 1} more runs"


def _thinned(view: CompareView, every: int) -> tuple[CompareView, int]:
    """The pictures of each ``every``-th step, counted from the last, and how many steps these are. 0: of none."""
    kept = view.pictures[::-1][::every][::-1] if every else ()
    return replace(view, pictures=kept), len(kept)


def _said(side: int, num_steps: int, num_left: int, max_bytes: int) -> str:
    """What was done to the pictures."""
    done = []
    if num_left < num_steps:
        done.append(f"of {num_steps} steps with pictures it shows {num_left or 'none'}")
    if side < report_pictures.SIDES[0] and num_left:
        done.append(f"its pictures are reduced to {side} pixels")
    return f"To keep this report within {human_bytes(max_bytes)}, {' and '.join(done)}" if done else ""


class _Charts:
    """Draws each chart once, however often the report is rendered."""

    def __init__(self) -> None:
        self._drawn: dict[int, Markup] = {}

    def __call__(self, rows: Sequence[Row], title: str = "", is_final: bool = True) -> Markup:
        """As ``svg``. The rows live as long as this does."""
        if id(rows) not in self._drawn:
            self._drawn[id(rows)] = svg(rows, title, is_final=is_final)
        return self._drawn[id(rows)]


def _rendered(
    view: CompareView, runs: Sequence[RunView], title: str, said: str, charts: _Charts
) -> tuple[str, list[Path]]:
    """The HTML with a placeholder for each picture, ``picture:0`` and so on, and which pictures these are."""
    paths: list[Path] = []

    def picture(path: Path, small: bool = False) -> str:
        paths.append(path)
        return f"picture:{len(paths) - 1}"

    style = (STATIC / "page.css").read_text(encoding="utf-8")
    script = "\n".join((STATIC / name).read_text(encoding="utf-8") for name in SCRIPTS)
    html = fragment(
        "report.html",
        view=view,
        runs=[replace(run, pictures=view.pictures) for run in runs],
        svg=charts,
        badges=BADGES,
        picture=picture,
        href=lambda root: "",
        is_page=False,
        title=title,
        said=said,
        policy=_policy(style, script),
        style=Markup(style),
        script=Markup(script),
        version=version("kandinsky5-lora"),
    )
    return without_credentials(str(html)), paths


def _policy(style: str, script: str) -> str:
    """What a browser may do with the file: show the pictures in it, and obey its own style and script."""
    hashes = [base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in (style, script)]
    return (
        f"default-src 'none'; img-src data:; style-src 'sha256-{hashes[0]}'; script-src 'sha256-{hashes[1]}'; "
        "base-uri 'none'; form-action 'none'"
    )

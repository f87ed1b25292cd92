"""The page that shows runs beside each other: ``/compare?run=ID&run=ID``, and a list to choose them from."""

from __future__ import annotations

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from k5cache.shared.errors import RunError
from k5train.runs.compared import in_order
from k5train.ui import listing
from k5train.ui.early import early
from k5train.ui.listing import Entry
from k5train.ui.pages import project_of, render
from k5train.ui.run_pictures import picture_src
from k5train.ui.runs.compare_view import view_of

MOST_RUNS = 60
"""Beyond it a page would be slow, and nobody could read it."""
MOST_TICKED = 12


def compare(request: Request) -> Response:
    """The chosen runs beside each other, and the list."""
    project = project_of(request)
    runs, sweeps = listing.runs(project), listing.sweeps(project)
    inside = {
        sweep: sorted(listing.runs_of(project, sweep), key=lambda run: in_order(run.path))
        for sweep in _newest_first(sweeps)
    }
    every = [*runs, *(run for of_sweep in inside.values() for run in of_sweep)]
    ids = dict.fromkeys(request.query_params.getlist("run"))
    chosen = [listing.find([*every, *sweeps], id) for id in ids]
    num_runs = sum(len(inside.get(entry, [entry])) for entry in chosen)
    if num_runs > MOST_RUNS:
        raise RunError(f"{num_runs} runs are more than this page compares", f"Choose at most {MOST_RUNS}")
    hrefs = {entry.path: f"/runs/{entry.id}" for entry in every}
    return render(
        request,
        "compare.html",
        view=view_of([entry.path for entry in chosen]) if chosen else None,
        picture=picture_src(project),
        href=lambda root: hrefs.get(root, ""),
        is_page=True,
        runs=_newest_first(runs),
        sweeps=inside,
        ticked=set(ids),
        most=MOST_TICKED,
    )


def _newest_first(entries: list[Entry]) -> list[Entry]:
    return sorted(entries, key=lambda entry: -entry.changed)


def routes() -> list[Route]:
    """The URLs of this view."""
    return [Route("/compare", early("compare.html", compare))]

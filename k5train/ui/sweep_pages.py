"""The page of a sweep: ``/sweeps/<id>``, whose grid is live while its runs are trained."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from k5cache.shared.lock import holder
from k5train.ui import events, listing
from k5train.ui.listing import Entry
from k5train.ui.pages import project_of, render
from k5train.ui.project import Project
from k5train.ui.run_pictures import picture_src
from k5train.ui.runs.state import BADGES
from k5train.ui.runs.sweep_view import read_sweep
from k5train.ui.templating import fragment


def sweep(request: Request) -> Response:
    """A sweep as one thing."""
    project = project_of(request)
    entry = listing.find(listing.sweeps(project), request.path_params["id"])
    return render(request, "sweep.html", entry=entry, **_values(project, entry))


def changes(request: Request) -> Response:
    """The grid, each time that it changes."""
    project = project_of(request)
    entry = listing.find(listing.sweeps(project), request.path_params["id"])
    return events.stream(request, _look(project, entry), 2.0)


def _look(project: Project, entry: Entry) -> Callable[[], dict[str, str]]:
    def look() -> dict[str, str]:
        listing.find(listing.sweeps(project), entry.id)  # says so if it was removed
        return {"sweep": fragment("sweep_grid.html", **_values(project, entry))}

    return look


def _values(project: Project, entry: Entry) -> dict[str, Any]:
    runs = listing.runs_of(project, entry)
    hrefs = {run.path: f"/runs/{run.id}" for run in runs}

    def href(path: Path) -> str:
        return hrefs.get(path, "")

    view = read_sweep(entry.path, [run.path for run in runs], lambda run: holder(run / ".lock") is not None)
    return {"view": view, "words": BADGES, "picture": picture_src(project), "href": href}


def routes() -> list[Route]:
    """The URLs of this view."""
    return [Route("/sweeps/{id}", sweep), Route("/sweeps/{id}/events", changes)]

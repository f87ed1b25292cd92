"""The first page: what runs, how it goes, and what to do next."""

from __future__ import annotations

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from k5train.ui import listing
from k5train.ui.pages import project_of, render


def overview(request: Request) -> Response:
    """What the project has."""
    project = project_of(request)
    return render(
        request,
        "overview.html",
        folders=listing.folders(project),
        caches=listing.caches(project),
        runs=sorted(listing.runs(project), key=lambda run: -run.changed),
        sweeps=listing.sweeps(project),
        leading_out=listing.leading_out(project),
    )


def routes() -> list[Route]:
    """The URLs of this view."""
    return [Route("/", overview)]

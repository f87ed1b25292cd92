"""The first page: what runs, how it goes, and what to do next."""

from __future__ import annotations

from collections.abc import Mapping

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from k5train.ui.early import early
from k5train.ui.events import stream
from k5train.ui.overview_view import Overview, read_overview
from k5train.ui.pages import fragment, project_of, render
from k5train.ui.runs.state import BADGES

SECONDS = 3.0


def overview(request: Request) -> Response:
    """``/``."""
    view = read_overview(project_of(request))
    return render(request, "overview.html", view=view, parts=_parts(view))


def events(request: Request) -> Response:
    """The same, as it changes."""
    project = project_of(request)
    return stream(request, lambda: _parts(read_overview(project)), SECONDS)


def _parts(view: Overview) -> Mapping[str, str]:
    """What changes with time, by the id of its element."""
    names = ("now", "next", "runs")
    return {f"overview-{name}": fragment(f"overview_{name}.html", view=view, badges=BADGES) for name in names}


def routes() -> list[Route]:
    """The URLs of this view."""
    return [Route("/", early("overview.html", overview)), Route("/events", events)]

"""The list of runs and sweeps: ``/runs``."""

from __future__ import annotations

from typing import Any
from urllib.parse import urlencode

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from k5train.ui import events
from k5train.ui.compare_pages import MOST_TICKED
from k5train.ui.early import early
from k5train.ui.pages import project_of, render
from k5train.ui.project import Project
from k5train.ui.run_pictures import picture_src
from k5train.ui.runs.listed import SORTS, Item, RunList, read_again, read_list
from k5train.ui.runs.state import BADGES
from k5train.ui.templating import fragment


def runs(request: Request) -> Response:
    """A page of the runs and sweeps."""
    project, asked = project_of(request), _asked(request)
    listed = read_list(project, **asked)

    def page_url(page: int) -> str:
        return f"/runs?{urlencode({**_named(asked), 'page': page})}"

    return render(
        request,
        "run_list.html",
        listed=listed,
        asked=asked,
        words=BADGES,
        sorts=SORTS,
        page_url=page_url,
        events=f"/runs/events?{urlencode({**_named(asked), 'page': listed.page})}",
        picture=picture_src(project),
        most=MOST_TICKED,
    )


def changes(request: Request) -> Response:
    """How each of the listed runs goes, when it changes."""
    project = project_of(request)
    listed = read_list(project, **_asked(request))
    return events.stream(request, lambda: _cells(project, listed))


def _cells(project: Project, listed: RunList) -> dict[str, str]:
    picture = picture_src(project)
    return {f"run-{item.entry.id}": _cell(item, picture) for item in read_again(project, listed)}


def _cell(item: Item, picture: Any) -> str:
    return fragment("run_list_cell.html", item=item, words=BADGES, picture=picture)


def _asked(request: Request) -> dict[str, Any]:
    query = request.query_params
    page = query.get("page", "1")
    word, sort = query.get("state", ""), query.get("sort", "newest")
    return {
        "search": query.get("q", "")[:200],
        "word": word if word in BADGES else "",
        "sort": sort if sort in SORTS else "newest",
        "page": int(page) if page.isascii() and page.isdecimal() and len(page) < 9 else 1,
    }


def _named(asked: dict[str, Any]) -> dict[str, str]:
    """What was asked, as it stands in a URL."""
    named = {"q": asked["search"], "state": asked["word"], "sort": asked["sort"]}
    return {name: value for name, value in named.items() if value and value != "newest"}


def routes() -> list[Route]:
    """The URLs of this view."""
    return [Route("/runs", early("run_list.html", runs)), Route("/runs/events", changes)]

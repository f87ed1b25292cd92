"""How does a view answer with a page? Its template in the frame of all pages."""

from __future__ import annotations

from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from k5train.ui import actions, static_files
from k5train.ui.project import Project
from k5train.ui.templating import environment, fragment

NAVIGATION = (
    ("/", "Overview"),
    ("/data", "Data"),
    ("/new", "New run"),
    ("/runs", "Runs"),
    ("/compare", "Compare"),
    ("/queue", "Queue"),
)
MAIN = b'<main id="main"'
"""Before it, a page depends on hardly anything."""
environment().globals.update(static=static_files.static, navigation=NAVIGATION)

__all__ = ["MAIN", "fragment", "html_response", "project_of", "render", "top_of"]


def render(request: Request, name: str, status: int = 200, **values: Any) -> Response:
    """A page from a template that extends ``layout.html``. It says once what the last action did."""
    notice = actions.notice_of(request)
    html = (
        environment()
        .get_template(name)
        .render(request=request, project=project_of(request), path=request.url.path, notice=notice, **values)
    )
    response = html_response(html, status)
    if notice:
        response.delete_cookie(actions.COOKIE)
    return response


def top_of(request: Request, name: str, **values: Any) -> bytes:
    """What stands before ``MAIN`` in the page from a template. ``values`` are those that its head needs."""
    here = {"request": request, "project": project_of(request), "path": request.url.path, "notice": None}
    top = ""
    for part in environment().get_template(name).generate(**here, **values):
        top += str(part)  # what is added to Markup would be escaped
        if (end := top.find(MAIN.decode())) >= 0:
            return _encoded(top[:end])
    raise AssertionError(f"{name} has no {MAIN.decode()}")


def project_of(request: Request) -> Project:
    """The project that the page is over."""
    project: Project = request.app.state.project
    return project


def html_response(html: str, status: int = 200) -> Response:
    """HTML as bytes. File names that are no text have lone surrogates, which are shown as escapes."""
    return Response(_encoded(html), status, media_type="text/html")


def _encoded(html: str) -> bytes:
    return html.encode("utf-8", "backslashreplace")

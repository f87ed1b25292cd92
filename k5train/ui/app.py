"""What does the page consist of? The routes of all views, behind the guard, and what is answered to an error."""

from __future__ import annotations

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp

from k5cache.shared.credentials import without_credentials
from k5cache.shared.disk_errors import sentence
from k5cache.shared.errors import K5Error
from k5train.ui import (
    compare_pages,
    data_pages,
    jobs_pages,
    new_run_pages,
    overview_pages,
    run_list_pages,
    run_pages,
    run_pictures,
    static_files,
    sweep_pages,
)
from k5train.ui.actions import BadForm
from k5train.ui.events import Listeners
from k5train.ui.guard import Access, Guard
from k5train.ui.listing import NotHere
from k5train.ui.pages import render
from k5train.ui.project import Project

VIEWS = (
    static_files,
    overview_pages,
    data_pages,
    run_list_pages,
    run_pictures,
    run_pages,
    compare_pages,
    sweep_pages,
    new_run_pages,
    jobs_pages,
)
"""The modules whose ``routes()`` make up the page."""
_WORDS = {
    404: ("There is no such page", "Choose one above"),
    408: ("What was sent stopped in the middle", "Send it again"),
    405: ("This page cannot be asked like this", "Use the page's own buttons"),
}


class Page(Starlette):
    """An app behind the guard, also its errors."""

    access: Access

    def build_middleware_stack(self) -> ASGIApp:
        """The guard stands outside of everything, so that no answer goes around it."""
        return Guard(super().build_middleware_stack(), self.access)


def create_app(project: Project, access: Access | None = None) -> Page:
    """The page over a project.

    Args:
        access: who may ask. None: everybody on this machine.
    """
    routes: list[Route] = [route for view in VIEWS for route in view.routes()]
    page = Page(
        routes=routes,
        exception_handlers={
            K5Error: _answer_user,
            OSError: _answer_disk,
            HTTPException: _answer_http,
            500: _answer_bug,
        },
    )
    page.access = access or Access()
    page.state.project = project
    page.state.listeners = Listeners()
    page.state.at_end = []
    return page


def _answer_user(request: Request, error: Exception) -> Response:
    """An error that the user can correct: the same two lines as in the terminal."""
    assert isinstance(error, K5Error)
    status = 404 if isinstance(error, NotHere) else 413 if isinstance(error, BadForm) else 400
    return _error(request, status, error.problem, error.fix)


def _answer_disk(request: Request, error: Exception) -> Response:
    """An error of the disk: the sentence that the terminal has for it."""
    lines = sentence(error)
    if lines is None:
        raise error
    return _error(request, 409, *lines)


def _answer_http(request: Request, error: Exception) -> Response:
    """A page that is not there, or a method that it does not take."""
    assert isinstance(error, HTTPException)
    problem, fix = _WORDS.get(error.status_code, ("This cannot be answered", "Go back and reload the page"))
    response = _error(request, error.status_code, problem, fix)
    response.headers.update(error.headers or {})
    return response


def _answer_bug(request: Request, error: Exception) -> Response:
    """Anything else. The server prints the traceback in the terminal."""
    problem = f"This page failed with an error of its own ({type(error).__name__})"
    return _error(
        request, 500, problem, "The terminal of k5train ui shows where. Nothing else is affected: go on elsewhere"
    )


def _error(request: Request, status: int, problem: str, fix: str) -> Response:
    return render(
        request, "error.html", status, problem=without_credentials(problem), fix=without_credentials(fix), code=status
    )

"""Which URLs has the view of data? What answers them imports Pillow and pyarrow, so that is done at the first one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib import import_module

from starlette.datastructures import FormData
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from k5train.ui import actions, listing
from k5train.ui.data.limits import MOST_BYTES, MOST_FILES
from k5train.ui.early import Known, early
from k5train.ui.pages import project_of
from k5train.ui.project import Project

actions.NOTICES.update(
    received="The pictures are in the folder.",
    folder="The folder is made. Drop pictures into it.",
    caption="The caption is saved.",
    encoding="The encode is in the queue. How it goes is shown below.",
    comparing="Looking at what an encode would do. The answer comes below.",
)


def _read(name: str) -> Callable[[Request], Response]:
    """The endpoint of this name in ``handlers``."""

    def endpoint(request: Request) -> Response:
        response: Response = getattr(import_module("k5train.ui.data.handlers"), name)(request)
        return response

    return endpoint


def _known(entries: Callable[[Project], Sequence[listing.Entry]]) -> Known:
    """The folder or the cache that a request is about."""
    return lambda request: {"entry": listing.find(entries(project_of(request)), request.path_params["id"])}


def _change(name: str) -> Callable[[Request, FormData], Response]:
    """The same for an action."""

    def handle(request: Request, form: FormData) -> Response:
        response: Response = getattr(import_module("k5train.ui.data.handlers"), name)(request, form)
        return response

    return handle


def _to_folder(request: Request) -> Response:
    folder = listing.find(listing.folders(project_of(request)), request.path_params["id"])
    return actions.redirect(f"/data/f/{folder.id}")


def routes() -> list[Route]:
    """The URLs of this view."""
    pages = {
        "/data/f/{id}/events": "folder_events",
        "/data/f/{id}/{picture}": "folder_item",
        "/data/f/{id}/{picture}/picture": "folder_picture",
        "/data/c/{id}/events": "cache_events",
        "/data/c/{id}/{number:int}": "cache_item",
        "/data/c/{id}/{number:int}/picture": "cache_picture",
    }
    changes = {
        "/data/folders": "make_folder",
        "/data/f/{id}/encode": "encode_folder",
        "/data/f/{id}/{picture}/caption": "save_caption",
        "/data/c/{id}/encode": "encode_cache",
        "/data/c/{id}/diff": "diff_cache",
    }
    files = actions.action(_change("receive"), MOST_BYTES, MOST_FILES)
    # What was refused is shown at the address of the form: who opens that again comes back to the folder.
    back = [Route(f"/data/f/{{id}}/{name}", _to_folder) for name in ("pictures", "encode")]
    posts = [Route(path, actions.action(_change(name)), methods=["POST"]) for path, name in changes.items()]
    gets = [Route(path, _read(name)) for path, name in pages.items()]
    grids = [
        Route("/data", early("data.html", _read("data"))),
        Route("/data/f/{id}", early("data_folder.html", _read("folder"), _known(listing.folders))),
        Route("/data/c/{id}", early("data_cache.html", _read("cache"), _known(listing.caches))),
    ]
    return [*grids, *posts, Route("/data/f/{id}/pictures", files, methods=["POST"]), *back, *gets]

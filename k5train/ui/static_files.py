"""Our own CSS, JavaScript and icon: known by name when the page starts, and at URLs that change with their content."""

from __future__ import annotations

import functools
import hashlib
from dataclasses import dataclass
from pathlib import Path

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from k5train.ui.listing import NotHere

FOLDER = Path(__file__).parent / "static"
_TYPES = {".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}
UNCHANGING = "private, max-age=31536000, immutable"
"""``Cache-Control`` of a URL with the version of its content in it."""


@dataclass(frozen=True)
class _File:
    content: bytes
    kind: str
    version: str


@functools.cache
def _files() -> dict[str, _File]:
    return {path.name: _read(path) for path in FOLDER.iterdir() if path.suffix in _TYPES}


def _read(path: Path) -> _File:
    content = path.read_bytes()
    return _File(content, _TYPES[path.suffix], hashlib.sha256(content).hexdigest()[:12])


def static(name: str) -> str:
    """The URL of one of our files, for templates."""
    return f"/static/{name}?v={_files()[name].version}"


def text_of(name: str) -> str:
    """The text of one of our files, for a report that carries it in itself."""
    return _files()[name].content.decode()


async def answer(request: Request) -> Response:
    """One of our files. It is in memory: no thread is waited for, as for pictures, and so a page is painted sooner."""
    file = _files().get(request.path_params.get("name", "icon.svg"))
    if file is None:
        raise NotHere("There is no such file", "Go back to the page that you came from")
    is_versioned = request.query_params.get("v") == file.version
    return Response(
        file.content, media_type=file.kind, headers={"Cache-Control": UNCHANGING if is_versioned else "no-cache"}
    )


def routes() -> list[Route]:
    """The URLs of our files."""
    return [Route("/static/{name}", answer), Route("/favicon.ico", answer)]

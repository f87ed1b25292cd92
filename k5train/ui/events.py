"""How does a page stay up to date? Server-sent events: files are looked at only while somebody listens."""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import suppress

import anyio.to_thread
from starlette.requests import Request
from starlette.responses import StreamingResponse

from k5cache.shared.disk_errors import sentence
from k5cache.shared.errors import K5Error
from k5train.ui.pages import fragment

QUIET_SECONDS = 15.0
"""After so long without news a comment is sent, so that a connection that is gone is noticed."""
_LINES = re.compile(r"\r\n|\r|\n")

Changes = Callable[[], Mapping[str, str]]


class Listeners:
    """The streams that are open, so that the server can end all of them at once."""

    def __init__(self) -> None:
        self._ends: set[asyncio.Event] = set()
        self.is_closed = False

    def close(self) -> None:
        """End all streams, also those that are asked for from now on. Only from the thread of the server."""
        self.is_closed = True
        for end in self._ends:
            end.set()

    def __len__(self) -> int:
        return len(self._ends)

    def add(self) -> asyncio.Event:
        """An event that is set when the server stops."""
        end = asyncio.Event()
        if self.is_closed:
            end.set()
        self._ends.add(end)
        return end

    def remove(self, end: asyncio.Event) -> None:
        """The stream has ended."""
        self._ends.discard(end)


def stream(request: Request, changes: Changes, seconds: float = 1.0) -> StreamingResponse:
    """Answer with server-sent events until the client goes or the server stops.

    Args:
        changes: id of an element -> the HTML that is in it now. It is called in a thread every ``seconds``, and what
            differs from what was last sent is sent. If it raises a ``K5Error`` or an error of the disk, its two lines
            are sent to the element ``problem`` of the layout, and the stream ends.
    """
    headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
    return StreamingResponse(_events(request, changes, seconds), media_type="text/event-stream", headers=headers)


async def _events(request: Request, changes: Changes, seconds: float) -> AsyncIterator[bytes]:
    listeners: Listeners = request.app.state.listeners
    end = listeners.add()
    last: dict[str, str] = {}
    said = time.monotonic()
    try:
        while True:
            try:
                now = await anyio.to_thread.run_sync(changes)
            except (K5Error, OSError) as error:
                yield message("problem", problem_fragment(error))
                yield message("end", "")
                return
            for name, html in now.items():
                if last.get(name) != html:
                    last[name], said = html, time.monotonic()
                    yield message(name, html)
            if time.monotonic() - said > QUIET_SECONDS:
                said = time.monotonic()
                yield b": still here\n\n"
            with suppress(TimeoutError):
                await asyncio.wait_for(end.wait(), seconds)
            if end.is_set() or await request.is_disconnected():
                return
    finally:
        listeners.remove(end)


def problem_fragment(error: K5Error | OSError) -> str:
    """The two lines of an error, as the terminal has them."""
    if isinstance(error, K5Error):
        problem, fix = error.problem, error.fix
    else:
        problem, fix = sentence(error) or (str(error), "Reload the page")
    return fragment("error_box.html", problem=problem, fix=fix)


def message(name: str, html: str) -> bytes:
    """One event, for the element with this id."""
    lines = "".join(f"data: {line}\n" for line in _LINES.split(html))
    return f"event: {name}\n{lines}\n".encode("utf-8", "backslashreplace")

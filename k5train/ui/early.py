"""How is the top of a page on the screen before the rest is known? It is sent first, and the rest when it is there.

What a page shows may take a while: a folder of thousands of files is read, or a disk wakes up. The head of the page
and its navigation are the same whatever comes of it, so a browser gets them at once and paints them meanwhile. Its
status is 200 then, also if the rest turns out to be an error, which stands in the page as ever. Anybody who is no
browser gets the whole page when it is known, with its status.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from typing import Any

from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from k5train.ui import actions
from k5train.ui.pages import MAIN, top_of

Endpoint = Callable[[Request], Response]
Known = Callable[[Request], Mapping[str, Any]]


def early(
    template: str, endpoint: Endpoint, known: Known = lambda request: {}
) -> Callable[[Request], Awaitable[Response]]:
    """An endpoint that sends the top of its page first.

    Args:
        template: the page's.
        endpoint: renders the whole page.
        known: what the head of the template needs to know, found at once. What it raises is answered as ever.
    """

    async def answer(request: Request) -> Response:
        is_page = request.method == "GET" and request.headers.get("sec-fetch-dest") == "document"
        if not is_page or actions.notice_of(request):  # a notice is said once: its cookie goes with the headers
            return await run_in_threadpool(endpoint, request)
        values = await run_in_threadpool(known, request)
        return _InTwo(request, endpoint, top_of(request, template, **values))

    return answer


class _InTwo(Response):
    """A page whose top is there already."""

    def __init__(self, request: Request, endpoint: Endpoint, top: bytes) -> None:
        super().__init__(media_type="text/html")
        del self.headers["content-length"]
        self._request, self._endpoint, self._top = request, endpoint, top

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send both parts. A bug of ours goes on to the server's log after the page has said so."""
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        await send({"type": "http.response.body", "body": self._top, "more_body": True})
        bug: Exception | None = None
        try:
            page = await run_in_threadpool(self._endpoint, self._request)
        except Exception as error:
            page, bug = await run_in_threadpool(self._answer_error, error)
        html = bytes(page.body)
        await send({"type": "http.response.body", "body": html[max(0, html.find(MAIN)) :]})
        if bug is not None:
            raise bug

    def _answer_error(self, error: Exception) -> tuple[Response, Exception | None]:
        """What the app answers to an error, and the error itself if the app has no words for it."""
        handlers = self._request.app.exception_handlers
        kind = next((kind for kind in type(error).__mro__ if kind in handlers), None)
        if kind is not None:
            try:
                return handlers[kind](self._request, error), None
            except Exception as other:  # an error of the disk that has no sentence
                error = other
        return handlers[500](self._request, error), error

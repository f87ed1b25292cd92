"""How does a page change something? A form is read within limits, done in a thread, and answered by a redirect."""

from __future__ import annotations

import re
from collections.abc import AsyncGenerator, Awaitable, Callable

import anyio.to_thread
from starlette.datastructures import FormData
from starlette.formparsers import FormParser, MultiPartException, MultiPartParser
from starlette.requests import Request
from starlette.responses import RedirectResponse, Response

from k5cache.shared.errors import K5Error
from k5cache.shared.units import human_bytes

COOKIE = "k5_notice"
NOTICES = {
    "saved": "Saved.",
    "stopped": "Told it to stop. It saves what it has first.",
    "queued": "Put in the queue.",
    "removed": "Removed from the queue.",
}
"""What an action did, by the word that the cookie carries. Views add their own with ``NOTICES.update``."""
MOST_FORM_BYTES = 4 << 20
MOST_FIELDS = 1000


class BadForm(K5Error):
    """What a form sent is too large, or is no form."""


async def form(request: Request, most_bytes: int = MOST_FORM_BYTES, most_files: int = 0) -> FormData:
    """What a form sent.

    Args:
        most_bytes: of everything that is sent, files included.
        most_files: that may be sent. They are kept in memory up to 1 MiB each, and in temporary files beyond it.

    Raises:
        BadForm: it is larger, or cannot be read.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    try:
        body = _bounded(request, most_bytes)
        if kind == "multipart/form-data":
            parser = MultiPartParser(
                request.headers,
                _whole(body),
                max_files=most_files,
                max_fields=MOST_FIELDS,
                max_part_size=MOST_FORM_BYTES,
            )
            return await parser.parse()
        if kind == "application/x-www-form-urlencoded":
            return await FormParser(
                request.headers, body, max_fields=MOST_FIELDS, max_part_size=MOST_FORM_BYTES
            ).parse()
    except MultiPartException as error:
        raise BadForm(
            f"The form cannot be read: {error.message}", "Go back, reload the page and send it again"
        ) from None
    raise BadForm("What was sent is not a form", "Use the page's own buttons")


async def _whole(body: AsyncGenerator[bytes, None]) -> AsyncGenerator[bytes, None]:
    """The parts, which must end as a form with files ends: the parser takes half of one, too."""
    end = b""
    async for part in body:
        end = (end + part)[-8:]
        yield part
    if not end.rstrip().endswith(b"--"):
        raise BadForm("The form did not arrive whole", "Send it again")


async def _bounded(request: Request, most_bytes: int) -> AsyncGenerator[bytes, None]:
    """The parts of what is sent, until there is too much of it."""
    num_bytes = 0
    async for part in request.stream():
        num_bytes += len(part)
        if num_bytes > most_bytes:
            raise BadForm(f"More than {human_bytes(most_bytes)} were sent", "Send less at once")
        yield part


def action(
    handle: Callable[[Request, FormData], Response], most_bytes: int = MOST_FORM_BYTES, most_files: int = 0
) -> Callable[[Request], Awaitable[Response]]:
    """An endpoint for a POST route: reads the form within limits, and runs ``handle`` in a thread."""

    async def endpoint(request: Request) -> Response:
        data = await form(request, most_bytes, most_files)
        try:
            return await anyio.to_thread.run_sync(handle, request, data)
        finally:
            await data.close()

    return endpoint


def text(data: FormData, name: str, most: int = 100_000) -> str:
    """A text field, with line breaks as ``\\n``. Empty if it was not sent.

    Raises:
        BadForm: it has more than ``most`` characters.
    """
    value = data.get(name, "")
    value = value.replace("\r\n", "\n") if isinstance(value, str) else ""
    if len(value) > most:
        raise BadForm(f"{name} has {len(value):,} characters, and at most {most:,} are taken", "Make it shorter")
    return value


def redirect(to: str, notice: str | None = None) -> Response:
    """Go on to a page of ours, which then says once what was done.

    Args:
        to: a path of ours that begins with ``/``; never a text that was sent.
        notice: a word of ``NOTICES``.
    """
    assert re.match(r"/(?!/)", to), to
    response = RedirectResponse(to, status_code=303)
    if notice is not None:
        assert notice in NOTICES, notice
        response.set_cookie(COOKIE, notice, max_age=60, httponly=True, samesite="strict")
    return response


def notice_of(request: Request) -> str:
    """What the last action did; empty if there was none."""
    return NOTICES.get(request.cookies.get(COOKIE, ""), "")

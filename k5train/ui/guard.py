"""Who may ask the page for what? Every request passes here first, whatever it is for: pages, pictures, files, events.

A page on the internet can make a browser send requests to this machine. What stands against it: the name in ``Host``
(a name that was pointed here by DNS is refused), ``Origin`` on everything that changes, ``Sec-Fetch-Site`` on the rest,
and for every host but this machine a token in a cookie that other sites cannot send.
"""

from __future__ import annotations

import hmac
import ipaddress
import re
from collections.abc import Collection
from dataclasses import dataclass
from http.cookies import CookieError, SimpleCookie
from urllib.parse import parse_qsl, urlencode

import anyio
from markupsafe import escape
from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.responses import RedirectResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; "
    "form-action 'self'; base-uri 'none'; frame-ancestors 'none'"
)
HEADERS = {
    "Content-Security-Policy": POLICY,
    "X-Content-Type-Options": "nosniff",
    # Not no-referrer: with it, browsers send "Origin: null" with the forms of the page itself.
    "Referrer-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "X-Frame-Options": "DENY",
}
"""In every answer."""
READING = ("GET", "HEAD")
METHODS = (*READING, "POST")
MOST_PATH = 1000
"""Bytes of a URL's path; ours have 100."""
SECONDS_FOR_A_PART = 30.0
"""A client that sends nothing for so long in the middle of a request is answered 408."""
_AUTHORITY = re.compile(r"(\[[0-9a-f:.]{2,45}\]|[a-z0-9._-]{1,253})(?::([0-9]{1,5}))?", re.ASCII)
_PAGE = (
    "<!doctype html><html lang=en><meta charset=utf-8><meta name=viewport content='width=device-width'>"
    "<title>{status}</title><h1>{title}</h1><p>{problem}</p><p>{fix}</p>"
)


@dataclass(frozen=True)
class Access:
    """Who may ask."""

    hosts: Collection[str] = ("127.0.0.1", "localhost", "::1")
    """The names that this page goes by, in lower case, without ports: a tunnel may give it another port."""
    is_any_address: bool = False
    """Whether any IP address is a name of it too, as with ``--host 0.0.0.0``. DNS cannot point an address elsewhere."""
    token: str | None = None
    """What a client has to know. None: being on this machine is enough."""
    cookie: str = "k5_token"
    """Its name has the port in it: browsers send a cookie to all ports of a host."""


@dataclass(frozen=True)
class Refusal:
    """Why a request is not answered."""

    status: int
    title: str
    problem: str
    fix: str

    def response(self) -> Response:
        """A page without styles, which may not be sent to everybody."""
        html = _PAGE.format(status=self.status, **{k: escape(v) for k, v in vars(self).items() if k != "status"})
        return Response(html, self.status, media_type="text/html")


class Guard:
    """Stands before an app, and answers itself what may not pass. It adds ``HEADERS`` to every answer."""

    def __init__(self, app: ASGIApp, access: Access) -> None:
        self.app, self.access = app, access

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request."""
        if scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
            return
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                headers.update(HEADERS)
                headers.setdefault("Cache-Control", "no-store")
            await send(message)

        app = self.answer_of(scope) or self.app
        await app(scope, _patient(receive), send_with_headers)

    def answer_of(self, scope: Scope) -> Response | None:
        """What is answered in place of the app; None if the request may pass."""
        headers = Headers(scope=scope)
        refusal = check_host(headers, self.access) or check_site(scope["method"], headers) or check_path(scope["path"])
        if refusal:
            return refusal.response()
        if self.access.token is None:
            return None
        return self._check_token(scope, headers, self.access.token)

    def _check_token(self, scope: Scope, headers: Headers, token: str) -> Response | None:
        """The token in the cookie; or in the URL, from which it goes into the cookie and out of sight."""
        if any(_is_same(value, token) for value in cookies_of(headers, self.access.cookie)):
            return None
        query = parse_qsl(scope["query_string"].decode("latin-1"), keep_blank_values=True)
        given = [value for name, value in query if name == "token"]
        if scope["method"] == "GET" and len(given) == 1 and _is_same(given[0], token):
            rest = urlencode([(name, value) for name, value in query if name != "token"])
            path = "/" + scope["path"].lstrip("/\\")  # "//elsewhere" would be another host
            response = RedirectResponse(path + (f"?{rest}" if rest else ""), status_code=303)
            response.set_cookie(self.access.cookie, token, httponly=True, samesite="strict")
            return response
        return Refusal(
            401,
            "A token is needed",
            "This page was started for other machines too, so it asks who you are",
            "Open the URL with ?token= that k5train ui printed. If you came here by a link, load this page again",
        ).response()


def check_host(headers: Headers, access: Access) -> Refusal | None:
    """Refuse a request that was sent to another name than ours."""
    given = headers.getlist("host")
    match = _AUTHORITY.fullmatch(given[0].lower()) if len(given) == 1 else None
    if match and (not match[2] or 0 < int(match[2]) < 65536):
        name = match[1].strip("[]")
        if name in access.hosts or (access.is_any_address and _is_address(name)):
            return None
    return Refusal(
        403,
        "Not this host",
        "The request names another host than this page is served for",
        "Open the URL that k5train ui printed; for a name of this machine, start it with --host NAME",
    )


def check_site(method: str, headers: Headers) -> Refusal | None:
    """Refuse what a page of another site sends: everything that changes, and reading except by following a link."""
    if method not in METHODS:
        return Refusal(405, "Not allowed", "This page answers GET, HEAD and POST", "Use the page's own buttons")
    sites = headers.getlist("sec-fetch-site")
    is_elsewhere = any(site not in ("same-origin", "none") for site in sites)
    if method in READING:
        is_link = (headers.get("sec-fetch-mode"), headers.get("sec-fetch-dest")) == ("navigate", "document")
        is_refused = is_elsewhere and not is_link
    else:
        origins = [origin.lower() for origin in headers.getlist("origin")]
        host = headers["host"].lower()
        is_refused = is_elsewhere or len(origins) != 1 or origins[0] not in (f"http://{host}", f"https://{host}")
    if not is_refused:
        return None
    return Refusal(
        403,
        "From another site",
        "The request did not come from this page itself",
        "Open the page in a tab of its own, and use its buttons",
    )


def check_path(path: str) -> Refusal | None:
    """Refuse a path that is none of ours by its length: a number of thousands of digits is no number to Python."""
    if len(path) <= MOST_PATH:
        return None
    return Refusal(404, "There is no such page", "The URL is longer than any of this page's", "Open the page itself")


def cookies_of(headers: Headers, name: str) -> list[str]:
    """The values that a client sends for a cookie."""
    values = []
    for line in headers.getlist("cookie"):
        for part in line.split(";"):
            try:
                jar = SimpleCookie(part.strip())
            except CookieError:
                continue
            values += [jar[name].value] if name in jar else []
    return values


def _is_same(given: str, token: str) -> bool:
    """Compared in a time that does not depend on how much of it is right."""
    return hmac.compare_digest(given.encode("utf-8", "replace"), token.encode())


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


def _patient(receive: Receive) -> Receive:
    """``receive``, which gives up on a client that stops in the middle of what it sends."""
    is_whole = False

    async def receive_in_time() -> Message:
        nonlocal is_whole
        if is_whole:
            return await receive()  # now it only tells when the client goes
        with anyio.move_on_after(SECONDS_FOR_A_PART) as time:
            message = await receive()
            is_whole = not message.get("more_body", False)
            return message
        assert time.cancelled_caught
        raise HTTPException(408)

    return receive_in_time

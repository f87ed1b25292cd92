"""How is the page served? On a socket that is ours before anything is said, without logs, until Ctrl-C ends it."""

from __future__ import annotations

import asyncio
import errno
import ipaddress
import logging
import secrets
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from importlib import import_module
from types import FrameType
from typing import Any

import h11
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from k5cache.shared.errors import K5Error, OutputError
from k5train.ui.app import Page, create_app
from k5train.ui.guard import Access
from k5train.ui.jobs import queue
from k5train.ui.overview_view import read_overview
from k5train.ui.project import Project
from k5train.ui.templating import environment

LOOPBACK = ("127.0.0.1", "localhost", "::1")
MOST_CONNECTIONS = 256
"""Beyond it, clients are told to come back: each waits in memory."""
SECONDS_FOR_A_BEGINNING = 15.0
FAREWELL = "The page has ended. What it started goes on: `k5train ui` shows it again"


def open_socket(host: str, port: int) -> socket.socket:
    """A socket that listens.

    Raises:
        OutputError: the port is taken, or the host is not this machine.
    """
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
    except (OSError, UnicodeError):
        raise OutputError(f"--host {host} is not a name or an address", "Give one of this machine") from None
    opened = socket.socket(family, socket.SOCK_STREAM)
    try:
        opened.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        opened.bind(address)
        opened.listen(128)
    except OSError as error:
        opened.close()
        raise _refused(error, host, port) from None
    return opened


def _refused(error: OSError, host: str, port: int) -> OutputError:
    if error.errno == errno.EADDRINUSE:
        other = _free_port(host, port)
        return OutputError(
            f"Port {port} of {host} is taken, perhaps by another k5train ui",
            f"End the other program, or take another port: k5train ui --port {other}",
        )
    if error.errno == errno.EADDRNOTAVAIL:
        return OutputError(f"--host {host} is not an address of this machine", "Give one that it has, or 127.0.0.1")
    if error.errno == errno.EACCES:
        return OutputError(f"There is no permission to serve on port {port}", "Give --port a number above 1023")
    return OutputError(f"Cannot serve on {host}, port {port}: {error.strerror}", "Give another --port or --host")


def _free_port(host: str, taken: int) -> int:
    """A port near ``taken`` that is free now."""
    for port in range(taken + 1, min(taken + 20, 65536)):
        try:
            socket.create_server((host, port)).close()
        except OSError:
            continue
        return port
    return 0 if taken == 8001 else 8001


def access_for(host: str, port: int, wants_token: bool) -> Access:
    """Who may ask a page that is served on ``host``."""
    is_here = host.lower() in LOOPBACK or host.startswith("127.")
    token = secrets.token_urlsafe(32) if wants_token or not is_here else None
    is_any = host in ("0.0.0.0", "::", "")
    own = {socket.gethostname().lower(), socket.getfqdn().lower()} if is_any else {host.lower()}
    return Access(frozenset({*LOOPBACK, *own}), is_any, token, f"k5_token_{port}")


def url_of(host: str, port: int, access: Access) -> str:
    """What to open. The token is in it, if one is needed."""
    name = socket.gethostname() if host in ("0.0.0.0", "::", "") else host
    with suppress(ValueError):
        name = f"[{name}]" if ipaddress.ip_address(name).version == 6 else name
    return f"http://{name}:{port}/" + (f"?token={access.token}" if access.token else "")


def serve(project: Project, host: str, port: int, wants_token: bool, say: Callable[[str], object]) -> None:
    """Serve the page until it is stopped.

    Args:
        say: is told the URL once connections are taken.

    Raises:
        OutputError: as ``open_socket``.
        KeyboardInterrupt: it was stopped, with a sentence.
    """
    opened = open_socket(host, port)
    port = opened.getsockname()[1]
    access = access_for(host, port, wants_token)
    server = Server(create_app(project, access))
    begin_waiting(project)
    say(url_of(host, port, access))
    threading.Thread(target=warm_up, args=(project,), daemon=True).start()
    server.run([opened])
    raise KeyboardInterrupt(FAREWELL)


def warm_up(project: Project) -> None:
    """Do once, while the browser is being opened, what makes first pages slow: imports and templates.

    What is wrong with the project is said by the pages.
    """
    for name in environment().list_templates():
        environment().get_template(name)
    with suppress(K5Error, OSError):
        read_overview(project)
    for name in ("numpy", "PIL.Image", "pyarrow.parquet", "k5train.ui.data.cache_view"):
        import_module(name)


def begin_waiting(project: Project) -> None:
    """Begin the jobs that wait since before a reboot. Where there is no queue, or it cannot be written, none does."""
    with suppress(K5Error, OSError):
        if any(job.state == "waiting" for job in queue.jobs(project)):
            queue.advance(project)


class Connection(H11Protocol):
    """uvicorn's connection, which is ended if the beginning of a request is not sent in time.

    Otherwise anybody who knows no token could have all connections by sending nothing on them.
    """

    _waits: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """A client has come."""
        super().connection_made(transport)
        self._watch()

    def data_received(self, data: bytes) -> None:
        """It has sent something."""
        super().data_received(data)
        self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        """It has gone."""
        super().connection_lost(exc)
        self._rest()

    def _watch(self) -> None:
        if self.conn.their_state is not h11.IDLE:
            self._rest()
        elif self._waits is None:
            self._waits = self.loop.call_later(SECONDS_FOR_A_BEGINNING, self._end)

    def _rest(self) -> None:
        if self._waits is not None:
            self._waits.cancel()
            self._waits = None

    def _end(self) -> None:
        if self.conn.their_state is h11.IDLE and not self.transport.is_closing():
            self.transport.close()


class Server(uvicorn.Server):
    """uvicorn's server, which sleeps until something is asked, and ends streams that are open when it is stopped."""

    def __init__(self, page: Page) -> None:
        logging.getLogger("uvicorn.error").setLevel(logging.ERROR)  # what fails is still shown with its traceback
        config = uvicorn.Config(
            page,
            http=Connection,
            ws="none",
            lifespan="off",
            log_config=None,
            access_log=False,
            server_header=False,
            date_header=False,
            proxy_headers=False,
            limit_concurrency=MOST_CONNECTIONS,
            timeout_graceful_shutdown=1,
        )
        super().__init__(config)
        self.page = page
        self._stopped: asyncio.Event | None = None
        self._loop: asyncio.AbstractEventLoop | None = None

    async def main_loop(self) -> None:
        """Wait to be stopped. uvicorn's own looks ten times a second."""
        self._loop, self._stopped = asyncio.get_running_loop(), asyncio.Event()
        if not self.should_exit:
            await self._stopped.wait()
        self.page.state.listeners.close()
        for end in self.page.state.at_end:  # what requests that are being answered wait for
            end()

    def stop(self) -> None:
        """End the server, from any thread."""
        self.should_exit = True
        if self._loop and self._stopped:
            self._loop.call_soon_threadsafe(self._stopped.set)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """A signal. The second does not wait for anything."""
        self.force_exit = self.should_exit
        self.stop()

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Ctrl-C and SIGTERM stop the server; the caller then says so. In other threads than the main one, nothing."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        # What the process that started this one ignores stays ignored (nohup).
        numbers = [n for n in (signal.SIGINT, signal.SIGTERM) if signal.getsignal(n) is not signal.SIG_IGN]
        before: dict[int, Any] = {number: signal.signal(number, self.handle_exit) for number in numbers}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

"""A link between this machine and a server, which tests slow down, silence, or stop at a request they wait for."""

from __future__ import annotations

import re
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from urllib.parse import urlsplit

_REQUEST = re.compile(rb"(GET|HEAD|PUT|POST|DELETE) (\S+) HTTP/1\.1\r\n")
_PIECE = 8192  # bytes that are passed on at once, and that the system keeps for the link


class Link:
    """Passes bytes on, as told.

    Args:
        server: an address such as ``http://127.0.0.1:9000``; None: there is no server, and the link is silent.
    """

    def __init__(self, server: str | None) -> None:
        self._server = urlsplit(server) if server else None
        self._listener = socket.socket()
        self._listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _PIECE)
        self._listener.bind(("127.0.0.1", 0))
        self._listener.listen(64)
        self._open: list[socket.socket] = []
        self._unanswered: set[socket.socket] = set()
        self.address = "http://{}:{}".format(*self._listener.getsockname())
        self.requests: list[str] = []
        """Method and path of each request that began."""
        self.bytes_per_second = 0.0
        """At most so many are passed to the server on each connection; 0: any number."""
        self.silent_after: tuple[str, int | None] | None = None
        """A regular expression of a request, and the bytes of its body that are passed on before all goes silent; None:
        the whole request, and nothing of the answer."""
        self.is_silent = threading.Event()
        """Connections are accepted, and nothing is read."""
        if server is None:
            self.is_silent.set()
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        with suppress(OSError):  # the test is over
            while True:
                connection, _ = self._listener.accept()
                self._open.append(connection)
                threading.Thread(target=self._serve, args=(connection,), daemon=True).start()

    def _serve(self, connection: socket.socket) -> None:
        with suppress(OSError):
            if self._server is None:
                self._note(connection.recv(_PIECE))
                return
            onward = socket.create_connection((self._server.hostname, self._server.port))
            self._open.append(onward)
            threading.Thread(target=self._answer, args=(onward, connection), daemon=True).start()
            left = -1
            while piece := connection.recv(_PIECE):
                request = self._note(piece)
                if request and self.silent_after and re.search(self.silent_after[0], request):
                    if self.silent_after[1] is None:
                        self._unanswered.add(onward)
                    else:
                        left = piece.index(b"\r\n\r\n") + 4 + self.silent_after[1]
                if left >= 0:
                    piece, left = piece[:left], left - len(piece)
                    if left <= 0:
                        self.is_silent.set()
                        onward.sendall(piece)
                if self.is_silent.is_set():
                    return  # and the connection stays open
                onward.sendall(piece)
                if self.bytes_per_second:
                    time.sleep(len(piece) / self.bytes_per_second)
            onward.shutdown(socket.SHUT_WR)

    def _note(self, piece: bytes) -> str:
        match = _REQUEST.match(piece)
        if not match:
            return ""
        self.requests.append(f"{match[1].decode()} {match[2].decode()}")
        return self.requests[-1]

    def _answer(self, onward: socket.socket, connection: socket.socket) -> None:
        with suppress(OSError):
            while piece := onward.recv(1 << 16):
                if onward in self._unanswered:
                    self.is_silent.set()
                if self.is_silent.is_set():
                    return
                connection.sendall(piece)
            connection.shutdown(socket.SHUT_WR)

    def close(self) -> None:
        """End all connections."""
        for connection in (self._listener, *self._open):
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
            connection.close()


@contextmanager
def link_to(server: str | None) -> Iterator[Link]:
    """A link for the time of a block."""
    link = Link(server)
    try:
        yield link
    finally:
        link.close()

"""How do the processes of a run talk on the host, and notice that one has died? Over a socket from each to the first.

The system closes the sockets of a process that ends, however it ends, so the others know at once. A process that ends
by an error says which, so that the first one can print it.
"""

from __future__ import annotations

import hmac
import json
import secrets
import select
import socket
import struct
import time
from collections.abc import Mapping
from contextlib import suppress

from k5train.parallel.ranks import RankLost

_HEAD = struct.Struct("!cQ")
_DATA, _END = b"d", b"e"
_MOST_BYTES = 1 << 34
# A machine that loses its power closes no socket. It is given up after 15 + 3 * 5 seconds without an answer.
_KEEPALIVE = {"TCP_KEEPIDLE": 15, "TCP_KEEPINTVL": 5, "TCP_KEEPCNT": 3}
FAILED, STOPPED, DONE = "failed", "stopped", "done"


class Line:
    """A socket to another process.

    Args:
        name: of that process, as it begins an error.
    """

    def __init__(self, connection: socket.socket, name: str) -> None:
        self.socket, self.name = connection, name
        connection.setblocking(True)
        with suppress(OSError):
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            for option, value in _KEEPALIVE.items():
                if hasattr(socket, option):
                    connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)

    def send(self, data: bytes, kind: bytes = _DATA) -> None:
        """Send one message.

        Raises:
            RankLost, KeyboardInterrupt: the other process has ended; as ``receive``.
        """
        try:
            self.socket.sendall(_HEAD.pack(kind, len(data)) + data)
        except OSError:
            self.receive_end()

    def receive(self) -> bytes:
        """The next message.

        Raises:
            RankLost: the other process has failed, or ended without a word.
            KeyboardInterrupt: it was stopped.
        """
        kind, size = _HEAD.unpack(self._read(_HEAD.size))
        if size > _MOST_BYTES:
            raise RankLost(f"{self.name} sent what is no message", "Start the run again: its saved state is whole")
        data = self._read(size)
        if kind == _END:
            raise self._ended(json.loads(data))
        return data

    def receive_end(self) -> None:
        """Read on until the other process says how it ended."""
        while True:
            self.receive()

    def check(self) -> None:
        """Raise what ``receive`` would, if the other process has ended and nothing of it is left to receive."""
        if select.select([self.socket], [], [], 0)[0]:
            try:
                kind = self.socket.recv(1, socket.MSG_PEEK)
            except OSError:
                kind = b""
            if kind != _DATA:
                self.receive()

    def _read(self, size: int) -> bytes:
        parts, rest = [], size
        while rest:
            try:
                part = self.socket.recv(min(rest, 1 << 20))
            except OSError:  # a connection that was reset
                part = b""
            if not part:
                raise RankLost(
                    f"{self.name} ended without a word, as a process does that was killed",
                    "Look for what killed it: a lack of host memory (dmesg), or the cluster's limit of time",
                )
            parts.append(part)
            rest -= len(part)
        return b"".join(parts)

    def _ended(self, words: Mapping[str, str]) -> BaseException:
        if words["kind"] == STOPPED:
            return KeyboardInterrupt()
        if words["kind"] == DONE:
            return RankLost(f"{self.name} ended before the others", "Start the run again: its saved state is whole")
        lost = RankLost(f"{self.name}: {words['problem']}", words["fix"])
        lost.is_told = True
        return lost


class Channel:
    """The sockets of one process: of the first one to every other, of another to the first.

    Args:
        lines: by rank.
    """

    def __init__(self, rank: int, size: int, lines: Mapping[int, Line]) -> None:
        self.rank, self.size, self.lines = rank, size, dict(lines)
        self._has_ended = False

    def broadcast(self, data: bytes) -> bytes:
        """The first process's bytes, on every process."""
        if self.rank:
            return self.lines[0].receive()
        for line in self.lines.values():
            line.send(data)
        return data

    def collect(self, data: bytes) -> list[bytes]:
        """The bytes of all processes on the first one, in the order of their ranks; nothing on the others."""
        if self.rank:
            self.lines[0].send(data)
            return []
        arrived = {0: data}
        while missing := {line.socket: rank for rank, line in self.lines.items() if rank not in arrived}:
            for ready in select.select(list(missing), [], [])[0]:
                rank = missing[ready]
                arrived[rank] = self.lines[rank].receive()
        return [arrived[rank] for rank in range(self.size)]

    def check(self) -> None:
        """Raise ``RankLost`` or ``KeyboardInterrupt`` if another process has ended."""
        for line in self.lines.values():
            line.check()

    def wait_for_news(self, seconds: float) -> None:
        """Raise as ``check``, if another process ends within this time."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            self.check()
            time.sleep(0.05)

    def end(self, kind: str, problem: str = "", fix: str = "") -> None:
        """Say to the others how this process ends. Those that have ended do not hear it."""
        if self._has_ended:
            return
        self._has_ended = True
        words = json.dumps({"kind": kind, "problem": problem, "fix": fix}).encode()
        for line in self.lines.values():
            with suppress(OSError):
                line.socket.settimeout(5)
                line.socket.sendall(_HEAD.pack(_END, len(words)) + words)
                line.socket.shutdown(socket.SHUT_WR)


def listen(host: str) -> tuple[socket.socket, int, str]:
    """A socket on a free port that other processes connect to, its port, and a word that they must know.

    Args:
        host: from where they come: ``127.0.0.1``, or any other address.
    """
    listener = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_STREAM)
    listener.bind((host, 0))
    listener.listen(1024)
    return listener, int(listener.getsockname()[1]), secrets.token_hex(16)


def accept(listener: socket.socket, word: str, size: int, seconds: float) -> Channel:
    """The channel of the first process, once all others have connected.

    Raises:
        RankLost: one did not within this time.
    """
    deadline = time.monotonic() + seconds
    lines: dict[int, Line] = {}
    with listener:
        while len(lines) < size - 1:
            listener.settimeout(max(0.01, deadline - time.monotonic()))
            try:
                connection, _ = listener.accept()
                connection.settimeout(10)
                hello = json.loads(_exactly(connection, 512))
                if hmac.compare_digest(str(hello["word"]), word):
                    rank = int(hello["rank"])
                    lines[rank] = Line(connection, f"Rank {rank} (process {hello['pid']} on {hello['host']})")
            except TimeoutError:
                if time.monotonic() >= deadline:
                    missing = ", ".join(str(rank) for rank in range(1, size) if rank not in lines)
                    raise not_come(missing, size, seconds) from None
            except (OSError, ValueError, KeyError, TypeError):
                continue  # not one of ours
    return Channel(0, size, lines)


def call(host: str, port: int, word: str, rank: int, size: int, pid: int, seconds: float) -> Channel:
    """The channel of another process than the first."""
    connection = socket.create_connection((host, port), timeout=seconds)
    hello = json.dumps({"word": word, "rank": rank, "pid": pid, "host": socket.gethostname()[:200]})
    connection.sendall(hello.encode().ljust(512))
    return Channel(rank, size, {0: Line(connection, f"Rank 0 (on {host})")})


def not_come(missing: str, size: int, seconds: float) -> RankLost:
    """The error for processes that did not begin."""
    return RankLost(
        f"Of the {size} processes of this run, rank {missing} did not come within {seconds:.0f} s",
        "Look at what it printed, and whether its machine reaches the address in MASTER_ADDR",
    )


def _exactly(connection: socket.socket, size: int) -> bytes:
    parts: list[bytes] = []
    while (rest := size - sum(map(len, parts))) > 0:
        part = connection.recv(rest)
        if not part:
            raise OSError("closed")
        parts.append(part)
    return b"".join(parts)

"""How do the processes of a run talk on the host, and notice that one has died or hangs? Each with the first one.

A process that ends by an error says which, so that the first one can print it.
"""

from __future__ import annotations

import hmac
import json
import secrets
import socket
import threading
import time
from collections.abc import Mapping
from contextlib import suppress

from k5train.parallel import line as of_line
from k5train.parallel.line import FAILED, STOPPED, Line, Pulse
from k5train.parallel.ranks import RankLost


class Channel:
    """The sockets of one process: of the first one to every other, of another to the first.

    Args:
        lines: by rank.
        pulse: of this process, which its lines know.
    """

    def __init__(self, rank: int, size: int, lines: Mapping[int, Line], pulse: Pulse) -> None:
        self.rank, self.size, self.lines, self.pulse = rank, size, dict(lines), pulse
        self._is_ended = threading.Event()
        threading.Thread(target=self._beat, name="k5-pulse", daemon=True).start()

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
        while missing := {rank: line for rank, line in self.lines.items() if rank not in arrived}:
            ready = [rank for rank, line in missing.items() if line.has_message()]
            arrived.update({rank: self.lines[rank].receive() for rank in ready})
            if not ready:
                of_line.wait_for(list(missing.values()))
        return [arrived[rank] for rank in range(self.size)]

    def check(self) -> None:
        """Raise ``RankLost`` or ``KeyboardInterrupt`` if another process has ended or hangs."""
        for line in self.lines.values():
            line.check()

    def behind(self) -> str:
        """The names of processes that have begun fewer sums than this one, as far as it knows."""
        return ", ".join(line.name for line in self.lines.values() if line.place < self.pulse.place)

    def wait_for_news(self, seconds: float) -> None:
        """Raise as ``check``, if another process ends within this time."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            self.check()
            time.sleep(0.05)

    def end(self, kind: str, problem: str = "", fix: str = "") -> None:
        """Say to the others how this process ends. Those that have ended do not hear it."""
        if self._is_ended.is_set():
            return
        self._is_ended.set()
        for line in self.lines.values():
            line.end({"kind": kind, "problem": problem, "fix": fix})

    def _beat(self) -> None:
        while not self._is_ended.wait(of_line.BEAT):
            self.pulse.beats += 1
            for line in self.lines.values():
                line.beat()


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
        RankLost: one did not within this time, or counts other processes.
    """
    lines: dict[int, Line] = {}
    pulse, came = Pulse(), list[Line]()
    try:
        with listener:
            _let_in(listener, word, size, seconds, lines, pulse, came)
    except BaseException as error:
        words = {"problem": error.problem, "fix": error.fix} if isinstance(error, RankLost) else {}
        for line in came:
            kind = STOPPED if isinstance(error, KeyboardInterrupt) else FAILED
            line.end({"kind": kind, "problem": "", "fix": "", **words})
            with suppress(RankLost):
                line.take_in()  # to close a socket with something unread would take back what was sent
            line.socket.close()
        raise
    return Channel(0, size, lines, pulse)


def _let_in(
    listener: socket.socket, word: str, size: int, seconds: float, lines: dict[int, Line], pulse: Pulse,
    came: list[Line],
) -> None:  # fmt: skip
    deadline = time.monotonic() + seconds
    while len(lines) < size - 1:
        listener.settimeout(max(0.01, min(of_line.BEAT, deadline - time.monotonic())))
        try:
            connection, _ = listener.accept()
            connection.settimeout(10)
            hello = json.loads(_exactly(connection, 512))
            if hmac.compare_digest(str(hello["word"]), word):
                rank = int(hello["rank"])
                came.append(Line(connection, f"Rank {rank} (process {hello['pid']} on {hello['host']})", pulse))
                _check_place(came[-1].name, int(hello["size"]), rank, size, lines)
                lines[rank] = came[-1]
        except TimeoutError:
            if time.monotonic() >= deadline:
                missing = ", ".join(str(rank) for rank in range(1, size) if rank not in lines)
                raise not_come(missing, size, seconds) from None
            for line in lines.values():  # those that have come wait for longer than a silent process may be
                line.beat()
        except (OSError, ValueError, KeyError, TypeError):
            continue  # not one of ours


def call(host: str, port: int, word: str, rank: int, size: int, pid: int, seconds: float) -> Channel:
    """The channel of another process than the first."""
    connection = socket.create_connection((host, port), timeout=seconds)
    hello = json.dumps({"word": word, "rank": rank, "size": size, "pid": pid, "host": socket.gethostname()[:200]})
    connection.sendall(hello.encode().ljust(512))
    pulse = Pulse()
    return Channel(rank, size, {0: Line(connection, f"Rank 0 (on {host})", pulse)}, pulse)


def _check_place(name: str, its_size: int, rank: int, size: int, lines: Mapping[int, Line]) -> None:
    """Refuse a process that was started as one of others: two commands with one address and port, say."""
    if its_size != size or not 0 < rank < size:
        found = f"is one of {its_size}"
    elif rank in lines:
        found = "has come, and so has another rank of this number"
    else:
        return
    raise RankLost(
        f"{name} {found}, and rank 0 waits for {size} processes",
        "Give every process the same WORLD_SIZE and a RANK of its own, and every run a MASTER_PORT of its own",
    )


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

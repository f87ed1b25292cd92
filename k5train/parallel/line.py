"""How does a message pass between two processes of a run, and when is the other one given up? By a socket.

The system closes the sockets of a process that ends, however it ends, so the other one knows at once. One that hangs
closes nothing: a thread of each process says every second that it lives, and one that is silent for a minute is given
up. A minute is sixty seconds in which this process itself was running, so that a machine or a job that is put to sleep
as a whole wakes up as it was.
"""

from __future__ import annotations

import json
import select
import socket
import struct
import threading
from collections import deque
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass

from k5cache.shared import interrupt
from k5train.parallel.ranks import RankLost

BEAT = 1.0
"""Seconds between two signs of life."""
SILENT = 60
"""So many missing signs of life end a run. A process in a long call of a library may miss some, but hardly ten."""
FAILED, STOPPED, DONE = "failed", "stopped", "done"
_HEAD = struct.Struct("!cQ")
_DATA, _END, _BEAT = b"d", b"e", b"b"  # of a beat, the head's number is not a size but ``Pulse.place``
_MOST_BYTES = 1 << 34
_CHUNK = 1 << 20
# A machine that loses its power closes no socket. It is given up after 15 + 3 * 5 seconds without an answer.
_KEEPALIVE = {"TCP_KEEPIDLE": 15, "TCP_KEEPINTVL": 5, "TCP_KEEPCNT": 3}


@dataclass
class Pulse:
    """What this process tells the others of itself."""

    beats: int = 0
    """Signs of life that it has given: the seconds in which it was running."""
    place: int = 0
    """How many sums over all processes it has begun."""


class Line:
    """A socket to another process.

    Args:
        name: of that process, as it begins an error.
        pulse: of this process.
    """

    def __init__(self, connection: socket.socket, name: str, pulse: Pulse) -> None:
        self.socket, self.name = connection, name
        self.place = 0
        """The other process's ``Pulse.place``, as of its last sign of life."""
        self._pulse, self._heard = pulse, pulse.beats
        self._arrived, self._messages = bytearray(), deque[tuple[bytes, bytes]]()
        self._is_closed = self._is_ended = self._is_cut = False
        self._sending = threading.Lock()
        connection.setblocking(False)
        with suppress(OSError):
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            for option, value in _KEEPALIVE.items():
                if hasattr(socket, option):
                    connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)

    def send(self, data: bytes) -> None:
        """Send one message.

        Raises:
            RankLost, KeyboardInterrupt: the other process has ended or hangs; as ``receive``.
        """
        # Nothing can follow half a message: a first Ctrl-C waits.
        with interrupt.deferred(), self._sending:
            rest, self._is_cut = memoryview(_HEAD.pack(_DATA, len(data)) + data), True
            while rest:
                try:
                    rest = rest[self.socket.send(rest[:_CHUNK]) :]
                except BlockingIOError:
                    wait_for([self], is_to_send=True)
                except OSError:
                    break
            self._is_cut = bool(rest)
        while rest:  # until the other process says how it ended
            self.receive()

    def receive(self) -> bytes:
        """The next message.

        Raises:
            RankLost: the other process has failed, ended without a word, or hangs.
            KeyboardInterrupt: it was stopped.
        """
        while not self._messages and not self._is_closed:
            wait_for([self])
        self._raise_if_ended()
        return self._messages.popleft()[1]

    def has_message(self) -> bool:
        """Whether ``receive`` returns or raises at once."""
        return bool(self._messages) or self._is_closed

    def check(self) -> None:
        """Raise what ``receive`` would, if the other process hangs, or has ended and nothing is left to receive."""
        self.take_in()
        self._raise_if_ended()

    def take_in(self) -> None:
        """Read all that has come, without waiting. Raises ``RankLost`` if nothing has come for too long."""
        self._read()
        silent = self._pulse.beats - self._heard
        if silent >= SILENT and not self._is_closed:
            raise RankLost(
                f"{self.name} hangs: it has given no sign of life for {silent * BEAT:.0f} s",
                "See whether it was stopped (SIGSTOP, a debugger), or its machine hangs or is out of memory",
            )

    def beat(self) -> None:
        """Say that this process lives, unless a message that is being sent says so."""
        if not self._sending.acquire(blocking=False):
            return
        try:
            # What can be written at all has room for a third of the buffer: this is sent whole.
            if not self._is_ended and not self._is_cut and select.select([], [self.socket], [], 0)[1]:
                with suppress(OSError):
                    self.socket.send(_HEAD.pack(_BEAT, self._pulse.place))
        finally:
            self._sending.release()

    def end(self, words: Mapping[str, str]) -> None:
        """Say how this process ends. A process that has ended does not hear it."""
        data = json.dumps(words).encode()
        with self._sending, suppress(OSError):
            self._is_ended = True
            if not self._is_cut:
                self.socket.settimeout(5)
                self.socket.sendall(_HEAD.pack(_END, len(data)) + data)
            self.socket.shutdown(socket.SHUT_WR)
        with suppress(OSError):
            self.socket.setblocking(False)  # what the other one says can still be read

    def _read(self) -> None:
        while not self._is_closed:
            try:
                part = self.socket.recv(_CHUNK)
            except BlockingIOError:
                break
            except OSError:  # a connection that was reset
                part = b""
            self._is_closed = not part
            self._arrived += part
            self._heard = self._pulse.beats
        while len(self._arrived) >= _HEAD.size:
            kind, number = _HEAD.unpack_from(self._arrived)
            size = 0 if kind == _BEAT else number
            if kind not in (_DATA, _END, _BEAT) or size > _MOST_BYTES:
                raise RankLost(f"{self.name} sent what is no message", "Start the run again: its saved state is whole")
            if len(self._arrived) < _HEAD.size + size:
                break
            if kind == _BEAT:
                self.place = number
            else:
                self._messages.append((kind, bytes(self._arrived[_HEAD.size : _HEAD.size + size])))
            del self._arrived[: _HEAD.size + size]

    def _raise_if_ended(self) -> None:
        if not self._messages and self._is_closed:
            raise RankLost(
                f"{self.name} ended without a word, as a process does that was killed",
                "Look for what killed it: a lack of host memory (dmesg), or the cluster's limit of time",
            )
        if self._messages and self._messages[0][0] == _END:
            raise self._ended(json.loads(self._messages[0][1]))

    def _ended(self, words: Mapping[str, str]) -> BaseException:
        if words["kind"] == STOPPED:
            return KeyboardInterrupt()
        if words["kind"] == DONE:
            return RankLost(f"{self.name} ended before the others", "Start the run again: its saved state is whole")
        lost = RankLost(f"{self.name}: {words['problem']}", words["fix"])
        lost.is_told = True
        return lost


def wait_for(lines: Sequence[Line], is_to_send: bool = False) -> None:
    """Wait up to a second until something comes from one of these, or something can be sent.

    Raises:
        RankLost: one of the processes hangs.
    """
    sockets = [line.socket for line in lines]
    select.select(sockets, sockets if is_to_send else [], [], BEAT)
    for line in lines:
        line.take_in()

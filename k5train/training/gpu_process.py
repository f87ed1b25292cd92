"""A process that works with one GPU for this one: start it, give it orders, hear what it says and how it ends."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from k5cache.shared import system
from k5cache.shared.gpus import Slot

COLUMNS = "400"
"""No line of a worker is folded before it is printed here."""
_LAST_LINES = 3


@dataclass
class Event:
    """Something that a worker says: one of its answers, a ``line`` on its stderr, or that it is ``gone``."""

    worker: GpuProcess
    kind: str
    facts: Mapping[str, Any] = field(default_factory=dict)


class GpuProcess:
    """A process that sees one GPU. It reads orders from its stdin and answers on its stdout, JSON a line.

    It is in a session of its own, so that Ctrl-C at the terminal reaches this process alone, which passes it on.

    Args:
        command: what to start.
        hear: called with every event, from two threads.
        env: further variables.
    """

    def __init__(
        self,
        command: Sequence[str],
        gpu: Slot,
        name: str,
        hear: Callable[[Event], object],
        env: Mapping[str, str] | None = None,
    ) -> None:
        self.gpu, self.name, self._hear = gpu, name, hear
        self.last_lines: list[str] = []
        pipe = subprocess.PIPE
        env = {
            **system.environment(),
            **gpu.env,
            **(env or {}),
            "COLUMNS": COLUMNS,
            "PYTHONUNBUFFERED": "1",
            "NO_COLOR": "1",
        }
        self._process = system.start_apart(command, stdin=pipe, stdout=pipe, stderr=pipe, env=env, cwd=Path.cwd())
        stdin, stdout, stderr = self._process.stdin, self._process.stdout, self._process.stderr
        assert stdin is not None
        self._stdin = stdin
        self._lines = threading.Thread(target=self._read_lines, args=(stderr,), daemon=True)
        self._lines.start()
        threading.Thread(target=self._read_answers, args=(stdout,), daemon=True).start()

    def order(self, what: str, **facts: object) -> None:
        """Tell it to do something. One that is gone says so itself."""
        with suppress(OSError, ValueError):
            self._stdin.write(json.dumps({"do": what, **facts}).encode() + b"\n")
            self._stdin.flush()

    def kill(self) -> None:
        """End it at once, with what it started."""
        system.end_with_children(self._process)
        self.close()

    def close(self) -> None:
        """Give no more orders. If it was not told to end, it stops as if told to."""
        with suppress(OSError):
            self._stdin.close()

    def wait(self, seconds: float) -> None:
        """Let it end by itself; after so long, end it."""
        try:
            self._process.wait(seconds)
        except subprocess.TimeoutExpired:
            self.kill()

    @property
    def how_it_ended(self) -> str:
        """In words, with the last that it printed if it ended by itself."""
        code = self._process.poll()
        if code is not None and code < 0:
            out_of_memory = ", as the system does when memory runs out" if code == -9 else ""
            return f"its process was killed by signal {-code}{out_of_memory}"
        said = f": {self.last_lines[-1].strip()}" if self.last_lines else ""
        return f"its process ended with exit code {code}{said}"

    def _read_lines(self, stderr: BinaryIO) -> None:
        with stderr:
            for raw in stderr:
                line = raw.decode("utf-8", "backslashreplace").rstrip()
                if line:
                    self.last_lines = [*self.last_lines, line][-_LAST_LINES:]
                    self._hear(Event(self, "line", {"text": line}))

    def _read_answers(self, stdout: BinaryIO) -> None:
        with stdout:
            for line in stdout:
                with suppress(ValueError):
                    answer = json.loads(line)
                    self._hear(Event(self, answer.pop("event"), answer))
        self._process.wait()
        self._lines.join(1.0)
        self._hear(Event(self, "gone"))


def module(name: str) -> list[str]:
    """The command that runs one of our modules. ``-P``: a file of the user's named random.py is not imported."""
    return [sys.executable, "-P", "-m", name]

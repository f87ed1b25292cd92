"""How does ``--gpus N`` start a process on each GPU? The same command line again, with torchrun's variables.

The first process has this terminal. The others are silent: what one says as it fails the first one prints, and what is
left of its output is shown if it died. Ctrl-C goes to all of them, once.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import IO

from k5cache.shared import console, progress_file, system
from k5cache.shared.errors import RunError
from k5train.parallel.world import LAUNCHED

PATIENCE = 30.0
"""Seconds for which processes may end by themselves after one has failed. Then they are asked to."""
MORE_PATIENCE = 600.0
"""Seconds until the first process is ended, which may be saving the state on a slow disk."""
PATIENCE_WITH_THE_REST = 10.0
"""The same for both with the others once the first one has ended: they have nothing to save."""
_LINES = 12  # of a process that died
_REPORTED = progress_file.VARIABLE


@dataclass
class _Child:
    rank: int
    process: subprocess.Popen[bytes]
    said: deque[str] = field(default_factory=lambda: deque(maxlen=_LINES))
    """The last lines of its output."""
    reader: threading.Thread | None = None

    def listen(self) -> None:
        """Keep reading its output, so that it never waits for a reader."""
        if self.process.stderr is not None:
            self.reader = threading.Thread(target=self._read, args=[self.process.stderr], daemon=True)
            self.reader.start()

    def end(self) -> None:
        """End it, if it is still running."""
        system.end_with_children(self.process)
        if self.reader:
            self.reader.join(5)
        for pipe in (self.process.stdin, self.process.stderr):
            if pipe:
                pipe.close()

    def _read(self, output: IO[bytes]) -> None:
        for line in output:
            if text := line.decode("utf-8", "replace").rstrip():
                self.said.append(text)


def launch(command: Sequence[str], count: int, env: Mapping[str, str] | None = None) -> int:
    """Run a command in ``count`` processes, and wait for all of them.

    Args:
        env: instead of this process's variables.

    Returns:
        the exit code of the first process.

    Raises:
        RunError: a process was killed, and the first one could not say so.
    """
    if os.name == "nt":
        raise RunError("--gpus needs NCCL, which Windows does not have", "Use WSL, or leave --gpus out")
    shared = {**(os.environ if env is None else env), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port()),
              "WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count), LAUNCHED: str(os.getpid())}  # fmt: skip
    children: list[_Child] = []
    try:
        for rank in range(count):
            children.append(_start(command, rank, shared))  # noqa: PERF401 (those that began are ended if one does not)
        _wait(children)
    finally:
        for child in children:
            child.end()
    return _code(children)


def _start(command: Sequence[str], rank: int, shared: Mapping[str, str]) -> _Child:
    own = {**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)}
    reporter = progress_file.reporter()
    if rank == 0 and reporter:
        own[_REPORTED] = str(reporter.path)
    # Their input is a pipe that nobody writes to. It ends if this process is killed, and then so do they.
    silent = {} if rank == 0 else {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE}
    process = system.start_apart(command, is_in_same_console=True, stdin=subprocess.PIPE, env=own, **silent)
    child = _Child(rank, process)
    child.listen()
    return child


def _wait(children: Sequence[_Child]) -> None:
    """Wait for all processes. A signal to this one goes to all of them, once each time it comes; a third ends them."""
    num_signals, is_asked, failed_at, left_at = 0, False, float("inf"), float("inf")
    while running := [child for child in children if child.process.poll() is None]:
        try:
            now, is_first_there = time.monotonic(), children[0] in running
            if any(child.process.poll() for child in children):
                failed_at = min(now, failed_at)
            if not is_first_there:
                left_at = min(now, left_at)
            waited = now - failed_at if is_first_there else now - left_at
            patience = PATIENCE if is_first_there else PATIENCE_WITH_THE_REST
            # Whoever was asked by a signal is not asked again: a second one would cut short what is being saved.
            if waited > patience and not is_asked and not num_signals:
                is_asked = True
                _interrupt(running)
            if num_signals > 2 or waited > patience + (MORE_PATIENCE if is_first_there else PATIENCE_WITH_THE_REST):
                for child in running:
                    system.end_with_children(child.process)
            time.sleep(0.05)
        except KeyboardInterrupt:
            num_signals += 1
            _interrupt(running)


def _interrupt(children: Sequence[_Child]) -> None:
    for child in children:
        with suppress(OSError):
            system.interrupt_child(child.process)


def _code(children: Sequence[_Child]) -> int:
    """The exit code of the whole, after what a process that died had to say. It is the first one's, which has the run's
    files, if it has one."""
    first = children[0].process.returncode
    for child in children[1:]:
        if child.process.returncode < 0 or child.process.returncode == 1 or first < 0:
            for line in child.said:
                console.note(f"rank {child.rank}: {line}")
    if first < 0:
        killer = signal.Signals(-first).name
        raise RunError(
            f"Rank 0 was ended by {killer}, and with it the run; its last saved state stays",
            f"To go on, run the same command again: {console.this_command()}",
        )
    return first


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def this_program(*more: str) -> list[str]:
    """The command line of this process, for another one like it.

    Args:
        more: arguments that were not given, and that a process without a terminal cannot ask for.
    """
    return [sys.executable, "-m", "k5train", *sys.argv[1:], *more]

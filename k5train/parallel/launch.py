"""How does ``--gpus N`` start a process on each GPU? The same command line again, with torchrun's variables.

The first process has this terminal. The others are silent: what one says as it fails the first one prints, and what is
left of its output is shown if it died, or if the first one does not end. Ctrl-C goes to all of them, and a second one
as a word on their stdin: for them all signals are one, since a cluster and this process send them the same.
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
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import IO

from k5cache.shared import console, interrupt, progress_file, system
from k5cache.shared.errors import RunError
from k5train.parallel.world import HURRY, LAUNCHED

PATIENCE = 30.0
"""Seconds for which processes may end by themselves after one has failed. Then they are asked to."""
MORE_PATIENCE = 600.0
"""Seconds after that until the first process is ended, which may be saving the state on a slow disk."""
PATIENCE_TO_SPEAK = 5.0
"""Seconds until this process says what is wrong, because the first one does not."""
PATIENCE_WITH_THE_REST = 10.0
"""The same for both with the others once the first one has ended: they have nothing to save."""
_LINES = 12  # of a process that died
_ENDS = (0, 2, console.STOPPED)  # exit codes of processes that have nothing to add to what the first one says
_REPORTED = progress_file.VARIABLE


@dataclass
class _Child:
    rank: int
    process: subprocess.Popen[bytes]
    said: deque[str] = field(default_factory=lambda: deque(maxlen=_LINES))
    """The last lines of its output."""
    has_spoken: bool = False
    was_killed: bool = False
    """By this process."""
    reader: threading.Thread | None = None

    def listen(self) -> None:
        """Keep reading its output, so that it never waits for a reader."""
        if self.process.stderr is not None:
            self.reader = threading.Thread(target=self._read, args=[self.process.stderr], daemon=True)
            self.reader.start()

    @property
    def has_failed(self) -> bool:
        """Whether it has ended, and not well."""
        return bool(self.process.poll())

    @property
    def how_it_ended(self) -> str:
        """In words."""
        code = self.process.returncode
        if self.was_killed:
            return "did not end when it was asked to, and was killed"
        return f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"

    def speak(self) -> None:
        """Print the last that it said, once, and how it ended."""
        if not self.has_spoken:
            self.has_spoken = True
            for line in self.said:
                console.note(f"rank {self.rank}: {line}")
            console.note(f"rank {self.rank} {self.how_it_ended}")

    def interrupt(self) -> None:
        """Ask it to stop."""
        with suppress(OSError):
            system.interrupt_child(self.process)

    def hurry(self) -> None:
        """Ask it to stop at once."""
        with suppress(OSError):
            assert self.process.stdin is not None
            self.process.stdin.write(HURRY)
            self.process.stdin.flush()

    def kill(self) -> None:
        """End it, if it is still running."""
        self.was_killed = self.was_killed or self.process.poll() is None
        system.end_with_children(self.process)

    def close(self) -> None:
        """End it, and read the rest of what it said."""
        self.kill()
        if self.reader:
            self.reader.join(5)
        for pipe in (self.process.stdin, self.process.stderr):
            with suppress(OSError):
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
        KeyboardInterrupt: stopped, before the first process could say so itself.
    """
    if os.name == "nt":
        raise RunError("--gpus needs NCCL, which Windows does not have", "Use WSL, or leave --gpus out")
    shared = {**(os.environ if env is None else env), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port()),
              "WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count), LAUNCHED: str(os.getpid())}  # fmt: skip
    children: list[_Child] = []
    with interrupt.counted() as num_signals:
        try:
            for rank in range(count):
                children.append(_start(command, rank, shared))  # noqa: PERF401 (those that began are ended if one does not)
            _wait(children, num_signals)
            is_stopped = bool(num_signals())
        finally:
            for child in children:
                child.close()
    return _code(children, is_stopped)


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


def _wait(children: Sequence[_Child], num_signals: Callable[[], int]) -> None:
    """Wait for all processes. A signal to this one goes to all of them, a second hurries them, a third ends them."""
    first, num_passed_on, is_asked = children[0], 0, False
    failed_at = left_at = float("inf")
    while running := [child for child in children if child.process.poll() is None]:
        now, is_first_there = time.monotonic(), first in running
        failed = [child for child in children if child.has_failed]
        failed_at = min(now, failed_at) if failed else failed_at
        left_at = left_at if is_first_there else min(now, left_at)
        waited = now - (failed_at if is_first_there else left_at)
        patience = PATIENCE if is_first_there else PATIENCE_WITH_THE_REST
        if is_first_there and waited > PATIENCE_TO_SPEAK and not all(child.has_spoken for child in failed):
            for child in failed:
                child.speak()
            left = console.human_seconds(PATIENCE + MORE_PATIENCE)
            console.warn(f"Rank 0 (process {first.process.pid}) has not ended yet. It is waited for, up to {left}")
        if num_passed_on < num_signals():
            num_passed_on += 1
            for child in running:
                child.interrupt() if num_passed_on == 1 else child.hurry()
        elif waited > patience and not is_asked:
            is_asked = True
            for child in running:
                child.interrupt()
        if num_passed_on > 2 or waited > patience + (MORE_PATIENCE if is_first_there else PATIENCE_WITH_THE_REST):
            for child in running:
                child.kill()
        time.sleep(0.05)


def _code(children: Sequence[_Child], is_stopped: bool) -> int:
    """The exit code of the whole, after what a process that died had to say. It is the first one's, which has the run's
    files, if it has one."""
    code = children[0].process.returncode
    for child in children[1:]:
        if child.process.returncode not in _ENDS or (code < 0 and child.has_failed):
            child.speak()
    again = f"To go on, run the same command again: {console.this_command()}"
    if code < 0 and is_stopped:
        raise KeyboardInterrupt(f"Stopped at once. A state that was saved before stays. {again}")
    if code < 0:
        problem = f"Rank 0 {children[0].how_it_ended}, and with it the run. A state that was saved before stays"
        raise RunError(problem, again)
    failed = [child for child in children[1:] if child.has_failed and not child.was_killed]
    ended = "; ".join(f"rank {child.rank} {child.how_it_ended}" for child in failed)
    lost = [child for child in failed if child.process.returncode != console.STOPPED]
    if code == console.STOPPED and lost and not is_stopped:  # asked by this process, not by a person
        raise RunError(f"The run was stopped because {ended}", f"See what it printed above. {again}")
    if code == 0 and failed and not is_stopped:
        raise RunError(
            f"Rank 0 has finished the run, whose files are whole, but {ended}",
            "See what it printed above, and the machine's log (dmesg). Nothing has to be trained again",
        )
    return code


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

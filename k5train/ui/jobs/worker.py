"""One job: runs its command with one GPU, keeps its log small, passes on what is to stop it, writes how it ended.

``python -m k5train.ui.jobs.worker FOLDER`` in a session of its own, so that it outlives the page. The command writes
into the log itself, so that it outlives this process if that is killed.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from k5cache.shared import system
from k5train.ui.jobs import folder as files
from k5train.ui.jobs import queue
from k5train.ui.jobs.job import PROGRAMS, now
from k5train.ui.project import Project

PROGRESS_VARIABLE = "K5_PROGRESS"
"""``k5cache/shared/progress_file.py``, which is not imported here: it needs rich."""
MOST_LOG_BYTES = 4 << 20
KEPT_BYTES = 1 << 20
"""The end of a log that grew too long, kept beside the new one."""
SECONDS = 0.25
MARK_SECONDS = 10.0
_COLOURS = ("FORCE_COLOR", "CLICOLOR_FORCE", "TTY_COMPATIBLE", "TTY_INTERACTIVE", "JUPYTER_COLUMNS")


class Worker:
    """Carries out one job.

    Args:
        folder: the job's.
        project: where its command runs.
    """

    def __init__(self, folder: Path, project: Path) -> None:
        self.folder, self.project = folder, project
        self.number_of_stops = 0
        self.is_at_once = False
        self._is_told = False
        self._over = threading.Event()
        self._marked = time.monotonic()

    def run(self) -> None:
        """Start the command, watch it until it ends, and write down how."""
        job, started = files.read(self.folder, files.JOB) or {}, files.read(self.folder, files.STARTED) or {}
        argv, began = job.get("argv"), time.monotonic()
        for number in system.stop_signals():  # and so the command does not ignore them, if this process was to
            signal.signal(number, self._on_signal)
        if not isinstance(argv, list) or not argv or argv[0] not in PROGRAMS:
            self._end({"exit_code": None, "problem": "job.json is not the file that was written"}, began)
            return
        if files.read(self.folder, files.STOP):
            self._end({"exit_code": None, "is_stopped": True, "problem": "It was stopped before it began"}, began)
            return
        log = system.open_bytes(self.folder / files.LOG, os.O_RDWR | os.O_CREAT | os.O_APPEND, is_followed=False)
        try:
            self._carry_out(command_of(argv), variables(started, self.folder), log, began)
        finally:
            os.close(log)

    def _carry_out(self, command: list[str], env: dict[str, str], log: int, began: float) -> None:
        try:
            process = system.start_apart(
                command,
                is_in_same_console=True,
                cwd=self.project,
                env=env,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )
        except OSError as error:
            self._end({"exit_code": None, "problem": f"It could not be started: {error.strerror or error}"}, began)
            return
        self._write(files.WORKER, {"worker": files.process_of(os.getpid()), "command": files.process_of(process.pid)})
        waiting = threading.Thread(target=self._wait, args=(process,), daemon=True)
        waiting.start()
        while not self._over.wait(SECONDS):
            self._look(process, log)
        waiting.join()
        code = process.returncode
        end: dict[str, Any] = {"exit_code": code if code >= 0 else None, "signal": -code if code < 0 else None}
        self._end({**end, "is_stopped": self.number_of_stops > 0 or self._is_told}, began)

    def _wait(self, process: subprocess.Popen[bytes]) -> None:
        process.wait()
        self._over.set()

    def _look(self, process: subprocess.Popen[bytes], log: int) -> None:
        """Pass on what is to stop the command, keep the log small, and show other machines that this process lives."""
        told = files.read(self.folder, files.STOP)
        if told is not None and told.get("at_once") is True and not self.is_at_once:
            self.is_at_once = self._is_told = True
            system.end_with_children(process)
        elif told is not None and not self._is_told:
            self._is_told = True
            system.interrupt_child(process)
        elif self.number_of_stops > 0:
            self.number_of_stops -= 1
            self._is_told = True
            system.interrupt_child(process)
        shorten(log, self.folder)
        if time.monotonic() > self._marked + MARK_SECONDS:
            self._marked = time.monotonic()
            with suppress(OSError):
                os.utime(self.folder / files.WORKER)

    def _on_signal(self, number: int, frame: object) -> None:
        self.number_of_stops += 1

    def _end(self, end: Mapping[str, Any], began: float) -> None:
        self._write(files.ENDED, {**end, "seconds": time.monotonic() - began, "at": now()["at"]})

    def _write(self, name: str, document: Mapping[str, Any]) -> None:
        """Write one of the job's files. If its folder was deleted, there is nobody to tell."""
        with suppress(OSError):
            files.write(self.folder, name, document)


def command_of(argv: list[str]) -> list[str]:
    """How this Python runs one of our programs. ``-P``: a file of the project's named random.py is not imported."""
    return [sys.executable, "-P", "-m", *argv]


def variables(started: Mapping[str, Any], folder: Path) -> dict[str, str]:
    """The environment of the command: one GPU, plain text at once, and where to write how far it is."""
    env = {name: value for name, value in system.environment().items() if name not in _COLOURS}
    given = started.get("env")
    env |= {str(name): str(value) for name, value in given.items()} if isinstance(given, dict) else {}
    env |= {"PYTHONUNBUFFERED": "1", "PYTHONUTF8": "1", "NO_COLOR": "1", "TERM": "dumb", "COLUMNS": "120"}
    return {**env, PROGRESS_VARIABLE: str(folder / files.PROGRESS)}


def shorten(log: int, folder: Path) -> None:
    """Begin a log anew that has grown too long, and keep its end beside it. The command goes on to append to it."""
    num_bytes = os.fstat(log).st_size
    if num_bytes <= MOST_LOG_BYTES:
        return
    end = system.read_at(log, KEPT_BYTES, num_bytes - KEPT_BYTES)
    os.ftruncate(log, 0)  # first: a full disk has room then
    note = f"... the log had {num_bytes:,} bytes; its last {len(end):,}:\n".encode()
    with suppress(OSError):
        path = folder / files.OLDER_LOG
        path.unlink(missing_ok=True)
        with path.open("xb") as file:
            file.write(note + end)


def main() -> None:
    """Carry out the job whose folder the command line names, then let the next one begin."""
    folder = Path(sys.argv[1])
    project = Project(folder.parents[2])
    try:
        Worker(folder, project.root).run()
    except Exception as error:  # of any kind: nobody else can tell how the job ended
        problem = f"The process that watches the command failed: {type(error).__name__}: {error}"
        with suppress(OSError):
            files.write(folder, files.ENDED, {"exit_code": None, "problem": problem[:500], **now()})
    finally:
        if project.root.is_dir() and folder.parent.is_dir():
            queue.advance(project)


if __name__ == "__main__":
    main()

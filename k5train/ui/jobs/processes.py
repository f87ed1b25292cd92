"""Which k5cache and k5train processes run on this machine that the queue did not start, and which may be stopped?"""

from __future__ import annotations

import time
from collections.abc import Mapping, MutableMapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path, PurePath
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

from k5cache.shared import system
from k5cache.shared.errors import RunError
from k5cache.shared.lock import Holder, holder
from k5train.ui import listing
from k5train.ui.jobs.job import PROGRAMS
from k5train.ui.project import Project

if TYPE_CHECKING:
    import psutil

ON_GPU = {
    "k5train": ("run", "resume", "sweep", "sample", "bench", "selftest"),
    "k5cache": ("encode", "prompts", "bench", "selftest"),
}
_WORKERS = {"k5train.training.sweep_worker": ("k5train", "sweep")}
"""What a command starts for each GPU. If the command is killed, these still have their GPUs while they save."""
_SHOWN = 120
_MOST_SECONDS = 20.0
_others: MutableMapping[psutil.Process, float] = WeakKeyDictionary()
"""Processes that were none of ours -> until when that is believed. A page that is open asks every second."""


@dataclass(frozen=True)
class Process:
    """One process that works with models."""

    pid: int
    words: tuple[str, ...]
    """Its command: ``k5train run cache/cats``."""
    variables: Mapping[str, str] | None
    """Its environment; None if it may not be read."""

    @property
    def says(self) -> str:
        """What a person calls it."""
        line = " ".join(self.words)
        return f"{line if len(line) <= _SHOWN else line[:_SHOWN] + '...'} (process {self.pid})"


def working(locks: Sequence[Path], folder: Path | None = None) -> list[Process]:
    """The processes that work with models: those of this user, and those of anyone that have one of these locks.

    Args:
        folder: only those that were started in it, or that have a lock.
    """
    import psutil

    holders = {one.pid for path in locks if (one := _holder(path)) and one.is_here}
    user = system.user_id()
    found: list[Process] = []
    for process in psutil.process_iter():
        if process.pid not in holders and _others.get(process, 0.0) > time.monotonic():
            continue
        with suppress(psutil.Error):
            if process.pid not in holders and user is not None and process.uids().effective != user:
                _remember(process)
                continue
            words = command_of(line := process.cmdline())
            if worker := _worker_of(line):
                if not _is_left_alone(process):
                    continue
                words = worker
            elif not uses_gpu(words):
                _remember(process)
                continue
            if not (folder is None or process.pid in holders or _is_in(process, folder)):
                continue
            if system.process_mark(process.pid):
                found.append(Process(process.pid, words, _variables(process)))
    return found


def _remember(process: psutil.Process) -> None:
    """Not to look at a process again for a while: the older it is, the less likely it becomes another command."""
    age = max(0.0, time.time() - process.create_time())
    _others[process] = time.monotonic() + min(age, _MOST_SECONDS)


def command_of(line: Sequence[str]) -> tuple[str, ...]:
    """The program and its arguments, however it was started; nothing if it is not one of ours."""
    for number, word in enumerate(line[:8]):
        if number and line[number - 1] in ("-W", "-X"):
            continue
        if word == "-m":
            name = line[number + 1] if number + 1 < len(line) else ""
            return (name, *line[number + 2 :]) if name in PROGRAMS else ()
        path = PurePath(word.replace("\\", "/"))
        name = path.parent.name if path.name in ("__main__.py", "cli.py") else path.name.removesuffix(".exe")
        if name in PROGRAMS:
            return (name, *line[number + 1 :])
        if number and not word.startswith("-"):  # a script of another program: ours may be among its arguments
            return ()
    return ()


def _worker_of(line: Sequence[str]) -> tuple[str, ...]:
    """The command that starts processes of this command line; nothing if it is not such a process."""
    return next((_WORKERS[name] for word, name in pairwise(line[:8]) if word == "-m" and name in _WORKERS), ())


def _is_left_alone(process: psutil.Process) -> bool:
    """Whether the command that started it is gone. Its parent is then the first process, which may be one of ours."""
    import psutil

    try:
        parent = process.parent()
        return parent is None or not uses_gpu(command_of(parent.cmdline()))
    except psutil.Error:  # gone this moment, or another user's
        return True


def uses_gpu(words: Sequence[str]) -> bool:
    """Whether a command works with models, on a GPU if there is one."""
    if not words:
        return False
    verb = next((word for word in words[1:] if not word.startswith("-")), "")
    return verb in ON_GPU[words[0]] and "--help" not in words


def is_on_processor(words: Sequence[str]) -> bool:
    """Whether a command says that it is for the processor."""
    return "--device=cpu" in words or ("--device", "cpu") in pairwise(words) or "train.device=cpu" in words


def _is_in(process: psutil.Process, folder: Path) -> bool:
    """Whether a process was started in a folder. False where that may not be read."""
    return Path(process.cwd()).is_relative_to(folder)


def _variables(process: psutil.Process) -> Mapping[str, str] | None:
    import psutil

    try:
        return process.environ()
    except (psutil.Error, OSError, ValueError):
        return None


def _holder(lock: Path) -> Holder | None:
    try:
        return holder(lock)
    except OSError:
        return None


def stop_holder(folder: Path) -> None:
    """Send Ctrl-C to the process that has the lock of a run, cache or sweep, from a terminal too.

    Raises:
        RunError: none has it; or it runs on another machine; or it is not surely a process of ours with this lock.
    """
    lock = folder / ".lock"
    found = _holder(lock)
    if found is None:
        raise RunError(f"{folder} is not being worked on", "Reload the page")
    if not found.is_here:
        raise RunError(
            f"Process {found.pid} on {found.host} works on {folder}, and this machine is another one",
            "Press Ctrl-C where it was started",
        )
    if not system.interrupt_process(found.pid, lambda: _has_lock(found.pid, lock)):
        raise RunError(
            f"Process {found.pid} may not be stopped from here: it is another user's, or not surely the one that "
            f"works on {folder}",
            "Press Ctrl-C where it was started",
        )


def _has_lock(pid: int, lock: Path) -> bool:
    """Whether a process is one of ours, of this user, and has this very file open, as no later one of its number."""
    import psutil

    try:
        process = psutil.Process(pid)
        is_users = system.user_id() is None or process.uids().effective == system.user_id()
        line = process.cmdline()
        if not is_users or not (command_of(line) or _is_part_of_ours(line)):
            return False
        return any(_is_same(Path(opened.path), lock) for opened in process.open_files())
    except (psutil.Error, OSError):
        return False


def _is_part_of_ours(line: Sequence[str]) -> bool:
    """Whether a command of ours started it, such as a worker of a sweep, with which the whole sweep stops."""
    return any(word == "-m" and name.partition(".")[0] in PROGRAMS for word, name in pairwise(line[:8]))


def _is_same(one: Path, other: Path) -> bool:
    with suppress(OSError):
        return one.samefile(other)
    return False


def locks_of(project: Project) -> list[Path]:
    """The lock files of a project's runs, caches and sweeps."""
    entries = [*listing.caches(project), *listing.all_runs(project), *listing.sweeps(project)]
    return [entry.path / ".lock" for entry in entries]

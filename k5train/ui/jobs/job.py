"""What is known of a job: what it does, how it goes and how it ended? Read from its folder; nothing is written."""

from __future__ import annotations

import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from k5cache.shared import system
from k5cache.shared.command_line import command
from k5train.ui.jobs import folder as files

State = Literal["waiting", "running", "finished", "failed", "stopped", "lost"]
PROGRAMS = ("k5train", "k5cache")
STOPPED = 130
"""The exit code of a command that Ctrl-C ended."""
WRONG = 2
"""The exit code of an error that the user can correct."""
WITHOUT_GPU = ("diff", "verify", "show", "plan", "report", "compare")
DAMAGED = "A job whose file cannot be read"
_HOST_SECONDS = 120
"""A worker of another machine marks its file every ten seconds."""
_ERROR = re.compile(r"^error: (.*)\n +fix: (.*)$", re.MULTILINE)
_MOST_PROBLEM_BYTES = 16 << 10


@dataclass(frozen=True)
class Job:
    """One job as its folder tells it."""

    id: str
    folder: Path
    label: str
    argv: tuple[str, ...]
    kind: str
    about: str
    """What it is about, as a path from the project: ``runs/cats``, ``cache/cats``."""
    state: State
    order: int
    """The waiting job with the lowest one is the next. A later job has a higher one, whatever the clock said."""
    added: float | None = None
    """Seconds since 1970, as ``since`` and ``ended``, by the clock of then."""
    since: float | None = None
    """When it began; None if it has not."""
    ended: float | None = None
    seen: float | None = None
    """When a lost job surely still ran."""
    seconds: float | None = None
    """How long it has run, of a lost job at least. Of others it does not depend on the clock."""
    exit_code: int | None = None
    signal: int | None = None
    """What ended its process, if that was a signal."""
    gpu: str | None = None
    """``GPU 0``, ``processor``; None if it needs none or has not begun."""
    slots: tuple[str, ...] = ()
    """The keys of its slots: several if its command has ``--gpus``."""
    problem: str | None = None
    """Why it could not be started, or what is lost."""
    is_stopping: bool = False
    """It was told to stop, and has not ended."""
    uses: tuple[str, ...] = ()
    """What it reads, as paths from the project."""
    after: tuple[str, ...] = ()
    """Ids of the jobs that must have finished before it begins."""
    is_ours: bool = False
    """It was put in on this machine, and is as it was then: not a job that came with somebody's project."""
    worker: int | None = None
    """The number of its worker's process, while that runs on this machine."""
    command: int | None = None
    """The number of its command's process, while that runs on this machine."""

    @property
    def log(self) -> Path:
        """What it printed, the last megabytes."""
        return self.folder / files.LOG

    @property
    def needs_gpu(self) -> bool:
        """Whether it waits for a GPU, or for the processor where there is none."""
        return self.kind not in WITHOUT_GPU

    @property
    def num_gpus(self) -> int:
        """How many GPUs it waits for."""
        return gpus_of(self.argv) if self.needs_gpu else 0

    @property
    def is_over(self) -> bool:
        """Whether it has ended and nothing of it runs."""
        return self.state not in ("waiting", "running") and self.command is None

    @property
    def last(self) -> float | None:
        """When it ended, or the last that is known of one that did not come to say so."""
        return self.ended or self.seen or self.since

    @property
    def line(self) -> str:
        """Its command, to copy."""
        return command(*self.argv)


def gpus_of(words: Sequence[str]) -> int:
    """How many GPUs a command asks for with ``--gpus``; 1 if it says nothing that can be."""
    for word, following in zip(words, (*words[1:], ""), strict=True):
        value = following if word == "--gpus" else word.removeprefix("--gpus=") if word.startswith("--gpus=") else ""
        if value.isdecimal() and len(value) < 4:
            return max(1, int(value))
    return 1


def read_job(folder: Path) -> Job:
    """The job in a folder. One whose ``job.json`` is damaged can still be stopped and removed.

    Raises:
        FileNotFoundError: the folder was removed.
    """
    document = files.read(folder, files.JOB) or {}
    if not document:
        folder.stat()
    started, worker = files.read(folder, files.STARTED), files.read(folder, files.WORKER) or {}
    ended = files.read(folder, files.ENDED)
    facts = _facts(folder, document)
    worker_pid = files.pid_of(worker.get("worker")) or files.pid_of((started or {}).get("worker"))
    command_pid = files.pid_of(worker.get("command"))
    has_started = started is not None or bool(worker) or ended is not None
    if not has_started:
        if facts["label"] == DAMAGED:
            return Job(**facts, state="failed", problem="job.json is not the file that was written")
        return Job(**facts, state="waiting")
    started = started or {}
    facts |= {"gpu": _text(started.get("gpu")), "slots": _slots(started), "since": _number(started.get("at"))}
    facts |= {"worker": worker_pid, "command": command_pid}
    if ended is not None:
        return _ended(facts, ended)
    is_running = worker_pid is not None or _is_starting(started) or _runs_elsewhere(folder, started, worker)
    is_stopping = files.read(folder, files.STOP) is not None
    if is_running:
        return Job(**facts, state="running", seconds=_elapsed(started), is_stopping=is_stopping)
    if (ended := files.read(folder, files.ENDED)) is not None:  # it ended since the last look
        return _ended(facts, ended)
    gone = "The process that watched it is gone: it was killed, or the machine was started again"
    if command_pid is not None:
        problem = f"{gone}. Its command still runs, as process {command_pid}"
        return Job(**facts, state="lost", problem=problem, seconds=_elapsed(started), is_stopping=is_stopping)
    seen, since = _marked(folder, worker), facts["since"]
    seconds = seen - since if seen is not None and since is not None and seen >= since else None
    return Job(**facts, state="lost", problem=gone, seen=seen, seconds=seconds)


def _facts(folder: Path, document: Mapping[str, Any]) -> dict[str, Any]:
    argv = document.get("argv")
    is_whole = isinstance(argv, list) and argv and all(isinstance(w, str) for w in argv) and argv[0] in PROGRAMS
    order = document.get("order")
    return {
        "id": folder.name,
        "folder": folder,
        "label": (_text(document.get("label")) or folder.name) if is_whole else DAMAGED,
        "argv": tuple(argv) if is_whole and argv else (),
        "kind": _text(document.get("kind")) or "",
        "about": _text(document.get("about")) or "",
        "order": order if isinstance(order, int) else 0,
        "added": _number(document.get("added")),
        "uses": _texts(document.get("uses")),
        "after": _texts(document.get("after")),
        "is_ours": files.is_sealed(folder, document),
    }


def _ended(facts: dict[str, Any], ended: Mapping[str, Any]) -> Job:
    code, signal = ended.get("exit_code"), ended.get("signal")
    facts |= {
        "ended": _number(ended.get("at")),
        "seconds": _number(ended.get("seconds")),
        "exit_code": code if isinstance(code, int) else None,
        "signal": signal if isinstance(signal, int) else None,
        "problem": _text(ended.get("problem")),
    }
    if code == 0:
        return Job(**facts, state="finished")
    is_stopped = code == STOPPED or ended.get("is_stopped") is True
    return Job(**facts, state="stopped" if is_stopped else "failed")


def _is_starting(started: Mapping[str, Any]) -> bool:
    """Whether the process that starts its worker has not come to write down which it is."""
    return "worker" not in started and files.pid_of(started.get("launcher")) is not None


def _runs_elsewhere(folder: Path, started: Mapping[str, Any], worker: Mapping[str, Any]) -> bool:
    """Whether its worker runs on another machine, as its mark of the last minutes says."""
    process = worker.get("worker") or started.get("worker")
    if not isinstance(process, dict) or not isinstance(process.get("host"), str) or files.is_here(process):
        return False
    marked = _marked(folder, worker)
    return marked is not None and abs(time.time() - marked) < _HOST_SECONDS


def _marked(folder: Path, worker: Mapping[str, Any]) -> float | None:
    """When its worker last showed that it lives, as it does every ten seconds."""
    try:
        return (folder / (files.WORKER if worker else files.STARTED)).stat().st_mtime
    except OSError:
        return None


def _elapsed(started: Mapping[str, Any]) -> float | None:
    """Seconds since it began, by the clock that nobody sets; where that is another one, by the clock on the wall."""
    monotonic, at = _number(started.get("monotonic")), _number(started.get("at"))
    if monotonic is not None and started.get("boot") == system.boot_mark() and files.is_here(started.get("launcher")):
        return max(0.0, time.monotonic() - monotonic)
    return max(0.0, time.time() - at) if at is not None else None


def now() -> dict[str, Any]:
    """The time, as ``_elapsed`` wants it."""
    return {"at": time.time(), "monotonic": time.monotonic(), "boot": system.boot_mark()}


def tail(job: Job, most: int = 64 << 10) -> str:
    """The last of what a job printed, from the beginning of a line on. Bytes that are no UTF-8 are shown as such."""
    data = b""
    for path in (job.log, job.folder / files.OLDER_LOG):
        if len(data) < most:
            try:
                data = files.read_bytes(path, most - len(data), len(data) - most) + data
            except OSError:
                continue
    if len(data) >= most:
        data = data[data.find(b"\n") + 1 :]
    return data.decode("utf-8", "backslashreplace").replace("\r\n", "\n")


@dataclass(frozen=True)
class Task:
    """One bar, as the terminal has it."""

    name: str
    completed: float
    total: float | None
    unit: str = ""
    note: str = ""
    per_second: float | None = None
    seconds_left: float | None = None


@dataclass(frozen=True)
class Progress:
    """How far a job is: its bars, the work of longest standing first."""

    tasks: tuple[Task, ...]


def progress(job: Job) -> Progress | None:
    """The bars of a job that runs; None if it has none, or does not run."""
    document = files.read(job.folder, files.PROGRESS) if job.command is not None else None
    tasks = (document or {}).get("tasks")
    found = [_task(task) for task in tasks[:20] if isinstance(task, dict)] if isinstance(tasks, list) else []
    return Progress(tuple(found)) if found else None


def _task(task: Mapping[str, Any]) -> Task:
    return Task(
        _text(task.get("name")) or "",
        _number(task.get("completed")) or 0.0,
        _number(task.get("total")),
        _text(task.get("unit")) or "",
        _text(task.get("note")) or "",
        _number(task.get("per_second")),
        _number(task.get("seconds_left")),
    )


def error_of(job: Job) -> tuple[str, str] | None:
    """The two lines, problem and fix, with which its command ended; None if it ended otherwise."""
    if job.exit_code != WRONG:
        return None
    found = _ERROR.findall(tail(job, _MOST_PROBLEM_BYTES))
    return (found[-1][0], found[-1][1]) if found else None


def _slots(started: Mapping[str, Any]) -> tuple[str, ...]:
    """The keys of the slots that a job was given; earlier versions gave it one."""
    return _texts(started.get("slots")) or _texts([started.get("slot")])


def _text(value: object) -> str | None:
    return value if isinstance(value, str) else None


def _texts(value: object) -> tuple[str, ...]:
    return tuple(text for text in value if isinstance(text, str)) if isinstance(value, list) else ()


def _number(value: object) -> float | None:
    is_one = isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e15
    return float(value) if is_one else None  # type: ignore[arg-type]

"""What is in the folder of a job? Small JSON files, each written whole by one process, and a log."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import secrets
import socket
import stat
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from k5cache.shared import system
from k5cache.shared.files import make_folder, remove_leftovers, write_json
from k5cache.shared.inside import is_inside
from k5cache.shared.plain import parse_json
from k5train.ui.project import Project

JOB = "job.json"
"""What is to be done, written by ``queue.add``."""
STARTED = "started.json"
"""On which GPU it began, and its worker; written by ``queue.advance``."""
WORKER = "worker.json"
"""The worker and its command; written by the worker."""
STOP = "stop.json"
"""It is to stop; written by ``queue.stop``, and seen by the worker."""
ENDED = "ended.json"
"""How it ended; written by the worker, or by ``queue.stop`` for a job that had not begun."""
LOG, OLDER_LOG = "log.txt", "log-older.txt"
PROGRESS = "progress.json"
OURS = (STARTED, WORKER, STOP, ENDED, LOG, OLDER_LOG, PROGRESS)
"""All but ``job.json`` and the files that ``queue.add`` was given, which it names."""
NOTED_NAME = re.compile(r"[a-z][a-z0-9_-]{0,40}\.(toml|json|txt)", re.ASCII)
_ID = re.compile(r"[0-9a-f]{12}", re.ASCII)
_NEW = re.compile(r"\.(new|old)-[0-9a-f]{12}", re.ASCII)
_MOST_BYTES = 1 << 20
_MOST_FILE_BYTES = 4 << 20


def queue_folder(project: Project) -> Path:
    """``.k5/queue``.

    Raises:
        OutputError: it is a link that leads out of the project.
    """
    return project.inside(project.own / "queue")


def make_queue_folder(project: Project) -> Path:
    """The same, made if it is not there."""
    folder = queue_folder(project)
    project.make_own()
    make_folder(folder)
    return folder


def job_folders(project: Project) -> list[Path]:
    """The folder of every job. Links are none, and nothing if the queue was deleted."""
    queue = queue_folder(project)
    with suppress(FileNotFoundError, NotADirectoryError), os.scandir(queue) as entries:
        return [queue / e.name for e in entries if _ID.fullmatch(e.name) and e.is_dir(follow_symlinks=False)]
    return []


def job_folder(project: Project, id: str) -> Path | None:
    """The folder of the job with this id; None if there is none."""
    return next((folder for folder in job_folders(project) if folder.name == id), None)


def new_folder(queue: Path, document: Mapping[str, Any], texts: Mapping[str, str]) -> Path:
    """Make the folder of a new job; it appears as a whole. The caller has the queue's lock.

    Args:
        document: what ``job.json`` has. ``{job}/`` at the beginning of a word of its ``argv`` becomes the folder.
        texts: further files by their names.
    """
    _remove_half(queue)
    name = secrets.token_hex(6)
    half = queue / f".new-{name}"
    half.mkdir()
    for file_name, text in texts.items():
        assert NOTED_NAME.fullmatch(file_name), file_name
        assert file_name not in (JOB, *OURS), file_name
        (half / file_name).write_text(text, encoding="utf-8", newline="\n")
    here = f".k5/queue/{name}/"
    argv = [word.replace("{job}/", here, 1) if word.startswith("{job}/") else word for word in document["argv"]]
    write_json(half / JOB, sealed(half, {**document, "argv": argv, "files": sorted(texts)}))
    return half.rename(queue / name)


def sealed(folder: Path, document: Mapping[str, Any]) -> dict[str, Any]:
    """What is in ``job.json``, with the seal of this machine: a person at it wants this command to run."""
    return {**document, "seal": _seal(folder, document)}


def is_sealed(folder: Path, document: Mapping[str, Any]) -> bool:
    """Whether a job was put in on this machine, into this very folder, with this command and these files.

    A project may be a stranger's, with jobs in its queue. These begin when somebody says so, and not before.
    """
    return document.get("seal") == _seal(folder, document)


def _seal(folder: Path, document: Mapping[str, Any]) -> str:
    """A hash that nobody can make who knows neither the machine nor which inode a folder gets there."""
    facts: list[Any] = [system.machine_mark(), system.user_id(), folder.stat().st_ino, document.get("argv")]
    names = document.get("files")
    for name in names if isinstance(names, list) else ():
        if isinstance(name, str) and NOTED_NAME.fullmatch(name):
            with suppress(OSError):
                facts += [name, hashlib.sha256(read_bytes(folder / name, _MOST_FILE_BYTES)).hexdigest()]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


def remove_folder(folder: Path) -> None:
    """Delete a job's folder with what is ours in it; anything else stays where it is."""
    job = read(folder, JOB) or {}
    names = [name for name in job.get("files", ()) if isinstance(name, str) and NOTED_NAME.fullmatch(name)]
    # Under another name first: a kill in between leaves no job without its job.json.
    half = folder.rename(folder.with_name(f".old-{folder.name}"))
    _empty(half, names)


def _remove_half(queue: Path) -> None:
    """Remove what killed processes left half made or half removed. The caller has the queue's lock."""
    for path in [*queue.iterdir()]:
        if _NEW.fullmatch(path.name) and not path.is_symlink() and path.is_dir():
            job = read(path, JOB) or {}
            _empty(path, [name for name in job.get("files", ()) if isinstance(name, str)])


def _empty(folder: Path, names: list[str]) -> None:
    remove_leftovers(folder)
    for name in (*OURS, *(name for name in names if NOTED_NAME.fullmatch(name)), "recipe.toml", JOB):
        with suppress(FileNotFoundError, IsADirectoryError, PermissionError):
            (folder / name).unlink()
    with suppress(OSError):
        folder.rmdir()


def write(folder: Path, name: str, document: Mapping[str, Any]) -> None:
    """Write one of a job's files, whole or not at all. Raises ``OSError``, also if the folder was deleted."""
    write_json(folder / name, document)


def read(folder: Path, name: str) -> dict[str, Any] | None:
    """One of a job's files; None if it is not there, is a link or a pipe, or is not an object of JSON."""
    try:
        value = parse_json(read_bytes(folder / name, _MOST_BYTES))
    except (OSError, ValueError):
        return None
    return value if isinstance(value, dict) else None


def read_bytes(path: Path, most: int, at: int = 0) -> bytes:
    """Up to ``most`` bytes of a plain file from ``at`` on, or from the end if ``at`` is negative. Follows no link."""
    fd = system.open_bytes(path, is_followed=False, may_wait=False)
    try:
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode):
            raise OSError(errno.EINVAL, "it is not a plain file", str(path))
        return system.read_at(fd, most, max(0, status.st_size + at) if at < 0 else at)
    finally:
        os.close(fd)


def process_of(pid: int) -> dict[str, Any]:
    """What is written down of a process, so that no later one of the same number is taken for it."""
    return {"pid": pid, "mark": system.process_mark(pid), "host": socket.gethostname()}


def is_here(process: object) -> bool:
    """Whether what ``process_of`` wrote is about a process of this machine."""
    return isinstance(process, dict) and process.get("host") == socket.gethostname()


def pid_of(process: object) -> int | None:
    """The number of a process that ``process_of`` wrote down and that is still running here."""
    if not isinstance(process, dict) or not is_here(process):
        return None
    pid, mark = process.get("pid"), process.get("mark")
    return pid if isinstance(pid, int) and isinstance(mark, str) and system.process_mark(pid) == mark else None


def within(project: Project, words: list[str]) -> Iterator[str]:
    """Those of a command's words that are places in the project, as relative paths with ``/``."""
    for word in words:
        with suppress(ValueError, OSError):
            path = project.root / word
            if "/" in word and is_inside(project.root, path):
                yield Path(os.path.relpath(path, project.root)).as_posix()

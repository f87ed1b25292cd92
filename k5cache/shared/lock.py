"""How does only one process at a time write a folder? With a lock that the system frees when its process ends."""

from __future__ import annotations

import errno
import json
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import lock_descriptor

from k5cache.shared import system
from k5cache.shared.disk_errors import named
from k5cache.shared.errors import OutputError

_OWNER_AT = 1  # Windows locks byte 0, and lets nobody else read it
_MOST_OWNER_BYTES = 4096
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP)


class Locked(Exception):
    """Another process has the lock."""

    def __init__(self, owner: str) -> None:
        super().__init__(owner)
        self.owner = owner
        """Which process, on which machine, and since when."""


@contextmanager
def lock_file(path: Path, wait_seconds: float = 0) -> Iterator[None]:
    """Have an exclusive lock on the file ``path`` until the end of the block. The file is created if it does not exist.

    After a space, it says who has the lock, as JSON: pid, host and since. It stays when the lock is released.

    Raises:
        Locked: another process had the lock for all of ``wait_seconds``.
        OutputError: the file system has no locks.
        OSError: the file cannot be opened or written; a symbolic link is not followed.
    """
    fd = _locked(path, time.monotonic() + wait_seconds)
    try:
        since = time.strftime("%Y-%m-%d %H:%M:%S %z")
        owner = {"pid": os.getpid(), "host": socket.gethostname(), "since": since}
        with named(path):
            os.ftruncate(fd, 0)
            os.lseek(fd, 0, os.SEEK_SET)
            os.write(fd, b" " * _OWNER_AT + json.dumps(owner).encode())
        yield
        os.ftruncate(fd, 0)
    finally:
        os.close(fd)  # which frees the lock


def _locked(path: Path, deadline: float) -> int:
    """The locked file, open. One that was deleted before it was locked locks nothing: another is made in its place."""
    while True:
        fd = system.open_bytes(path, os.O_RDWR | os.O_CREAT, is_followed=False)
        try:
            while not _try(path, fd):
                if time.monotonic() >= deadline:
                    raise Locked(_owner(fd))
                time.sleep(0.05)
            if _is_at(path, fd):
                return fd
        except BaseException:
            os.close(fd)
            raise
        os.close(fd)


def _try(path: Path, fd: int) -> bool:
    try:
        with named(path):
            return lock_descriptor(fd, blocking=False)
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        raise OutputError(
            f"{path} cannot be locked: {error.strerror}",
            "Mount its file system with locks that all machines share (NFS: its lock service must run), or use another",
        ) from None


def _is_at(path: Path, fd: int) -> bool:
    try:
        return os.path.samestat(path.stat(follow_symlinks=False), os.fstat(fd))
    except FileNotFoundError:
        return False


def is_lock(path: Path) -> bool:
    """Whether a file is a lock of ours: empty when it is free, otherwise JSON that says who has it."""
    if path.is_symlink() or not path.is_file() or path.stat().st_size > _MOST_OWNER_BYTES:
        return False
    text = path.read_bytes()
    try:
        return not text or {"pid", "host", "since"} <= set(json.loads(text))
    except (ValueError, TypeError):
        return False


@dataclass(frozen=True)
class Holder:
    """The process that has a lock."""

    pid: int
    host: str
    since: str
    """As that process wrote it, for people."""
    is_here: bool
    """Whether it runs on this machine."""


def holder(path: Path) -> Holder | None:
    """Who has the lock on a file now; None if nobody has. Nothing is written, so a page may ask at any time.

    A process that was interrupted leaves its number in the file. So that nobody who begins meanwhile finds the file
    locked, the lock itself is only tried if a process of that number runs here, or if it ran on another machine.
    """
    try:
        fd = system.open_bytes(path, is_followed=False, may_wait=False)
    except OSError:
        return None
    try:
        match _read_owner(fd):
            case {"pid": int(pid), "host": str(host), "since": str(since)}:
                is_here = host == socket.gethostname()
            case _:
                return None
        if is_here and pid != os.getpid() and not system.is_another_process(pid):
            return None
        try:
            is_free = lock_descriptor(fd, blocking=False)
        except OSError:  # some file systems lock no file that is open for reading: then its text is all there is
            is_free = False
        return None if is_free else Holder(pid, host, since, is_here)
    finally:
        os.close(fd)


def _owner(fd: int) -> str:
    try:
        owner = _read_owner(fd)
        return f"process {owner['pid']} on {owner['host']} since {owner['since']}"
    except (KeyError, TypeError):  # it has the lock but has not written yet who it is
        return "another process"


def _read_owner(fd: int) -> Any:
    """What the process that has the lock, or had it last, wrote into the file; None if that cannot be read."""
    try:
        try:
            text = system.read_at(fd, _MOST_OWNER_BYTES, 0)  # from 0 on, as earlier versions wrote it
        except PermissionError:
            text = system.read_at(fd, _MOST_OWNER_BYTES, _OWNER_AT)
        return json.loads(text)
    except (OSError, ValueError, RecursionError):  # also a folder or a pipe in its place
        return None

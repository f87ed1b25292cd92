"""How does only one process at a time write a folder? With a lock that the kernel frees when its process ends."""

from __future__ import annotations

import fcntl
import json
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from k5cache.shared.disk_errors import named


class Locked(Exception):
    """Another process has the lock."""

    def __init__(self, owner: str) -> None:
        super().__init__(owner)
        self.owner = owner
        """Which process, on which machine, and since when."""


@contextmanager
def lock_file(path: Path, wait_seconds: float = 0) -> Iterator[None]:
    """Have an exclusive lock on the file ``path`` until the end of the block. The file is created if it does not exist.

    It says who has the lock, as JSON: pid, host and since. It stays when the lock is released.

    Raises:
        Locked: another process had the lock for all of ``wait_seconds``.
        OSError: the file cannot be opened or written; a symbolic link is not followed.
    """
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)  # less the umask
    try:
        deadline = time.monotonic() + wait_seconds
        while not _try_lock(fd):
            if time.monotonic() >= deadline:
                raise Locked(_owner(fd))
            time.sleep(0.05)
        since = time.strftime("%Y-%m-%d %H:%M:%S %z")
        with named(path):
            os.ftruncate(fd, 0)
            os.pwrite(fd, json.dumps({"pid": os.getpid(), "host": socket.gethostname(), "since": since}).encode(), 0)
        yield
        os.ftruncate(fd, 0)
    finally:
        os.close(fd)


def _try_lock(fd: int) -> bool:
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _owner(fd: int) -> str:
    try:
        owner = json.loads(os.pread(fd, 4096, 0))
        return f"process {owner['pid']} on {owner['host']} since {owner['since']}"
    except (ValueError, KeyError, TypeError, RecursionError):  # it has the lock but has not written yet who it is
        return "another process"

"""How does a file appear either whole or not at all? Write under a temporary name, fsync, rename, fsync the folder."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from k5cache.shared import system
from k5cache.shared.disk_errors import named

TEMPORARY = ".tmp-"
_LEFTOVER = re.compile(r"\.(\d{1,9})-(.+)", re.ASCII | re.DOTALL)
_OF_LIBRARIES = re.compile(r"\.tmp\w+")  # safetensors' temporary files


class NewFile:
    """A file that is written under a temporary name until ``commit`` gives it its real name. Hashes what is written.

    It has the methods that ``pyarrow.PythonFile`` needs. It does not buffer, so a full disk raises an error in
    ``write`` or ``commit``, never later.
    """

    def __init__(self, folder: Path) -> None:
        make_folder(folder)
        self.path = folder / f"{TEMPORARY}{os.getpid()}-{os.urandom(6).hex()}"
        self.num_bytes = 0
        self.sha256 = hashlib.sha256()
        self.parts: list[Any] = []  # more hashes to update; the owner replaces them for each part of the file
        self.closed = False  # Arrow asks for it, and writes a footer even into a file that is discarded
        self._is_pending = True
        self._fd = system.open_bytes(self.path, os.O_WRONLY | os.O_CREAT | os.O_EXCL)

    def write(self, data: bytes) -> int:
        """Append ``data``. Does nothing after ``discard``."""
        if self._fd < 0:
            return len(data)
        rest = memoryview(data)
        with named(self.path):
            while rest:
                rest = rest[os.write(self._fd, rest) :]
        self.sha256.update(data)
        for part in self.parts:
            part.update(data)
        self.num_bytes += len(data)
        return len(data)

    def tell(self) -> int:
        """Bytes written so far."""
        return self.num_bytes

    def flush(self) -> None:
        """Do nothing: there is no buffer."""

    def close(self) -> None:
        """Do nothing: Arrow closes its sinks, but this one stays open until ``commit`` or ``discard``."""

    def commit(self, path: Path) -> None:
        """Make the bytes durable, then give the file the name ``path``."""
        with named(self.path):
            os.fsync(self._fd)
        os.close(self._fd)
        self._fd = -1
        self.path.replace(path)
        self._is_pending = False
        sync_folder(path.parent)

    def discard(self) -> None:
        """Delete the temporary file. Does nothing after ``commit``."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
        if self._is_pending:
            self._is_pending = False
            self.path.unlink(missing_ok=True)


@contextmanager
def new_file(path: Path) -> Iterator[NewFile]:
    """``with new_file(path) as file: file.write(...)`` writes all of ``path``; after an error ``path`` is unchanged."""
    file = NewFile(path.parent)
    try:
        yield file
        file.commit(path)
    finally:
        file.discard()


def make_folder(folder: Path) -> None:
    """Make a folder, and those above it, if they are not there; durably, like the files that will be in it."""
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    for path in missing:
        sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Make a rename in ``folder`` durable, if its file system can: some network and FUSE mounts refuse."""
    fd = system.open_to_sync(folder)
    if fd is None:
        return
    try:
        with named(folder):
            os.fsync(fd)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(fd)


def sync_file(path: Path) -> None:
    """Make a file durable that a library has written."""
    fd = system.open_to_sync(path)
    assert fd is not None, f"{path} is a folder"
    try:
        with named(path):
            os.fsync(fd)
    finally:
        os.close(fd)


def write_whole(path: Path, write: Callable[[Path], Any]) -> None:
    """Let ``write`` fill a temporary file, then rename it. For libraries that need a path to write to.

    The file lies in a temporary folder beside ``path``, so that temporary files that the library itself makes are in it
    too (safetensors' ``.tmpXXXXXX``). Such folders of processes that were killed are deleted, unless they hold anything
    else. If several processes write the same file at once, the last to finish wins.
    """
    folder = path.with_name(f".{os.getpid()}-{path.name}")
    remove_leftovers(path.parent, path.name)
    folder.mkdir()
    try:
        temporary = folder / path.name
        temporary.touch()
        mode = temporary.stat().st_mode
        with named(path):
            write(temporary)
        temporary.chmod(mode)  # safetensors makes files that other users cannot read, for example a ComfyUI server
        sync_file(temporary)
        temporary.replace(path)
    finally:
        _remove(folder, path.name)
    sync_folder(path.parent)


def remove_leftovers(folder: Path, name: str | None = None) -> list[Path]:
    """Delete what processes that were killed in ``write_whole`` left in ``folder``.

    Args:
        name: of the file that they wrote. None: any.

    Returns:
        what cannot be deleted because another user owns it.
    """
    remaining = []
    for path in folder.iterdir():
        match = _LEFTOVER.fullmatch(path.name)
        if match and name in (None, match[2]) and not system.is_another_process(int(match[1])):
            _remove(path, match[2])
            with suppress(FileNotFoundError):
                remaining += [path] if system.is_anothers(path.lstat()) else []
    return remaining


def _remove(folder: Path, name: str) -> None:
    """Delete a temporary folder if it holds only the file ``name`` and what libraries write before it."""
    with suppress(OSError):  # it is not a folder, or another process is deleting it too
        entries = [] if folder.is_symlink() else list(folder.iterdir())
        if all(entry.name == name or _OF_LIBRARIES.fullmatch(entry.name) for entry in entries):
            for entry in entries:
                entry.unlink(missing_ok=True)
            folder.rmdir()


def write_json(path: Path, value: object) -> None:
    """Write ``value`` as an indented JSON file, whole or not at all."""
    text = json.dumps(value, indent=2, ensure_ascii=False) + "\n"
    write_whole(path, lambda temporary: temporary.write_text(text, encoding="utf-8", newline="\n"))

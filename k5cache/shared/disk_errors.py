"""What does an error of the disk mean to a user? A sentence with the path, also if a library has wrapped the error."""

from __future__ import annotations

import errno
import os
import re
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

from k5cache.shared.urls import copy_of

_AGAIN = "run the same command again: what was finished is kept"
_PERMISSION = ("There is no permission for", "Use another folder, or change its permissions")
_GONE = ("There is no longer a file or folder", f"Put it back, if it was moved, and {_AGAIN}")
_SENTENCES = {
    errno.ENOSPC: ("The disk is full while writing", f"Free some space and {_AGAIN}"),
    errno.EDQUOT: ("The disk quota is used up while writing", f"Free some space and {_AGAIN}"),
    errno.EFBIG: (
        "A file is larger than this system allows", f"Raise `ulimit -f` or use another disk, and {_AGAIN}",
    ),
    errno.EACCES: _PERMISSION,
    errno.EPERM: _PERMISSION,
    errno.EROFS: ("The disk is read-only", "Write to another folder"),
    errno.EIO: (
        "The disk reports an error for", f"Check the disk and its cable or network (dmesg shows more), and {_AGAIN}",
    ),
    errno.EMFILE: ("Too many files are open, the next would be", f"Raise the limit with `ulimit -n 4096` and {_AGAIN}"),
    errno.ENFILE: ("Too many files are open, the next would be", f"Close other programs and {_AGAIN}"),
    errno.ENOENT: _GONE,
    errno.ESTALE: _GONE,
    errno.ENAMETOOLONG: ("This name is too long for the disk", "Choose a shorter one"),
}  # fmt: skip
_BEFORE_PATH = re.compile(r"( for| while writing|, the next would be|:)$")
_NOT_OPENED = re.compile(r"No such file or directory: (.+)")  # safetensors, whyever it could not open the file
_NUMBER = re.compile(r"\b(?:os error|errno) (\d+)", re.IGNORECASE)  # as Rust and pyarrow write it
_STRERROR = re.compile(r": ([^:]+) \((\d+)\)$")  # as safetensors' reader writes it


def sentence(error: BaseException) -> tuple[str, str] | None:
    """The problem and the fix for an error of the disk, wherever in the chain of causes it is; None for any other."""
    found = _os_error(error)
    if found is None:
        return None
    number, path, words = found
    if copy := copy_of(path):  # else the message would name the URL, whose store is not full
        path = f"the copies of {copy[0]} in {copy[1]}"
    problem, fix = _SENTENCES.get(number, (f"{words or os.strerror(number)}:", f"Correct this and {_AGAIN}"))
    return (f"{problem} {path}" if path else _BEFORE_PATH.sub("", problem)), fix


@contextmanager
def named(path: Path) -> Iterator[None]:
    """Around what reads or writes ``path``: an error of the disk says which file it was.

    Raises:
        OSError: with the path, for an error of the disk that has none or that a library has made another exception of.
    """
    try:
        yield
    except OSError as error:
        if error.errno is not None:
            if not error.filename or os.sep not in str(error.filename):  # rmtree names files below a folder it has open
                error.filename = str(path)
            raise
        if isinstance(error, FileNotFoundError) and _NOT_OPENED.fullmatch(str(error)):
            number = _why_not_opened(path)
            raise OSError(number, os.strerror(number), str(path)) from error
        _raise_with(path, error)
    except Exception as error:  # of any library; what is not the disk's error rises as it is
        _raise_with(path, error)


def _why_not_opened(path: Path) -> int:
    try:
        with path.open("rb"):
            return errno.EIO  # now it can be
    except OSError as error:
        return error.errno or errno.EIO


def _raise_with(path: Path, error: Exception) -> NoReturn:
    number = _number_in(error)
    if number is None:
        raise error
    raise OSError(number, os.strerror(number), str(path)) from error


def _os_error(error: BaseException | None) -> tuple[int, str, str] | None:
    """Error number, path and words of the first error of the disk among an error and its causes."""
    while error is not None:
        if isinstance(error, OSError) and error.errno is not None:
            return error.errno, str(error.filename or _path_in_use(error)), error.strerror or ""
        if isinstance(error, FileNotFoundError) and (match := _NOT_OPENED.fullmatch(str(error))):
            return _why_not_opened(Path(match[1])), match[1], ""
        number = _number_in(error)
        if number is not None:
            return number, str(_path_in_use(error)), ""
        error = error.__cause__
    return None


def _path_in_use(error: BaseException) -> Path | str:
    """The path with which the innermost function worked that had one: Python gives an error of ``read`` none."""
    for frame, _ in reversed(list(traceback.walk_tb(error.__traceback__))):
        for name in ("path", "self"):  # pathlib's methods call theirs self
            if isinstance(path := frame.f_locals.get(name), Path):
                return path
    return ""


def _number_in(error: BaseException) -> int | None:
    text = str(error)
    if match := _NUMBER.search(text):
        return int(match[1])
    match = _STRERROR.search(text)
    return int(match[2]) if match and match[1] == os.strerror(int(match[2])) else None

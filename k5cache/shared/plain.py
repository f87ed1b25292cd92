"""How is a file opened that somebody else may have put there? Only if it is a plain one, and not larger than is useful.

A pipe would block whoever opens it, ``/dev/zero`` never ends, and a link may lead to either. So a file is opened
without waiting, what is open is looked at, and not more than a bounded number of bytes is read.
"""

from __future__ import annotations

import errno
import json
import os
import stat
from collections.abc import Callable
from io import BufferedReader
from pathlib import Path
from typing import Any

from k5cache.shared import system

MOST_TEXT_BYTES = 4 << 20
"""Of a recipe, a config, the captions of one image, a list of prompts: a thousand times what people write."""


class UnfitFile(OSError):
    """A file that is not read: it is not a plain one, or it is too large. ``strerror`` says which."""

    def __init__(self, path: object, problem: str) -> None:
        super().__init__(errno.EINVAL, problem, str(path))


def open_plain(path: str | os.PathLike[str], most: int | None = None) -> BufferedReader:
    """Open a plain file for reading, through links.

    Args:
        most: bytes that it may have.

    Raises:
        UnfitFile: it is a folder, a pipe or a device, or is larger.
        OSError: it cannot be opened.
    """

    return os.fdopen(_descriptor(path, most)[0], "rb")


def _descriptor(path: str | os.PathLike[str], most: int | None) -> tuple[int, int]:
    """An open file descriptor of a plain file, and the file's size."""
    fd = system.open_bytes(path, may_wait=False)
    status = os.fstat(fd)
    problem = ""
    if not stat.S_ISREG(status.st_mode):
        kind = "a folder" if stat.S_ISDIR(status.st_mode) else "not a file but a pipe, a device or the like"
        problem = f"it is {kind}"
    elif most is not None and status.st_size > most:
        problem = too_large(status.st_size, most)
    if problem:
        os.close(fd)
        raise UnfitFile(path, problem)
    return fd, status.st_size


def too_large(num_bytes: int, most: int) -> str:
    """Why a file of ``num_bytes`` is not read."""
    return f"it has {num_bytes:,} bytes, and at most {most:,} are read"


def read_plain(path: str | os.PathLike[str], most: int = MOST_TEXT_BYTES) -> bytes:
    """The bytes of a plain file. Raises as ``open_plain``."""
    fd, num_bytes = _descriptor(path, most)
    data = b""
    try:
        while part := os.read(fd, max(num_bytes - len(data), 0) + 1):
            data += part
            if len(data) > most:  # it grows meanwhile
                raise UnfitFile(path, too_large(len(data), most))
    finally:
        os.close(fd)
    return data


def read_text(path: str | os.PathLike[str], most: int = MOST_TEXT_BYTES) -> str:
    """The text of a plain file in UTF-8, without the mark that Windows' editors put before it.

    Raises:
        UnicodeDecodeError: it is not UTF-8.
        OSError: as ``open_plain``.
    """
    return read_plain(path, most).decode("utf-8-sig")


def parse_json(text: str | bytes, as_object: Callable[[list[tuple[str, Any]]], Any] | None = None) -> Any:
    """``json.loads``, of which every error is a ValueError with a sentence: also of deep nesting and long numbers.

    Args:
        as_object: what becomes of an object, given its keys and values. None: a dictionary, in which the last of equal
            keys counts.
    """
    try:
        return json.loads(text, object_pairs_hook=as_object)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    except json.JSONDecodeError:
        raise
    except ValueError as error:
        if "integer string conversion" in str(error):
            raise ValueError("it has a number of more than 4,300 digits") from None
        raise


def read_json(path: Path, most: int = MOST_TEXT_BYTES) -> Any:
    """The value in a JSON file.

    Raises:
        ValueError: it is not JSON, or not UTF-8.
        OSError: as ``open_plain``.
    """
    return parse_json(read_text(path, most))

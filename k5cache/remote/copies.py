"""Which copies of objects lie on this machine, and which of them make room for others? The least recently used.

A copy has a mark beside it, in a folder of marks. What has none, such as a shard that is not sent yet, always stays.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import threading
from contextlib import suppress
from pathlib import Path

from k5cache.shared.console import parse_bytes
from k5cache.shared.errors import StoreError
from k5cache.shared.home import k5_home, make_home

ROOM = "remote"
MARKS = "copies"
VARIABLE = "K5_REMOTE_SIZE"
USUAL = 50 << 30
_IN_USE = 2  # of the copies of this process, those that were asked for last stay whatever the bound is
_LOCK = threading.Lock()
_held = 0
"""Bytes of all copies when they were last counted, and of those that came since."""
_added: int | None = None
"""Bytes of those that came since; None before the first count. Other processes add copies too."""


def bound() -> int:
    """Bytes that all copies together may take: ``K5_REMOTE_SIZE``, or 50 GiB and at most half of what the disk has.

    Raises:
        StoreError: the variable is not an amount of memory.
    """
    text = os.environ.get(VARIABLE)
    if text:
        try:
            return parse_bytes(text)
        except ValueError:
            raise StoreError(f"{VARIABLE}={text} is not an amount of memory", "Write it like 50GB or 800MB") from None
    there = next(folder for folder in (k5_home() / ROOM, *(k5_home() / ROOM).parents) if folder.exists())
    return min(USUAL, (shutil.disk_usage(there).free + _held) // 2)


def home_of(key: str) -> Path:
    """The folder of this machine for what is copied from one URL."""
    folder = make_home(ROOM) / key
    (folder / MARKS).mkdir(parents=True, exist_ok=True)
    return folder


def mark_of(home: Path, name: str) -> Path:
    """The mark of a copy."""
    return home / MARKS / name.replace("%", "%25").replace("/", "%2F")


def touch(home: Path, name: str) -> None:
    """Note that a copy is used now."""
    with suppress(OSError):
        os.utime(mark_of(home, name))


def mark(home: Path, folder: str, name: str, sha256: str = "") -> Path:
    """Note that ``home/folder/name`` is a copy, or will be one in a moment. Returns its mark."""
    mark = mark_of(home, name)
    mark.write_text(f"{folder}/{name}" + (f"\n{sha256}" if sha256 else ""), encoding="utf-8")
    return mark


def is_as_written(home: Path, name: str, raw: bytes) -> bool:
    """Whether the bytes of a copy are those that were fetched."""
    noted = mark_of(home, name).read_text(encoding="utf-8").rpartition("\n")[2]
    return noted == hashlib.sha256(raw).hexdigest()


def add(home: Path, folder: str, name: str, num_bytes: int, sha256: str = "") -> None:
    """Note a new copy, ``home/folder/name``, and remove as many others as its bytes need."""
    global _held, _added
    noted = mark(home, folder, name, sha256)
    with _LOCK:
        _held += num_bytes
        if _added is None or _held > bound() or _added > bound() // 10:
            _make_room(noted)
        else:
            _added += num_bytes


def forget(home: Path, names: set[str] | None = None) -> None:
    """Remove the copies of these names, or all, so that they are read from the store again."""
    for mark in list((home / MARKS).iterdir()):
        copy = _copy_of(mark)
        if copy and (names is None or copy.relative_to(home).as_posix().partition("/")[2] in names):
            copy.unlink(missing_ok=True)
            mark.unlink(missing_ok=True)


def _copy_of(mark: Path) -> Path | None:
    try:
        return mark.parent.parent / mark.read_text(encoding="utf-8").partition("\n")[0]
    except OSError:  # another process removed it
        return None


def _make_room(newest: Path) -> None:
    """Remove the copies that were used least recently, of all URLs, down to nine tenths of the bound."""
    global _held, _added
    known: list[tuple[float, int, Path, Path]] = []
    for mark in (k5_home() / ROOM).glob(f"*/{MARKS}/*"):
        copy = _copy_of(mark)
        try:
            assert copy
            known.append((mark.stat().st_mtime, copy.stat().st_size, mark, copy))
        except (OSError, AssertionError):  # another process removed it, or it was removed by hand
            with suppress(OSError):
                if mark != newest:
                    mark.unlink()
    known.sort(key=lambda entry: entry[0], reverse=True)
    kept, most = 0, bound()
    is_over = sum(size for _, size, _, _ in known) > most
    for number, (_, size, mark, copy) in enumerate(known):
        if is_over and kept + size > most * 9 // 10 and number >= _IN_USE:
            with suppress(OSError):
                copy.unlink()
                mark.unlink()
        else:
            kept += size
    _held, _added = kept, 0

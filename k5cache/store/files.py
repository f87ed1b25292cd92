"""Which files of a cache may be opened, and which did a killed writer leave behind?"""

from __future__ import annotations

import hashlib
import json
import os
import re
import stat
from contextlib import suppress
from pathlib import Path

from k5cache.remote.behind import mirror_of
from k5cache.shared import system
from k5cache.shared.command_line import command
from k5cache.shared.disk_errors import named
from k5cache.shared.errors import CacheCorrupt, CacheError
from k5cache.shared.files import TEMPORARY
from k5cache.shared.inside import is_inside
from k5cache.store.notes import Part, arguments_of, read_part

_MOST_READ = 1 << 28  # as manifest.MAX_BYTES
FOLDERS = ("latents", "masks", "text")
TEMPORARY_NAME = re.compile(rf"{re.escape(TEMPORARY)}\d+-[0-9a-f]{{12}}", re.ASCII)  # as NewFile gives it


def remove_leftovers(root: Path) -> list[str]:
    """Delete the temporary files of killed writers. The caller has the cache's lock. Returns their paths."""
    removed = []
    for folder in (root, *(root / name for name in FOLDERS)):
        if folder.is_dir() and not folder.is_symlink():
            for path in folder.glob(f"{TEMPORARY}*"):
                if TEMPORARY_NAME.fullmatch(path.name) and path.is_file() and not path.is_symlink():
                    with suppress(FileNotFoundError):
                        path.unlink()
                        removed.append(path.relative_to(root).as_posix())
    return removed


def open_inside(root: Path, file: str, num_bytes: int | None = None) -> int:
    """Open a file of the cache for reading.

    Args:
        file: a path relative to ``root``. The caller has checked that it is a name of the format.
        num_bytes: the size in the manifest.

    Returns:
        A file descriptor, which the caller closes.

    Raises:
        CacheCorrupt: the file is missing or has another size.
        StoreError: the cache is at a URL, from which the file cannot be fetched.
        CacheError: it is not a plain file, or it is a link that leads out of the cache.
    """
    path = root / file
    if mirror := mirror_of(root):
        mirror.bring(file, num_bytes)
    if not is_inside(root, path):
        raise CacheError(
            f"{path} is a link that leads out of the cache",
            f"Copy the cache with its files: cp -rL {root} COPY (from the hub: download with local_dir)",
        )
    try:
        with named(path):
            fd = system.open_bytes(path, may_wait=False)
    except (FileNotFoundError, NotADirectoryError):
        raise corrupt(root, f"{path} is missing") from None
    status = os.fstat(fd)
    if not stat.S_ISREG(status.st_mode):
        os.close(fd)
        raise CacheError(
            f"{path} is not a plain file", f"Use a cache made by: {command('k5cache', 'encode', 'SOURCE', '-o', root)}"
        )
    if num_bytes is not None and status.st_size != num_bytes:
        os.close(fd)
        raise corrupt(root, f"{path} has {status.st_size} bytes, {num_bytes} were written")
    return fd


def sha256_of(fd: int) -> str:
    """The sha256 of an open file in hexadecimal, read in small pieces."""
    with open(os.dup(fd), "rb", buffering=0) as file:  # noqa: PTH123 (a descriptor, not a path)
        file.seek(0)
        return hashlib.file_digest(file, "sha256").hexdigest()


def corrupt(root: Path, problem: str) -> CacheCorrupt:
    """The error for bytes that are not the bytes that were written."""
    verify = command("k5cache", "verify", root)
    return CacheCorrupt(
        problem,
        f"{verify} lists all damage; {repair(root)} encodes only what is damaged (if the manifest is damaged, restore "
        "it from a copy or encode into a new cache)",
    )


def repair(root: Path) -> str:
    """The command that mends a cache."""
    return command("k5cache", "encode", "SOURCE", *arguments_of(_part(root)), "-o", root, "--repair")


def _part(root: Path) -> Part | None:
    """The part that a cache says it holds, as far as its manifest can be read: it may be what is damaged."""
    try:
        with (root / "manifest.json").open("rb") as file:
            document = json.loads(file.read(_MOST_READ))
        return read_part(document.get("part")) if isinstance(document, dict) else None
    except (OSError, ValueError, RecursionError):
        return None

"""Which files in the folder of a cache are proven to be ours? Nothing else is ever deleted.

A name alone proves nothing. What a manifest names is ours. Any other file is ours if its name is one of the format's
and its content agrees: the id in a shard's name is how its sha256 begins, and Parquet metadata has our keys.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from k5cache.remote.behind import mirror_of
from k5cache.shared import outputs
from k5cache.shared.command_line import command
from k5cache.shared.lock import is_lock
from k5cache.shared.urls import copy_of, is_url, url_of
from k5cache.store import files, skipped
from k5cache.store.footer import footer_of

FILE = "manifest.json"
LOCK = ".lock"
SHARD_FILE = re.compile(
    r"((latents|masks)/[1-9]\d{0,4}x[1-9]\d{0,4}-[0-9a-f]{16}|text/[0-9a-f]{16})\.parquet", re.ASCII
)
TABLE_FILE = re.compile(r"(index|locations|split)-\d{6,12}\.parquet", re.ASCII)
TABLE_KEYS = {"index": b"k5cache.index", "locations": b"k5cache.files", "split": b"k5cache.split"}
"""The key in a table's metadata that proves it ours."""
SHARD_KEYS = (b"k5cache", b"k5cache.rows")


@dataclass(frozen=True)
class Unnamed:
    """The files of a cache's folder that its manifest does not name, relative to the folder, in order."""

    ours: tuple[str, ...]
    """Left by a crash or replaced since: proven by their content, so that garbage collection may delete them."""
    foreign: tuple[str, ...]
    """All others. They are named and never touched; a folder ends in a slash."""


def unnamed_files(root: Path, named: set[str]) -> Unnamed:
    """Look at every file in the folder of a cache. Files of our names that are not in ``named`` are read."""
    ours: list[str] = []
    foreign: list[str] = []
    known = {FILE, LOCK, *named, *([skipped.NAME] if skipped.is_ours(root) else [])}
    for name in _names(root):
        if name not in known:
            (ours if _is_proven(root, name) else foreign).append(name)
    return Unnamed(tuple(sorted(ours)), tuple(sorted(foreign)))


def check_root(root: Path, reads: Iterable[Path] = ()) -> None:
    """Refuse a folder for a cache unless it is new, empty, a cache, or one that a killed writer of ours began.

    Args:
        reads: folders that the command reads, which may not be or contain a new cache.

    Raises:
        OutputError: says what is there.
    """
    reads = list(reads)
    outputs.check_folder(root, "cache", is_unfinished, reads)
    if mirror := mirror_of(root):
        for path in reads:
            copy = copy_of(str(path))
            if copy or is_url(path):
                mirror.check_apart(copy[0] if copy else url_of(path))


def is_unfinished(root: Path) -> bool:
    """Whether the folder holds only what a writer of ours leaves if it is killed before its first manifest."""
    if not is_lock(root / LOCK):
        return False
    return not unnamed_files(root, set()).foreign and not (root / FILE).exists()


def how_to_make_one(root: Path) -> str:
    """What to do where there is no cache: a command to paste. A run, or a folder of images, cannot become one."""
    if outputs.kind_of(root) or root.is_file():
        return "Give a folder made by `k5cache encode`"
    if root.is_dir() and any(
        not outputs.HARMLESS.fullmatch(path.name) and path.name != LOCK for path in root.iterdir()
    ):
        return f"If these are images to train on, encode them first: {command('k5cache', 'encode', root)}"
    return f"Make one: {command('k5cache', 'encode', 'SOURCE', '-o', root)}"


def _names(root: Path) -> Iterator[str]:
    """What is in the folder and its three folders, without what systems leave there."""
    for entry in _entries(root):
        is_folder = entry.is_dir(follow_symlinks=False)
        if is_folder and entry.name in files.FOLDERS:
            for inner in _entries(root / entry.name):
                yield f"{entry.name}/{inner.name}{'/' if inner.is_dir(follow_symlinks=False) else ''}"
        else:
            yield f"{entry.name}{'/' if is_folder else ''}"


def _entries(folder: Path) -> list[os.DirEntry[str]]:
    with os.scandir(folder) as entries:
        return [entry for entry in entries if not outputs.HARMLESS.fullmatch(entry.name)]


def _is_proven(root: Path, name: str) -> bool:
    path = root / name
    if name.endswith("/") or path.is_symlink() or not path.is_file():
        return False
    if files.TEMPORARY_NAME.fullmatch(path.name):
        return True
    if TABLE_FILE.fullmatch(name):
        return TABLE_KEYS[name.partition("-")[0]] in _metadata(path)
    if not SHARD_FILE.fullmatch(name):
        return False
    metadata = _metadata(path)
    if not all(key in metadata for key in SHARD_KEYS):
        return False
    with suppress(OSError), path.open("rb") as file:  # it may be gone by now
        return files.sha256_of(file.fileno()).startswith(path.stem[-16:])
    return False


def _metadata(path: Path) -> dict[bytes, bytes]:
    """The key-value metadata of a Parquet file of this format; empty if it is another file, or has none."""
    try:
        with path.open("rb") as file:
            return footer_of(file).metadata
    except (OSError, ValueError):  # it is gone by now, or it is none that we would write
        return {}

"""How are images at a URL listed and read? Through a folder of this machine that has their names, but not their bytes.

What text there is (captions, metadata) is copied there, and tables and tars if they are the source. Of every picture
there is only an empty file: whoever lists a folder sees its name, and ``Shadow`` knows its size and its tag. A picture
is fetched when it is read, and its copy makes room for others within a bound (``K5_REMOTE_SIZE``).
"""

from __future__ import annotations

import errno
import fnmatch
import hashlib
import json
import os
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from k5cache.options import CacheConfig
from k5cache.remote import copies
from k5cache.remote.failures import Absent
from k5cache.remote.objects import Entry, Objects, is_clean
from k5cache.shared.console import note
from k5cache.shared.errors import DatasetError, StoreError
from k5cache.shared.files import write_json
from k5cache.shared.lock import lock_file
from k5cache.shared.plain import MOST_TEXT_BYTES
from k5cache.shared.units import count_of, human_bytes
from k5cache.shared.urls import stands_for, url_of
from k5cache.sources.caption_files import SUFFIXES
from k5cache.sources.decode import MOST_BYTES
from k5cache.sources.items import (
    IMAGE_SUFFIXES,
    METADATA,
    PICTURE_DECODER,
    Content,
    Skipped,
    SourceItem,
    UnreadableImage,
    stat_numbers,
)

_TABLES = (".csv", ".tsv", ".json", ".jsonl", ".parquet", ".arrow", ".tar")
_ALONE = (".parquet", ".arrow", ".tar")  # these name no files beside them
_TEXTS = frozenset({*SUFFIXES, ".caption", ".json", ".md", ".yaml"})
_OF_THE_NAME = frozenset({errno.ENAMETOOLONG, errno.EEXIST, errno.ENOTDIR, errno.EISDIR, errno.EILSEQ, errno.EINVAL})
_PICTURES = "pictures"
AT_ONCE = 16
"""Requests at the same time, for small files and ahead of who reads pictures one by one."""
_MOST_AHEAD = 2 * AT_ONCE
"""Pictures that wait in memory for whoever reads them."""
_IN_A_ROW = 3
"""Pictures that are read one after the other before the next are fetched ahead."""
_MOST_ASKED = 2000
"""Names that the listing lacks and that are asked for one by one: a store may list an object late."""


class Shadow:
    """The folder that stands for a source at a URL.

    Raises:
        DatasetError: nothing is there.
        StoreError: the store cannot be reached, or refuses, or there are more tables than copies may take.
    """

    def __init__(self, source: Path, config: CacheConfig) -> None:
        url = url_of(source)
        above, _, last = url.rpartition("/")
        self._is_files = any(mark in last for mark in "*[") or last.lower().endswith(_TABLES)
        self._pattern = last if self._is_files else ""
        self._objects = Objects(above if self._is_files else url)
        self._suffixes = _TEXTS.union(config.caption_suffixes or ())
        self._home = copies.home_of(hashlib.sha256(self._objects.url.encode()).hexdigest()[:16] + "-source")
        self._folder = self._home / "source"
        self._folder.mkdir(exist_ok=True)
        self.path = self._folder / last if self._is_files else self._folder
        """What stands for the source on this machine."""
        self.skipped: list[Skipped] = []
        """Objects whose names can be no files here."""
        stands_for(self._folder, self._objects.url)
        entries = [entry for entry in self._objects.entries() if self._is_wanted(entry.name)]
        if not entries:
            raise DatasetError(f"There is nothing at {url}", "Give the URL of a folder of images, a table or tars")
        self._entries = {entry.name: entry for entry in entries}
        self._leave_out_folders()
        self.skipped += [Skipped(name, "has a name that no file here can have") for name in self._objects.unusable()]
        suffixes = {_suffix(name) for name in self._entries}
        self._has_pictures = not self._is_files and not IMAGE_SUFFIXES.isdisjoint(suffixes)
        self._pool = ThreadPoolExecutor(AT_ONCE, "k5-fetch")
        self._bring()
        self._names = sorted(name for name in self._entries if _suffix(name) in IMAGE_SUFFIXES)
        self._numbers = {name: number for number, name in enumerate(self._names)}
        self._ahead: OrderedDict[str, Future[bytes]] = OrderedDict()
        self._last, self._in_a_row = -1, 0

    def __getstate__(self) -> dict[str, Any]:
        """For a process that reads pictures and lists nothing: threads and what they fetch ahead stay here."""
        own = ("_pool", "_ahead", "_stats")
        return {name: value for name, value in vars(self).items() if name not in own}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Perhaps on another machine, with another place for copies."""
        vars(self).update(state)
        self._home = copies.home_of(self._home.name)
        self._pool, self._ahead = ThreadPoolExecutor(AT_ONCE, "k5-fetch"), OrderedDict()
        self._last, self._in_a_row = -1, 0
        stands_for(self._folder, self._objects.url)

    def _leave_out_folders(self) -> None:
        """A store may have both cat and cat/a.png; here cat is a folder then."""
        folders: set[str] = set()
        for name in self._entries:
            folder = name.rpartition("/")[0]
            while folder and folder not in folders:
                folders.add(folder)
                folder = folder.rpartition("/")[0]
        for name in sorted(folders & self._entries.keys()):
            del self._entries[name]
            self.skipped.append(Skipped(name, "is a folder too, and cannot be both here"))

    def _is_wanted(self, name: str) -> bool:
        if not self._is_files or not self._pattern.lower().endswith(_ALONE):
            return True
        return "/" not in name and fnmatch.fnmatchcase(name, self._pattern)

    # The folder.

    def _bring(self) -> None:
        """Make the folder say what the store says."""
        with lock_file(self._home / "source.lock", wait_seconds=3600):
            note_file = self._home / "source.json"
            known: dict[str, str] = {}
            with suppress(OSError, ValueError):
                document = json.loads(note_file.read_text(encoding="utf-8"))
                known = document if isinstance(document, dict) else {}
            self._remove(known.keys() - self._entries.keys())
            self._whole = {name for name in self._entries if self._is_copied(name)}
            noted = {name: f"{entry.tag} {name in self._whole}" for name, entry in self._entries.items()}
            changed = [
                entry for name, entry in self._entries.items()
                if known.get(name) != noted[name] or not self._is_here(entry)
            ]  # fmt: skip
            self._check_room([entry for entry in changed if entry.name in self._whole])
            list(self._pool.map(self._bring_one, changed))
            if noted != known:
                write_json(note_file, noted)
            self._stats = self._stats_by_file()

    def _is_here(self, entry: Entry) -> bool:
        path = self._folder / entry.name
        return path.is_file() and (entry.name not in self._whole or path.stat().st_size == entry.num_bytes)

    def _is_copied(self, name: str) -> bool:
        """Whether the bytes of a file are needed to list the source."""
        base, suffix = name.rpartition("/")[2], _suffix(name)
        if base in METADATA or (self._is_files and "/" not in name and fnmatch.fnmatchcase(name, self._pattern)):
            return True
        if suffix in _ALONE:
            return not self._has_pictures
        if suffix in _TABLES and not self._has_pictures:
            return True
        return suffix in self._suffixes and self._entries[name].num_bytes <= MOST_TEXT_BYTES

    def _check_room(self, entries: Sequence[Entry]) -> None:
        size, bound = sum(entry.num_bytes for entry in entries), copies.bound()
        if size > bound:
            raise StoreError(
                f"{self._objects.url} has {human_bytes(size)} of tables, tars and text to copy, and copies may take "
                f"{human_bytes(bound)} on this machine",
                f"Set {copies.VARIABLE} to more, or name some of them: {self._objects.url}/NAME-0*.tar",
            )
        if size > 1 << 30:
            note(f"Copying {human_bytes(size)} of {self._objects.url}")

    def _bring_one(self, entry: Entry) -> None:
        path = self._folder / entry.name
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            if entry.name not in self._whole or path.is_dir():
                path.write_bytes(b"")  # raises for a folder: the store has both cat and cat/a.png
                return
        except OSError as error:
            if error.errno not in _OF_THE_NAME:
                raise
            self.skipped.append(Skipped(entry.name, f"cannot be a file of this machine ({error.strerror})"))
            return
        self._objects.fetch(entry.name, path, entry.num_bytes)

    def _remove(self, names: Iterable[str]) -> None:
        for name in names:
            if is_clean(name):
                with suppress(OSError):
                    (self._folder / name).unlink()
                    for parent in list(Path(name).parents)[:-1]:
                        (self._folder / parent).rmdir()

    def _stats_by_file(self) -> dict[tuple[int, int, int], tuple[int, int, int]]:
        """What ``stat_numbers`` says of each file of the folder -> what the store says of the object."""
        stats: dict[tuple[int, int, int], tuple[int, int, int]] = {}
        for name, entry in self._entries.items():
            with suppress(OSError):
                text = f"{entry.tag} {entry.mtime_ns} {PICTURE_DECODER}".encode()
                identity = int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little") >> 1
                local = stat_numbers((self._folder / name).stat())
                stats[local] = entry.num_bytes, entry.mtime_ns, identity
        return stats

    # What ``find`` asks for.

    def look_again(self, skipped: Sequence[Skipped]) -> bool:
        """Ask by name for what the listing lacks: images that a table names, captions of images. True if some exist."""
        names = [name for skip in skipped for name in self._of(skip) if is_clean(name) and name not in self._entries]
        found = [entry for entry in self._pool.map(self._objects.stat, dict.fromkeys(names[:_MOST_ASKED])) if entry]
        if found:
            note(f"{self._objects.url} did not list {count_of(len(found), 'object')} that it has: {found[0].name}, ...")
            self._entries |= {entry.name: entry for entry in found}
            self._bring()
        return bool(found)

    def _of(self, skip: Skipped) -> list[str]:
        if "does not exist" in skip.reason:
            return [skip.path]
        if skip.reason.startswith("missing caption"):
            return [f"{skip.path.rpartition('.')[0]}{suffix}" for suffix in sorted(self._suffixes & {*SUFFIXES})]
        return []

    def item(self, item: SourceItem) -> SourceItem:
        """An item of the folder, with the sizes, times and identities that the store gives."""
        size, mtime, inode = self._stats.get((item.num_bytes, item.mtime_ns, item.inode)) or (
            item.num_bytes, item.mtime_ns, item.inode
        )  # fmt: skip
        pictures = {
            which: replace(picture, num_bytes=stats[0], mtime_ns=stats[1], inode=stats[2])
            for which in ("mask", "source")
            if (picture := getattr(item, which))
            and (stats := self._stats.get((picture.num_bytes, picture.mtime_ns, picture.inode)))
        }
        return replace(item, num_bytes=size, mtime_ns=mtime, inode=inode, **pictures)

    def content(self, content: Content) -> Content:
        """A picture as the folder gives it: the bytes that the store has in the place of an empty file.

        Pictures that are read one after the other are fetched ahead.

        Raises:
            UnreadableImage: it is gone, or too large.
            StoreError: the store cannot be reached, or refuses.
        """
        if isinstance(content, bytes) or not content.is_relative_to(self._folder):
            return content
        name = content.relative_to(self._folder).as_posix()
        if name in self._whole or name not in self._entries:
            return content
        number = self._numbers.get(name, -1)
        self._in_a_row = self._in_a_row + 1 if number == self._last + 1 else 0
        self._last = number
        if self._in_a_row >= _IN_A_ROW:
            for following in self._names[number + 1 : number + 1 + AT_ONCE]:
                if following not in self._whole and following not in self._ahead:
                    self._ahead[following] = self._pool.submit(self._read, following)
            while len(self._ahead) > _MOST_AHEAD:  # nobody has asked for these, such as pictures that are encoded
                with suppress(KeyError):  # another thread has
                    self._ahead.popitem(last=False)
        ahead = self._ahead.pop(name, None)
        return ahead.result() if ahead else self._read(name)

    def _read(self, name: str) -> bytes:
        """The bytes of a picture, from its copy if there is one of these bytes."""
        entry = self._entries[name]
        if entry.num_bytes > MOST_BYTES:
            raise UnreadableImage(f"has {human_bytes(entry.num_bytes)}, at most {human_bytes(MOST_BYTES)} are read")
        copy = hashlib.sha256(f"{name}\0{entry.tag}".encode()).hexdigest()[:32]
        path = self._home / _PICTURES / copy
        with suppress(OSError):  # there is none, or it has just made room for another
            raw = path.read_bytes()
            if copies.is_as_written(self._home, copy, raw):
                copies.touch(self._home, copy)
                return raw
        copies.mark(self._home, _PICTURES, copy)
        try:
            sha256 = self._objects.fetch(name, path, entry.num_bytes)
        except Absent:
            raise UnreadableImage("is no longer there", has_changed=True) from None
        copies.add(self._home, _PICTURES, copy, entry.num_bytes, sha256)
        with suppress(OSError):
            return path.read_bytes()
        return self._objects.bytes_of(name)


def _suffix(name: str) -> str:
    return os.path.splitext(name)[1].lower()  # noqa: PTH122 (a name of the store, and a million of them)

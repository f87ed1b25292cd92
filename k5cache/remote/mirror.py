"""How is a cache at a URL read and written? In a folder of this machine, whose files come and go as they are needed.

``K5_HOME/remote/<hash of the URL>/`` has the folder itself, called as the cache is; ``note.json``, which says what the
store's manifest was when it was last seen; ``pending.json``, the manifest of work that was not sent; and the marks of
copies (``copies.py``). All code of the store works on that folder as on any other: it asks ``mirror_of`` for a file
that is not there, says when it has committed a manifest, and lets a writer begin and end.
"""

from __future__ import annotations

import hashlib
import json
import re
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from k5cache.remote import copies
from k5cache.remote.behind import MIRRORS
from k5cache.remote.objects import Entry, Objects
from k5cache.remote.sending import Sender
from k5cache.shared.console import note, warn
from k5cache.shared.errors import CacheCorrupt, CacheLocked, OutputError, StoreError
from k5cache.shared.files import new_file
from k5cache.shared.inside import as_file_names
from k5cache.shared.lock import Locked, lock_file
from k5cache.shared.sealed import seal, unseal
from k5cache.shared.units import human_bytes
from k5cache.shared.urls import stands_for, url_of

MANIFEST, LOCK = "manifest.json", ".lock"
OUR_NAMES = re.compile(
    r"manifest\.json|skipped\.csv|\.lock|(index|locations|split)-\d{6,12}\.parquet|(latents|masks|text)/.*", re.DOTALL
)
MOST_BYTES = 1 << 28  # of a manifest, as in store/manifest.py
_ID = re.compile(r"([0-9a-f]{16})\.parquet")  # of a shard: its sha256 begins so
_MOST_WAIT = 3600
"""Seconds for which another process of this machine may ask the store for one file."""
_STALE_SECONDS = 86_400
"""An object that no manifest names may be one that another machine is about to name; not if it is a day old."""
_NAMES = re.compile(rb'"file": "([^"]+)"')
_SIZES = re.compile(rb'"num_bytes": (\d+)')
_BESIDE = (copies.MARKS, "locks", "look.lock", "note.json", "pending.json")
"""What is beside the folder of a cache, so that a cache called copies has a folder called copies-2."""
_URLS: dict[str, Mirror] = {}


def folder_of(path: Path, is_new: bool = False) -> Path:
    """The folder of this machine that stands for the cache at a URL, with the manifest that is there now.

    Args:
        is_new: whether there may be no cache yet, so that one is to be made.

    Raises:
        StoreError: the store cannot be reached, or refuses.
        OutputError: something else is at the URL, where a cache is to be made.
    """
    url = url_of(path)
    mirror = _URLS.get(url) or Mirror(Objects(url))
    mirror.look(is_new)
    if url not in _URLS and not is_new:
        mirror.warn_of_size()
    _URLS[url] = MIRRORS[mirror.root] = mirror
    return mirror.root


def behind(root: Path) -> Mirror | None:
    """The mirror of a folder that ``folder_of`` has returned; None for any other."""
    return next((mirror for mirror in _URLS.values() if mirror.root == root), None)


class Mirror:
    """The folder of this machine that stands for a cache at a URL."""

    def __init__(self, objects: Objects) -> None:
        self.objects = objects
        self.home = copies.home_of(hashlib.sha256(objects.url.encode()).hexdigest()[:16])
        self.root = self.home / as_file_names([*_BESIDE, objects.url.rpartition("/")[2]])[-1]
        self.root.mkdir(exist_ok=True)
        self._sender: Sender | None = None
        self._listing: dict[str, Entry] | None = None
        self._locks: dict[str, threading.Lock] = {}
        stands_for(self.root, objects.url)

    def look(self, is_new: bool) -> None:
        """Take over the store's manifest. Raises as ``folder_of``."""
        if self._take_over():
            return
        others = [entry.name for entry in self.objects.entries() if not OUR_NAMES.fullmatch(entry.name)]
        if others and is_new:
            raise OutputError(
                f"{self.objects.url} is not empty and not a cache: it holds {', '.join(others[:3])}",
                f"Choose a new folder, for example -o {self.objects.url}-cache",
            )

    def warn_of_size(self) -> None:
        """Say so if the copies of a whole cache do not fit: rows are read in random order, so all are wanted."""
        path = self.root / MANIFEST
        size = sum(map(int, _SIZES.findall(path.read_bytes()))) if path.is_file() else 0
        if size > (bound := copies.bound()):
            warn(
                f"{self.objects.url} has {human_bytes(size)}, and copies may take {human_bytes(bound)} here: shards "
                f"are fetched again and again. Set {copies.VARIABLE} to more, or pull the cache to a larger disk"
            )

    def _take_over(self) -> bool:
        """Make the store's manifest that of the folder, unless a writer of this machine is at work there.

        Returns whether the store has one. A manifest here that the store has not seen is kept as ``pending.json``.
        """
        with self._turn("look.lock"):
            there = self.objects.read(MANIFEST, MOST_BYTES)
            self._listing = None
            if self._sender is None and not self._is_being_written():
                self._put_down(there)
        return there is not None

    def _is_being_written(self) -> bool:
        try:
            with lock_file(self.root / LOCK):
                return False
        except Locked:
            return True

    def check_apart(self, source: str) -> None:
        """Refuse a cache inside what it is made of, and the reverse.

        Raises:
            OutputError: one of the two is inside the other.
        """
        first, second = f"{self.objects.url}/", f"{source}/"
        if first.startswith(second) or second.startswith(first):
            raise OutputError(
                f"{self.objects.url} and {source} are inside one another, so the one cannot be a cache of the other",
                f"Choose another place, for example -o {source}-cache",
            )

    # What a reader asks for.

    def bring(self, name: str, num_bytes: int | None) -> None:
        """Make sure that a file of the cache is here. Copies are removed when they were not used for longest.

        Raises:
            CacheCorrupt: the store does not have it, or not with the bytes that it was written with.
            StoreError: the store cannot be reached.
        """
        path = self.root / name
        if _is_whole(path, num_bytes) or (path.is_file() and not copies.mark_of(self.home, name).exists()):
            copies.touch(self.home, name)
            return
        with self._locks.setdefault(name, threading.Lock()), self._alone(name):
            if not _is_whole(path, num_bytes):  # no other thread or process has fetched it meanwhile
                self._fetch(name, path, num_bytes)

    @contextmanager
    def _alone(self, name: str) -> Iterator[None]:
        """One process at a time fetches a file: the ranks of a run want the same."""
        (self.home / "locks").mkdir(exist_ok=True)
        with self._turn(f"locks/{copies.mark_of(self.home, name).name}.lock"):
            yield

    @contextmanager
    def _turn(self, name: str) -> Iterator[None]:
        """Wait until no other process of this machine is in the block."""
        try:
            with lock_file(self.home / name, wait_seconds=_MOST_WAIT):
                yield
        except Locked as error:
            raise CacheLocked(
                f"{self.objects.url} has been asked for {_MOST_WAIT // 60} minutes by {error.owner}",
                "See whether that process still works, and end it if it does not",
            ) from None

    def _fetch(self, name: str, path: Path, num_bytes: int | None) -> None:
        entry = self.objects.stat(name)
        if entry is None:
            self._take_over()  # perhaps a writer replaced the index after this process read the manifest
            raise self._corrupt(f"{self.objects.url}/{name} is missing")
        if num_bytes is not None and entry.num_bytes != num_bytes:
            raise self._corrupt(f"{self.objects.url}/{name} has {entry.num_bytes} bytes, {num_bytes} were written")
        copies.mark(self.home, self.root.name, name)  # before it is there: after a kill, it can still make room
        sha256 = self.objects.fetch(name, path, num_bytes)
        wanted = _ID.search(name)
        if wanted and not sha256.startswith(wanted[1]):
            path.unlink()
            raise self._corrupt(
                f"{self.objects.url}/{name} is not the file that was written: its sha256 does not match"
            )
        copies.add(self.home, self.root.name, name, entry.num_bytes)

    def _corrupt(self, problem: str) -> CacheCorrupt:
        return CacheCorrupt(
            problem,
            f"k5cache verify {self.objects.url} lists all damage; k5cache encode SOURCE -o {self.objects.url} --repair "
            "encodes only what is damaged",
        )

    def has(self, name: str, num_bytes: int) -> bool:
        """Whether the store has a file with this size. It is not fetched. What is not listed is asked for by name."""
        if self._listing is None:
            self._listing = {}
            with suppress(StoreError):  # who may read may not always list
                self._listing = {entry.name: entry for entry in self.objects.entries()}
        entry = self._listing.get(name) or self.objects.stat(name)
        return entry is not None and entry.num_bytes == num_bytes

    def forget(self) -> None:
        """Remove all copies, so that everything is read from the store again."""
        copies.forget(self.home)

    def again(self, names: set[str]) -> bool:
        """Remove the copies of these names: their bytes are not those that were written. False if there are none."""
        there = [name for name in names if copies.mark_of(self.home, name).exists()]
        copies.forget(self.home, names)
        return bool(there)

    def is_here(self, name: str) -> bool:
        """Whether a file is still here, or has made room."""
        return (self.root / name).exists()

    # What a writer says.

    def send_again(self, names: set[str]) -> None:
        """Objects of these names are damaged: if a shard gets one of the names again, it is sent again."""
        if self._sender:
            self._sender.send_again(names)

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Send what is committed in the block, and what an earlier writer could not send.

        The caller has the lock of the folder. At the end everything that was committed is in the store.

        Raises:
            StoreError: the store refuses, or another machine has written the cache in the meantime.
        """
        if self.objects.scheme == "hf":
            raise StoreError(
                f"{self.objects.url} can be read but not written: a repository takes files in commits",
                "Encode into a folder, and send it: k5cache push CACHE OWNER/NAME",
            )
        there = self._begin()
        self._sender = Sender(
            self.objects, self.root, there[1] if there else None, _names_in(there), self._sent, self._write_note
        )
        try:
            self._adopt()
            yield
            self._sender.finish()
        except BaseException:
            if self._sender.stop():
                note(f"What is not in {self.objects.url} yet is kept on this machine: the same command sends it")
            raise
        finally:
            self._sender = None

    def _begin(self) -> tuple[bytes, str] | None:
        """Take over the store's manifest under the writer's lock, and keep one that was not sent."""
        with self._turn("look.lock"):
            there = self.objects.read(MANIFEST, MOST_BYTES)
            self._put_down(there)
        return there

    def _put_down(self, there: tuple[bytes, str] | None) -> None:
        """Write the store's manifest into the folder. One that the store has not seen becomes ``pending.json``."""
        path = self.root / MANIFEST
        here = path.read_bytes() if path.exists() else None
        if here is not None and _digest(here) != self._note().get("sha256"):
            path.replace(self.home / "pending.json")
            here = None
        if there is None:
            path.unlink(missing_ok=True)
        elif here != there[0]:
            with new_file(path) as file:
                file.write(there[0])
        self._write_note(*(there[::-1] if there else (None, None)))

    def _adopt(self) -> None:
        """Name the shards of an earlier writer that were not sent. Keys are content, so they fit under any recipe."""
        pending = self.home / "pending.json"
        if not pending.exists():
            return
        path = self.root / MANIFEST
        with suppress(ValueError):
            ours = unseal(pending.read_bytes())
            nothing = {**ours, "shards": [], "index": None, "locations": None}
            theirs = unseal(path.read_bytes()) if path.exists() else nothing
            known = {shard["file"] for shard in theirs["shards"]}
            lost = [s for s in ours["shards"] if s["file"] not in known and self._is_somewhere(s)]
            if lost and ours["format"] == theirs["format"]:
                raw = seal({**theirs, "shards": [*theirs["shards"], *lost]}, allow_nan=False)
                with new_file(path) as file:
                    file.write(raw)
                self.committed(raw)
        pending.unlink()

    def _is_somewhere(self, shard: dict[str, Any]) -> bool:
        """Whether a shard is here, or was sent before it made room."""
        return (self.root / shard["file"]).is_file() or self.has(shard["file"], shard["num_bytes"])

    def committed(self, raw: bytes) -> None:
        """Send the files that a manifest names, and then the manifest itself. Returns at once.

        Raises:
            StoreError: something before it could not be sent.
        """
        if self._sender:
            self._sender.offer(raw)

    def _sent(self, name: str, num_bytes: int) -> None:
        copies.add(self.home, self.root.name, name, num_bytes)

    # What garbage collection and a verification ask for.

    def unnamed(self, named: set[str]) -> list[Entry]:
        """The objects that no manifest names, and that are old enough that no other machine is about to name them."""
        known = named | {MANIFEST, "skipped.csv"}
        before = (time.time() - _STALE_SECONDS) * 1e9
        return [entry for entry in self.objects.entries() if entry.name not in known and entry.mtime_ns < before]

    def bring_unnamed(self, named: set[str]) -> list[str]:
        """Fetch files of our names that no manifest names, to be proven by their content. Returns all other names."""
        foreign = []
        for entry in self.unnamed(named):
            if OUR_NAMES.fullmatch(entry.name):
                self._fetch(entry.name, self.root / entry.name, entry.num_bytes)
            else:
                foreign.append(entry.name)
        return foreign

    def delete(self, names: set[str]) -> None:
        """Delete objects that no manifest names any more, and their copies."""
        self.objects.delete(sorted(names))
        copies.forget(self.home, names)

    # The note.

    def _note(self) -> dict[str, Any]:
        with suppress(OSError, ValueError):
            document = json.loads((self.home / "note.json").read_text(encoding="utf-8"))
            if isinstance(document, dict):
                return document
        return {}

    def _write_note(self, tag: str | None, raw: bytes | None) -> None:
        document = {"url": self.objects.url, "tag": tag, "sha256": raw if raw is None else _digest(raw)}
        if document != self._note():
            with new_file(self.home / "note.json") as file:
                file.write(json.dumps(document).encode())


def _is_whole(path: Path, num_bytes: int | None) -> bool:
    """Whether a file is here, with this size. None: with any."""
    return path.is_file() and num_bytes in (None, path.stat().st_size)


def _names_in(there: tuple[bytes, str] | None) -> set[str]:
    """The files that a manifest names."""
    return {name.decode() for name in _NAMES.findall(there[0])} if there else set()


def _digest(raw: bytes) -> str:
    return hashlib.sha256(raw).hexdigest()

"""How do the files of a cache get into a store while more are written? Files first, several at once; a manifest last.

A thread sends what the newest manifest names and is not there yet, and then that manifest, on the condition that the
store's is still the one that this writer began with or wrote itself. So the store's manifest never names a file that
is not whole there, and two writers do not overwrite each other's.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from k5cache.remote import copies
from k5cache.remote.objects import Changed, Objects
from k5cache.shared.console import note
from k5cache.shared.errors import StoreError
from k5cache.shared.sealed import unseal

AT_ONCE = 4
"""Files that are sent at the same time."""
SECONDS = 30.0
"""Between two manifests of a cache that grows. The last is always sent."""
MANIFEST, SKIPPED = "manifest.json", "skipped.csv"


@dataclass(frozen=True)
class _Offer:
    """A manifest that was committed here."""

    raw: bytes
    sizes: dict[str, int]
    """The bytes of every file that it names."""
    tables: frozenset[str]
    """Those of them that are the index and the locations."""

    @classmethod
    def of(cls, raw: bytes) -> _Offer:
        document = unseal(raw)
        tables = [info for info in (document["index"], document["locations"], document.get("split")) if info]
        sizes = {info["file"]: info["num_bytes"] for info in (*document["shards"], *tables)}
        return cls(raw, sizes, frozenset(info["file"] for info in tables))


class Sender:
    """Sends what is committed in the folder of a cache.

    Args:
        tag: of the store's manifest; None if there is none.
        there: the files that it names.
        sent: called with each file that is in the store now, and its bytes.
        keep_note: called with the tag and the bytes of each manifest that was written.
    """

    def __init__(
        self, objects: Objects, root: Path, tag: str | None, there: set[str], sent: Callable[[str, int], None],
        keep_note: Callable[[str, bytes], None],
    ) -> None:  # fmt: skip
        self._objects, self._root, self._tag, self._sent, self._keep_note = objects, root, tag, sent, keep_note
        self._changed = threading.Condition()
        self._newest: _Offer | None = None
        self._done: _Offer | None = None
        self._there = set(there)
        self._damaged: set[str] = set()
        self._tables = frozenset(name for name in there if "/" not in name)
        self._is_ending = self._is_stopped = False
        self._error: BaseException | None = None
        self._thread: threading.Thread | None = None
        self._last = -SECONDS
        self._began = time.time()

    def offer(self, raw: bytes) -> None:
        """A newer manifest, whose files are whole in the folder. Waits only while more waits to be sent than copies
        may take.

        Raises:
            StoreError: sending failed.
        """
        with self._changed:
            self._newest = _Offer.of(raw)
            if self._thread is None:
                self._thread = threading.Thread(target=self._work, name="k5 sending", daemon=True)
                self._thread.start()
            self._changed.notify_all()
            self._changed.wait_for(lambda: self._error is not None or self._num_waiting() <= copies.bound())
        self._raise()

    def send_again(self, names: set[str]) -> None:
        """Send files of these names, if there will be any, also where the store has some."""
        with self._changed:
            self._there -= names
            self._damaged |= names

    def finish(self) -> None:
        """Wait until everything is in the store.

        Raises:
            StoreError: sending failed.
        """
        with self._changed:
            self._is_ending = True
            self._changed.notify_all()
        if self._thread:
            self._thread.join()
        self._raise()

    def stop(self) -> bool:
        """Send nothing more than what is under way. Returns whether something is not in the store."""
        with self._changed:
            self._is_ending = self._is_stopped = True
            self._changed.notify_all()
        if self._thread:
            self._thread.join()
        return self._newest is not self._done

    def _num_waiting(self) -> int:
        sizes = self._newest.sizes if self._newest else {}
        return sum(size for name, size in sizes.items() if name not in self._there)

    def _raise(self) -> None:
        if isinstance(self._error, Changed):
            raise StoreError(
                f"{self._objects.url} was written by another process since this command began",
                "Run the same command again: it goes on from what both have encoded",
            )
        if self._error:
            raise self._error

    def _work(self) -> None:
        try:
            while (offer := self._next()) is not None:
                self._send_files(offer)
                if not self._is_stopped and self._is_due(offer):
                    self._send_manifest(offer)
            skipped = self._root / SKIPPED
            if not self._is_stopped and skipped.is_file() and skipped.stat().st_mtime >= self._began:
                self._objects.send(SKIPPED, skipped)
        except BaseException as error:
            with self._changed:
                self._error = error
                self._changed.notify_all()

    def _next(self) -> _Offer | None:
        """The newest manifest, as soon as there is one that is not in the store; None at the end."""
        with self._changed:
            self._changed.wait_for(lambda: self._is_ending or self._is_ready(), timeout=None)
            return None if self._is_stopped or self._newest is self._done else self._newest

    def _is_ready(self) -> bool:
        return self._newest is not self._done and self._newest is not self._seen

    _seen: _Offer | None = None

    def _is_due(self, offer: _Offer) -> bool:
        """Whether a manifest is to be sent now: the last, one with another index, or the first in a while."""
        self._seen = offer
        is_last = self._is_ending and self._newest is offer
        return is_last or offer.tables != self._tables or time.monotonic() - self._last >= SECONDS

    def _send_files(self, offer: _Offer) -> None:
        to_send = {name: size for name, size in offer.sizes.items() if name not in self._there}
        if self._is_ending and len(to_send) > AT_ONCE:
            note(f"Sending what is left to {self._objects.url}")
        with ThreadPoolExecutor(AT_ONCE, "k5 sending") as pool:
            for done in [pool.submit(self._send_file, name, size) for name, size in to_send.items()]:
                try:
                    done.result()
                except BaseException:
                    pool.shutdown(cancel_futures=True)
                    raise

    def _send_file(self, name: str, num_bytes: int) -> None:
        if self._is_stopped:
            return
        there = None if name in self._damaged else self._objects.stat(name)
        if there is None or there.num_bytes != num_bytes or self._objects.is_another(there, self._root / name):
            self._objects.send(name, self._root / name)
        with self._changed:
            self._there.add(name)
            self._changed.notify_all()
        self._sent(name, num_bytes)

    def _send_manifest(self, offer: _Offer) -> None:
        self._tag = self._objects.replace(MANIFEST, offer.raw, self._tag)
        self._keep_note(self._tag, offer.raw)
        self._objects.delete(sorted(self._tables - offer.tables))
        with self._changed:
            self._done, self._tables, self._last = offer, offer.tables, time.monotonic()
            self._changed.notify_all()

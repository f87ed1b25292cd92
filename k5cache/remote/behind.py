"""What is behind the folder of a cache? For most nothing; for some a URL, and then the store's code tells its mirror.

This file is all of the room that a cache on disk imports, so that it costs nothing.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from pathlib import Path
from typing import Protocol


class Behind(Protocol):
    """What ``mirror.Mirror`` does for the code that works on its folder."""

    def bring(self, name: str, num_bytes: int | None) -> None:
        """A file of the cache is about to be opened."""

    def has(self, name: str, num_bytes: int) -> bool:
        """Whether a file is in the store with this size."""

    def forget(self) -> None:
        """Whatever is read next is read from the store."""

    def again(self, names: set[str]) -> bool:
        """Copies of these files are damaged. Returns whether there were any: the files are then fetched again."""

    def is_here(self, name: str) -> bool:
        """Whether a file that was brought has not made room since."""

    def send_again(self, names: set[str]) -> None:
        """These files are damaged in the store."""

    def committed(self, raw: bytes) -> None:
        """A manifest has been written in the folder."""

    def check_apart(self, source: str) -> None:
        """Refuse a cache inside what it is made of, and the reverse."""

    def writing(self) -> AbstractContextManager[None]:
        """A writer has the folder's lock until the end of the block."""


MIRRORS: dict[Path, Behind] = {}


def mirror_of(root: Path) -> Behind | None:
    """What is behind the folder of a cache. The folders of users have nothing behind them."""
    return MIRRORS.get(root)

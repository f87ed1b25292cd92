"""Where do encoded rows go? Into a cache's shards (``Committer``), or into memory to be compared (``Collector``)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Protocol

from k5cache.buckets import Bucket
from k5cache.store.manifest import ShardKind
from k5cache.store.tensors import TensorSpec

Append = Callable[[dict[str, Any]], None]
"""Takes one row: its ``key``, and a value for each column of its kind."""


class RowSink(Protocol):
    """What the encoders' passes write to."""

    def shards(
        self, kind: ShardKind, specs: dict[str, TensorSpec], bucket: Bucket | None = None
    ) -> AbstractContextManager[Append]:
        """Yield ``append`` for rows of one kind, and of one bucket if they are latents or masks."""
        ...


class Collector:
    """Keeps rows in memory, by key."""

    def __init__(self) -> None:
        self.rows: dict[str, dict[str, Any]] = {}

    @contextmanager
    def shards(self, kind: ShardKind, specs: dict[str, TensorSpec], bucket: Bucket | None = None) -> Iterator[Append]:
        """Yield ``append``."""
        yield lambda row: self.rows.update({row["key"]: row})

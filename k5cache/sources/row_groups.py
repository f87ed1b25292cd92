"""How is one image read from a row group of thousands? By going on from where the last reads stopped.

Parquet has no way to one row: a row group is decoded from its start. Images are wanted in nearly ascending order, but
sorted as text: row 10 comes after row 1, and row 2 after row 1999. That is an ascending order for each number of
digits, so several places are remembered, and each read goes on from the nearest one before it.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass
from threading import Lock

import pyarrow as pa

from k5cache.sources.items import UnreadableImage

_MAX_CURSORS = 8
"""Places remembered. One holds a page of the file, 1 MB or, if its writer was careless, 1,024 images."""
_MAX_BATCHES = 24
_MAX_BYTES = 128 << 20
"""Of the batches that are kept, since threads ask for neighbours in any order."""


@dataclass(frozen=True)
class Group:
    """One column of one row group."""

    key: Hashable
    batches: Callable[[], Iterator[pa.Array]]
    """Decodes it from the start, a batch of rows at a time."""


@dataclass
class _Cursor:
    """A place in a row group: the batches that come next begin at ``row``."""

    key: Hashable
    row: int
    batches: Iterator[pa.Array]


class GroupReader:
    """Reads single cells of row groups. Threads may share it."""

    def __init__(self) -> None:
        self._lock = Lock()
        self._cursors: list[_Cursor] = []
        """The one used last comes last."""
        self._kept: OrderedDict[tuple[Hashable, int], pa.Array] = OrderedDict()
        """(group, first row) -> batch; the one used last comes last."""

    def __reduce__(self) -> tuple[type[GroupReader], tuple[()]]:
        """In another process it begins anew."""
        return GroupReader, ()

    def read(self, group: Group, row: int) -> bytes:
        """The bytes in a row of a group.

        Raises:
            UnreadableImage: there are none, or the file is damaged or was changed.
        """
        try:
            with self._lock:
                start, batch = self._find(group.key, row) or self._decode(group, row)
            content = batch[row - start].as_py()
        except (pa.ArrowException, OSError, ValueError) as error:
            raise UnreadableImage(f"cannot be read ({' '.join(str(error).split())[:200]})") from None
        if content is None:
            raise UnreadableImage("holds no image")
        return bytes(content)

    def _find(self, key: Hashable, row: int) -> tuple[int, pa.Array] | None:
        """The batch with this row and its first row, if it is kept."""
        for (kept_key, start), batch in reversed(self._kept.items()):
            if kept_key == key and start <= row < start + len(batch):
                self._kept.move_to_end((key, start))
                return start, batch
        return None

    def _decode(self, group: Group, row: int) -> tuple[int, pa.Array]:
        """Go on to the batch with this row, from the nearest place before it or from the start."""
        before = [cursor for cursor in self._cursors if cursor.key == group.key and cursor.row <= row]
        cursor = max(before, key=lambda cursor: cursor.row, default=None) or _Cursor(group.key, 0, group.batches())
        if cursor in before:
            self._cursors.remove(cursor)
        for batch in cursor.batches:
            start, cursor.row = cursor.row, cursor.row + len(batch)
            self._keep(group.key, start, batch)
            if row < cursor.row:
                self._cursors = [*self._cursors[1 - _MAX_CURSORS :], cursor]
                return start, batch
        raise UnreadableImage("is no longer there")

    def _keep(self, key: Hashable, start: int, batch: pa.Array) -> None:
        self._kept[key, start] = batch
        while len(self._kept) > _MAX_BATCHES or (
            len(self._kept) > 1 and sum(kept.nbytes for kept in self._kept.values()) > _MAX_BYTES
        ):
            self._kept.popitem(last=False)

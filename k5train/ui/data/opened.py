"""What does a cache's index say, for pages? A cache stays open between requests; only what a page needs is decoded."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from k5cache.shared.errors import CacheError
from k5cache.store.index import IndexRow
from k5cache.store.reader import Cache, open_cache
from k5train.ui.data.query import Query, slice_of

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

MOST_OPEN = 4
LARGE = 100_000
"""Items. Of larger caches no table of keys is kept, 100 bytes an item: only a picture's own page has captions."""
SEARCHED = 10_000
"""Items whose captions are searched: they are read from the shards, 0.1 ms each, once."""
_open: OrderedDict[Path, tuple[tuple[int, ...], Opened]] = OrderedDict()
_lock = threading.Lock()


class Opened:
    """A cache, and what of it was asked for before."""

    def __init__(self, cache: Cache) -> None:
        self.cache = cache
        self.is_large = len(cache) > LARGE
        self.has_captions = len(cache) <= SEARCHED
        """Whether a search covers captions."""

    def numbers(self, query: Query) -> NDArray[np.int64] | range:
        """The items that a query leaves, in its order."""
        chosen = self._chosen(query)
        if not query.sort:
            return range(len(self.cache)) if chosen is None else chosen.nonzero()[0]
        import numpy as np

        numbers = np.arange(len(self.cache)) if chosen is None else chosen.nonzero()[0]
        if query.sort == "name":
            return numbers[np.argsort(self._ranks[numbers], kind="stable")]
        return numbers[np.argsort(-self._values(query.sort)[numbers], kind="stable")]

    def page(self, query: Query) -> tuple[list[int], int]:
        """The numbers of the items on a page, and how many the query leaves."""
        numbers = self.numbers(query)
        return [int(number) for number in numbers[slice_of(query, len(numbers))]], len(numbers)

    def caption(self, key: str) -> str:
        """One caption as it was encoded; of a damaged row, what is wrong."""
        try:
            return self.cache.caption(key)
        except (CacheError, OSError) as error:
            return f"[cannot be read: {error.problem if isinstance(error, CacheError) else error.strerror}]"

    @cached_property
    def buckets(self) -> list[tuple[str, int]]:
        """Each bucket and how many items it has, the fullest first."""
        import numpy as np

        sizes, counts = np.unique(self._bucket_codes(), return_counts=True)
        names = [f"{size >> 20}x{size & 0xFFFFF}" for size in sizes.tolist()]
        return sorted(zip(names, counts.tolist(), strict=True), key=lambda bucket: -bucket[1])

    @cached_property
    def num_masks(self) -> int:
        """Items with a mask."""
        return len(self.cache) - self._column("mask_key").null_count

    @cached_property
    def num_several(self) -> int:
        """Items with several captions."""
        return int((self._num_captions() > 1).sum())

    @cached_property
    def num_truncated(self) -> int:
        """Items with a caption that was cut off."""
        return int(self._is_truncated().sum())

    def _chosen(self, query: Query) -> NDArray[np.bool_] | None:
        """Which items the filter and the search leave; None for all."""
        parts = []
        if query.bucket:
            width, height = map(int, query.bucket.split("x"))
            parts.append(self._bucket_codes() == (width << 20) + height)
        if query.only == "mask":
            parts.append(_flags(self._column("mask_key").is_valid()))
        elif query.only == "several":
            parts.append(self._num_captions() > 1)
        elif query.only == "truncated":
            parts.append(self._is_truncated())
        elif query.only == "no-caption":
            parts.append(self._num_captions() == 0)
        if query.q:
            parts.append(self._has_text(query.q))
        return None if not parts else parts[0] if len(parts) == 1 else parts[0] & parts[1] & parts[-1]

    def _has_text(self, text: str) -> NDArray[np.bool_]:
        import pyarrow.compute as pc

        names = _flags(pc.match_substring(self._paths, text, ignore_case=True))
        if not self.has_captions:
            return names
        import numpy as np

        wanted = text.lower()
        return names | np.array([wanted in captions for captions in self._captions], dtype=bool)

    @cached_property
    def _paths(self) -> Any:
        """The one column that stays decoded: 40 bytes an item."""
        return self._column("path")

    @cached_property
    def _captions(self) -> list[str]:
        """Of each item all captions in lower case, in one text."""
        keys = self._column("caption_keys").to_pylist()
        known = {key: self.caption(key).lower() for key in {key for of_item in keys for key in of_item}}
        return ["\n".join(known[key] for key in of_item) for of_item in keys]

    @property
    def _ranks(self) -> NDArray[np.int64]:
        """The place of each item when they are sorted by name."""
        import numpy as np
        import pyarrow.compute as pc

        order = _values(pc.sort_indices(self._paths), "uint64")
        ranks = np.empty(len(order), dtype=np.int64)
        ranks[order] = np.arange(len(order))
        return ranks

    def _values(self, sort: str) -> NDArray[np.int64]:
        import numpy as np

        if sort == "size":
            return self._numbers("width").astype(np.int64) * self._numbers("height")
        if sort == "newest":
            return self._numbers("mtime_ns")
        lengths = self._column("caption_lengths")
        longest = np.zeros(len(lengths), dtype=np.int64)
        owners = np.repeat(np.arange(len(lengths)), self._num_captions())
        np.maximum.at(longest, owners, _values(lengths.flatten(), "int32"))
        return longest

    def _bucket_codes(self) -> NDArray[np.int64]:
        import numpy as np

        return (self._numbers("bucket_width").astype(np.int64) << 20) + self._numbers("bucket_height")

    def _num_captions(self) -> NDArray[np.int32]:
        import pyarrow.compute as pc

        return _values(pc.list_value_length(self._column("caption_lengths")), "int32")

    def _is_truncated(self) -> NDArray[np.bool_]:
        import numpy as np
        import pyarrow as pa
        import pyarrow.compute as pc

        cut = [key for key, _, _ in self.cache.manifest.left_out.truncated]
        chosen = np.zeros(len(self.cache), dtype=bool)
        if cut:
            keys = self._column("caption_keys")
            owners = _values(pc.list_parent_indices(keys), "int64")
            chosen[owners[_flags(pc.is_in(keys.flatten(), pa.array(cut)))]] = True
        return chosen

    def _numbers(self, name: str) -> NDArray[Any]:
        column = self._column(name)
        return _values(column, str(column.type))

    def _column(self, name: str) -> Any:
        column = self.cache.columns(name).column(0)
        return column.chunk(0) if column.num_chunks else column.combine_chunks()


def _values(array: Any, dtype: str) -> NDArray[Any]:
    """The numbers of an array without nulls. ``to_numpy`` would import pandas if it is installed."""
    import numpy as np

    if not len(array):
        return np.zeros(0, dtype)
    return np.frombuffer(array.buffers()[1], dtype, len(array), array.offset * np.dtype(dtype).itemsize)


def _flags(array: Any) -> NDArray[np.bool_]:
    import pyarrow as pa

    return _values(array.cast(pa.uint8()), "uint8").astype(bool)


def open_index(root: Path) -> Opened:
    """The cache at ``root``, open. Raises as ``open_cache``."""
    status = (root / "manifest.json").stat()
    stamp = (status.st_mtime_ns, status.st_ctime_ns, status.st_size, status.st_ino)
    with _lock:
        known = _open.get(root)
        if known and known[0] == stamp:
            _open.move_to_end(root)
            return known[1]
    opened = Opened(open_cache(root))
    with _lock:
        _open[root] = (stamp, opened)
        while len(_open) > MOST_OPEN:
            _open.popitem(last=False)
    return opened


def captions_of(opened: Opened, rows: Sequence[IndexRow]) -> list[tuple[str, ...]]:
    """The captions of some items as they were encoded. Of a large cache, the table of keys is let go again."""
    if opened.is_large:
        opened = Opened(open_cache(opened.cache.root))
    return [tuple(opened.caption(key) for key in row.caption_keys) for row in rows]

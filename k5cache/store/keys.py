"""Which keys does a cache have? A set of keys as one sorted column: a million take 36 MB, a set of strings 130."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Iterator, Set

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from k5cache.store import columns


class Keys(Set[str]):
    """A set of keys. ``in`` bisects, which takes 10 us: ask for many at once with ``are_in``."""

    def __init__(self, keys: pa.Array) -> None:
        """``keys``: strings in the order of their bytes. They may be there several times."""
        self.array = pc.unique(keys)
        self._key = columns.getter(self.array)

    def __contains__(self, key: object) -> bool:
        at = bisect_left(range(len(self)), str(key), key=self._key)
        return at < len(self) and self._key(at) == key

    def __iter__(self) -> Iterator[str]:
        return iter(self.array.to_pylist())

    def __len__(self) -> int:
        return len(self.array)

    @classmethod
    def _from_iterable(cls, keys: Iterable[str]) -> Set[str]:  # type: ignore[override]
        return frozenset(keys)


def are_in(keys: pa.Array, known: Set[str]) -> np.ndarray[tuple[int], np.dtype[np.bool_]]:
    """Which of these keys are known."""
    if not known:
        return np.zeros(len(keys), bool)
    of_known = known.array if isinstance(known, Keys) else pa.array(sorted(known), pa.string())
    return columns.flags(pc.is_in(keys, value_set=of_known))


def first_places(keys: pa.Array) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    """The place of each different key where it stands first, ascending. Null counts as a key."""
    encoded = keys.dictionary_encode(null_encoding="encode")
    return np.unique(columns.numbers(encoded.indices), return_index=True)[1]

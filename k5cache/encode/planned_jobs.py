"""How does a plan hold a million jobs? As columns: each job is made when it is asked for. No torch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from typing import Any, TypeVar, overload

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from k5cache.encode.job import LatentJob, SourceView, TextJob
from k5cache.store import columns
from k5cache.store.geometry import geometry_of, source_of_row
from k5cache.store.index import IndexRows
from k5cache.store.keys import are_in, first_places

_Job = TypeVar("_Job")
_Numbers = np.ndarray[Any, Any]
_PIECE = 1 << 12  # texts that are Python objects at once


class Jobs(Sequence[_Job]):
    """Jobs of which only numbers are kept. To send some to another process, make a list of them."""

    def __init__(self, make: Callable[[int], _Job], numbers: _Numbers) -> None:
        """``make``: a job by its number."""
        self._make, self._numbers = make, numbers

    def __len__(self) -> int:
        return len(self._numbers)

    @overload
    def __getitem__(self, i: int) -> _Job: ...
    @overload
    def __getitem__(self, i: slice) -> Jobs[_Job]: ...
    def __getitem__(self, i: int | slice) -> _Job | Jobs[_Job]:
        if isinstance(i, slice):
            return Jobs(self._make, self._numbers[i])
        return self._make(int(self._numbers[i]))

    def __iter__(self) -> Iterator[_Job]:
        return (self._make(int(number)) for number in self._numbers)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Sequence):
            return NotImplemented
        return len(self) == len(other) and all(mine == its for mine, its in zip(self, other, strict=True))

    __hash__ = None  # type: ignore[assignment]

    def __reduce__(self) -> tuple[Any, ...]:
        return tuple, (list(self),)

    def at(self, places: Sequence[int]) -> Jobs[_Job]:
        """The jobs at these places."""
        return Jobs(self._make, self._numbers[np.asarray(places, np.int64)])


def at(jobs: Sequence[_Job], places: Sequence[int]) -> Sequence[_Job]:
    """The jobs at these places, as lean as ``jobs`` are."""
    return jobs.at(places) if isinstance(jobs, Jobs) else [jobs[place] for place in places]


def latent_jobs_of(
    rows: IndexRows, of_edits: Sequence[str], jobs_of_edits: Mapping[str, LatentJob], stored: Set[str]
) -> tuple[Jobs[LatentJob], int]:
    """One job per key that is not stored, in the order of first use: an image that is there twice is encoded once.

    Args:
        of_edits: the keys of the sources of pairs to draw.
        jobs_of_edits: the jobs of those that are new.

    Returns:
        the jobs, and how many keys are stored.
    """
    targets, sources = rows.column("latent_key"), rows.column("source_key")
    by_row = pa.concat_arrays([targets, sources]).take(
        pa.array(np.arange(2 * len(rows)).reshape(2, len(rows)).T.ravel())
    )
    keys = pa.concat_arrays([by_row, pa.array(of_edits, pa.string())])
    numbers = first_places(keys)
    numbers = numbers[columns.flags(keys.take(pa.array(numbers)).is_valid())]
    are_stored = are_in(keys.take(pa.array(numbers)), stored)

    def make(number: int) -> LatentJob:
        if number >= 2 * len(rows):
            return jobs_of_edits[of_edits[number - 2 * len(rows)]]
        row = rows[number // 2]
        if number % 2 == 0:
            return LatentJob(row.latent_key, row.path, geometry_of(row), row.content_hash)
        assert row.source_key
        assert row.source_path
        return LatentJob(row.source_key, row.source_path, source_of_row(row), row.source_hash or "", is_source=True)

    return Jobs(make, numbers[~are_stored]), int(are_stored.sum())


class TextColumns:
    """Texts as they are met, as columns of keys and cleaned captions."""

    def __init__(self) -> None:
        self._texts: list[tuple[str, str]] = []
        self._pieces: list[pa.Table] = []
        self._sources: list[SourceView | None] = []
        self._has_sources = False

    def add(self, key: str, caption: str, source: SourceView | None) -> None:
        """A text; it may have been added before."""
        self._texts.append((key, caption))
        if source and not self._has_sources:
            self._sources = [None] * (self._num_texts - 1)
            self._has_sources = True
        if self._has_sources:
            self._sources.append(source)
        if len(self._texts) == _PIECE:
            self._close_piece()

    def jobs(self, needed: pa.Array, stored: Set[str]) -> tuple[Jobs[TextJob], int]:
        """One job per key that is needed and not stored, in the order of first use.

        Returns:
            the jobs, and how many of the keys that are needed are stored.
        """
        self._close_piece()
        table = pa.concat_tables(self._pieces)
        keys, captions = (columns.one_array(table.column(name)) for name in ("key", "caption"))
        needed = needed.unique()
        are_stored = are_in(needed, stored)
        wanted = needed.filter(pa.array(~are_stored))
        numbers = first_places(keys)
        numbers = numbers[columns.flags(pc.is_in(keys.take(pa.array(numbers)), value_set=wanted))]
        key, caption, sources = columns.getter(keys), columns.getter(captions), self._sources

        def make(number: int) -> TextJob:
            return TextJob(key(number), caption(number), sources[number] if sources else None)

        return Jobs(make, numbers), int(are_stored.sum())

    @property
    def _num_texts(self) -> int:
        return sum(map(len, self._pieces)) + len(self._texts)

    def _close_piece(self) -> None:
        schema = pa.schema([("key", pa.string()), ("caption", pa.string())])
        names = [key for key, _ in self._texts], [caption for _, caption in self._texts]
        self._pieces.append(pa.Table.from_arrays([pa.array(column, pa.string()) for column in names], schema=schema))
        self._texts.clear()

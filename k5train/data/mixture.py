"""How are several caches one list of rows? Which rows does an epoch have, in which order, and where is each one?"""

from __future__ import annotations

import bisect
import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from k5cache.shared.errors import CacheStale, RecipeError
from k5cache.shared.kind import LONG_NAMES
from k5cache.store.reader import Cache, no_items, open_cache
from k5train.data.folder_repeats import folder_repeats, used_never
from k5train.options.data import DataConfig

if TYPE_CHECKING:
    import torch

    from k5cache.store.index import IndexRow

Size = tuple[int, int]
_GOLDEN = 0.6180339887  # multiples of it, modulo 1, are spread evenly over 0 to 1


@dataclass(frozen=True)
class Source:
    """A cache, and how a run uses it."""

    cache: Cache
    repeats: int = 1
    weight: float | None = None
    """Share of the rows of an epoch, relative to the weights of the other sources. None: in proportion to its size."""
    is_regularisation_data: bool = False
    split: frozenset[int] = frozenset()
    """Items of the cache that are not trained on: the validation split."""
    repeats_by_folder: bool = False
    """Whether ``repeats`` is multiplied by the number in the name of an image's folder."""


@dataclass(frozen=True)
class Pool:
    """The rows of one source in one bucket, all used equally often."""

    rows: list[int]
    rate: float
    """Mean number of rows that the pool contributes to an epoch."""
    phase: float
    """0 to 1: shifts the epochs in which a fractional rate is rounded up, so that they differ between pools."""

    def count(self, epoch: int) -> int:
        """Number of rows in this epoch: the rate, rounded so that the sum over epochs is never off by one."""
        return math.floor((epoch + 1) * self.rate + self.phase) - math.floor(epoch * self.rate + self.phase)


class Mixture:
    """Rows 0 to ``len - 1``: the items of the first cache, then those of the second, and so on."""

    def __init__(self, sources: Sequence[Source]) -> None:
        self.sources = tuple(sources)
        self._ends = list(itertools.accumulate(len(s.cache) for s in self.sources))

    @property
    def first(self) -> Cache:
        """The first cache, whose prompts are drawn."""
        return self.sources[0].cache

    def __len__(self) -> int:
        return self._ends[-1]

    @property
    def first_rows(self) -> list[int]:
        """The number of the first row of each source."""
        return [end - len(source.cache) for end, source in zip(self._ends, self.sources, strict=True)]

    def locate(self, row: int) -> tuple[Source, int]:
        """The source of a row, and the number of its item there."""
        number = bisect.bisect_right(self._ends, row)
        return self.sources[number], row - (self._ends[number - 1] if number else 0)

    def row(self, row: int) -> IndexRow:
        """The index entry of a row."""
        source, item = self.locate(row)
        return source.cache.row(item)

    def name(self, row: int) -> str:
        """A row's name for people: the path of its image, with the cache if there are several."""
        source, item = self.locate(row)
        path = source.cache.row(item).path
        return path if len(self.sources) == 1 else f"{source.cache.root.name}: {path}"

    def has_masks(self) -> bool:
        """Whether any row has a mask."""
        columns = [s.cache.columns("mask_key").column(0) for s in self.sources]
        return any(column.null_count < len(column) for column in columns)

    @cached_property
    def pools(self) -> dict[Size, list[Pool]]:
        """Bucket -> the pools of each source that has rows in it."""
        by_source = [self._groups(number) for number in range(len(self.sources))]
        sizes = [sum(len(rows) * often for (_, often), rows in groups.items()) for groups in by_source]
        totals = [float(size * source.repeats) for size, source in zip(sizes, self.sources, strict=True)]
        weights = [s.weight or 0.0 for s in self.sources]
        if sum(weights):
            totals = [sum(totals) * weight / sum(weights) for weight in weights]
        pools: dict[Size, list[Pool]] = {}
        number = 0
        for groups, size, total in zip(by_source, sizes, totals, strict=True):
            for (bucket, often), rows in groups.items():
                rate = total / size * len(rows) * often
                pools.setdefault(bucket, []).append(Pool(rows, rate, number * _GOLDEN % 1))
                number += 1
        return dict(sorted(pools.items()))

    def paths(self) -> list[str]:
        """The path of every row of the caches whose repeats are in the names of folders."""
        caches = [source.cache for source in self.sources if source.repeats_by_folder]
        return [path for cache in caches for path in cache.columns("path").column(0).to_pylist()]

    def _groups(self, number: int) -> dict[tuple[Size, int], list[int]]:
        """(bucket, how often by the folder's name) -> the rows of a source."""
        source = self.sources[number]
        columns = source.cache.columns("bucket_width", "bucket_height").columns
        sizes = zip(*(column.to_pylist() for column in columns), strict=True)
        paths = source.cache.columns("path").column(0).to_pylist() if source.repeats_by_folder else ()
        offset = self.first_rows[number]
        groups: dict[tuple[Size, int], list[int]] = {}
        for item, size in enumerate(sizes):
            if item not in source.split:
                often = folder_repeats(paths[item]) if paths else 1
                groups.setdefault((size, often), []).append(offset + item)
        return groups


def open_mixture(entries: Sequence[DataConfig]) -> Mixture:
    """Open the caches of a run.

    Raises:
        CacheError: a cache cannot be opened, or all are empty.
        RecipeError: the name of a folder says that its images are never used.
        CacheStale: they were made by different encoders; names the fields.
    """
    sources = [
        Source(
            open_cache(Path(e.cache)), e.repeats, e.weight, e.is_regularisation_data,
            repeats_by_folder=e.repeats_by_folder,
        )
        for e in entries
    ]  # fmt: skip
    mixture = Mixture(sources)
    if never := used_never(mixture.paths()):
        raise RecipeError(
            f"repeats_by_folder is set, and the folder of {never[0]} says 0 times",
            "Rename the folder and encode again, which encodes no image anew; or set repeats_by_folder=false",
        )
    if not len(mixture):
        raise no_items(mixture.first)
    for other in sources[1:]:
        first = mixture.first
        if other.cache.kind != first.kind:
            raise CacheStale(
                f"{first.root} was encoded for {LONG_NAMES[first.kind]} and {other.cache.root} for"
                f" {LONG_NAMES[other.cache.kind]}, and a transformer is for one of the two",
                "Train on caches of one kind",
            )
        ours, theirs = mixture.first.manifest.recipe, other.cache.manifest.recipe
        fields = [("text", name) for name in ours["text"]]
        fields += [("latents", name) for name in ("vae", "scaling_factor")]
        different = [f"{table}.{name}" for table, name in fields if ours[table][name] != theirs[table].get(name)]
        if different:
            raise CacheStale(
                f"{mixture.first.root} and {other.cache.root} were encoded differently: {', '.join(different)} differ",
                "Encode both with the same [model] and [cache] and the same installation",
            )
    return mixture


def num_micro_batches(data: Mixture, batch_size: int, epochs: int) -> int:
    """How many micro-batches the first ``epochs`` epochs have."""
    return sum(num_batches(data.pools, batch_size, epoch) for epoch in range(epochs))


def num_batches(pools: Mapping[Size, Sequence[Pool]], batch_size: int, epoch: int) -> int:
    """Number of batches in an epoch. Without weights it is the same for all epochs."""
    return sum(-(-sum(p.count(epoch) for p in parts) // batch_size) for parts in pools.values())


def epoch_batches(
    pools: Mapping[Size, Sequence[Pool]], batch_size: int, epoch: int, generator: torch.Generator
) -> list[list[int]]:
    """The batches of one epoch, in order.

    Args:
        pools: ``Mixture.pools``. A pool of n rows that contributes ``q * n + r`` rows contributes each row q times, and
            r of them once more, which are drawn anew in every epoch.
        batch_size: rows of a batch. The last batch of a bucket may be smaller.

    Returns:
        Lists of rows. The rows of one list share a bucket.
    """
    import torch

    batches: list[list[int]] = []
    for parts in pools.values():
        rows: list[int] = []
        for pool in parts:
            times, rest = divmod(pool.count(epoch), len(pool.rows))
            rows += pool.rows * times
            if rest:
                rows += [pool.rows[i] for i in torch.randperm(len(pool.rows), generator=generator)[:rest].tolist()]
        rows = [rows[i] for i in torch.randperm(len(rows), generator=generator).tolist()]
        batches += [rows[i : i + batch_size] for i in range(0, len(rows), batch_size)]
    return [batches[i] for i in torch.randperm(len(batches), generator=generator).tolist()]

"""Are the batches and updates of a run as large as its recipe asks? A bucket with fewer rows makes smaller ones."""

from __future__ import annotations

from collections.abc import Collection
from math import ceil

from k5cache.shared.units import count_of
from k5train.data.mixture import Mixture, Size
from k5train.options.train import TrainConfig

MOST_NAMED = 3
FULL = 0.75  # of batch_size on average: the last batch of each bucket has what is left, which is no surprise


def batch_warnings(data: Mixture, config: TrainConfig, num_ranks: int = 1) -> list[str]:
    """What is to be said of batches with fewer rows than ``batch_size``, and of updates longer than an epoch.

    Args:
        data: without what the run holds out.
        num_ranks: processes that train together, of which each accumulates.
    """
    size, per_update = config.batch_size, config.gradient_accumulation_steps * num_ranks
    rows = {bucket: ceil(sum(pool.rate for pool in pools)) for bucket, pools in data.pools.items()}
    count = _num_batches(rows.values(), size)
    lines = []
    if count and not _are_full(rows.values(), size):
        best = next(n for n in range(size - 1, 0, -1) if _are_full(rows.values(), n, 0.9))
        use = f"Use --set train.batch_size={best}, which every bucket fills"
        lines.append(f"train.batch_size is {size}, but {_found(rows, size)}. {use}")
    if count and per_update > count:
        batches = "one batch" if count == 1 else f"{count} batches"
        on = "" if num_ranks == 1 else f" on each of {num_ranks} GPUs"
        fewer = f"--set train.gradient_accumulation_steps={count // num_ranks}" if count >= num_ranks else "fewer GPUs"
        lines.append(
            f"train.gradient_accumulation_steps is {per_update // num_ranks}{on}, but an epoch has {batches}: each"
            f" update goes {per_update / count:.2g} times through the images. Use {fewer}"
        )
    return lines


def _found(rows: dict[Size, int], size: int) -> str:
    """Which buckets hold how many rows, as a repeat, a weight and a split leave them in an epoch."""
    small = sorted((n, bucket) for bucket, n in rows.items() if n < size)
    mean = f"batches have {sum(rows.values()) / _num_batches(rows.values(), size):.3g} rows on average"
    if not small:
        return f"{mean}: the last one of each bucket has what is left"
    if len(rows) == 1:
        return f"an epoch has {count_of(small[0][0], 'row')}, so that its one batch has no more"
    named = [f"{width}x{height} has {n}" for n, (width, height) in small[:MOST_NAMED]]
    more = [f"{len(small) - MOST_NAMED} more"] if len(small) > MOST_NAMED else []
    return f"{len(small)} of {len(rows)} buckets have fewer rows in an epoch ({', '.join(named + more)}): {mean}"


def _are_full(rows: Collection[int], size: int, share: float = FULL) -> bool:
    """Whether every bucket fills a batch, and batches have this share of ``size`` on average."""
    return min(rows) >= size and sum(rows) / _num_batches(rows, size) >= share * size


def _num_batches(rows: Collection[int], size: int) -> int:
    return sum(-(-n // size) for n in rows)

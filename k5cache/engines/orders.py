"""How is the work of a pass divided? Into orders: jobs that one worker encodes and writes together. Arithmetic only.

The first orders are large, so that shards are large; the last are small, so that all workers end at about the same
time.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterator, Sequence

from k5cache.buckets import Bucket
from k5cache.encode.job import LatentJob, TextJob

PIXEL_BYTES = 2**29
"""Of an order's pixels between the processes that decode and the one that encodes: 170 images of 1024x1024."""
LEAST_ROWS = 8
"""Smaller orders would wait for their start and their shard longer than they compute."""


def pixel_bytes(num_workers: int, num_machines: int, object_bytes: int) -> int:
    """The most that an order's pixels may take: so much that all orders at once take a quarter of Ray's memory.

    Args:
        object_bytes: of memory that Ray's processes share, on all machines.
    """
    return min(PIXEL_BYTES, object_bytes // (4 * _at_once(num_workers, num_machines)))


def bytes_to_allow(pixel_bytes: int, num_workers: int, num_machines: int) -> int:
    """How much of its memory Ray Data may use. Without a limit it would decode ahead until half of it is full.

    It gives half of that to the step that decodes, and half to the step that makes reports.
    """
    return 2 * pixel_bytes * _at_once(num_workers, num_machines)


def _at_once(num_workers: int, num_machines: int) -> int:
    """How many orders may have pixels: a worker has one and the next, and a machine decodes four."""
    return 2 * num_workers + 4 * num_machines


def latent_orders(
    latent_jobs: Sequence[LatentJob], num_workers: int, most_rows: int, pixel_bytes: int = PIXEL_BYTES
) -> Iterator[list[LatentJob]]:
    """Orders of one bucket each.

    Args:
        most_rows: as many as may be lost when a worker dies.
        pixel_bytes: the most that an order's pixels may take.
    """
    places: dict[Bucket, array[int]] = {}
    for i, job in enumerate(latent_jobs):
        places.setdefault(job.geometry.bucket, array("q")).append(i)
    num_left = len(latent_jobs)
    for bucket, in_bucket in sorted(places.items()):
        limit = min(most_rows, max(1, pixel_bytes // (3 * bucket.width * bucket.height)))
        start = 0
        while start < len(in_bucket):
            order = in_bucket[start : start + num_rows(num_left, num_workers, limit)]
            yield [latent_jobs[i] for i in order]
            start, num_left = start + len(order), num_left - len(order)


def text_orders(
    text_jobs: Sequence[TextJob], num_workers: int, most_rows: int, is_guided: bool = True
) -> Iterator[list[TextJob]]:
    """Orders of texts, in their order. Those of one source stay together: the vision tower then sees it once.

    Args:
        is_guided: whether the last orders are small. Not where each order reads all weights.
    """
    start, count = 0, len(text_jobs)
    share = min(most_rows, -(-count // num_workers))
    while start < count:
        end = min(count, start + (num_rows(count - start, num_workers, most_rows) if is_guided else share))
        source = text_jobs[end - 1].source
        while source and end < count and text_jobs[end].source == source:
            end += 1
        yield [text_jobs[i] for i in range(start, end)]
        start = end


def num_rows(num_left: int, num_workers: int, limit: int) -> int:
    """How many jobs the next order has: half of a fair share of what is left, within bounds."""
    return min(limit, max(LEAST_ROWS, num_left // (2 * num_workers)))


def extremes(latent_jobs: Sequence[LatentJob]) -> list[LatentJob]:
    """The jobs on which the plan of the VAE depends: the one of the largest bucket and the one of the largest image."""
    sizes: list[Callable[[LatentJob], int]] = [
        lambda job: job.geometry.bucket.width * job.geometry.bucket.height,
        lambda job: job.geometry.width * job.geometry.height,
    ]
    return [max(latent_jobs, key=size) for size in sizes] if latent_jobs else []

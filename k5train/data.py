"""Rows to batches: which rows, in what order, with which noise. All of it is a function of (seed, step, row).

No worker count, restart or machine changes a batch: every draw comes from a generator seeded by what it is for.
"""

from __future__ import annotations

import hashlib
import queue
import threading
from collections.abc import Callable, Generator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from k5train import flow

if TYPE_CHECKING:
    from k5cache.store.reader import Cache
    from k5train.config import TrainConfig

LOOK_AHEAD = 4  # batches read before they are needed; one is under 10 MB at 1024x1024


@dataclass(frozen=True)
class Group:
    """One forward pass: rows whose captions have one length, or padded ones with the lengths they had."""

    latents: Tensor
    """``[B, 1, H/8, W/8, 16]`` float32, scaled."""
    noise: Tensor
    """Like ``latents``, N(0, 1)."""
    sigma: Tensor
    """``[B]`` float32 in (0, 1)."""
    prompt_embeds: Tensor
    """``[B, L, 3584]`` in the dtype of the cache."""
    pooled_projections: Tensor
    """``[B, 768]``."""
    text_lengths: tuple[int, ...] | None = None
    """Of each caption, where ``prompt_embeds`` is padded behind it: the forward pass masks the rest. None: all L."""

    def to(self, device: torch.device) -> Group:
        """The same group on another device."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=True))

    def pin(self) -> Group:
        """The same group in page-locked memory, for copies that do not wait."""
        return self._map(Tensor.pin_memory)

    def _map(self, change: Callable[[Tensor], Tensor]) -> Group:
        changed: dict[str, Any] = {n: change(value) for n, value in vars(self).items() if isinstance(value, Tensor)}
        return replace(self, **changed)


@dataclass(frozen=True)
class Batch:
    """One micro-batch: rows of one bucket."""

    rows: tuple[int, ...]
    """Positions in the cache's index."""
    groups: tuple[Group, ...]

    @property
    def num_rows(self) -> int:
        """Rows in all groups."""
        return len(self.rows)


def epoch_batches(
    buckets: list[tuple[int, int]], batch_size: int, repeats: int, seed: int, epoch: int
) -> list[list[int]]:
    """The batches of one epoch, in order.

    Args:
        buckets: the bucket of each row.
        batch_size: rows of a batch; the last batch of a bucket may be smaller.
        repeats: how often each row comes.

    Returns:
        Lists of row positions; the rows of one list share a bucket, and every row comes ``repeats`` times.
    """
    generator = _generator(seed, "order", epoch)
    order = torch.randperm(len(buckets) * repeats, generator=generator).tolist()
    by_bucket: dict[tuple[int, int], list[int]] = {}
    for position in order:
        row = position % len(buckets)
        by_bucket.setdefault(buckets[row], []).append(row)
    batches = [
        rows[i : i + batch_size] for _, rows in sorted(by_bucket.items()) for i in range(0, len(rows), batch_size)
    ]
    shuffled = torch.randperm(len(batches), generator=generator).tolist()
    return [batches[i] for i in shuffled]


class Loader:
    """Micro-batch ``i`` of a run, for any ``i``, in any order.

    Args:
        cache: opened by ``k5cache.store.reader.open_cache``.
        config: seeds, sizes and dropout.
        scaling_factor: of the VAE whose moments the cache holds.
    """

    def __init__(self, cache: Cache, config: TrainConfig, scaling_factor: float) -> None:
        self.cache, self.config, self.scaling_factor = cache, config, scaling_factor
        sizes = cache.columns("bucket_width", "bucket_height")
        self.buckets = list(zip(*(column.to_pylist() for column in sizes.columns), strict=True))
        self.batches_per_epoch = len(self._epoch(0))
        self._cached_epoch: tuple[int, list[list[int]]] = (0, self._epoch(0))

    def rows_of(self, micro: int) -> list[int]:
        """Row positions of micro-batch ``micro`` (counted from the start of the run)."""
        epoch, position = divmod(micro, self.batches_per_epoch)
        if self._cached_epoch[0] != epoch:
            self._cached_epoch = (epoch, self._epoch(epoch))
        return self._cached_epoch[1][position]

    def batch(self, micro: int) -> Batch:
        """Read micro-batch ``micro`` from the cache and draw its noise.

        Raises:
            CacheCorrupt: a row of it is not the bytes that were written.
        """
        rows = self.rows_of(micro)
        drawn = [self._draw(row, micro, place) for place, row in enumerate(rows)]
        if self.config.unequal_captions == "mask":
            return Batch(tuple(rows), (pad(drawn),))
        by_length: dict[int, list[Group]] = {}
        for one in drawn:
            by_length.setdefault(one.prompt_embeds.shape[1], []).append(one)
        groups = tuple(_cat(members) for _, members in sorted(by_length.items()))
        return Batch(tuple(rows), groups)

    def _epoch(self, epoch: int) -> list[list[int]]:
        return epoch_batches(self.buckets, self.config.batch_size, self.config.repeats, self.config.seed, epoch)

    def _draw(self, row_index: int, micro: int, place: int) -> Group:
        row = self.cache.row(row_index)
        # One generator a row, drawn from in a fixed order: sigma, dropout, caption, posterior, noise.
        generator = _generator(self.config.seed, "row", micro, place)
        sigma = flow.sample_sigmas(1, generator, shift=self.config.flow_schedule_shift)
        dropout, choice = torch.rand(2, generator=generator).tolist()
        if dropout < self.config.caption_dropout_probability:
            text = self.cache.prompt("")
        else:
            text = self.cache.text(row.caption_keys[int(choice * len(row.caption_keys))])
        moments = self.cache.latents(row.latent_key)
        mean = moments["mean"].float()
        std = moments["std"].float() if "std" in moments else torch.zeros_like(mean)
        latents = flow.sample_posterior(mean, std, torch.randn(mean.shape, generator=generator), self.scaling_factor)
        return Group(
            latents=latents[None, None],
            noise=torch.randn(latents.shape, generator=generator)[None, None],
            sigma=sigma,
            prompt_embeds=text.prompt_embeds[None],
            pooled_projections=text.pooled[None],
        )


def prefetch(read: Callable[[int], Batch], first: int, last: int, pin: bool) -> Generator[Batch, None, None]:
    """Yield ``read(first) .. read(last - 1)`` in order, read ahead by a background thread.

    An error of the reading thread rises here, at the batch it belongs to.
    """
    ready: queue.Queue[Batch | BaseException] = queue.Queue(LOOK_AHEAD)
    stop = threading.Event()

    def put(value: Batch | BaseException) -> None:
        while not stop.is_set():
            with suppress(queue.Full):
                ready.put(value, timeout=0.1)
                return

    def work() -> None:
        try:
            for micro in range(first, last):
                batch = read(micro)
                put(replace(batch, groups=tuple(g.pin() for g in batch.groups)) if pin else batch)
                if stop.is_set():
                    return
        except BaseException as error:  # handed to the consumer, which raises it
            put(error)

    thread = threading.Thread(target=work, name="k5-loader", daemon=True)
    thread.start()
    try:
        for _ in range(first, last):
            value = ready.get()
            if isinstance(value, BaseException):
                raise value
            yield value
    finally:
        stop.set()
        thread.join()


def pad(members: Sequence[Group]) -> Group:
    """Rows of one bucket as one group: captions end in zeros up to the longest, and ``text_lengths`` says where."""
    lengths = tuple(m.prompt_embeds.shape[1] for m in members for _ in m.sigma)
    longest = max(lengths)
    if set(lengths) == {longest}:
        return _cat(members)
    padded = [
        replace(m, prompt_embeds=F.pad(m.prompt_embeds, (0, 0, 0, longest - m.prompt_embeds.shape[1]))) for m in members
    ]
    return replace(_cat(padded), text_lengths=lengths)


def _cat(members: Sequence[Group]) -> Group:
    tensors = [name for name, value in vars(members[0]).items() if isinstance(value, Tensor)]
    together: dict[str, Any] = {name: torch.cat([vars(m)[name] for m in members]) for name in tensors}
    return Group(**together)


def _generator(seed: int, *what: str | int) -> torch.Generator:
    digest = hashlib.sha256("/".join(map(str, (seed, *what))).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))

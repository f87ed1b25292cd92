"""How well does the adapter do on images that it was not trained on?

The training loss jumps with the sigma that each step draws. The held-out loss has the same (row, sigma, noise) triples
at every measurement and in every run on the caches. A curve that turns up shows overfitting, and two runs can be
compared. The same measurement on images that are trained on, the probe, shows what the adapter has learned.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from functools import cached_property, partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from k5train.data.mixture import Mixture
from k5train.data.split import held_out_rows
from k5train.forward.condition import condition_of
from k5train.objective import flow
from k5train.parallel.ranks import ALONE, Ranks

if TYPE_CHECKING:
    from k5cache.store.reader import Cache
    from k5train.training.step import Predict


def sigmas_of(key: str, count: int) -> list[float]:
    """``count`` sigmas for a row, one in each equal part of (0, 1). The row's key decides them."""
    u = torch.rand(count, generator=_generator(key, "sigma")).tolist()
    return [(i + x) / count for i, x in enumerate(u)]


class HeldOutLoss:
    """Measures the loss on fixed rows of a mixture: those of its validation split, or others.

    Args:
        data: from ``split_off``.
        num_sigmas: sigmas for each row.
        scaling_factor: of the VAE.
        rows: the rows to measure on. None: the validation split, without regularisation data.
    """

    def __init__(
        self, data: Mixture, num_sigmas: int, scaling_factor: float, rows: Sequence[int] | None = None
    ) -> None:
        self.data = data
        self.rows = list(held_out_rows(data)[0] if rows is None else rows)
        self.num_sigmas, self.scaling_factor = num_sigmas, scaling_factor

    @property
    def num_passes(self) -> int:
        """Forward passes of one measurement."""
        return len(self.rows) * self.num_sigmas

    @cached_property
    def key(self) -> str:
        """A hash of what is measured. Losses of two runs can be compared if it is the same in both."""
        digest = hashlib.sha256(f"{self.num_sigmas} {self.scaling_factor}".encode())
        for row in map(self.data.row, self.rows):
            digest.update(f"/{row.latent_key} {row.caption_keys[0]} {row.source_key}".encode())
        return digest.hexdigest()[:16]

    @torch.no_grad()
    def measure(
        self, predict: Predict, device: torch.device, on_step: Callable[[], object] = lambda: None, ranks: Ranks = ALONE
    ) -> list[float]:
        """The plain flow-matching loss in each part of (0, 1), low noise first: means over the rows.

        Each row has its first caption and the mean of its posterior, and its source has the mean of its own. Weights,
        masks and routes are not used.

        Args:
            ranks: the processes that share the rows. The sums are those of one process.
        """
        by_row: list[list[float]] = []
        for number in ranks.share(self.rows):
            source, item = self.data.locate(number)
            row = source.cache.row(item)
            text = source.cache.text(row.caption_keys[0])
            embeds, pooled = text.prompt_embeds[None].to(device), text.pooled[None].to(device)
            latents = self._mean(source.cache, row.latent_key)
            condition = condition_of(self._mean(source.cache, row.source_key)) if row.source_key else None
            extra = {} if condition is None else {"condition": condition.to(device)}
            losses = []
            for i, sigma in enumerate(sigmas_of(row.latent_key, self.num_sigmas)):
                noise = torch.randn(latents.shape, generator=_generator(row.latent_key, "noise", i)).to(device)
                losses.append(_loss(partial(predict, **extra), latents.to(device), noise, sigma, embeds, pooled))
                on_step()
            by_row.append(losses)
        sums = [0.0] * self.num_sigmas
        for losses in ranks.unite(by_row):
            sums = [total + loss for total, loss in zip(sums, losses, strict=True)]
        return [total / len(self.rows) for total in sums]

    def _mean(self, cache: Cache, key: str) -> Tensor:
        """``[1, 1, H/8, W/8, 16]`` float32: the mean of a row's posterior, scaled."""
        return cache.latents(key)["mean"].float()[None, None] * self.scaling_factor


def _loss(predict: Predict, latents: Tensor, noise: Tensor, sigma: float, embeds: Tensor, pooled: Tensor) -> float:
    sigmas = torch.tensor([sigma], device=latents.device)
    velocity = predict(flow.add_noise(latents, noise, sigmas), sigmas, embeds, pooled)
    error = velocity.float() - flow.velocity_target(latents, noise)
    return error.square().mean().item()


def _generator(*parts: str | int) -> torch.Generator:
    digest = hashlib.sha256("/".join(map(str, parts)).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))

"""How well does the adapter do on images that it was not trained on?

The training loss jumps with the sigma that each step draws. The held-out loss has the same (row, sigma, noise) triples
at every measurement and in every run on the cache. A curve that turns up shows overfitting, and two runs can be
compared.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from k5cache.shared.errors import RecipeError
from k5train.data.mixture import Mixture
from k5train.forward.condition import condition_of
from k5train.objective import flow

if TYPE_CHECKING:
    from k5cache.store.reader import Cache
    from k5train.training.step import Predict


def split_off(data: Mixture, share: float) -> Mixture:
    """The same mixture with a validation split: rows of its first cache that are not trained on.

    Raises:
        RecipeError: the split would be empty, or would be the whole cache.
    """
    first, *others = data.sources
    split = split_rows(first.cache.columns("content_hash").column(0).to_pylist(), share)
    if share and not 0 < len(split) < len(first.cache):
        raise RecipeError(
            f"train.validation.split of {share} holds out {len(split)} of {len(first.cache)} rows",
            "Set train.validation.split=0, or encode more images",
        )
    return Mixture([replace(first, split=split), *others]) if split else data


def split_rows(content_hashes: Sequence[str], share: float) -> frozenset[int]:
    """The rows of the validation split, chosen by the bytes of their images alone.

    All rows of an image are on the same side, because a flip is the same image. If images are added to the
    cache, few rows change sides; the seed of a run has no influence.
    """
    images = sorted(set(content_hashes), key=lambda h: hashlib.sha256(f"held out/{h}".encode()).digest())
    count = max(1, round(share * len(images))) if share else 0
    chosen = set(images[:count])
    return frozenset(i for i, h in enumerate(content_hashes) if h in chosen)


def sigmas_of(key: str, count: int) -> list[float]:
    """``count`` sigmas for a row, one in each equal part of (0, 1). The row's key decides them."""
    u = torch.rand(count, generator=_generator(key, "sigma")).tolist()
    return [(i + x) / count for i, x in enumerate(u)]


class HeldOutLoss:
    """Measures the loss on the validation split of a mixture.

    Args:
        data: from ``split_off``.
        num_sigmas: sigmas for each row.
        scaling_factor: of the VAE.
    """

    def __init__(self, data: Mixture, num_sigmas: int, scaling_factor: float) -> None:
        self.cache: Cache = data.first
        self.items = sorted(data.sources[0].split)
        self.num_sigmas, self.scaling_factor = num_sigmas, scaling_factor

    @property
    def num_passes(self) -> int:
        """Forward passes of one measurement."""
        return len(self.items) * self.num_sigmas

    @torch.no_grad()
    def measure(
        self, predict: Predict, device: torch.device, on_step: Callable[[], object] = lambda: None
    ) -> list[float]:
        """The plain flow-matching loss in each part of (0, 1), low noise first: means over the rows of the split.

        Each row has its first caption and the mean of its posterior, and its source has the mean of its own. Weights,
        masks and routes are not used.
        """
        sums = [0.0] * self.num_sigmas
        for item in self.items:
            row = self.cache.row(item)
            text = self.cache.text(row.caption_keys[0])
            embeds, pooled = text.prompt_embeds[None].to(device), text.pooled[None].to(device)
            latents = self._mean(row.latent_key)
            extra = {"condition": condition_of(self._mean(row.source_key)).to(device)} if row.source_key else {}
            for i, sigma in enumerate(sigmas_of(row.latent_key, self.num_sigmas)):
                noise = torch.randn(latents.shape, generator=_generator(row.latent_key, "noise", i))
                sums[i] += _loss(partial(predict, **extra), latents.to(device), noise.to(device), sigma, embeds, pooled)
                on_step()
        return [total / len(self.items) for total in sums]

    def _mean(self, key: str) -> Tensor:
        """``[1, 1, H/8, W/8, 16]`` float32: the mean of a row's posterior, scaled."""
        return self.cache.latents(key)["mean"].float()[None, None] * self.scaling_factor


def _loss(predict: Predict, latents: Tensor, noise: Tensor, sigma: float, embeds: Tensor, pooled: Tensor) -> float:
    sigmas = torch.tensor([sigma], device=latents.device)
    velocity = predict(flow.add_noise(latents, noise, sigmas), sigmas, embeds, pooled)
    error = velocity.float() - flow.velocity_target(latents, noise)
    return error.square().mean().item()


def _generator(*parts: str | int) -> torch.Generator:
    digest = hashlib.sha256("/".join(map(str, parts)).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))

"""The held-out loss: how well the adapter does on images it was not trained on, at fixed noise, the same for every run.

A training loss jumps with the sigma that each step draws. This one has the same (row, sigma, noise) triples at every
measurement and in every run on the cache: a curve that turns up tells overfitting, and two runs can be compared.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from k5cache.shared.errors import RecipeError
from k5train.data.mixture import Mixture
from k5train.objective import flow

if TYPE_CHECKING:
    from k5cache.store.reader import Cache
    from k5train.training.step import Predict


def hold_out(data: Mixture, share: float) -> Mixture:
    """The same mixture, some of its first cache's rows not trained on.

    Raises:
        RecipeError: nothing would be left on one of the two sides.
    """
    first, *others = data.sources
    held = held_out_rows(first.cache.columns("content_hash").column(0).to_pylist(), share)
    if share and not 0 < len(held) < len(first.cache):
        raise RecipeError(
            f"train.validation.split of {share} holds out {len(held)} of {len(first.cache)} rows",
            "Leave it at 0, or encode more images",
        )
    return Mixture([replace(first, held_out=held), *others]) if held else data


def held_out_rows(content_hashes: Sequence[str], share: float) -> frozenset[int]:
    """Which rows are held out: whole images (a flip is the same image), chosen by their bytes alone.

    Adding images to the cache keeps most of the choice, and no seed changes it.
    """
    images = sorted(set(content_hashes), key=lambda h: hashlib.sha256(f"held out/{h}".encode()).digest())
    count = max(1, round(share * len(images))) if share else 0
    chosen = set(images[:count])
    return frozenset(i for i, h in enumerate(content_hashes) if h in chosen)


def sigmas_of(key: str, count: int) -> list[float]:
    """``count`` noise levels for a row, one in each equal part of (0, 1), fixed by the row's key."""
    u = torch.rand(count, generator=_generator(key, "sigma")).tolist()
    return [(i + x) / count for i, x in enumerate(u)]


class HeldOut:
    """Measures the loss on the rows of a mixture that are held out.

    Args:
        data: from ``hold_out``.
        num_sigmas: noise levels a row.
        scaling_factor: of the VAE.
    """

    def __init__(self, data: Mixture, num_sigmas: int, scaling_factor: float) -> None:
        self.cache: Cache = data.first
        self.rows = sorted(data.sources[0].held_out)
        self.num_sigmas, self.scaling_factor = num_sigmas, scaling_factor

    @torch.no_grad()
    def measure(
        self, predict: Predict, device: torch.device, on_step: Callable[[], object] = lambda: None
    ) -> list[float]:
        """The plain flow-matching loss in each part of (0, 1), low noise first: means over the held-out rows.

        Each row has its first caption and the middle of its posterior; weights, masks and routes play no part.
        """
        sums = [0.0] * self.num_sigmas
        for item in self.rows:
            row = self.cache.row(item)
            text = self.cache.text(row.caption_keys[0])
            embeds, pooled = text.prompt_embeds[None].to(device), text.pooled[None].to(device)
            latents = self.cache.latents(row.latent_key)["mean"].float()[None, None] * self.scaling_factor
            for i, sigma in enumerate(sigmas_of(row.latent_key, self.num_sigmas)):
                noise = torch.randn(latents.shape, generator=_generator(row.latent_key, "noise", i))
                sums[i] += _loss(predict, latents.to(device), noise.to(device), sigma, embeds, pooled)
                on_step()
        return [total / len(self.rows) for total in sums]


def _loss(predict: Predict, latents: Tensor, noise: Tensor, sigma: float, embeds: Tensor, pooled: Tensor) -> float:
    level = torch.tensor([sigma], device=latents.device)
    velocity = predict(flow.add_noise(latents, noise, level), level, embeds, pooled)
    error = velocity.float() - flow.velocity_target(latents, noise)
    return error.square().mean().item()


def _generator(*what: str | int) -> torch.Generator:
    digest = hashlib.sha256("/".join(map(str, what)).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))

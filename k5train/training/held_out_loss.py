"""How well does the adapter do on images that it was not trained on?

The training loss jumps with the sigma that each step draws. The held-out loss has the same (row, sigma, noise) triples
at every measurement and in every run on the caches. A curve that turns up shows overfitting, and two runs can be
compared. The same measurement on images that are trained on, the probe, shows what the adapter has learned.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import cached_property, partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from k5cache.shared.errors import RecipeError
from k5train.data.mixture import Mixture, Source
from k5train.forward.condition import condition_of
from k5train.objective import flow

if TYPE_CHECKING:
    from k5cache.store.reader import Cache
    from k5train.training.step import Predict


def split_off(data: Mixture, share: float) -> Mixture:
    """The same mixture with a validation split: rows of every cache that are not trained on.

    Each cache gives its own share of images. An image that is chosen in one cache is held out in all of them, at every
    resolution, mirrored or not, regularisation data included.

    Raises:
        RecipeError: the split of a cache would be empty, or would be the whole of it; names the cache.
    """
    if not share:
        return data
    hashes = [_content_hashes(source) for source in data.sources]
    own = [split_rows(contents, share) for contents in hashes]
    chosen = {contents[item] for contents, items in zip(hashes, own, strict=True) for item in items}
    sources = []
    for source, contents, items in zip(data.sources, hashes, own, strict=True):
        split = frozenset(item for item, content in enumerate(contents) if content in chosen)
        if (contents or source is data.sources[0]) and not 0 < len(split) < len(contents):
            raise _leaves_nothing(data, source, share, len(split), is_own=len(items) == len(split))
        sources.append(replace(source, split=split))
    return Mixture(sources)


def _leaves_nothing(data: Mixture, source: Source, share: float, num_rows: int, is_own: bool) -> RecipeError:
    size = len(source.cache)
    of = (
        f"{size} rows"
        if len(data.sources) == 1
        else f"the {size} {'row' if size == 1 else 'rows'} of {source.cache.root}"
    )
    reason = "" if is_own else ", because its images are held out of other caches of the run too"
    fix = "Set train.validation.split=0, or encode more images"
    if len(data.sources) > 1:
        fix += " into it, or leave this cache out"
    return RecipeError(f"train.validation.split of {share} holds out {num_rows} of {of}{reason}", fix)


def split_rows(content_hashes: Sequence[str], share: float) -> frozenset[int]:
    """The rows of one cache's validation split, chosen by the bytes of their images alone.

    All rows of an image are on the same side, because a flip is the same image. If images are added to the
    cache, few rows change sides; the seed of a run has no influence.
    """
    images = _in_hash_order("held out", content_hashes)
    count = max(1, round(share * len(images))) if share else 0
    chosen = set(images[:count])
    return frozenset(i for i, h in enumerate(content_hashes) if h in chosen)


def held_out_rows(data: Mixture) -> tuple[list[int], list[int]]:
    """The held-out rows of a mixture from ``split_off``: those of the subject, and those of regularisation data."""
    of_subject: list[int] = []
    of_prior: list[int] = []
    for first, source, is_prior in _by_kind(data):
        (of_prior if is_prior else of_subject).extend(first + item for item in sorted(source.split))
    return of_subject, of_prior


def probe_rows(data: Mixture, num_images: int) -> list[int]:
    """Rows of up to ``num_images`` images that are trained on and are not regularisation data: one row an image.

    As in the split, the bytes of the images alone decide which.
    """
    row_of: dict[str, int] = {}
    for first, source, is_prior in _by_kind(data):
        for item, content in enumerate([] if is_prior else _content_hashes(source)):
            if item not in source.split:
                row_of.setdefault(content, first + item)
    return [row_of[image] for image in _in_hash_order("probe", row_of)[:num_images]]


def _by_kind(data: Mixture) -> list[tuple[int, Source, bool]]:
    """(first row, source, whether it is regularisation data) of each source. If all are, none is beside the others."""
    with_rows = [source for source in data.sources if len(source.cache)]
    are_all = all(source.is_regularisation_data for source in with_rows)
    return [
        (first, source, source.is_regularisation_data and not are_all)
        for first, source in zip(data.first_rows, data.sources, strict=True)
    ]


def _content_hashes(source: Source) -> list[str]:
    hashes: list[str] = source.cache.columns("content_hash").column(0).to_pylist()
    return hashes


def _in_hash_order(purpose: str, content_hashes: Iterable[str]) -> list[str]:
    return sorted(set(content_hashes), key=lambda h: hashlib.sha256(f"{purpose}/{h}".encode()).digest())


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
        self, predict: Predict, device: torch.device, on_step: Callable[[], object] = lambda: None
    ) -> list[float]:
        """The plain flow-matching loss in each part of (0, 1), low noise first: means over the rows.

        Each row has its first caption and the mean of its posterior, and its source has the mean of its own. Weights,
        masks and routes are not used.
        """
        sums = [0.0] * self.num_sigmas
        for number in self.rows:
            source, item = self.data.locate(number)
            row = source.cache.row(item)
            text = source.cache.text(row.caption_keys[0])
            embeds, pooled = text.prompt_embeds[None].to(device), text.pooled[None].to(device)
            latents = self._mean(source.cache, row.latent_key)
            condition = condition_of(self._mean(source.cache, row.source_key)) if row.source_key else None
            extra = {} if condition is None else {"condition": condition.to(device)}
            for i, sigma in enumerate(sigmas_of(row.latent_key, self.num_sigmas)):
                noise = torch.randn(latents.shape, generator=_generator(row.latent_key, "noise", i))
                sums[i] += _loss(partial(predict, **extra), latents.to(device), noise.to(device), sigma, embeds, pooled)
                on_step()
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

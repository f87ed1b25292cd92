"""Which rows does a batch have, and which noise, sigma and caption? All of it is a function of the seed and the step.

No number of workers, restart or machine changes a batch: each draw has its own generator, seeded by its purpose.
"""

from __future__ import annotations

import bisect
import hashlib
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from k5cache.shared.errors import RecipeError
from k5train.data.batch import Batch, Group, concatenate, pad
from k5train.data.kind import check_classes, check_masks
from k5train.data.mixture import Mixture, Source, epoch_batches, num_batches, num_micro_batches
from k5train.forward.condition import condition_of, no_source
from k5train.objective import flow, rollout, tread

if TYPE_CHECKING:
    from k5cache.store.index import IndexRow
    from k5cache.store.reader import Cache, TextRow
    from k5train.options.train import TrainConfig

_LOOKED_AT = 2000  # micro-batches: a bucket that none of them has is rare


class Loader:
    """Micro-batch ``i`` of a run, for any ``i``, in any order.

    Args:
        data: a mixture of caches, or one cache opened by ``k5cache.store.reader.open_cache``.
        config: seeds, sizes, dropout, objective, TREAD and rollout.
        scaling_factor: from the config of the VAE that encoded the cache.
        inference_sigmas: the scheduler's, from 1 down to 0. Rollouts step along them.
        num_ranks: processes that share the micro-batches of an update, of which each has
            ``gradient_accumulation_steps``.

    Raises:
        RecipeError: an option needs masks, and no row has one; or next to no sigma is in the range asked for.
    """

    def __init__(
        self, data: Mixture | Cache, config: TrainConfig, scaling_factor: float,
        inference_sigmas: Tensor | None = None, num_ranks: int = 1,
    ) -> None:  # fmt: skip
        self.data = (
            data
            if isinstance(data, Mixture)
            else Mixture([Source(data, config.repeats, repeats_by_folder=config.repeats_by_folder)])
        )
        self.config, self.scaling_factor, self.inference_sigmas = config, scaling_factor, inference_sigmas
        self.per_update = config.gradient_accumulation_steps * num_ranks
        """Micro-batches of an update, over all processes."""
        self._is_shared = num_ranks > 1
        check_masks(self.data, config)
        check_classes(self.data, config)
        self._check_sigmas()
        self._epochs: dict[int, list[list[int]]] = {}
        self._ends = [0]  # micro-batches before each epoch
        self._slices: tuple[int, list[int], list[int]] = (-1, [], [])  # step, sizes of its micro-batches, slice by row

    def _check_sigmas(self) -> None:
        """Refuse a range of sigmas that the distribution or the rollouts never reach."""
        objective = self.config.objective
        self._range = (objective.sigma_min, objective.sigma_max)
        if self._range == (0.0, 1.0):
            return
        for width, height in self.data.pools:
            flow.check_range(objective, self._shift(width // 16 * (height // 16)))
        if self.inference_sigmas is not None and not rollout.ends_in(self.inference_sigmas, self._range).any():
            raise RecipeError(
                f"No sigma of the {self.config.rollout.num_inference_steps} steps on which a rollout ends is in"
                f" train.objective.sigma_min = {objective.sigma_min:g} to sigma_max = {objective.sigma_max:g}",
                "Widen the range, or raise train.rollout.num_inference_steps",
            )

    def _shift(self, num_tokens: int) -> float:
        is_auto = self.config.objective.flow_schedule_auto_shift
        return flow.auto_shift(num_tokens) if is_auto else self.config.flow_schedule_shift

    def rows_of(self, micro: int) -> list[int]:
        """Rows of micro-batch ``micro``, counted from the start of the run."""
        while self._ends[-1] <= micro:
            self._ends.append(
                self._ends[-1] + num_batches(self.data.pools, self.config.batch_size, len(self._ends) - 1)
            )
        epoch = bisect.bisect_right(self._ends, micro) - 1
        return self._epoch(epoch)[micro - self._ends[epoch]]

    def micro_batches(self, epochs: int) -> int:
        """How many micro-batches the first ``epochs`` epochs have."""
        return num_micro_batches(self.data, self.config.batch_size, epochs)

    def first_of_each_size(self, most: int) -> list[int]:
        """The first micro-batch of each bucket and number of rows among the first few thousand, at most ``most``."""
        first: dict[tuple[int, int, int], int] = {}
        for micro in range(min(_LOOKED_AT, self.config.steps * self.per_update)):
            rows = self.rows_of(micro)
            row = self.data.row(rows[0])
            first.setdefault((row.bucket_width, row.bucket_height, len(rows)), micro)
            if len(first) == most:
                break
        return list(first.values())

    def batch(self, micro: int) -> Batch:
        """Read micro-batch ``micro`` from the cache and draw its noise.

        Raises:
            CacheCorrupt: the bytes of a row are not those that were written.
        """
        rows = self.rows_of(micro)
        drawn = [self._draw(row, micro, place) for place, row in enumerate(rows)]
        is_padded = self.config.unequal_captions == "mask"
        alike: dict[tuple[int, ...], list[Group]] = {}
        for group in drawn:
            num_class_tokens = 0 if group.class_embeds is None else group.class_embeds.shape[1]
            lengths = (group.prompt_embeds.shape[1], num_class_tokens)
            alike.setdefault((min(num_class_tokens, 1),) if is_padded else lengths, []).append(group)
        join = pad if is_padded else concatenate
        groups = [join(members) for _, members in sorted(alike.items())]
        num_rows = self._num_rows(self._step(micro)) if self._is_shared else None
        return Batch(tuple(rows), tuple(self._route(group, micro) for group in groups), num_rows)

    def _num_rows(self, step: int) -> int:
        """Rows of all micro-batches of an update."""
        return sum(len(self.rows_of(micro)) for micro in range(step * self.per_update, (step + 1) * self.per_update))

    def _epoch(self, epoch: int) -> list[list[int]]:
        if epoch not in self._epochs:
            if len(self._epochs) > 1:  # two are kept, because an update may span two epochs
                del self._epochs[min(self._epochs)]
            generator = _generator(self.config.seed, "order", epoch)
            self._epochs[epoch] = epoch_batches(self.data.pools, self.config.batch_size, epoch, generator)
        return self._epochs[epoch]

    def _step(self, micro: int) -> int:
        return micro // self.per_update

    def _draw(self, row_index: int, micro: int, place: int) -> Group:
        config, objective = self.config, self.config.objective
        source, _ = self.data.locate(row_index)
        row = self.data.row(row_index)
        # One generator for each row, used in a fixed order: sigma, dropout, caption, posterior, noise.
        generator = _generator(config.seed, "row", micro, place)
        u = torch.rand(1, generator=generator, dtype=torch.float64)
        text, of_class = self._text(source, row, generator)
        latents, noise = self._latents(source.cache, row, generator)
        if objective.stratified_sigmas:
            u = self._stratified(u, micro, place)
        num_tokens = latents.shape[0] * latents.shape[1] // 4
        sigma = flow.draw_sigma(u, objective, self._shift(num_tokens))
        path = None
        if config.rollout.probability:
            assert self.inference_sigmas is not None, "rollout needs the scheduler's sigmas"
            of_rollout = _generator(config.seed, "rollout", micro, place)
            step = self._step(micro)
            path = rollout.draw_path(sigma.item(), self.inference_sigmas, config.rollout, step, of_rollout, self._range)
            sigma = path[-1:]
        condition = self._condition(source.cache, row.source_key, micro, place) if row.source_key else None
        mask = None
        if row.mask_key and (objective.masked_loss or config.tread.keep_masked):
            mask = source.cache.mask(row.mask_key)
        return Group(
            latents=latents[None, None],
            noise=noise[None, None],
            sigma=sigma,
            prompt_embeds=text.prompt_embeds[None],
            pooled_projections=text.pooled[None],
            class_embeds=of_class.prompt_embeds[None] if of_class else None,
            class_pooled=of_class.pooled[None] if of_class else None,
            condition=None if condition is None else condition[None, None],
            weight=self._weight(sigma, source),
            mask=self._mask(mask, latents) if objective.masked_loss else None,
            path=None if path is None else path[None],
            scores=self._scores(mask, num_tokens, micro, place) if config.tread.routes else None,
        )

    def _text(self, source: Source, row: IndexRow, generator: torch.Generator) -> tuple[TextRow, TextRow | None]:
        """What a row is trained with, and its class caption, which dropout does not drop."""
        cache = source.cache
        dropout, choice = torch.rand(2, generator=generator).tolist()
        number = 0 if self.config.caption_choice == "first" else int(choice * len(row.caption_keys))
        is_preserved = self.config.objective.preservation_weight > 0 and not source.is_regularisation_data
        of_class = cache.class_text(row.caption_keys[number]) if is_preserved else None
        if dropout < self.config.caption_dropout_probability:
            return (cache.text(row.empty_key) if row.empty_key else cache.prompt("")), of_class
        return cache.text(row.caption_keys[number]), of_class

    def _latents(self, cache: Cache, row: IndexRow, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        latents = self._posterior(cache, row.latent_key, generator)
        return latents, torch.randn(latents.shape, generator=generator)

    def _posterior(self, cache: Cache, key: str, generator: torch.Generator) -> Tensor:
        moments = cache.latents(key)
        mean = moments["mean"].float()
        std = moments["std"].float() if "std" in moments else torch.zeros_like(mean)
        return flow.sample_posterior(mean, std, torch.randn(mean.shape, generator=generator), self.scaling_factor)

    def _condition(self, cache: Cache, source_key: str, micro: int, place: int) -> Tensor:
        """``[H/8, W/8, 17]``: a fresh sample of the source. Its generator is its own: the other draws are those of a
        row without a source."""
        generator = _generator(self.config.seed, "source", micro, place)
        is_dropped = torch.rand(1, generator=generator).item() < self.config.source_dropout_probability
        source = self._posterior(cache, source_key, generator)
        return no_source(source) if is_dropped else condition_of(source)

    def _stratified(self, u: Tensor, micro: int, place: int) -> Tensor:
        """``u`` moved into one of n equal slices of 0 to 1: each of the n rows of an update has its own slice."""
        step, count = self._step(micro), self.per_update
        if self._slices[0] != step:
            sizes = [len(self.rows_of(m)) for m in range(step * count, (step + 1) * count)]
            order = torch.randperm(sum(sizes), generator=_generator(self.config.seed, "slices", step)).tolist()
            self._slices = (step, sizes, order)
        _, sizes, order = self._slices
        number = order[sum(sizes[: micro - step * count]) + place]
        return (number + u) / len(order)

    def _weight(self, sigma: Tensor, source: Source) -> Tensor | None:
        weight = flow.loss_weights(sigma, self.config.objective)
        prior = self.config.objective.prior_loss_weight
        if prior == 1 or not any(s.is_regularisation_data for s in self.data.sources):
            return weight
        return (torch.ones_like(sigma) if weight is None else weight) * (prior if source.is_regularisation_data else 1)

    def _mask(self, mask: Tensor | None, latents: Tensor) -> Tensor:
        mask = torch.ones(latents.shape[:2]) if mask is None else mask
        return mask.clamp(min=self.config.objective.unmasked_weight)[None, None, ..., None]

    def _scores(self, mask: Tensor | None, num_tokens: int, micro: int, place: int) -> Tensor:
        forced = tread.masked_tokens(mask) if mask is not None and self.config.tread.keep_masked else None
        generator = _generator(self.config.seed, "tread", micro, place)
        routes = self.config.tread.routes
        return torch.stack([tread.token_scores(num_tokens, generator, forced) for _ in routes])[None]

    def _route(self, group: Group, micro: int) -> Group:
        if group.path is not None and torch.equal(group.path, group.path[:, -1:].expand_as(group.path)):
            group = replace(group, path=None)  # none of its rows takes a step
        if group.scores is None:
            return group
        routes = tread.choose(group.scores, self.config.tread, self._step(micro), self.config.steps)
        return replace(group, scores=None, routes=routes)


def _generator(seed: int, *purpose: str | int) -> torch.Generator:
    digest = hashlib.sha256("/".join(map(str, (seed, *purpose))).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))

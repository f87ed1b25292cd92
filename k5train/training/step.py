"""What happens in one update of the adapter? Forward passes, their loss, summed and clipped gradients, a step."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from k5cache.shared.errors import RunError
from k5train.data.batch import Batch, Group
from k5train.data.mixture import Mixture
from k5train.objective import flow, rollout
from k5train.options.train import TrainConfig
from k5train.parallel.ranks import ALONE, Ranks

if TYPE_CHECKING:
    from k5cache.store.reader import Cache
    from k5train.training.graph import GraphedPasses


Predict = Callable[..., Tensor]
"""Noisy latents, sigma, prompt_embeds, pooled_projections -> velocity. A source that is edited adds ``condition=``,
padded captions add ``text_lengths=``, and TREAD adds ``routes=``."""
ADVICE = "Check these rows with `k5cache verify`, or lower train.optim.lr"


@dataclass(frozen=True)
class Losses:
    """The losses of one update."""

    mean: float
    """Of all rows, as the recipe weights them: what the gradients are of."""
    errors: tuple[tuple[float, float], ...] = ()
    """Sigma and plain squared error of each row without a rollout. They can be compared between recipes."""
    preservation: float | None = None
    """Of differential output preservation, without its weight: a mean over the rows with a class caption. None: no
    row has one."""
    norm: float | None = None
    """Of the gradients before they were clipped. None: they were not."""
    rows: tuple[int, ...] = ()
    """That the update is of, over all processes."""


def train_step(
    predict: Predict,
    group: Group,
    huber_c: float | None = None,
    cost: rollout.Cost | None = None,
    errors: list[Tensor] | None = None,
    inputs: list[Tensor] | None = None,
) -> Tensor:
    """The flow-matching loss of one forward pass: a mean over its rows and elements, in float32.

    Args:
        huber_c: as in ``flow_loss``.
        cost: counts what rollouts cost.
        errors: gets the mean squared error of the velocity of each row, ``[B]``, without weight, mask and Huber's rule.
        inputs: gets the noisy latents.
    """
    if group.path is not None:
        noisy, target = _own_input(predict, group, cost or rollout.Cost())
    else:
        noisy = flow.add_noise(group.latents, group.noise, group.sigma)
        target = flow.velocity_target(group.latents, group.noise)
    if inputs is not None:
        inputs.append(noisy)
    extra = _extra(group, group.text_lengths)
    velocity = predict(noisy, group.sigma, group.prompt_embeds, group.pooled_projections, **extra)
    if errors is not None:
        errors.append(flow.row_errors(velocity.detach(), target))
    return flow.flow_loss(velocity, target, group.weight, group.mask, huber_c)


def preservation_loss(predict: Predict, predict_base: Predict, group: Group, noisy: Tensor) -> Tensor:
    """Differential output preservation: what the adapter changes on the class captions of a group, which should be 0.

    The mean squared difference of two predictions on the same input, TREAD's routes included; the second has no
    adapter and no gradient. Masks, weights and Huber's rule do not apply: all of the class is to stay as it is.

    Args:
        predict_base: the transformer without its adapter.
        noisy: the group's noisy latents.
    """
    assert group.class_embeds is not None
    assert group.class_pooled is not None
    texts, extra = (group.class_embeds, group.class_pooled), _extra(group, group.class_lengths)
    with torch.no_grad():
        target = predict_base(noisy, group.sigma, *texts, **extra)
    return flow.flow_loss(predict(noisy, group.sigma, *texts, **extra), target)


def loss_function(config: TrainConfig, cost: rollout.Cost | None = None) -> Callable[..., Tensor]:
    """``train_step`` with the recipe's objective."""
    huber_c = config.objective.huber_c if config.objective.loss_type == "huber" else None
    return partial(train_step, huber_c=huber_c, cost=cost)


def compute_on(predict: Predict, loss_of: Callable[..., Tensor], group: Group, share: Tensor | float) -> Tensor:
    """Add the gradients of a group on the device, times ``share``; return its loss and its rows' errors, ``[1 + B]``.

    Reads no tensor on the host, so that it can be captured.
    """
    errors: list[Tensor] = []
    loss = loss_of(predict, group, errors=errors)
    torch.autograd.backward(loss * share)
    return torch.cat([loss.detach()[None], *errors])


def _extra(group: Group, lengths: tuple[int, ...] | Tensor | None) -> dict[str, Any]:
    """What ``predict`` gets of a group besides noise and text."""
    extra: dict[str, Any] = {} if lengths is None else {"text_lengths": lengths}
    if group.condition is not None:
        extra["condition"] = group.condition
    if group.routes:
        extra["routes"] = group.routes
    return extra


def _own_input(predict: Predict, group: Group, cost: rollout.Cost) -> tuple[Tensor, Tensor]:
    """Noisy latents that the model itself has reached, and the velocity that leads from there to the data."""
    assert group.path is not None

    def predict_rows(noisy: Tensor, sigma: Tensor, rows: Tensor) -> Tensor:
        lengths = group.text_lengths
        extra: dict[str, Any] = {}
        if lengths is not None:
            assert not isinstance(lengths, Tensor)
            extra["text_lengths"] = tuple(lengths[i] for i in rows.tolist())
        if group.condition is not None:
            extra["condition"] = group.condition[rows]
        return predict(noisy, sigma, group.prompt_embeds[rows], group.pooled_projections[rows], **extra)

    return rollout.roll(predict_rows, group.latents, group.noise, group.path, cost)


def accumulate(
    predict: Predict,
    batches: Sequence[Batch],
    cache: Cache | Mixture,
    device: torch.device,
    loss_limit: float = 0.0,
    loss_of: Callable[..., Tensor] = train_step,
    preserve: tuple[float, Predict] | None = None,
    graphs: GraphedPasses | None = None,
    clip: Callable[[], Tensor] | None = None,
    ranks: Ranks = ALONE,
    seed: Callable[[int], object] | None = None,
) -> Losses:
    """Compute the gradients of one update. Every row has the same weight, however rows fall into batches and groups.

    Args:
        loss_limit: a larger loss is an error. 0: any finite loss is allowed.
        loss_of: ``train_step``, with the recipe's objective.
        preserve: the weight of ``preservation_loss`` and the transformer without its adapter.
        graphs: does the passes, by ``compute_on`` with the same functions. None: they are done here.
        clip: clips the gradients and returns their norm before. With several processes it adds them up first.
        ranks: the processes that do the update together. Each has some of its batches, and all get the same losses.
        seed: called with the number of a batch, before its first pass.

    Raises:
        RunError: the loss is not finite, or beyond the limit. The error names the rows, and nothing was updated.
    """
    num_rows = batches[0].num_rows_of_update or sum(batch.num_rows for batch in batches)
    results: list[Tensor] = []
    preserved: list[Tensor] = []
    passes: list[tuple[int, tuple[Group, ...], bool]] = []
    for number, batch in enumerate(batches):
        if seed:
            seed(number)
        for groups in _passes(batch, graphs):
            share = sum(len(group.latents) for group in groups) / num_rows
            if graphs is not None:
                passes.append((number, groups, False))
                results.append(graphs.run(groups, share))
                continue
            (here,) = (group.to(device) for group in groups)
            is_preserved = preserve is not None and here.class_embeds is not None
            passes.append((number, groups, is_preserved))
            inputs: list[Tensor] = []
            loss_here = partial(loss_of, inputs=inputs) if is_preserved else loss_of
            results.append(compute_on(predict, loss_here, here, share))
            # After the backward pass, so that one pass at a time takes memory.
            if preserve is not None and is_preserved:
                loss = preservation_loss(predict, preserve[1], here, inputs[0])
                torch.autograd.backward(loss * (preserve[0] * share))
                preserved.append(loss.detach().reshape(1))
    norms = [clip().reshape(1)] if clip else []
    # The only wait for the GPU, which has the work of the whole update by now, but for the optimizer's.
    values = torch.cat([*results, *preserved, *norms]).tolist()
    of_classes = iter(values[sum(map(len, results)) :])
    measured = [_Measured(batch.rows, []) for batch in batches]
    at = 0
    for (number, groups, is_preserved), result in zip(passes, results, strict=True):
        loss_value, *of_rows = values[at : at + len(result)]
        sigmas = [sigma for group in groups for sigma in _trained_sigmas(group)]
        errors = [(s, error) for s, error in zip(sigmas, of_rows, strict=True) if s is not None]
        of_class = next(of_classes) if is_preserved else None
        measured[number].passes.append((len(of_rows), loss_value, errors, of_class))
        at += len(result)
    if ranks.size > 1:
        measured = [_Measured(*one) for one in ranks.unite(measured)]
    return replace(_losses(measured, num_rows, loss_limit, cache), norm=values[-1] if clip else None)


def seed_dropout(seed: int, first: int, every: int, number: int) -> None:
    """Make what the adapter's dropout draws in a batch a function of the seed and the micro-batch, like every draw.

    Args:
        first: the micro-batch of this process's first batch in the update, counted from the beginning of the run.
        every: how many processes share the update out.
        number: of the batch among those of this process in the update.
    """
    torch.manual_seed(seed * 1_000_003 + first + number * every)


def _passes(batch: Batch, graphs: GraphedPasses | None) -> list[tuple[Group, ...]]:
    """The groups of each pass: one, or on fixed buffers all of them, where the lengths of captions are data."""
    return [(group,) for group in batch.groups] if graphs is None else [batch.groups]


class _Measured(NamedTuple):
    """What the passes over a batch gave. It is sent to other processes as JSON."""

    rows: Sequence[int]
    passes: list[tuple[int, float, Sequence[tuple[float, float]], float | None]]
    """Of each pass: how many rows it has, its loss, ``Losses.errors`` and what was preserved."""


def _losses(batches: Sequence[_Measured], num_rows: int, loss_limit: float, cache: Cache | Mixture) -> Losses:
    """The losses of an update.

    Raises:
        RunError: one is not finite, or beyond the limit.
    """
    total, errors, preserved = 0.0, [], []
    for batch in batches:
        for count, loss, of_rows, preservation in batch.passes:
            if not math.isfinite(loss) or 0 < loss_limit < loss:
                raise exploded(f"The loss is {loss:.4g}", batch.rows, cache)
            total += loss * (count / num_rows)
            errors += [(sigma, error) for sigma, error in of_rows]
            if preservation is not None:
                preserved.append((batch.rows, count, preservation))
    rows = tuple(row for batch in batches for row in batch.rows)
    return Losses(total, tuple(errors), _mean_preservation(preserved, cache), rows=rows)


def _mean_preservation(preserved: Sequence[tuple[Sequence[int], int, float]], cache: Cache | Mixture) -> float | None:
    """The mean over rows of what was preserved; None without any.

    Raises:
        RunError: it is not finite.
    """
    for rows, _, value in preserved:
        if not math.isfinite(value):
            raise exploded(f"The preservation loss is {value:.4g}", rows, cache)
    return sum(n * value for _, n, value in preserved) / sum(n for _, n, _ in preserved) if preserved else None


def by_sigma(errors: Sequence[tuple[float, float]], count: int) -> list[float | None]:
    """The mean error in each of ``count`` equal parts of sigma's 0 to 1, low noise first; None where it is no number.

    Six digits: float32 has hardly more, and every step has a line of its own.
    """
    parts: list[list[float]] = [[] for _ in range(count)]
    for sigma, error in errors:
        parts[min(int(sigma * count), count - 1)].append(error)
    means = [sum(part) / len(part) if part else math.nan for part in parts]
    return [float(f"{mean:.6g}") if math.isfinite(mean) else None for mean in means]


def _trained_sigmas(group: Group) -> list[float | None]:
    """The sigma of each row of a group in host memory; None for a row with a rollout, which has another target."""
    sigmas: list[float] = group.sigma.tolist()
    if group.path is None:
        return [*sigmas]
    rolled = (group.path[:, 0] != group.path[:, -1]).tolist()
    return [None if is_rolled else sigma for sigma, is_rolled in zip(sigmas, rolled, strict=True)]


def clip_gradients(parameters: Sequence[torch.nn.Parameter], max_grad_norm: float) -> Tensor:
    """Clip the gradients; return their norm before, without waiting for it. A norm of 0 clips nothing."""
    return torch.nn.utils.clip_grad_norm_(parameters, max_grad_norm or float("inf"))


def update(
    optimizer: torch.optim.Optimizer,
    norm: float,
    explain: Callable[[str], RunError] | None = None,
    graphs: GraphedPasses | None = None,
) -> None:
    """Take a step and clear the gradients, which are clipped already.

    Args:
        norm: of the gradients before they were clipped.
        explain: returns the error that names the rows.
        graphs: takes the step.

    Raises:
        RunError: a gradient is not finite. Nothing was updated.
    """
    if not math.isfinite(norm):
        problem = f"The gradients' norm is {norm}"
        raise explain(problem) if explain else RunError(problem, ADVICE)
    if graphs is not None:
        graphs.update(optimizer)
        return
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def exploded(problem: str, rows: Sequence[int], cache: Cache | Mixture) -> RunError:
    """The error that ends a run before an update: the problem and the rows it occurs on."""
    name = cache.name if isinstance(cache, Mixture) else lambda i: cache.row(i).path
    names = ", ".join(dict.fromkeys(name(i) for i in rows))
    return RunError(f"{problem} at {names}; nothing was updated", ADVICE)

"""One update of the adapter: forward passes, their losses, gradients summed, clipped, stepped."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from k5cache.shared.errors import RunError
from k5train.data.batch import Batch, Group
from k5train.data.mixture import Mixture
from k5train.objective import flow, rollout

if TYPE_CHECKING:
    from k5cache.store.reader import Cache


Predict = Callable[..., Tensor]


"""Noisy latents, sigma, prompt_embeds, pooled_projections -> velocity. Padded captions add ``text_lengths=``, and TREAD
``routes=``."""


def train_step(
    predict: Predict, group: Group, huber_c: float | None = None, cost: rollout.Cost | None = None
) -> Tensor:
    """The flow-matching loss of one forward pass, a mean over its rows and elements, in float32.

    Args:
        huber_c: as in ``flow_loss``.
        cost: adds up what rollouts take.
    """
    if group.path is not None:
        noisy, target = _own_input(predict, group, cost or rollout.Cost())
    else:
        noisy = flow.add_noise(group.latents, group.noise, group.sigma)
        target = flow.velocity_target(group.latents, group.noise)
    extra: dict[str, Any] = {} if group.text_lengths is None else {"text_lengths": group.text_lengths}
    if group.routes:
        extra["routes"] = group.routes
    velocity = predict(noisy, group.sigma, group.prompt_embeds, group.pooled_projections, **extra)
    return flow.flow_loss(velocity, target, group.weight, group.mask, huber_c)


def _own_input(predict: Predict, group: Group, cost: rollout.Cost) -> tuple[Tensor, Tensor]:
    """Noisy latents that the model has made, and the velocity that leads from there to the data."""
    assert group.path is not None

    def predict_rows(noisy: Tensor, sigma: Tensor, rows: Tensor) -> Tensor:
        lengths = group.text_lengths
        extra = {} if lengths is None else {"text_lengths": tuple(lengths[i] for i in rows.tolist())}
        return predict(noisy, sigma, group.prompt_embeds[rows], group.pooled_projections[rows], **extra)

    return rollout.roll(predict_rows, group.latents, group.noise, group.path, cost)


def accumulate(
    predict: Predict,
    batches: Sequence[Batch],
    cache: Cache | Mixture,
    device: torch.device,
    loss_limit: float = 0.0,
    loss_of: Callable[[Predict, Group], Tensor] = train_step,
) -> float:
    """Gradients of one update: every row weighs the same, however rows fall into batches and groups.

    Args:
        loss_limit: the largest loss that may lead to an update; 0: any finite one.
        loss_of: ``train_step``, with the recipe's objective.

    Returns:
        The mean loss over the rows.

    Raises:
        RunError: the loss is not finite, or beyond the limit; the rows are named and nothing was updated.
    """
    num_rows = sum(batch.num_rows for batch in batches)
    losses: list[Tensor] = []
    for batch in batches:
        for group in batch.groups:
            loss = loss_of(predict, group.to(device))
            torch.autograd.backward(loss * (group.latents.shape[0] / num_rows))
            losses.append(loss.detach())
    found = torch.stack(losses).tolist()  # the only wait for the GPU: it has the whole update's work by now
    total, each = 0.0, iter(found)
    for batch in batches:
        for group in batch.groups:
            loss_of_group = next(each)
            if not math.isfinite(loss_of_group) or 0 < loss_limit < loss_of_group:
                raise exploded(f"The loss is {loss_of_group:.4g}", [batch], cache)
            total += loss_of_group * (group.latents.shape[0] / num_rows)
    return total


def update(
    optimizer: torch.optim.Optimizer,
    parameters: Sequence[torch.nn.Parameter],
    max_grad_norm: float,
    explain: Callable[[str], RunError] | None = None,
) -> float:
    """Clip, step, clear. Returns the gradients' norm before clipping.

    Args:
        explain: makes the error that names the rows.

    Raises:
        RunError: a gradient is not finite; nothing was updated.
    """
    limit = max_grad_norm or float("inf")
    norm = torch.nn.utils.clip_grad_norm_(parameters, limit).item()
    if not math.isfinite(norm):
        problem = f"The gradients' norm is {norm}"
        raise explain(problem) if explain else RunError(problem, ADVICE)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return norm


ADVICE = "Check these rows with `k5cache verify`, or lower train.optim.lr"


def exploded(problem: str, batches: Sequence[Batch], cache: Cache | Mixture) -> RunError:
    """The error that ends a run before an update: what was found, and on which rows."""
    name = cache.name if isinstance(cache, Mixture) else lambda i: cache.row(i).path
    names = ", ".join(dict.fromkeys(name(i) for batch in batches for i in batch.rows))
    return RunError(f"{problem} at {names}; nothing was updated", ADVICE)

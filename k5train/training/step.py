"""What happens in one update of the adapter? Forward passes, their loss, summed and clipped gradients, a step."""

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
"""Noisy latents, sigma, prompt_embeds, pooled_projections -> velocity. A source that is edited adds ``condition=``,
padded captions add ``text_lengths=``, and TREAD adds ``routes=``."""
ADVICE = "Check these rows with `k5cache verify`, or lower train.optim.lr"


def train_step(
    predict: Predict, group: Group, huber_c: float | None = None, cost: rollout.Cost | None = None
) -> Tensor:
    """The flow-matching loss of one forward pass: a mean over its rows and elements, in float32.

    Args:
        huber_c: as in ``flow_loss``.
        cost: counts what rollouts cost.
    """
    if group.path is not None:
        noisy, target = _own_input(predict, group, cost or rollout.Cost())
    else:
        noisy = flow.add_noise(group.latents, group.noise, group.sigma)
        target = flow.velocity_target(group.latents, group.noise)
    extra: dict[str, Any] = {} if group.text_lengths is None else {"text_lengths": group.text_lengths}
    if group.condition is not None:
        extra["condition"] = group.condition
    if group.routes:
        extra["routes"] = group.routes
    velocity = predict(noisy, group.sigma, group.prompt_embeds, group.pooled_projections, **extra)
    return flow.flow_loss(velocity, target, group.weight, group.mask, huber_c)


def _own_input(predict: Predict, group: Group, cost: rollout.Cost) -> tuple[Tensor, Tensor]:
    """Noisy latents that the model itself has reached, and the velocity that leads from there to the data."""
    assert group.path is not None

    def predict_rows(noisy: Tensor, sigma: Tensor, rows: Tensor) -> Tensor:
        lengths = group.text_lengths
        extra: dict[str, Any] = {}
        if lengths is not None:
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
    loss_of: Callable[[Predict, Group], Tensor] = train_step,
) -> float:
    """Compute the gradients of one update. Every row has the same weight, however rows fall into batches and groups.

    Args:
        loss_limit: a larger loss is an error. 0: any finite loss is allowed.
        loss_of: ``train_step``, with the recipe's objective.

    Returns:
        The mean loss over the rows.

    Raises:
        RunError: the loss is not finite, or beyond the limit. The error names the rows, and nothing was updated.
    """
    num_rows = sum(batch.num_rows for batch in batches)
    losses: list[Tensor] = []
    for batch in batches:
        for group in batch.groups:
            loss = loss_of(predict, group.to(device))
            torch.autograd.backward(loss * (group.latents.shape[0] / num_rows))
            losses.append(loss.detach())
    # The only wait for the GPU, which has the work of the whole update by now.
    values = iter(torch.stack(losses).tolist())
    total = 0.0
    for batch in batches:
        for group in batch.groups:
            value = next(values)
            if not math.isfinite(value) or 0 < loss_limit < value:
                raise exploded(f"The loss is {value:.4g}", [batch], cache)
            total += value * (group.latents.shape[0] / num_rows)
    return total


def update(
    optimizer: torch.optim.Optimizer,
    parameters: Sequence[torch.nn.Parameter],
    max_grad_norm: float,
    explain: Callable[[str], RunError] | None = None,
) -> float:
    """Clip the gradients, take a step and clear them; return their norm before clipping.

    Args:
        explain: returns the error that names the rows.

    Raises:
        RunError: a gradient is not finite. Nothing was updated.
    """
    limit = max_grad_norm or float("inf")
    norm = torch.nn.utils.clip_grad_norm_(parameters, limit).item()
    if not math.isfinite(norm):
        problem = f"The gradients' norm is {norm}"
        raise explain(problem) if explain else RunError(problem, ADVICE)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return norm


def exploded(problem: str, batches: Sequence[Batch], cache: Cache | Mixture) -> RunError:
    """The error that ends a run before an update: the problem and the rows it occurs on."""
    name = cache.name if isinstance(cache, Mixture) else lambda i: cache.row(i).path
    names = ", ".join(dict.fromkeys(name(i) for batch in batches for i in batch.rows))
    return RunError(f"{problem} at {names}; nothing was updated", ADVICE)

"""One update of the adapter: forward passes, their losses, gradients summed, clipped, stepped."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from k5cache.errors import RunError
from k5train import flow
from k5train.data import Batch, Group

if TYPE_CHECKING:
    from k5cache.store.reader import Cache

Predict = Callable[..., Tensor]
"""Noisy latents, sigma, prompt_embeds, pooled_projections -> velocity. Padded captions add ``text_lengths=``."""


def train_step(predict: Predict, group: Group) -> Tensor:
    """The flow-matching loss of one forward pass, a mean over its rows and elements, in float32."""
    noisy = flow.add_noise(group.latents, group.noise, group.sigma)
    lengths = {} if group.text_lengths is None else {"text_lengths": group.text_lengths}
    velocity = predict(noisy, group.sigma, group.prompt_embeds, group.pooled_projections, **lengths)
    return flow.flow_loss(velocity, flow.velocity_target(group.latents, group.noise))


def accumulate(predict: Predict, batches: Sequence[Batch], cache: Cache, device: torch.device) -> float:
    """Gradients of one update: every row weighs the same, however rows fall into batches and groups.

    Returns:
        The mean loss over the rows.

    Raises:
        RunError: the loss is not finite; the rows are named and nothing was updated.
    """
    num_rows = sum(batch.num_rows for batch in batches)
    total = 0.0
    for batch in batches:
        for group in batch.groups:
            loss = train_step(predict, group.to(device))
            share = group.latents.shape[0] / num_rows
            torch.autograd.backward(loss * share)
            total += loss.item() * share
        if not math.isfinite(total):
            names = ", ".join(cache.row(i).path for i in batch.rows)
            raise RunError(
                f"The loss is {total} at {names}", "Check these rows with `k5cache verify`, or lower train.optim.lr"
            )
    return total


def update(optimizer: torch.optim.Optimizer, parameters: list[torch.nn.Parameter], max_grad_norm: float) -> float:
    """Clip, step, clear. Returns the gradients' norm before clipping."""
    limit = max_grad_norm or float("inf")
    norm = torch.nn.utils.clip_grad_norm_(parameters, limit)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return norm.item()

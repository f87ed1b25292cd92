"""The optimizer and its learning rate."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from k5train.config import OptimConfig


def make_optimizer(parameters: Iterable[torch.nn.Parameter], config: OptimConfig) -> torch.optim.AdamW:
    """AdamW over the adapter; its learning rate is set a step at a time by ``learning_rate``."""
    return torch.optim.AdamW(
        list(parameters), lr=config.lr, betas=config.betas, eps=config.eps, weight_decay=config.weight_decay
    )


def learning_rate(step: int, config: OptimConfig) -> float:
    """The learning rate of update ``step`` (0 is the first): linear warm-up to ``lr``, then constant.

    The first update already moves: with ``warmup_steps = 100`` it has ``lr / 100``.
    """
    return config.lr * min(1.0, (step + 1) / config.warmup_steps) if config.warmup_steps else config.lr

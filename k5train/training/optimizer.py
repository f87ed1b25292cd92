"""The optimizer, its learning rate, and the average of what it made."""

from __future__ import annotations

import importlib
import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from k5cache.shared import console
from k5cache.shared.errors import RunError
from k5train.options.optimizer import OptimConfig

EXTRAS = {"adamw8bit": "bitsandbytes", "prodigy": "prodigyopt", "lion": "lion_pytorch", "schedulefree": "schedulefree"}


"""Optimizers that are extras of the package of their own name, and the module each needs."""


def make_optimizer(parameters: Iterable[torch.nn.Parameter], config: OptimConfig) -> torch.optim.Optimizer:
    """The optimizer over the adapter; its learning rate is set a step at a time by ``learning_rate``.

    Raises:
        RunError: it needs an extra that is not installed, or weights of two dimensions where the adapter has others.
    """
    chosen, name = list(parameters), config.optimizer
    common: dict[str, Any] = {"lr": config.lr, "weight_decay": config.weight_decay}
    adam: dict[str, Any] = {**common, "betas": config.betas, "eps": config.eps}
    library = _extra(name) if name in EXTRAS else torch.optim
    match name:
        case "adamw":
            on_gpu = bool(chosen) and all(p.is_cuda for p in chosen)
            return torch.optim.AdamW(chosen, **adam, fused=on_gpu or None)  # one launch, not ten, for 64 tensors
        case "adafactor":
            # An update of size lr, as AdamW's. Scaled by the weights' own size, Adafactor's default, it would be
            # lr * 1e-3 for matrices that start at 0, which LoRA's B does: 16 steps of k5-micro moved nothing.
            return torch.optim.Adafactor(chosen, **common, eps=(None, 1.0))
        case "muon":
            if any(p.ndim != 2 for p in chosen):
                raise RunError(
                    "train.optim.optimizer is muon, which turns matrices only; this adapter has vectors",
                    "Use --set train.optim.optimizer=adamw, or train.lora.algo=lora",
                )
            # Updates of the size of AdamW's, so that a learning rate means the same.
            return torch.optim.Muon(chosen, **common, momentum=config.betas[0], adjust_lr_fn="match_rms_adamw")
        case "lion":
            made = library.Lion(chosen, **common, betas=config.betas)
        case "prodigy":
            if config.lr < 0.1:
                console.warn(f"prodigy finds its own rate and multiplies it by lr: 1.0 is usual, found {config.lr:g}")
            made = library.Prodigy(chosen, **adam, safeguard_warmup=config.warmup_steps > 0)
        case "schedulefree":
            made = library.AdamWScheduleFree(chosen, **adam)
            made.train()
        case "adamw8bit":
            made = library.optim.AdamW8bit(chosen, **adam)
    optimizer: torch.optim.Optimizer = made
    return optimizer


def learning_rate(step: int, config: OptimConfig, num_steps: int) -> float:
    """The learning rate of update ``step`` (0 is the first) of ``num_steps``: linear warm-up, then the schedule.

    The first update already moves: with ``warmup_steps = 100`` it has ``lr / 100``. After warm-up the schedules are
    diffusers' own (``diffusers.optimization``); ``rex`` is Chen et al.'s (2022), ``(1 - p) / (1 - p / 2)``.
    """
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    progress = (step - config.warmup_steps) / max(1, num_steps - config.warmup_steps)
    share = _falling(min(1.0, progress), config)
    return config.lr * (config.lr_end + (1 - config.lr_end) * share)


def _falling(progress: float, config: OptimConfig) -> float:
    """1 to 0 while progress goes from 0 to 1."""
    match config.lr_scheduler:
        case "linear":
            return 1 - progress
        case "cosine":
            return (1 + math.cos(math.pi * progress)) / 2
        case "cosine_with_restarts":
            in_cycle = (progress * config.lr_num_cycles) % 1.0 if progress < 1 else 1.0
            return (1 + math.cos(math.pi * in_cycle)) / 2
        case "polynomial":
            return (1 - progress) ** config.lr_power
        case "rex":
            return (1 - progress) / (1 - progress / 2)
    return 1.0


@contextmanager
def settled(optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """While sampling and saving: a schedule-free optimizer puts its average in the parameters' place."""
    switches = hasattr(optimizer, "eval") and hasattr(optimizer, "train")
    if switches:
        optimizer.eval()  # type: ignore[attr-defined]
    try:
        yield
    finally:
        if switches:
            optimizer.train()  # type: ignore[attr-defined]


def _extra(name: str) -> Any:
    try:
        return importlib.import_module(EXTRAS[name])
    except ImportError as error:
        raise RunError(
            f"train.optim.optimizer is {name}, and {EXTRAS[name]} is not installed",
            f'pip install "kandinsky5-lora[{name}]", or use --set train.optim.optimizer=adamw',
        ) from error

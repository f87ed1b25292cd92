"""The optimizer and its learning rate."""

from __future__ import annotations

import importlib
import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from k5cache.shared import interrupt
from k5cache.shared.errors import RunError
from k5train.options.optimizer import OptimConfig

EXTRAS = {"adamw8bit": "bitsandbytes", "prodigy": "prodigyopt", "lion": "lion_pytorch", "schedulefree": "schedulefree"}
"""The optimizers that are an extra of our package, under their own name, and the module that each one needs."""


def make_optimizer(parameters: Iterable[torch.nn.Parameter], config: OptimConfig) -> torch.optim.Optimizer:
    """The optimizer of an adapter. The loop sets its learning rate at every step, from ``learning_rate``.

    Raises:
        RunError: it needs an extra that is not installed, or only matrices and the adapter has vectors.
    """
    weights, name = list(parameters), config.optimizer
    common: dict[str, Any] = {"lr": _rate(config), "weight_decay": config.weight_decay}
    adam: dict[str, Any] = {**common, "betas": config.betas, "eps": config.eps}
    library = _extra(name) if name in EXTRAS else torch.optim
    optimizer: torch.optim.Optimizer
    match name:
        case "adamw":
            on_gpu = bool(weights) and all(p.is_cuda for p in weights)
            if on_gpu:  # with the rate on the GPU, so that a captured update reads the rate of its step
                adam["lr"] = torch.tensor(adam["lr"], device=weights[0].device)
            # fused: one launch, not ten, for 64 tensors
            return torch.optim.AdamW(weights, **adam, fused=on_gpu or None, capturable=on_gpu)
        case "adafactor":
            # An update has size lr, as AdamW's has. Adafactor's default scales it by the size of the weights: for
            # matrices that start at 0, as LoRA's B does, it would be lr * 1e-3. 16 steps of k5-micro changed nothing.
            return torch.optim.Adafactor(weights, **common, eps=(None, 1.0))
        case "muon":
            if any(p.ndim != 2 for p in weights):
                raise RunError(
                    "train.optim.optimizer is muon, which trains matrices only; this adapter has vectors",
                    "Use --set train.optim.optimizer=adamw, or train.lora.algo=lora",
                )
            # Updates have the size of AdamW's, so that a learning rate means the same.
            return torch.optim.Muon(weights, **common, momentum=config.betas[0], adjust_lr_fn="match_rms_adamw")
        case "lion":
            optimizer = library.Lion(weights, **common, betas=config.betas)
        case "prodigy":
            optimizer = library.Prodigy(weights, **adam, safeguard_warmup=config.warmup_steps > 0)
        case "schedulefree":
            optimizer = library.AdamWScheduleFree(weights, **adam)
            optimizer.train()  # type: ignore[attr-defined]
        case "adamw8bit":
            optimizer = library.optim.AdamW8bit(weights, **adam)
    return optimizer


def learning_rate(step: int, config: OptimConfig, num_steps: int) -> float:
    """The learning rate of update ``step`` (0 is the first) of ``num_steps``: linear warm-up, then the schedule.

    The first update is not 0: with ``warmup_steps = 100`` it has ``lr / 100``. After warm-up the schedules are those of
    ``diffusers.optimization``; ``rex`` is Chen et al.'s (2022), ``(1 - p) / (1 - p / 2)``.
    """
    rate = _rate(config)
    if step < config.warmup_steps:
        return rate * (step + 1) / config.warmup_steps
    progress = (step - config.warmup_steps) / max(1, num_steps - config.warmup_steps)
    share = _falling(min(1.0, progress), config)
    return rate * (config.lr_end + (1 - config.lr_end) * share)


def set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Have the next updates use this learning rate."""
    for group in optimizer.param_groups:
        if isinstance(group["lr"], torch.Tensor):
            group["lr"].fill_(rate)
        else:
            group["lr"] = rate


def _rate(config: OptimConfig) -> float:
    assert config.lr is not None, "with_usual_rate gives a recipe the learning rate of its adapter"
    return config.lr


def _falling(progress: float, config: OptimConfig) -> float:
    """Falls from 1 to 0 while progress goes from 0 to 1."""
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
    """For drawing and saving: a schedule-free optimizer puts its average in the place of the parameters."""
    is_schedule_free = hasattr(optimizer, "eval") and hasattr(optimizer, "train")
    try:
        with interrupt.deferred():  # half of the parameters averaged is a state that nothing leads back from
            if is_schedule_free:
                optimizer.eval()  # type: ignore[attr-defined]
        yield
    finally:
        with interrupt.deferred():
            if is_schedule_free:
                optimizer.train()  # type: ignore[attr-defined]


def _extra(name: str) -> Any:
    try:
        return importlib.import_module(EXTRAS[name])
    except ImportError as error:
        raise RunError(
            f"train.optim.optimizer is {name}, and {EXTRAS[name]} is not installed",
            f'pip install "kandinsky5-lora[{name}]", or use --set train.optim.optimizer=adamw',
        ) from error

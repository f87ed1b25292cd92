"""``[train.optim]``: the options of the optimizer. The docstring under an option is its help."""

from __future__ import annotations

from dataclasses import dataclass
from math import inf
from typing import Literal

OptimizerName = Literal["adamw", "adamw8bit", "adafactor", "prodigy", "lion", "schedulefree", "muon"]


ScheduleName = Literal["constant", "linear", "cosine", "cosine_with_restarts", "polynomial", "rex"]


@dataclass(frozen=True)
class OptimConfig:
    """``[train.optim]``: the optimizer and its learning rate. Defaults are the official trainer's."""

    optimizer: OptimizerName = "adamw"
    """``adafactor``, ``muon`` and ``adamw`` are torch's. ``adamw8bit``, ``prodigy``, ``lion`` and ``schedulefree``
    (AdamW) need the extra of their name: pip install "kandinsky5-lora[lion]". Prodigy finds its own rate: lr = 1.0."""
    lr: float = 1e-4
    """Learning rate after warm-up."""
    betas: tuple[float, float] = (0.9, 0.95)
    """Averaging of gradient and of its square. ``adafactor`` has none, ``muon`` uses the first."""
    weight_decay: float = 0.0
    """Decoupled weight decay."""
    eps: float = 1e-8
    """What keeps AdamW's division finite; for AdamW's kin (8-bit, Prodigy, schedule-free) too."""
    lr_scheduler: ScheduleName = "constant"
    """How the learning rate goes on after warm-up, until the last step."""
    lr_num_cycles: int = 1
    """Of ``cosine_with_restarts``: how many times it falls."""
    lr_power: float = 1.0
    """Of ``polynomial``: 1 is a straight line, 2 a parabola."""
    lr_end: float = 0.0
    """Where ``linear``, ``polynomial``, ``cosine``, ``cosine_with_restarts`` and ``rex`` end, as a share of ``lr``."""
    warmup_steps: int = 100
    """Optimizer steps over which the learning rate rises from 0 to ``lr``."""
    max_grad_norm: float = 1.0
    """Gradients are scaled down to this norm. 0: never."""
    ema_decay: float = 0.0
    """Also keep an average of the adapter, each step this share old: 0.99 to 0.9999. 0: none. It is saved beside the
    LoRA, as ``-ema``, and drawn as a row of its own."""

    def check(self) -> list[str]:
        """What is out of range."""
        problems = []
        positive = (("lr", self.lr), ("eps", self.eps), ("lr_power", self.lr_power))
        problems += [f"{name} must be above 0, found {value}" for name, value in positive if not 0 < value < inf]
        if not all(0 <= beta < 1 for beta in self.betas):
            problems.append(f"betas must be at least 0 and below 1, found {list(self.betas)}")
        for name, value in (("weight_decay", self.weight_decay), ("max_grad_norm", self.max_grad_norm)):
            if not 0 <= value < inf:
                problems.append(f"{name} must be 0 or more, found {value}")
        if self.warmup_steps < 0:
            problems.append(f"warmup_steps must be 0 or more, found {self.warmup_steps}")
        if self.lr_num_cycles < 1:
            problems.append(f"lr_num_cycles must be at least 1, found {self.lr_num_cycles}")
        if not 0 <= self.lr_end <= 1:
            problems.append(f"lr_end must be 0 to 1, found {self.lr_end}")
        if not 0 <= self.ema_decay < 1:
            problems.append(f"ema_decay must be at least 0 and below 1, found {self.ema_decay}")
        if self.optimizer == "schedulefree" and (self.lr_scheduler != "constant" or self.ema_decay):
            problems.append("optimizer 'schedulefree' averages by itself: lr_scheduler must be constant, ema_decay 0")
        return problems

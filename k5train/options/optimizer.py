"""``[train.optim]``: the options of the optimizer. The docstring under an option is its help."""

from __future__ import annotations

from dataclasses import dataclass
from math import inf
from typing import Literal

OptimizerName = Literal["adamw", "adamw8bit", "adafactor", "prodigy", "lion", "schedulefree", "muon"]
ScheduleName = Literal["constant", "linear", "cosine", "cosine_with_restarts", "polynomial", "rex"]


@dataclass(frozen=True)
class OptimConfig:
    """``[train.optim]``: the optimizer and its learning rate. The defaults are the official trainer's."""

    optimizer: OptimizerName = "adamw"
    """``adafactor``, ``muon`` and ``adamw`` are torch's. ``adamw8bit``, ``prodigy``, ``lion`` and ``schedulefree``
    (AdamW) each need the extra of that name: pip install "kandinsky5-lora[lion]". Prodigy finds the learning rate by
    itself."""
    lr: float | None = None
    """Learning rate after the warm-up. None: the usual rate of the adapter and the optimizer, which for a LoRA with
    AdamW is 1e-4. What a run trains at is in its recipe."""
    betas: tuple[float, float] = (0.9, 0.95)
    """Decay of the averages of the gradient and of its square. ``adafactor`` has neither; ``muon`` uses the first."""
    weight_decay: float = 0.0
    """Decoupled weight decay."""
    eps: float = 1e-8
    """Added to the denominator in AdamW and its variants (8-bit, Prodigy, schedule-free)."""
    lr_scheduler: ScheduleName = "constant"
    """How the learning rate changes from the end of the warm-up to the last step."""
    lr_num_cycles: int = 1
    """For ``cosine_with_restarts``: the number of cycles."""
    lr_power: float = 1.0
    """For ``polynomial``: 1 is a straight line, 2 a parabola."""
    lr_end: float = 0.0
    """The last value of ``linear``, ``polynomial``, ``cosine``, ``cosine_with_restarts`` and ``rex``, as a share of
    ``lr``."""
    warmup_steps: int = 100
    """Optimizer steps over which the learning rate rises from 0 to ``lr``."""
    max_grad_norm: float = 1.0
    """Gradients with a larger norm are scaled down to this norm. 0: never."""
    ema_decay: float = 0.0
    """Also keep an exponential moving average of the adapter with this decay, usually 0.99 to 0.9999; 0 turns it off.
    It is saved beside the LoRA as ``-ema``, and has its own row of pictures."""

    def check(self) -> list[str]:
        """What is out of range."""
        problems = []
        positive = (("lr", self.lr), ("eps", self.eps), ("lr_power", self.lr_power))
        problems += [
            f"{name} must be above 0, found {value}"
            for name, value in positive
            if value is not None and not 0 < value < inf
        ]
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
            problems.append(
                "optimizer 'schedulefree' averages by itself: lr_scheduler must be constant and ema_decay 0"
            )
        return problems

"""The options of stage 2, each written once. The docstring under an option is its help."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal


@dataclass(frozen=True)
class LoraConfig:
    """``[train.lora]``: the adapter."""

    rank: int = 32
    """Rank of each pair of matrices."""
    alpha: float | None = None
    """Strength: the adapter is scaled by alpha / rank. None: alpha = rank, as the official trainer does."""
    dropout: float = 0.0
    """Share of the adapter's inputs dropped in training."""
    targets: tuple[str, ...] = ("official",)
    """Presets (``official``, ``attention``, ``qkv``) or patterns of module names; a pattern must match something."""

    def check(self) -> list[str]:
        """What is out of range."""
        problems = []
        if self.rank < 1:
            problems.append(f"rank must be at least 1, found {self.rank}")
        if not 0 <= self.dropout < 1:
            problems.append(f"dropout must be in [0, 1), found {self.dropout}")
        if not self.targets:
            problems.append("targets must name at least one preset or pattern")
        return problems


@dataclass(frozen=True)
class OptimConfig:
    """``[train.optim]``: AdamW and its learning rate. Defaults are the official trainer's."""

    lr: float = 1e-4
    """Learning rate after warm-up."""
    betas: tuple[float, float] = (0.9, 0.95)
    """AdamW's averaging of gradient and of its square."""
    weight_decay: float = 0.0
    """AdamW's decoupled weight decay."""
    eps: float = 1e-8
    """AdamW's epsilon."""
    warmup_steps: int = 100
    """Optimizer steps over which the learning rate rises from 0 to ``lr``."""
    max_grad_norm: float = 1.0
    """Gradients are scaled down to this norm. 0: never."""

    def check(self) -> list[str]:
        """What is out of range."""
        problems = []
        if self.lr <= 0:
            problems.append(f"lr must be above 0, found {self.lr}")
        if self.warmup_steps < 0:
            problems.append(f"warmup_steps must be 0 or more, found {self.warmup_steps}")
        return problems


@dataclass(frozen=True)
class MemoryConfig:
    """``[train.memory]``: what is traded for memory."""

    gradient_checkpointing: bool = True
    """Recompute each block in the backward pass instead of keeping its activations."""


@dataclass(frozen=True)
class ValidationConfig:
    """``[train.validation]``: pictures along the way, from prompts that the cache holds."""

    prompts: tuple[str, ...] = ()
    """What to draw. `k5cache encode` puts them in the cache, so no text encoder is loaded here."""
    negative_prompt: str = ""
    """What guidance moves away from."""
    every: int = 250
    """Optimizer steps between sample grids. 0: only before and after."""
    guidance_scale: float = 5.0
    """Classifier-free guidance. 1.0: none, and half the time."""
    num_inference_steps: int = 50
    """Euler steps a picture."""
    width: int | None = None
    """Pixels. None: the cache's resolution."""
    height: int | None = None
    """Pixels. None: the cache's resolution."""
    seed: int = 42
    """Noise of the samples: the same for every checkpoint, so that rows can be compared."""
    before: bool = True
    """Also draw the base model's pictures before the first step."""

    def check(self) -> list[str]:
        """What is out of range."""
        problems = [
            f"{name} must be a multiple of 16 and at least 16, found {side}"
            for name, side in (("width", self.width), ("height", self.height))
            if side is not None and (side < 16 or side % 16)
        ]
        if self.num_inference_steps < 1:
            problems.append(f"num_inference_steps must be at least 1, found {self.num_inference_steps}")
        return problems


@dataclass(frozen=True)
class TrainConfig:
    """``[train]``: stage 2, a cache to a LoRA."""

    name: str | None = None
    """Folder under ``runs/``. None: the cache's name."""
    steps: int = 1000
    """Optimizer updates."""
    batch_size: int = 1
    """Rows of one forward pass. Its captions have one length and its images one bucket."""
    gradient_accumulation_steps: int = 1
    """Forward passes of one optimizer update."""
    repeats: int = 1
    """How often each image counts in one epoch."""
    caption_dropout_probability: float = 0.1
    """Share of rows trained with the empty prompt, so that guidance keeps working."""
    base_model_precision: Literal["int8-quanto", "no_change"] = "int8-quanto"
    """The frozen transformer: int8 weights by quanto's ``qint8`` scheme, or bf16 as it came."""
    mixed_precision: Literal["bf16", "fp32"] = "bf16"
    """Number format of activations and of unquantised weights. fp32 is for CPUs and tests."""
    flow_schedule_shift: float = 1.0
    """``sigma -> s*sigma / (1 + (s-1)*sigma)``; above 1 trains more on noisy inputs. The official trainer uses 3."""
    seed: int = 42
    """Order, noise, sigma and dropout are functions of this and the step."""
    checkpoint_every: int = 250
    """Optimizer steps between saved LoRAs. 0: only the last."""
    device: Literal["auto", "cuda", "cpu"] = "auto"
    """auto: the GPU where there is one."""
    lora: LoraConfig = field(default_factory=LoraConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    memory: MemoryConfig = field(default_factory=MemoryConfig)
    validation: ValidationConfig = field(default_factory=ValidationConfig)

    def check(self) -> list[str]:
        """What is out of range."""
        problems = [
            f"{name} must be at least 1, found {value}"
            for name, value in (
                ("steps", self.steps),
                ("batch_size", self.batch_size),
                ("gradient_accumulation_steps", self.gradient_accumulation_steps),
                ("repeats", self.repeats),
            )
            if value < 1
        ]
        if not 0 <= self.caption_dropout_probability <= 1:
            problems.append(f"caption_dropout_probability must be 0 to 1, found {self.caption_dropout_probability}")
        if self.flow_schedule_shift <= 0:
            problems.append(f"flow_schedule_shift must be above 0, found {self.flow_schedule_shift}")
        return problems

"""``[train]``: the options of a run, and the tables below it. The docstring under an option is its help."""

from __future__ import annotations

from dataclasses import dataclass, field
from math import inf
from typing import Literal

from k5train.options.adapter import LoraConfig
from k5train.options.memory import MemoryConfig
from k5train.options.objective import DataConfig, ObjectiveConfig, RolloutConfig, TreadConfig
from k5train.options.optimizer import OptimConfig
from k5train.options.validation import TrackersConfig, ValidationConfig


@dataclass(frozen=True)
class TrainConfig:
    """``[train]``: stage 2, a cache to a LoRA."""

    name: str | None = None
    """Folder under ``runs/``. None: the cache's name."""
    steps: int = 1000
    """Optimizer updates."""
    epochs: int | None = None
    """Passes over the data, in place of ``steps``."""
    max_hours: float | None = None
    """End after the step at which this much time has passed, as if it were the last."""
    batch_size: int = 1
    """Rows of a micro-batch. They share a bucket; ``unequal_captions`` says what becomes of their captions."""
    unequal_captions: Literal["split", "mask"] = "split"
    """Captions of different lengths in a batch. ``split``: one forward pass a length. ``mask``: one for all, padded."""
    gradient_accumulation_steps: int = 1
    """Forward passes of one optimizer update."""
    repeats: int = 1
    """How often each image counts in one epoch."""
    caption_dropout_probability: float = 0.1
    """Share of rows trained with the empty prompt, so that guidance keeps working."""
    caption_choice: Literal["random", "first"] = "random"
    """Which of an image's captions a step trains on."""
    base_model_precision: Literal["int8-quanto", "int8-dynamic", "no_change"] = "int8-quanto"
    """The frozen transformer: int8 weights by quanto's ``qint8`` scheme, the same on int8 tensor cores, or bf16."""
    mixed_precision: Literal["bf16", "fp32"] = "bf16"
    """Number format of activations and of unquantised weights. fp32 is for CPUs and tests."""
    flow_schedule_shift: float = 1.0
    """``sigma -> s*sigma / (1 + (s-1)*sigma)``; above 1 trains more on noisy inputs. The official trainer uses 3."""
    seed: int = 42
    """Order, noise, sigma and dropout are functions of this and the step."""
    checkpoint_every: int = 250
    """Optimizer steps between saved LoRAs, each with all that `k5train resume` needs. 0: only the last."""
    checkpoints_total_limit: int | None = None
    """How many of these LoRAs are kept, the newest; the best is kept besides. None: all. The state to resume from is
    always one."""
    loss_limit: float = 20.0
    """A loss above this ends the run before its update: predicting nothing at all gives about 2. 0: no limit."""
    device: Literal["auto", "cuda", "cpu"] = "auto"
    """auto: the GPU where there is one."""
    deterministic: bool = False
    """On a GPU: only kernels that give the same bits every time, so that a resumed run ends with the bits of a run
    without a break; it may be slower. A CPU always does."""
    data: tuple[DataConfig, ...] = ()
    """``[[train.data]]`` entries in place of CACHE arguments, each ``cache``, ``weight`` (share of the rows),
    ``repeats`` and ``is_regularisation_data`` (weighed by ``objective.prior_loss_weight``)."""
    lora: LoraConfig = field(default_factory=LoraConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    tread: TreadConfig = field(default_factory=TreadConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    memory: MemoryConfig = field(default_factory=MemoryConfig)
    validation: ValidationConfig = field(default_factory=ValidationConfig)
    trackers: TrackersConfig = field(default_factory=TrackersConfig)

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
        if not 0 < self.flow_schedule_shift < inf:
            problems.append(f"flow_schedule_shift must be above 0, found {self.flow_schedule_shift}")
        if self.flow_schedule_shift != 1 and self.objective.flow_schedule_auto_shift:
            problems.append("flow_schedule_shift must be 1 where objective.flow_schedule_auto_shift finds the shift")
        if self.epochs is not None and self.epochs < 1:
            problems.append(f"epochs must be at least 1, found {self.epochs}")
        if self.checkpoint_every < 0:
            problems.append(f"checkpoint_every must be 0 or more, found {self.checkpoint_every}")
        if self.checkpoints_total_limit is not None and self.checkpoints_total_limit < 1:
            problems.append(f"checkpoints_total_limit must be at least 1, found {self.checkpoints_total_limit}")
        if not self.loss_limit >= 0:  # NaN too
            problems.append(f"loss_limit must be 0 or more, found {self.loss_limit}")
        if self.max_hours is not None and not self.max_hours > 0:
            problems.append(f"max_hours must be above 0, found {self.max_hours}")
        if len({entry.weight is None for entry in self.data}) > 1:
            problems.append("data has entries with a weight and entries without: give one to all, or to none")
        if self.lora.algo in ("dora", "lokr") and self.base_model_precision == "int8-dynamic":
            problems.append(
                f"lora.algo is {self.lora.algo}, which runs as peft's modules, and these multiply in 16 bits:"
                " base_model_precision must be int8-quanto or no_change"
            )
        if self.base_model_precision == "no_change" and self.memory.enable_group_offload:
            problems.append("memory.enable_group_offload moves int8 weights: base_model_precision = no_change has none")
        if self.base_model_precision == "int8-dynamic" and self.memory.execution == "diffusers":
            problems.append("base_model_precision = int8-dynamic needs memory.execution = compiled or eager")
        return problems

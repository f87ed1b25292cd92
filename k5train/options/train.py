"""``[train]``: the options of a run, and the tables below it. The docstring under an option is its help."""

from __future__ import annotations

from dataclasses import dataclass, field
from math import inf
from typing import Literal

from k5train.options.adapter import LoraConfig
from k5train.options.data import DataConfig
from k5train.options.memory import MemoryConfig
from k5train.options.objective import ObjectiveConfig, RolloutConfig, TreadConfig
from k5train.options.optimizer import OptimConfig
from k5train.options.validation import TrackersConfig, ValidationConfig

FIXED = ("base_model_precision", "mixed_precision", "device", "memory", "data", "name")
"""What all runs of a sweep have in common: the options that decide the shared base and the caches."""

BaseModelPrecision = Literal["auto", "int8-quanto", "int8-dynamic", "no_change"]


@dataclass(frozen=True)
class TrainConfig:
    """``[train]``: stage 2, from a cache to a LoRA."""

    name: str | None = None
    """The folder under ``runs/``. None: the name of the cache."""
    steps: int = 1000
    """Number of optimizer updates."""
    epochs: int | None = None
    """Passes over the data, instead of ``steps``."""
    max_hours: float | None = None
    """Stop after the step in which this much time is used up, as if it were the last step."""
    batch_size: int = 1
    """Rows of a micro-batch, all from one bucket. See ``unequal_captions`` for captions that differ in length."""
    unequal_captions: Literal["split", "mask"] = "split"
    """Captions of different lengths in a batch. ``split``: one forward pass for each length, except
    where steps are captured as CUDA graphs. ``mask``: one forward pass, with padding that is masked out."""
    gradient_accumulation_steps: int = 1
    """Micro-batches of one optimizer update."""
    repeats: int = 1
    """How often each image is used in one epoch."""
    repeats_by_folder: bool = False
    """Multiply ``repeats`` by the number with which the name of an image's folder begins, as in kohya's trainers:
    images in ``10_cat`` are used 10 times, those in a folder without a number once. SOURCE of the encode was the folder
    above."""
    caption_dropout_probability: float = 0.1
    """Share of the rows that are trained with the empty prompt, so that guidance keeps working."""
    source_dropout_probability: float = 0.0
    """Only for image-to-image: share of the rows that are trained without their source, whose latents and mask channel
    become zeros. What Qwen saw of the source stays in the instruction's embeddings."""
    caption_choice: Literal["random", "first"] = "random"
    """Which of an image's captions a step uses."""
    base_model_precision: BaseModelPrecision = "auto"
    """The frozen transformer. ``int8-quanto``: int8 weights by quanto's ``qint8``. ``int8-dynamic``: the same weights,
    multiplied on int8 tensor cores. ``no_change``: bf16. ``auto``: int8-dynamic where the GPU and the recipe can use
    it, otherwise int8-quanto; a run keeps what it began with."""
    mixed_precision: Literal["bf16", "fp32"] = "bf16"
    """Number format of activations and of weights that are not quantised. fp32 is for CPUs and tests."""
    flow_schedule_shift: float = 1.0
    """The s in ``sigma -> s*sigma / (1 + (s-1)*sigma)``: above 1 trains more on noisy inputs. The official trainer uses
    3."""
    seed: int = 42
    """Order, noise, sigma and dropout are functions of the seed and the step."""
    checkpoint_every: int = 250
    """Optimizer steps between saved LoRAs, each with the state that `k5train resume` needs. 0: only the last one."""
    checkpoints_total_limit: int | None = None
    """How many of these LoRAs are kept: the newest ones, and the best in addition. None: all. Those that somebody asked
    for with "save now" stay. The last two states to resume from are kept."""
    loss_limit: float = 20.0
    """A pass whose mean loss is above this stops the run before the update; a model that predicts 0 has a loss of about
    2. 0: no limit."""
    device: Literal["auto", "cuda", "cpu"] = "auto"
    """auto: the GPU if there is one. To choose among several, put CUDA_VISIBLE_DEVICES=1 before the command."""
    deterministic: bool = False
    """On a GPU, use only kernels that give the same bits every time, so that a resumed run ends with the same bits as
    an uninterrupted one; this may be slower. A CPU always gives the same bits."""
    data: tuple[DataConfig, ...] = ()
    """``[[train.data]]`` entries instead of CACHE arguments, with ``cache``, ``weight`` (share of the rows),
    ``repeats``, ``repeats_by_folder`` and ``is_regularisation_data`` (weighted by ``objective.prior_loss_weight``)."""
    lora: LoraConfig = field(default_factory=LoraConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    tread: TreadConfig = field(default_factory=TreadConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    memory: MemoryConfig = field(default_factory=MemoryConfig)
    validation: ValidationConfig = field(default_factory=ValidationConfig)
    trackers: TrackersConfig = field(default_factory=TrackersConfig)

    def check(self) -> list[str]:
        """What is out of range, or cannot be combined."""
        return [*self._out_of_range(), *self._conflicts()]

    def _out_of_range(self) -> list[str]:
        counts = ("steps", "batch_size", "gradient_accumulation_steps", "repeats", "epochs", "checkpoints_total_limit")
        problems = [
            f"{name} must be at least 1, found {value}"
            for name, value in ((name, getattr(self, name)) for name in counts)
            if value is not None and value < 1
        ]
        problems += [
            f"{name} must be 0 to 1, found {value}"
            for name, value in (
                (n, getattr(self, n)) for n in ("caption_dropout_probability", "source_dropout_probability")
            )
            if not 0 <= value <= 1
        ]
        if not 0 < self.flow_schedule_shift < inf:
            problems.append(f"flow_schedule_shift must be above 0, found {self.flow_schedule_shift}")
        if self.checkpoint_every < 0:
            problems.append(f"checkpoint_every must be 0 or more, found {self.checkpoint_every}")
        if not self.loss_limit >= 0:  # NaN too
            problems.append(f"loss_limit must be 0 or more, found {self.loss_limit}")
        if self.max_hours is not None and not self.max_hours > 0:
            problems.append(f"max_hours must be above 0, found {self.max_hours}")
        return problems

    def _conflicts(self) -> list[str]:
        problems = []
        if self.flow_schedule_shift != 1 and self.objective.flow_schedule_auto_shift:
            problems.append("flow_schedule_shift must be 1 if objective.flow_schedule_auto_shift is set")
        if len({entry.weight is None for entry in self.data}) > 1:
            problems.append("data has entries with a weight and entries without: give all a weight, or none")
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

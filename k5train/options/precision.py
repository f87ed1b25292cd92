"""What can ``base_model_precision = "auto"`` become, for a recipe? ``forward/precision.py`` asks the GPU.

A run decides it once, before its recipe is written, and keeps it.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

from k5train.options.train import BaseModelPrecision, TrainConfig

Precision = Literal["int8-quanto", "int8-dynamic", "no_change"]


def is_open(config: TrainConfig) -> bool:
    """Whether the precision is still to be decided."""
    return config.base_model_precision == "auto"


def with_precision(config: TrainConfig, precision: BaseModelPrecision) -> TrainConfig:
    """The recipe with this precision, if its own is still to be decided."""
    return replace(config, base_model_precision=precision) if is_open(config) else config


def precision_of(config: TrainConfig) -> Precision:
    """The precision. One that nobody decided is ``int8-quanto``, which works everywhere."""
    return "int8-quanto" if config.base_model_precision == "auto" else config.base_model_precision


def can_be_dynamic(config: TrainConfig) -> bool:
    """Whether ``int8-dynamic`` can train the recipe on a GPU that has int8 tensor cores, in bfloat16."""
    runs_lean = config.memory.execution != "diffusers" and config.lora.algo in ("lora", "rslora")
    return runs_lean and config.mixed_precision == "bf16" and config.device != "cpu"

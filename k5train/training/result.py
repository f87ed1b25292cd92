"""What does a finished run leave behind?"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from k5cache.shared.template import PIPELINES


@dataclass(frozen=True)
class Result:
    """What a finished run leaves behind."""

    lora: Path
    loads_by: str
    """How diffusers loads it. The saved file was loaded that way and compared."""
    grid: Path | None
    steps: int
    first_loss: float
    last_loss: float
    """Mean over the first and over the last tenth of the steps, because the loss of one step jumps with its sigma."""
    seconds: float
    ended_by: str
    """``steps``, ``max_hours`` or ``patience``."""
    best_step: int | None
    best_loss: float | None
    """The lowest held-out loss and its step. The LoRA of that step is ``<name>-best.safetensors``."""
    seconds_to_start: float
    """From the call of ``train`` until everything was ready for the first step."""
    pipeline: str = PIPELINES["t2i"]
    """The class of diffusers that ``loads_by`` calls ``pipe``."""
    base_held_out_loss: float | None = None
    """Before the first step: of the base model, or of the LoRA in ``train.lora.init_lora``."""
    held_out_loss: float | None = None
    """After the last step. None where there is no split, or if it is not finite."""
    ema_held_out_loss: float | None = None
    """Of ``<name>-ema.safetensors``, after the last step."""
    base_probe_loss: float | None = None
    """As ``base_held_out_loss``, on images that are trained on."""
    probe_loss: float | None = None

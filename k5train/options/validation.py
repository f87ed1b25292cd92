"""``[train.validation]`` and ``[train.trackers]``: the options of pictures, held-out loss and trackers."""

from __future__ import annotations

from dataclasses import dataclass
from math import inf
from typing import Literal


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
    prompt_library: str | None = None
    """A JSON file of further prompts, a list or an object of names to prompts. The run's recipe then holds them all."""
    split: float = 0.0
    """Share of the cache's rows that are held out of training, to measure the loss on. 0: none."""
    held_out_every: int = 100
    """Optimizer steps between measurements of the held-out loss. 0: only before and after."""
    held_out_sigmas: int = 4
    """Noise levels at which each held-out row is measured, one in each equal part of 0 to 1."""
    patience: int = 0
    """End once the held-out loss has not fallen for this many measurements. 0: never."""

    def check(self) -> list[str]:
        """What is out of range."""
        problems = [
            f"{name} must be a multiple of 16 and at least 16, found {side}"
            for name, side in (("width", self.width), ("height", self.height))
            if side is not None and (side < 16 or side % 16)
        ]
        if self.num_inference_steps < 1:
            problems.append(f"num_inference_steps must be at least 1, found {self.num_inference_steps}")
        if not 0 <= self.split <= 0.5:
            problems.append(f"split must be 0 to 0.5, found {self.split}")
        if self.held_out_sigmas < 1:
            problems.append(f"held_out_sigmas must be at least 1, found {self.held_out_sigmas}")
        if self.patience and not self.split:
            problems.append("patience needs rows to measure on: set split, for example split = 0.1")
        if self.patience and not self.held_out_every:
            problems.append("patience counts measurements along the way: held_out_every must be above 0")
        if not 0 <= self.guidance_scale < inf:
            problems.append(f"guidance_scale must be 0 or more, found {self.guidance_scale}")
        problems += [f"{name} must be 0 or more, found {value}" for name, value in
                     (("every", self.every), ("held_out_every", self.held_out_every), ("patience", self.patience))
                     if value < 0]  # fmt: skip
        return problems


@dataclass(frozen=True)
class TrackersConfig:
    """``[train.trackers]``: where a run is also shown. ``metrics.jsonl`` is always written."""

    use: tuple[Literal["tensorboard", "wandb", "trackio"], ...] = ()
    """Each is an extra: pip install "kandinsky5-lora[tensorboard]"."""
    project: str = "kandinsky5-lora"
    """Name under which wandb and trackio group runs."""
    offline: bool = False
    """wandb writes only into the run's folder, for `wandb sync` to send later. TensorBoard and trackio are local."""

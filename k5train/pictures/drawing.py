"""What is one picture to draw: from which prompt, or source and instruction, at which size and with which settings?"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

    from k5cache.store.reader import TextRow


@dataclass(frozen=True)
class SampleSettings:
    """How pictures are drawn. The same settings give the same noise, whatever the adapter."""

    width: int
    height: int
    num_inference_steps: int
    guidance_scale: float
    seed: int


@dataclass(frozen=True)
class Posterior:
    """What the VAE made of a picture, as the cache holds it."""

    mean: Tensor
    """``[H/8, W/8, 16]`` float16, unscaled."""
    std: Tensor | None
    """None: the cache holds only the mean."""
    scaling_factor: float

    @property
    def latents(self) -> Tensor:
        """``[1, 1, H/8, W/8, 16]`` float32, scaled: the mean, which decodes to the picture."""
        return self.mean.float()[None, None] * self.scaling_factor


@dataclass(frozen=True)
class Drawing:
    """One picture to draw."""

    label: str
    """What heads its column of a sheet."""
    prompt: TextRow
    negative: TextRow | None
    """What guidance leads away from. None: there is no guidance."""
    settings: SampleSettings
    source: Posterior | None = None
    """The picture that is edited."""
    target: Posterior | None = None
    """What the edit should become, if the cache knows it."""
    name: str = ""
    """What it is called, if anything."""

    @property
    def head(self) -> str:
        """What stands above its column: its name, if it has one, in a line of its own."""
        return f"{self.name}\n{self.label}" if self.name else self.label

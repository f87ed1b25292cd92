"""What does a transformer that edits images see of the source? Its latents, and a channel that says they are there."""

from __future__ import annotations

import torch
from torch import Tensor


def condition_of(source: Tensor) -> Tensor:
    """``[..., 17]``: a source's latents and a channel of ones, as ``Kandinsky5I2IPipeline.prepare_latents`` makes them.

    Args:
        source: ``[..., 16]``, scaled.
    """
    return torch.cat([source, torch.ones_like(source[..., :1])], dim=-1)


def no_source(source: Tensor) -> Tensor:
    """``[..., 17]`` zeros in the place of ``condition_of(source)``: the models' own sign that there is no picture."""
    return torch.zeros_like(condition_of(source))

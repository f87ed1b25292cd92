"""Flow matching: what is noised, by how much, and what the transformer should answer. Pure, in float32.

The rules are the official trainer's: ``x = (1 - sigma) * latents + sigma * noise`` and ``velocity = noise - latents``,
with ``sigma = sigmoid(N(0, 1))`` and then the shift.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def sample_posterior(mean: Tensor, std: Tensor | None, noise: Tensor, scaling_factor: float) -> Tensor:
    """One draw of the VAE's posterior, in the units that the transformer sees.

    Args:
        mean: any shape, unscaled, as the cache holds it (float16).
        std: like ``mean``. None: the cache holds only the mean, and the mean is the draw.
        noise: like ``mean``, N(0, 1).
        scaling_factor: the VAE config's. Kandinsky 5 does not use ``shift_factor``.

    Returns:
        latents, float32, like ``mean``.
    """
    moment = mean.float() if std is None else mean.float() + std.float() * noise.float()
    return moment * scaling_factor


def sample_sigmas(n: int, generator: torch.Generator, shift: float = 1.0) -> Tensor:
    """``[n]`` noise levels in (0, 1), float32, on the generator's device."""
    return shift_sigmas(torch.sigmoid(torch.randn(n, generator=generator, device=generator.device)), shift)


def shift_sigmas(sigma: Tensor, shift: float) -> Tensor:
    """``s * sigma / (1 + (s - 1) * sigma)``; 0 and 1 stay, above 1 moves the rest towards noise."""
    return shift * sigma / (1 + (shift - 1) * sigma)


def add_noise(latents: Tensor, noise: Tensor, sigma: Tensor) -> Tensor:
    """The transformer's input at ``sigma``.

    Args:
        latents: ``[B, ...]``.
        noise: like ``latents``, N(0, 1).
        sigma: ``[B]``; 0 gives the latents, 1 the noise.

    Returns:
        float32, like ``latents``.
    """
    sigma = sigma.float().view(-1, *(1,) * (latents.ndim - 1))
    return (1 - sigma) * latents.float() + sigma * noise.float()


def velocity_target(latents: Tensor, noise: Tensor) -> Tensor:
    """The velocity that leads from data to noise, float32: what the transformer should predict at every sigma."""
    return noise.float() - latents.float()


def flow_loss(predicted: Tensor, velocity: Tensor) -> Tensor:
    """Mean squared error over everything, a float32 scalar."""
    return F.mse_loss(predicted.float(), velocity.float())

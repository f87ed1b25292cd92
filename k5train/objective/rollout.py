"""Scheduled sampling (rollout): training on noisy inputs that the model has made itself.

In training the input at sigma is ``x = (1 - sigma) * latents + sigma * noise``, exactly on the line from data to noise.
In sampling it is where the model's own Euler steps have led, with their errors, and the model was never shown how to
answer there. A rolled row starts on the line at a higher sigma and takes 1 to k steps on the inference grid without
gradient::

    x = (1 - s_0) * latents + s_0 * noise,     s_0 > s_1 > ... > s_m = sigma
    x = x + (s_{i+1} - s_i) * v(x, s_i)        for i = 0 ... m - 1

It ends at ``x_hat``, beside the line. The velocity that leads from there to the data in the time that is left is
constant, ``x_hat - sigma * velocity = latents``, hence the target::

    velocity = (x_hat - latents) / sigma

A model whose v is ``noise - latents`` stays on the line, and the target is ``noise - latents`` as ever. A model that is
off by a constant c ends at ``x - (s_0 - sigma) * c``; its target is ``noise - latents - c * (s_0 - sigma) / sigma``:
the error is answered, amplified by 1 / sigma, which is why low sigmas are left out (``min_sigma``).

A path is ``[B, k + 1]`` sigmas from the start to sigma, high to low; two equal neighbours are no step, so rows of one
batch may take different numbers of steps, and a row whose sigmas are all equal is trained as usual.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from k5train.objective import flow
from k5train.options.objective import RolloutConfig

PredictRows = Callable[[Tensor, Tensor, Tensor], Tensor]


"""Noisy latents ``[n, ...]``, sigma ``[n]`` and the row numbers ``[n]`` that they are of -> velocity."""


@dataclass
class Cost:
    """What rollouts took since ``take`` was last called."""

    passes: int = 0
    """Rows passed through the transformer without gradient."""
    seconds: float = 0.0

    def take(self) -> dict[str, float]:
        """For ``metrics.jsonl``; empty where nothing was rolled."""
        passes, seconds, self.passes, self.seconds = self.passes, self.seconds, 0, 0.0
        return {"rollout_passes": passes, "rollout_seconds": seconds} if passes else {}


def draw_path(
    sigma: float, grid: Tensor, config: RolloutConfig, step: int, generator: torch.Generator
) -> Tensor:  # fmt: skip
    """One row's path at update ``step`` (0 is the first).

    Args:
        sigma: as drawn for the row; a rolled row is moved to the nearest point of the grid, which is where it ends.
        grid: the inference sigmas, from 1 down to 0.

    Returns:
        ``[max_steps + 1]`` float32.
    """
    whether, how_many = torch.rand(2, generator=generator).tolist()
    ramp = min(1.0, (step + 1) / config.ramp_steps) if config.ramp_steps else 1.0
    if whether >= config.probability * ramp or sigma < config.min_sigma:
        return torch.full((config.max_steps + 1,), sigma)
    inner = grid[1:-1]  # at the first point nothing leads there, at the last nothing is left to learn
    end = 1 + int((inner - sigma).abs().argmin())
    start = max(0, end - 1 - int(how_many * config.max_steps))
    path = grid[start : end + 1].float()
    return torch.cat([path[:1].expand(config.max_steps + 1 - len(path)), path])


@torch.no_grad()
def roll(predict: PredictRows, latents: Tensor, noise: Tensor, path: Tensor, cost: Cost) -> tuple[Tensor, Tensor]:
    """The inputs at the end of their paths and the velocities that lead from there to the data.

    Returns:
        noisy latents and velocity, float32, both like ``latents``. Rows without a step have what they always have.
    """
    began = time.monotonic()
    noisy = flow.add_noise(latents, noise, path[:, 0])
    for here, there in zip(path.T[:-1], path.T[1:], strict=True):
        rows = torch.nonzero(here != there).flatten()
        if len(rows):
            velocity = predict(noisy[rows], here[rows], rows).float()
            noisy[rows] += _like(there[rows] - here[rows], velocity) * velocity
            cost.passes += len(rows)
    rolled = _like(path[:, 0] != path[:, -1], noisy)
    to_data = (noisy - latents.float()) / _like(path[:, -1], noisy)
    if latents.is_cuda:
        torch.cuda.synchronize(latents.device)  # the seconds are the steps', not only their launches'
    cost.seconds += time.monotonic() - began
    return noisy, torch.where(rolled, to_data, flow.velocity_target(latents, noise))


def _like(values: Tensor, rows: Tensor) -> Tensor:
    return values.view(-1, *(1,) * (rows.ndim - 1))

"""How is the model trained on noisy inputs that it computed itself? By scheduled sampling, called rollout here.

In training, the input at sigma is ``x = (1 - sigma) * latents + sigma * noise``, exactly on the line from data to
noise. In sampling, it is the result of the model's own Euler steps, with their errors, and the model was never trained
on such inputs. A row with a rollout starts on the line at a higher sigma and takes 1 to k steps on the inference grid,
without gradient::

    x = (1 - s_0) * latents + s_0 * noise,     s_0 > s_1 > ... > s_m = sigma
    x = x + (s_{i+1} - s_i) * v(x, s_i)        for i = 0 ... m - 1

It ends at ``x_hat``, beside the line. A constant velocity leads from there to the data in the remaining time,
``x_hat - sigma * velocity = latents``, hence the target::

    velocity = (x_hat - latents) / sigma

A model that predicts ``noise - latents`` stays on the line, and its target is ``noise - latents`` as usual. A model
that is off by a constant c ends at ``x - (s_0 - sigma) * c``, and its target is
``noise - latents - c * (s_0 - sigma) / sigma``. The target corrects the error, amplified by 1 / sigma, which is why low
sigmas are left out (``min_sigma``).

A path is ``[B, k + 1]`` sigmas from the start down to sigma. Two equal neighbours mean no step, so the rows of a batch
may take different numbers of steps, and a row whose sigmas are all equal is trained as usual.
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
"""Noisy latents ``[n, ...]``, their sigma ``[n]`` and row numbers ``[n]`` -> velocity."""


@dataclass
class Cost:
    """What rollouts have cost since ``take`` was last called."""

    passes: int = 0
    """Rows passed through the transformer without gradient."""
    seconds: float = 0.0

    def take(self) -> dict[str, float]:
        """Return the entries for ``metrics.jsonl``, none if there was no rollout, and start again from 0."""
        passes, seconds, self.passes, self.seconds = self.passes, self.seconds, 0, 0.0
        return {"rollout_passes": passes, "rollout_seconds": seconds} if passes else {}


def draw_path(
    sigma: float, grid: Tensor, config: RolloutConfig, step: int, generator: torch.Generator,
    bounds: tuple[float, float] = (0, 1),
) -> Tensor:  # fmt: skip
    """One row's path at update ``step`` (0 is the first).

    Args:
        sigma: as drawn for the row. A row with a rollout ends at the nearest point of the grid instead.
        grid: the inference sigmas, from 1 down to 0.
        bounds: the lowest and the highest sigma at which a path may end.

    Returns:
        ``[max_steps + 1]`` float32.
    """
    chance, share = torch.rand(2, generator=generator).tolist()
    ramp = min(1.0, (step + 1) / config.ramp_steps) if config.ramp_steps else 1.0
    if chance >= config.probability * ramp or sigma < config.min_sigma:
        return torch.full((config.max_steps + 1,), sigma)
    distance = torch.where(ends_in(grid, bounds), (grid - sigma).abs(), torch.inf)
    end = int(distance.argmin())
    start = max(0, end - 1 - int(share * config.max_steps))
    path = grid[start : end + 1].float()
    return torch.cat([path[:1].expand(config.max_steps + 1 - len(path)), path])


def ends_in(grid: Tensor, bounds: tuple[float, float]) -> Tensor:
    """Which points of the grid a path may end at: bool, like ``grid``.

    No step leads to the first point, and at the last there is nothing to learn.
    """
    allowed = (grid >= bounds[0]) & (grid <= bounds[1])
    allowed[[0, -1]] = False
    return allowed


@torch.no_grad()
def roll(predict: PredictRows, latents: Tensor, noise: Tensor, path: Tensor, cost: Cost) -> tuple[Tensor, Tensor]:
    """The inputs at the end of their paths and the velocities that lead from there to the data.

    Returns:
        noisy latents and velocity, float32, both like ``latents``. Rows without a step have the usual ones.
    """
    began = time.monotonic()
    noisy = flow.add_noise(latents, noise, path[:, 0])
    for here, there in zip(path.T[:-1], path.T[1:], strict=True):
        rows = torch.nonzero(here != there).flatten()
        if len(rows):
            velocity = predict(noisy[rows], here[rows], rows).float()
            noisy[rows] += _broadcast(there[rows] - here[rows], velocity) * velocity
            cost.passes += len(rows)
    rolled = _broadcast(path[:, 0] != path[:, -1], noisy)
    to_data = (noisy - latents.float()) / _broadcast(path[:, -1], noisy)
    if latents.is_cuda:
        torch.cuda.synchronize(latents.device)  # so that the seconds include the computation, not only the launches
    cost.seconds += time.monotonic() - began
    return noisy, torch.where(rolled, to_data, flow.velocity_target(latents, noise))


def _broadcast(values: Tensor, rows: Tensor) -> Tensor:
    """``[B]`` as ``[B, 1, ...]``, with as many dimensions as ``rows``."""
    return values.view(-1, *(1,) * (rows.ndim - 1))

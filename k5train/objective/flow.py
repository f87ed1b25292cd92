"""How noisy is an input, what should the transformer predict from it, and how is its error counted? Pure, float32.

The rules are the official trainer's: ``x = (1 - sigma) * latents + sigma * noise`` and ``velocity = noise - latents``,
with ``sigma = sigmoid(N(0, 1))`` and then the shift.
"""

from __future__ import annotations

import functools
import math

import torch
import torch.nn.functional as F
from torch import Tensor

from k5cache.shared.errors import RecipeError
from k5train.options.objective import ObjectiveConfig


def sample_posterior(mean: Tensor, std: Tensor | None, noise: Tensor, scaling_factor: float) -> Tensor:
    """One draw from the VAE's posterior, in the units that the transformer sees.

    Args:
        mean: any shape, unscaled, as the cache holds it (float16).
        std: like ``mean``. None: the cache holds only the mean, which is then the draw.
        noise: like ``mean``, N(0, 1).
        scaling_factor: the VAE config's. Kandinsky 5 does not use ``shift_factor``.

    Returns:
        latents, float32, like ``mean``.
    """
    moment = mean.float() if std is None else mean.float() + std.float() * noise.float()
    return moment * scaling_factor


def sigma_quantile(u: Tensor, objective: ObjectiveConfig) -> Tensor:
    """The quantile ``u`` of the distribution of sigma, before the shift.

    One uniform number gives one sigma, whatever the distribution; equally spaced numbers give stratified sigmas.

    Args:
        u: any shape, 0 to 1, float64 for exact tails.

    Returns:
        float32 in (0, 1), like ``u``.
    """
    u = u.double().clamp(2.0**-24, 1 - 2.0**-24)
    match objective.sigma_sampling:
        case "sigmoid":
            sigma = torch.sigmoid(objective.sigmoid_scale * torch.special.ndtri(u))
        case "logit_normal":
            sigma = torch.sigmoid(objective.logit_mean + objective.logit_std * torch.special.ndtri(u))
        case "mode":  # diffusers' compute_density_for_timestep_sampling, where sigma falls as u rises
            u = 1 - u
            sigma = 1 - u - objective.mode_scale * (torch.cos(math.pi * u / 2) ** 2 - 1 + u)
        case "beta":
            sigma = _beta_quantile(u, objective.beta_schedule_alpha, objective.beta_schedule_beta)
        case "uniform":
            sigma = u
    return sigma.float()


def _beta_quantile(u: Tensor, a: float, b: float) -> Tensor:
    """Where the distribution function of Beta(a, b) reaches ``u``: looked up in a table of it, good to 5 digits."""
    z, cdf = _beta_table(a, b)
    right = torch.searchsorted(cdf, u.contiguous()).clamp(1, len(cdf) - 1)
    left = right - 1
    share = ((u - cdf[left]) / (cdf[right] - cdf[left])).nan_to_num().clamp(0, 1)
    return torch.sigmoid(torch.lerp(z[left], z[right], share)).clamp(min=torch.finfo(torch.float32).tiny)


@functools.lru_cache(maxsize=4)
def _beta_table(a: float, b: float) -> tuple[Tensor, Tensor]:
    """Points z and the share of Beta(a, b) below sigmoid(z), by adding up the density. Made once, 2 MB.

    In z the density is ``sigmoid(z)^a * sigmoid(-z)^b``, which is smooth and falls off exponentially for all shapes.
    """
    end = 40 / min(a, b, 1.0)  # e^-40 of the density is beyond
    z = torch.linspace(-end, end, 2**17, dtype=torch.float64)
    log_density = a * F.logsigmoid(z) + b * F.logsigmoid(-z)
    cdf = torch.cumulative_trapezoid((log_density - log_density.max()).exp(), z)
    return z[1:], cdf / cdf[-1]


def auto_shift(num_tokens: int) -> float:
    """Flux's shift for a picture of this many tokens (pixels / 256): exp of ``pipelines.flux.calculate_shift``."""
    slope = (1.15 - 0.5) / (4096 - 256)
    return math.exp(0.5 + (num_tokens - 256) * slope)


def shift_sigmas(sigma: Tensor, shift: float) -> Tensor:
    """``s * sigma / (1 + (s - 1) * sigma)``. 0 and 1 stay; a shift above 1 moves all others towards noise."""
    return shift * sigma / (1 + (shift - 1) * sigma)


def draw_sigma(u: Tensor, objective: ObjectiveConfig, shift: float) -> Tensor:
    """A row's sigma: the quantile ``u`` of the shifted distribution, of which only sigma_min to sigma_max is left.

    Args:
        u: any shape, 0 to 1, float64.

    Returns:
        float32, like ``u``.
    """
    lowest, highest = objective.sigma_min, objective.sigma_max
    if (lowest, highest) == (0.0, 1.0):
        return shift_sigmas(sigma_quantile(u, objective), shift)
    first, last = share_of_range(objective, shift)
    return shift_sigmas(sigma_quantile(first + u * (last - first), objective), shift).clamp(lowest, highest)


@functools.lru_cache(maxsize=64)
def share_of_range(objective: ObjectiveConfig, shift: float) -> tuple[float, float]:
    """The shares of all sigmas that are below sigma_min and below sigma_max, after the shift.

    Found by halving, because only quantiles have a formula for every distribution.
    """
    ends = torch.tensor([objective.sigma_min, objective.sigma_max], dtype=torch.float64)
    low, high = torch.zeros(2, dtype=torch.float64), torch.ones(2, dtype=torch.float64)
    for _ in range(53):  # the bits of float64
        middle = (low + high) / 2
        is_below = shift_sigmas(sigma_quantile(middle, objective).double(), shift) < ends
        low, high = torch.where(is_below, middle, low), torch.where(is_below, high, middle)
    first, last = ((low + high) / 2).tolist()
    return (first if objective.sigma_min > 0 else 0.0), (last if objective.sigma_max < 1 else 1.0)


def check_range(objective: ObjectiveConfig, shift: float) -> None:
    """Refuse a range of sigmas in which the distribution has next to none.

    Raises:
        RecipeError: fewer than 1 in 100,000 are in it.
    """
    first, last = share_of_range(objective, shift)
    if last - first < 1e-5:
        raise RecipeError(
            f'With train.objective.sigma_sampling = "{objective.sigma_sampling}" and a shift of {shift:g}, fewer than 1'
            f" in 100,000 sigmas are in sigma_min = {objective.sigma_min:g} to sigma_max = {objective.sigma_max:g}",
            "Widen the range, or use --set train.objective.sigma_sampling=uniform",
        )


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
    """The velocity from data to noise, float32: what the transformer should predict at every sigma."""
    return noise.float() - latents.float()


def loss_weights(sigma: Tensor, objective: ObjectiveConfig) -> Tensor | None:
    """The weight of each row's error at its sigma.

    ``min_snr``: an error e of the velocity is an error ``sigma * e`` of the data, which Min-SNR weights by
    ``min(SNR, gamma)`` with ``SNR = ((1 - sigma) / sigma)^2``. The product is ``min(SNR, gamma) * sigma^2``, which is
    also Min-SNR's own rule for v-prediction.

    Args:
        sigma: ``[B]``, after the shift.

    Returns:
        ``[B]`` float32, or None if all rows have the same weight.
    """
    sigma = sigma.float()
    match objective.weighting:
        case "cosmap":  # diffusers' compute_loss_weighting_for_sd3
            return 2 / (math.pi * (1 - 2 * sigma + 2 * sigma**2))
        case "bell":  # exp(-2 (sigma - 1/2)^2), lowered to 0 at the ends, divided by its mean
            lowest, mean = math.exp(-0.5), math.sqrt(math.pi / 2) * math.erf(math.sqrt(0.5))
            return (torch.exp(-2 * (sigma - 0.5) ** 2) - lowest) / (mean - lowest)
        case "min_snr":
            return torch.minimum((1 - sigma) ** 2, objective.snr_gamma * sigma**2)
    return None


def row_errors(predicted: Tensor, velocity: Tensor) -> Tensor:
    """The mean squared error of each row, ``[B]`` float32, without any weight: what held-out losses are means of."""
    return (predicted.float() - velocity.float()).square().flatten(1).mean(1)


def flow_loss(
    predicted: Tensor,
    velocity: Tensor,
    weight: Tensor | None = None,
    mask: Tensor | None = None,
    huber_c: float | None = None,
) -> Tensor:
    """The mean error of the rows of a forward pass, a float32 scalar.

    Args:
        predicted: ``[B, ...]``.
        velocity: like ``predicted``.
        weight: ``[B]``, the weight of each row. None: 1.
        mask: broadcasts to ``predicted``, 0 to 1. A row's error is the mean over the area that its mask covers, so a
            small subject counts as much as a large one. None: the mean over everything.
        huber_c: the size from which an error counts linearly: ``c * (2 * |e| - c)`` instead of ``e^2``. None: never.
    """
    predicted, velocity = predicted.float(), velocity.float()
    if weight is None and mask is None and huber_c is None:
        return F.mse_loss(predicted, velocity)
    if huber_c is None:
        errors = F.mse_loss(predicted, velocity, reduction="none")
    else:
        errors = 2 * F.huber_loss(predicted, velocity, reduction="none", delta=huber_c)
    if mask is None:
        rows = errors.flatten(1).mean(1)
    else:
        mask = mask.expand_as(errors).flatten(1)
        rows = (errors.flatten(1) * mask).sum(1) / mask.sum(1).clamp(min=torch.finfo(torch.float32).tiny)
    return (rows if weight is None else rows * weight).mean()

"""Is the noise, the target and the loss what flow matching and the official trainer say?"""

from __future__ import annotations

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution

from k5train import flow


def gaussian(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_sigma_0_is_the_latents_and_sigma_1_the_noise():
    latents, noise = torch.tensor([[2.0, -4.0]] * 3), torch.tensor([[10.0, 8.0]] * 3)
    mixed = flow.add_noise(latents, noise, torch.tensor([0.0, 0.25, 1.0]))
    assert mixed.tolist() == [[2.0, -4.0], [4.0, -1.0], [10.0, 8.0]]


def test_noisy_latents_are_those_of_the_pipelines_scheduler():
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    timesteps = scheduler.timesteps[[3, 500, 998]]
    latents, noise = gaussian(3, 1, 4, 6, 16), gaussian(3, 1, 4, 6, 16, seed=1)
    theirs = scheduler.scale_noise(latents, timesteps, noise)
    assert torch.equal(flow.add_noise(latents, noise, scheduler.sigmas[[3, 500, 998]]), theirs)


def test_everything_is_float32_whatever_the_cache_holds():
    half = gaussian(2, 1, 2, 2, 16).half()
    assert flow.add_noise(half, half, torch.tensor([0.5, 0.5])).dtype == torch.float32
    assert flow.velocity_target(half, half).dtype == torch.float32
    assert flow.flow_loss(half.bfloat16(), half).dtype == torch.float32
    assert flow.sample_posterior(half, half, half, 0.3611).dtype == torch.float32


def test_the_velocity_leads_from_any_noisy_point_back_to_the_data():
    latents, noise = gaussian(2, 1, 2, 2, 16), gaussian(2, 1, 2, 2, 16, seed=1)
    sigma = torch.tensor([0.3, 0.9])
    back = flow.add_noise(latents, noise, sigma) - sigma.view(2, 1, 1, 1, 1) * flow.velocity_target(latents, noise)
    torch.testing.assert_close(back, latents, rtol=0, atol=1e-6)  # float32: two roundings of values near 3
    assert (
        flow.velocity_target(torch.tensor([1.0]), torch.tensor([3.0])).item() == 2.0
    )  # noise - latents, not the other


def test_the_loss_is_the_mean_of_squares_in_float32():
    predicted, velocity = torch.tensor([1.0, 300.0], dtype=torch.bfloat16), torch.tensor([0.0, 299.0])
    assert flow.flow_loss(predicted, velocity).item() == 1.0  # in bfloat16 299 would be 300 and the loss 0.5


@pytest.mark.parametrize(
    ("sigma", "shift", "shifted"),
    [(0.5, 1.0, 0.5), (0.5, 3.0, 0.75), (0.0, 3.0, 0.0), (1.0, 3.0, 1.0), (0.2, 0.5, 1 / 9)],
)
def test_the_shift_moves_sigma_as_the_scheduler_does(sigma, shift, shifted):
    assert flow.shift_sigmas(torch.tensor([sigma]), shift).item() == pytest.approx(shifted, abs=1e-7)


def test_the_shift_is_the_schedulers_own():
    plain, shifted = FlowMatchEulerDiscreteScheduler(shift=1.0), FlowMatchEulerDiscreteScheduler(shift=3.0)
    # atol 1e-6: the scheduler computes in float64 before it rounds
    torch.testing.assert_close(flow.shift_sigmas(plain.sigmas, 3.0), shifted.sigmas, rtol=0, atol=1e-6)


def test_sigmas_are_the_sigmoid_of_a_gaussian_and_follow_their_generator():
    sigmas = flow.sample_sigmas(20_000, torch.Generator().manual_seed(7))
    logits = torch.logit(sigmas.double())
    assert sigmas.dtype == torch.float32
    assert abs(logits.mean().item()) < 0.03  # 4 standard errors of 20,000 draws
    assert abs(logits.std().item() - 1) < 0.02
    assert torch.equal(sigmas, flow.sample_sigmas(20_000, torch.Generator().manual_seed(7)))
    assert torch.equal(sigmas, torch.sigmoid(gaussian(20_000, seed=7)))
    assert torch.equal(
        flow.sample_sigmas(5, torch.Generator().manual_seed(7), 3.0),
        flow.shift_sigmas(torch.sigmoid(gaussian(5, seed=7)), 3.0),
    )


def test_a_posterior_sample_is_diffusers_own_times_the_scaling_factor_without_a_shift():
    moments = gaussian(1, 32, 4, 6)
    posterior = DiagonalGaussianDistribution(moments)
    noise = torch.randn(posterior.mean.shape, generator=torch.Generator().manual_seed(3))
    theirs = posterior.sample(torch.Generator().manual_seed(3)) * 0.3611
    assert torch.equal(flow.sample_posterior(posterior.mean, posterior.std, noise, 0.3611), theirs)
    assert torch.equal(flow.sample_posterior(posterior.mean, None, noise, 0.3611), posterior.mode() * 0.3611)

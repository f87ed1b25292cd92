"""Are the noise, the target and the loss those of flow matching and of the official trainer?"""

from __future__ import annotations

import math

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from diffusers.pipelines.flux.pipeline_flux import calculate_shift
from diffusers.training_utils import compute_density_for_timestep_sampling, compute_loss_weighting_for_sd3

from k5cache.shared.errors import RecipeError
from k5train.objective import flow
from k5train.options.objective import ObjectiveConfig


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


def sigmas(n: int, **options) -> torch.Tensor:
    """Sigmas at equally spaced quantiles, which show the distribution without random draws."""
    u = (torch.arange(n, dtype=torch.float64) + 0.5) / n
    return flow.sigma_quantile(u, ObjectiveConfig(**options))


def test_sigmas_are_the_sigmoid_of_a_gaussian():
    values = sigmas(10_001)
    assert values.dtype == torch.float32
    assert values[5000].item() == 0.5
    logits = torch.logit(values.double())
    assert abs(logits.mean().item()) < 1e-6
    assert abs(logits.std().item() - 1) < 2e-3  # the tails beyond 1 in 20,000 are missing
    assert sigmas(5, sigmoid_scale=2.0).tolist() == pytest.approx(torch.sigmoid(2 * torch.logit(sigmas(5))).tolist())
    assert ((values > 0) & (values < 1)).all()


@pytest.mark.parametrize(
    ("options", "theirs"),
    [
        ({"sigma_sampling": "uniform"}, {"weighting_scheme": "none"}),
        (
            {"sigma_sampling": "logit_normal", "logit_mean": -0.5, "logit_std": 1.5},
            {"weighting_scheme": "logit_normal", "logit_mean": -0.5, "logit_std": 1.5},
        ),
        ({"sigma_sampling": "mode", "mode_scale": 1.29}, {"weighting_scheme": "mode", "mode_scale": 1.29}),
        ({"sigma_sampling": "mode", "mode_scale": -0.8}, {"weighting_scheme": "mode", "mode_scale": -0.8}),
    ],
)
def test_each_distribution_is_diffusers_own(options, theirs):
    drawn = compute_density_for_timestep_sampling(
        batch_size=40_000, generator=torch.Generator().manual_seed(1), **{"logit_mean": 0, "logit_std": 1, **theirs}
    )
    shares = torch.tensor([0.01, 0.1, 0.25, 0.5, 0.75, 0.9, 0.99])
    ours = flow.sigma_quantile(shares, ObjectiveConfig(**options))
    torch.testing.assert_close(ours, torch.quantile(drawn, shares), rtol=0, atol=0.012)  # 4 standard errors of 40,000


@pytest.mark.parametrize(
    ("a", "b", "quantile"),
    [
        (1.0, 1.0, lambda u: u),
        (3.0, 1.0, lambda u: u ** (1 / 3)),
        (1.0, 4.0, lambda u: 1 - (1 - u) ** 0.25),
        (0.5, 0.5, lambda u: torch.sin(math.pi * u / 2) ** 2),
        (2.0, 2.0, lambda u: 0.5 - torch.sin(torch.asin(1 - 2 * u) / 3)),
    ],
)
def test_beta_sigmas_have_the_quantiles_of_the_closed_forms(a, b, quantile):
    u = torch.tensor([1e-4, 0.03, 0.25, 0.5, 0.8, 0.999], dtype=torch.float64)
    objective = ObjectiveConfig(sigma_sampling="beta", beta_schedule_alpha=a, beta_schedule_beta=b)
    torch.testing.assert_close(flow.sigma_quantile(u, objective), quantile(u).float(), rtol=2e-6, atol=1e-9)


@pytest.mark.parametrize("sampling", ["sigmoid", "uniform", "logit_normal", "mode", "beta"])
def test_even_the_ends_of_the_unit_interval_give_sigmas_inside_it(sampling):
    values = flow.sigma_quantile(torch.tensor([0.0, 1.0]), ObjectiveConfig(sigma_sampling=sampling))
    assert 0 < values[0] < 0.01
    assert 0.99 < values[1] <= 1


@pytest.mark.parametrize(
    ("options", "shift"),
    [
        ({}, 1.0), ({"sigmoid_scale": 1.7}, 3.0), ({"sigma_sampling": "uniform"}, 1.0),
        ({"sigma_sampling": "logit_normal", "logit_mean": 0.4}, 0.5), ({"sigma_sampling": "mode"}, 2.0),
        ({"sigma_sampling": "beta", "beta_schedule_beta": 0.7}, 3.0),
    ],
)  # fmt: skip
def test_a_range_of_sigma_leaves_the_shifted_distribution_without_what_is_outside(options, shift):
    u = (torch.arange(100_000, dtype=torch.float64) + 0.5) / 100_000
    objective = ObjectiveConfig(**options, sigma_min=0.3, sigma_max=0.85)
    all_of_them = flow.shift_sigmas(flow.sigma_quantile(u, objective), shift)
    inside = all_of_them[(all_of_them >= 0.3) & (all_of_them <= 0.85)].sort().values
    drawn = flow.draw_sigma((torch.arange(len(inside), dtype=torch.float64) + 0.5) / len(inside), objective, shift)
    # Two neighbours among the 100,000 are half as far apart, where the density is lowest.
    torch.testing.assert_close(drawn.sort().values, inside, rtol=0, atol=2e-4)
    assert (drawn.min() >= 0.3).item()
    assert (drawn.max() <= 0.85).item()


def test_a_range_of_uniform_sigmas_is_a_line_and_the_whole_range_changes_no_bit():
    u = torch.tensor([0.0, 0.25, 1.0], dtype=torch.float64)
    objective = ObjectiveConfig(sigma_sampling="uniform", sigma_min=0.2, sigma_max=0.6)
    assert flow.draw_sigma(u, objective, 1.0).tolist() == pytest.approx([0.2, 0.3, 0.6], abs=1e-6)
    upper = flow.draw_sigma(u, ObjectiveConfig(sigma_sampling="uniform", sigma_min=0.5), 1.0)
    assert upper.tolist() == pytest.approx([0.5, 0.625, 1.0], abs=1e-6)
    usual = flow.shift_sigmas(flow.sigma_quantile(u, ObjectiveConfig()), 3.0)
    assert torch.equal(flow.draw_sigma(u, ObjectiveConfig(), 3.0), usual)


def test_a_range_that_a_distribution_does_not_reach_is_refused():
    flow.check_range(ObjectiveConfig(sigma_min=0.95), 1.0)
    with pytest.raises(RecipeError, match="fewer than 1 in 100,000 sigmas are in sigma_min"):
        flow.check_range(ObjectiveConfig(sigma_min=0.995), 1.0)
    flow.check_range(ObjectiveConfig(sigma_min=0.995), 6.0)  # the range is of what the shift gives
    assert ObjectiveConfig(sigma_min=0.5, sigma_max=0.5).check() == [
        "sigma_min and sigma_max must be 0 to 1, the first below the second, found 0.5 and 0.5"
    ]
    for bad in ({"sigma_min": -0.1}, {"sigma_max": 1.1}, {"sigma_min": math.nan}):
        assert len(ObjectiveConfig(**bad).check()) == 1, bad


def test_the_automatic_shift_is_flux_s_own():
    for width, height in ((256, 256), (512, 512), (1024, 1024), (1280, 768)):
        tokens = width * height // 256
        assert flow.auto_shift(tokens) == pytest.approx(math.exp(calculate_shift(tokens)), rel=1e-9)
    assert flow.auto_shift(4096) == pytest.approx(3.158, abs=1e-3)
    assert flow.auto_shift(1024) == pytest.approx(1.878, abs=1e-3)


def test_no_weighting_leaves_every_row_as_it_is():
    assert flow.loss_weights(torch.tensor([0.1, 0.9]), ObjectiveConfig()) is None


def test_cosmap_is_diffusers_own():
    sigma = torch.rand(50, generator=torch.Generator().manual_seed(0))
    theirs = compute_loss_weighting_for_sd3("cosmap", sigma)
    assert torch.equal(flow.loss_weights(sigma, ObjectiveConfig(weighting="cosmap")), theirs)


def test_the_bell_is_0_at_the_ends_highest_in_the_middle_and_1_on_average():
    sigma = torch.linspace(0, 1, 100_001)
    weights = flow.loss_weights(sigma, ObjectiveConfig(weighting="bell"))
    assert weights[[0, -1]].tolist() == pytest.approx([0, 0], abs=1e-6)
    assert sigma[weights.argmax()].item() == pytest.approx(0.5, abs=1e-3)  # flat there
    assert weights.mean().item() == pytest.approx(1, abs=1e-4)


def test_min_snr_weighs_the_velocity_as_it_weighs_v_prediction():
    sigma = torch.tensor([0.1, 0.3, 0.5, 0.9])
    snr = ((1 - sigma) / sigma) ** 2
    expected = torch.minimum(snr, torch.tensor(5.0)) * sigma**2
    torch.testing.assert_close(flow.loss_weights(sigma, ObjectiveConfig(weighting="min_snr")), expected)
    # hand computed: at 0.1 SNR is 81, capped to 5, times 0.01; at 0.5 SNR is 1, times 0.25
    assert flow.loss_weights(sigma, ObjectiveConfig(weighting="min_snr"))[[0, 2]].tolist() == pytest.approx(
        [0.05, 0.25]
    )


def test_a_weighted_loss_is_the_mean_of_weighted_rows():
    predicted, velocity = torch.tensor([[1.0, 3.0], [2.0, 0.0]]), torch.zeros(2, 2)
    assert flow.flow_loss(predicted, velocity, weight=torch.tensor([1.0, 0.5])).item() == (5.0 + 0.5 * 2.0) / 2
    assert torch.equal(flow.flow_loss(predicted, velocity, weight=torch.ones(2)), flow.flow_loss(predicted, velocity))


def test_a_masked_loss_is_the_mean_over_what_each_mask_covers():
    predicted, velocity = torch.tensor([[1.0, 3.0], [2.0, 4.0], [5.0, 5.0]]), torch.zeros(3, 2)
    mask = torch.tensor([[1.0, 0.0], [0.5, 1.0], [0.0, 0.0]])
    rows = [1.0, (0.5 * 4 + 16) / 1.5, 0.0]  # a mask of nothing teaches nothing, and is no NaN
    assert flow.flow_loss(predicted, velocity, mask=mask).item() == pytest.approx(sum(rows) / 3)


def test_huber_is_squared_to_its_limit_and_linear_beyond():
    predicted = torch.tensor([[0.5], [3.0]])
    assert flow.flow_loss(predicted, torch.zeros(2, 1), huber_c=1.0).item() == (0.25 + (2 * 3 - 1)) / 2
    assert torch.equal(  # within the limit it is the squared error
        flow.flow_loss(predicted, torch.zeros(2, 1), huber_c=10.0), flow.flow_loss(predicted, torch.zeros(2, 1))
    )


def test_a_posterior_sample_is_diffusers_own_times_the_scaling_factor_without_a_shift():
    moments = gaussian(1, 32, 4, 6)
    posterior = DiagonalGaussianDistribution(moments)
    noise = torch.randn(posterior.mean.shape, generator=torch.Generator().manual_seed(3))
    theirs = posterior.sample(torch.Generator().manual_seed(3)) * 0.3611
    assert torch.equal(flow.sample_posterior(posterior.mean, posterior.std, noise, 0.3611), theirs)
    assert torch.equal(flow.sample_posterior(posterior.mean, None, noise, 0.3611), posterior.mode() * 0.3611)

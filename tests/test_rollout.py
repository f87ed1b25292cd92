"""Rollout: does a path end where the maths says, and is the target what leads from there to the data?"""

from __future__ import annotations

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from k5train.objective import flow, rollout
from k5train.options.objective import RolloutConfig
from k5train.pictures import sample

GRID = torch.tensor([1.0, 0.8, 0.6, 0.4, 0.2, 0.0])
SHAPE = (3, 1, 2, 2, 4)


def gaussian(seed: int) -> torch.Tensor:
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed))


LATENTS, NOISE = gaussian(0), gaussian(1)
# Row 0 takes two steps to 0.4, row 1 none at 0.7, row 2 one to 0.6.
PATH = torch.tensor([[0.8, 0.6, 0.4], [0.7, 0.7, 0.7], [0.8, 0.8, 0.6]])


def run(velocity):
    cost = rollout.Cost()
    noisy, target = rollout.roll(lambda x, sigma, rows: velocity(x, sigma, rows), LATENTS, NOISE, PATH, cost)
    return noisy, target, cost


def test_a_model_that_knows_the_velocity_stays_on_the_line_and_has_the_usual_target():
    noisy, target, _ = run(lambda x, sigma, rows: (NOISE - LATENTS)[rows])
    torch.testing.assert_close(noisy, flow.add_noise(LATENTS, NOISE, PATH[:, -1]))
    torch.testing.assert_close(target, NOISE - LATENTS, rtol=1e-4, atol=1e-5)


def test_a_model_that_is_off_by_a_constant_ends_beside_the_line_and_is_told_the_way_back():
    c = 0.3
    noisy, target, _ = run(lambda x, sigma, rows: (NOISE - LATENTS)[rows] + c)
    on_the_line = flow.add_noise(LATENTS, NOISE, PATH[:, -1])
    gone = (PATH[:, 0] - PATH[:, -1]).view(-1, 1, 1, 1, 1)
    torch.testing.assert_close(noisy, on_the_line - gone * c)
    sigma = PATH[:, -1].view(-1, 1, 1, 1, 1)
    torch.testing.assert_close(target, NOISE - LATENTS - c * gone / sigma, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(noisy - sigma * target, LATENTS, rtol=1e-4, atol=1e-5)  # one step leads to the data


def test_a_path_follows_the_schedulers_own_euler_steps():
    def velocity(x, sigma, rows):  # depends on where and when it is asked
        return 0.5 * x + sigma.view(-1, 1, 1, 1, 1)

    noisy, _, _ = run(velocity)
    scheduler = FlowMatchEulerDiscreteScheduler(shift=1.0)
    scheduler.set_timesteps(sigmas=GRID[:-1].tolist())
    x = flow.add_noise(LATENTS[:1], NOISE[:1], torch.tensor([0.8]))
    for i in (1, 2):
        v = velocity(x, scheduler.sigmas[i : i + 1], None)
        x = scheduler.step(v, scheduler.timesteps[i], x, return_dict=False)[0]
    torch.testing.assert_close(noisy[:1], x)


def test_rows_without_a_step_are_trained_as_ever_and_cost_nothing():
    asked = []

    def velocity(x, sigma, rows):
        asked.append((rows.tolist(), sigma.tolist()))
        return torch.zeros_like(x)

    noisy, target, cost = run(velocity)
    assert torch.equal(noisy[1], flow.add_noise(LATENTS, NOISE, PATH[:, -1])[1])
    assert torch.equal(target[1], (NOISE - LATENTS)[1])
    assert asked == [([0], [pytest.approx(0.8)]), ([0, 2], [pytest.approx(0.6), pytest.approx(0.8)])]
    assert cost.passes == 3
    taken = cost.take()
    assert taken["rollout_passes"] == 3
    assert taken["rollout_seconds"] > 0
    assert cost.take() == {}


def test_no_gradient_flows_through_the_steps():
    weight = torch.ones(1, requires_grad=True)
    noisy, target, _ = run(lambda x, sigma, rows: weight * x)
    assert not noisy.requires_grad
    assert not target.requires_grad


def paths(count: int, step: int = 10, sigma: float = 0.43, **options) -> list[list[float]]:
    config = RolloutConfig(**{"probability": 1.0, "max_steps": 2, **options})
    generator = torch.Generator().manual_seed(0)
    drawn = [rollout.draw_path(sigma, GRID, config, step, generator) for _ in range(count)]
    return [[round(x, 4) for x in path.tolist()] for path in drawn]


def test_a_path_ends_at_the_nearest_grid_point_after_1_to_k_steps():
    drawn = paths(50)
    assert {tuple(p) for p in drawn} == {(0.6, 0.6, 0.4), (0.8, 0.6, 0.4)}
    assert {tuple(p) for p in paths(20, sigma=0.97)} == {(1.0, 1.0, 0.8)}  # only one step leads to the second point
    assert all(p[-1] == 0.2 for p in paths(20, sigma=0.11))  # never at 0, where nothing is left to learn


def test_a_path_ends_within_the_range_of_sigma():
    config, generator = RolloutConfig(probability=1.0), torch.Generator().manual_seed(0)
    ends = [rollout.draw_path(0.52, GRID, config, 0, generator, bounds)[-1].item() for bounds in ((0, 1), (0.3, 0.55))]
    assert ends == pytest.approx([0.6, 0.4])
    assert rollout.ends_in(GRID, (0.3, 0.65)).tolist() == [False, False, True, True, False, False]


def test_low_sigmas_are_left_alone():
    assert paths(5, sigma=0.05) == [[0.05, 0.05, 0.05]] * 5


def test_the_probability_rises_over_the_ramp():
    def rolled(step: int) -> float:
        return sum(p[0] != p[-1] for p in paths(2000, step, probability=0.5, ramp_steps=10)) / 2000

    assert rolled(0) == pytest.approx(0.05, abs=0.02)  # 4 standard errors
    assert rolled(4) == pytest.approx(0.25, abs=0.04)
    assert rolled(9) == pytest.approx(0.5, abs=0.045)
    assert rolled(500) == pytest.approx(0.5, abs=0.045)


def test_the_grid_is_that_of_the_checkpoints_scheduler(toy_model):
    sigmas = sample.inference_sigmas(toy_model, 10)
    scheduler = FlowMatchEulerDiscreteScheduler.from_pretrained(toy_model, subfolder="scheduler")
    scheduler.set_timesteps(10)
    assert torch.equal(sigmas, scheduler.sigmas)
    assert (sigmas[0].item(), sigmas[-1].item(), len(sigmas)) == (1.0, 0.0, 11)

"""Does each optimizer, schedule and average do what its library or its formula says?"""

from __future__ import annotations

import importlib
import math
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from torch.utils._python_dispatch import TorchDispatchMode

from k5cache.shared.errors import RunError
from k5train.options.optimizer import OptimConfig
from k5train.training.average import Ema
from k5train.training.optimizer import EXTRAS, learning_rate, make_optimizer, set_rate, settled
from k5train.training.optimizer_state import optimizer_state, restore_optimizer
from k5train.training.session import Session

EVERY = ["adamw", "adamw8bit", "adafactor", "prodigy", "lion", "schedulefree", "muon"]


def make(name: str, **options):
    """An optimizer over two matrices, large enough for 8-bit states."""
    if name in EXTRAS:
        pytest.importorskip(EXTRAS[name])
    generator = torch.Generator().manual_seed(0)
    weights = [torch.nn.Parameter(torch.randn(64, 80, generator=generator)) for _ in range(2)]
    config = OptimConfig(optimizer=name, **{"lr": 1.0 if name == "prodigy" else 1e-2, **options})
    return weights, make_optimizer(weights, config)


def descend(weights, optimizer, first: int, last: int) -> None:
    """Steps towards zero, whose gradients depend on the step."""
    for step in range(first, last):
        for i, weight in enumerate(weights):
            weight.grad = weight.detach() + 0.1 * torch.sin(torch.arange(weight.numel()) + step + i).view_as(weight)
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("name", EVERY)
def test_each_optimizer_moves_towards_the_minimum(name):
    weights, optimizer = make(name)
    before = sum(w.square().sum() for w in weights)
    descend(weights, optimizer, 0, 100 if name == "prodigy" else 20)  # Prodigy starts at a rate of 1e-6
    with settled(optimizer):
        assert sum(w.square().sum() for w in weights) < 0.99 * before


@pytest.mark.parametrize("name", EVERY)
def test_each_optimizer_goes_on_from_safetensors_and_json_bit_for_bit(name):
    through, optimizer = make(name)
    descend(through, optimizer, 0, 8)

    first, optimizer = make(name)
    descend(first, optimizer, 0, 4)
    tensors, plain = optimizer_state(optimizer, ["a", "b"])
    again, optimizer = make(name)
    for weight, saved in zip(again, first, strict=True):
        weight.data = saved.detach().clone()
    restore_optimizer(optimizer, ["a", "b"], tensors, plain)
    descend(again, optimizer, 4, 8)
    assert all(torch.equal(a, b) for a, b in zip(again, through, strict=True))


class _Copies(TorchDispatchMode):
    """Notes what makes new tensors as large as the weights, and in which memory it was asked to."""

    def __init__(self) -> None:
        super().__init__()
        self.made: list[tuple[str, object]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor) and not func.is_view and not func._schema.is_mutable and out.numel() >= 5120:
            self.made.append((func._schema.name, str((kwargs or {}).get("device"))))
        return out


@pytest.mark.parametrize("name", EVERY)
def test_a_state_is_saved_without_a_copy_on_the_gpu_where_a_captured_step_holds_the_rest(name):
    weights, optimizer = make(name)
    descend(weights, optimizer, 0, 2)
    base: Any = SimpleNamespace(device=torch.device("cpu"))
    session = Session(base, dict(zip("ab", weights, strict=True)), optimizer, None, None)
    with _Copies() as copies:
        session.parts()
        with session.settled():
            pass
    assert set(copies.made) <= {("aten::_to_copy", "cpu")}
    assert copies.made or name == "adafactor"  # whose averages are rows and columns


def test_a_rate_on_the_device_is_saved_as_a_number_and_kept_there_by_what_an_earlier_version_saved():
    def with_rate(rate):
        weights = [torch.nn.Parameter(torch.ones(4, 5)) for _ in range(2)]
        return weights, torch.optim.AdamW(weights, lr=rate, foreach=False)

    weights, older = with_rate(1e-2)
    descend(weights, older, 0, 3)
    tensors, plain = optimizer_state(older, ["a", "b"])
    _, ours = with_rate(torch.tensor(0.5))
    ours.param_groups[0]["capturable"] = True  # as it is made on a GPU
    restore_optimizer(ours, ["a", "b"], tensors, plain)
    (group,) = ours.param_groups
    assert isinstance(group["lr"], torch.Tensor)
    assert (group["lr"].item(), group["capturable"]) == (pytest.approx(1e-2), True)
    set_rate(ours, 0.25)
    assert group["lr"].item() == 0.25
    tensors, plain = optimizer_state(ours, ["a", "b"])
    assert plain["groups"][0]["lr"] == 0.25
    assert "group/0/lr" not in tensors
    restore_optimizer(older, ["a", "b"], tensors, plain)  # and back, as on a CPU
    assert (older.param_groups[0]["lr"], older.param_groups[0]["capturable"]) == (0.25, False)
    set_rate(older, 1e-3)
    assert older.param_groups[0]["lr"] == 1e-3


@pytest.mark.parametrize(
    ("name", "theirs"),
    [
        ("adamw", lambda p: torch.optim.AdamW(p, lr=1e-2, betas=(0.8, 0.9), eps=1e-6, weight_decay=0.1)),
        ("adafactor", lambda p: torch.optim.Adafactor(p, lr=1e-2, weight_decay=0.1, eps=(None, 1.0))),
        (
            "muon",
            lambda p: torch.optim.Muon(p, lr=1e-2, weight_decay=0.1, momentum=0.8, adjust_lr_fn="match_rms_adamw"),
        ),
        (
            "lion",
            lambda p: importlib.import_module("lion_pytorch").Lion(p, lr=1e-2, betas=(0.8, 0.9), weight_decay=0.1),
        ),
    ],
)
def test_the_recipes_numbers_reach_the_library(name, theirs):
    ours, optimizer = make(name, betas=(0.8, 0.9), eps=1e-6, weight_decay=0.1)
    reference, _ = make(name)
    descend(ours, optimizer, 0, 3)
    descend(reference, theirs(reference), 0, 3)
    assert all(torch.equal(a, b) for a, b in zip(ours, reference, strict=True))


@pytest.mark.parametrize("name", sorted(set(EVERY) - {"prodigy"}))
def test_a_matrix_that_starts_at_0_moves_by_the_learning_rate(name):
    (weight, _), optimizer = make(name, lr=1e-4)
    with torch.no_grad():
        weight.zero_()
    weight.grad = torch.randn(weight.shape, generator=torch.Generator().manual_seed(1))
    optimizer.step()
    size = weight.detach().square().mean().sqrt().item()
    assert 0.1e-4 < size < 2e-4  # Muon's match_rms_adamw: 0.2 of it


def test_eight_bits_hold_the_states_of_adamw8bit():
    weights, optimizer = make("adamw8bit")
    descend(weights, optimizer, 0, 1)
    assert optimizer.state[weights[0]]["state1"].dtype == torch.uint8


def test_a_missing_extra_is_named_with_the_command_that_installs_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "prodigyopt", None)
    with pytest.raises(RunError) as caught:
        make_optimizer([torch.nn.Parameter(torch.ones(2, 2))], OptimConfig(optimizer="prodigy", lr=1.0))
    assert "prodigyopt is not installed" in caught.value.problem
    assert 'pip install "kandinsky5-lora[prodigy]"' in caught.value.fix


def test_muon_refuses_an_adapter_with_vectors():
    with pytest.raises(RunError, match="matrices only"):
        make_optimizer([torch.nn.Parameter(torch.ones(3))], OptimConfig(optimizer="muon", lr=1e-3))


def test_schedulefree_saves_its_average_and_trains_on():
    weights, optimizer = make("schedulefree")
    descend(weights, optimizer, 0, 5)
    trained = weights[0].detach().clone()
    with settled(optimizer):
        assert not torch.equal(weights[0], trained)
    torch.testing.assert_close(weights[0], trained)  # the switch is arithmetic on the weights themselves
    assert OptimConfig(optimizer="schedulefree", lr_scheduler="cosine").check()


@pytest.mark.parametrize("warmup", [0, 5])
@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        ({"lr_scheduler": "constant"}, "constant_with_warmup"),
        ({"lr_scheduler": "linear"}, "linear"),
        ({"lr_scheduler": "cosine"}, "cosine"),
        ({"lr_scheduler": "cosine_with_restarts", "lr_num_cycles": 3}, "cosine_with_restarts"),
        ({"lr_scheduler": "polynomial", "lr_power": 1.0}, "polynomial"),
    ],
)
def test_after_warm_up_a_schedule_is_diffusers_own(ours, theirs, warmup):
    config = OptimConfig(lr=2e-3, warmup_steps=warmup, **ours)
    reference = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=2e-3)
    scheduler = get_scheduler(theirs, reference, num_warmup_steps=warmup, num_training_steps=30, num_cycles=3)
    for step in range(30):
        expected = reference.param_groups[0]["lr"]
        rate = learning_rate(step, config, 30)
        if step < warmup:  # diffusers' first step does not move at all
            assert rate == pytest.approx(2e-3 * (step + 1) / warmup)
        else:
            # its polynomial ends at 1e-7, not at 0
            assert rate == pytest.approx(expected, abs=1.01e-7 if theirs == "polynomial" else 1e-12), step
        reference.step()
        scheduler.step()


def test_rex_polynomial_and_the_end_are_their_formulas():
    def rates(**options):
        config = OptimConfig(lr=1.0, warmup_steps=0, **options)
        return [learning_rate(step, config, 4) for step in range(4)]

    assert rates(lr_scheduler="rex") == pytest.approx([1, 0.75 / 0.875, 0.5 / 0.75, 0.25 / 0.625])
    assert rates(lr_scheduler="polynomial", lr_power=2.0) == pytest.approx([1, 0.5625, 0.25, 0.0625])
    assert rates(lr_scheduler="linear", lr_end=0.2) == pytest.approx([1, 0.8, 0.6, 0.4])
    assert rates(lr_scheduler="cosine", lr_end=0.5)[2] == pytest.approx(0.75)


def test_warm_up_longer_than_the_run_still_rises():
    config = OptimConfig(lr=1.0, warmup_steps=100, lr_scheduler="cosine")
    assert [learning_rate(step, config, 10) for step in (0, 9)] == [0.01, 0.1]


def test_the_average_is_diffusers_own():
    weights, optimizer = make("adamw")
    ours, theirs = Ema(weights, 0.9), EMAModel(weights, decay=0.9)
    for step in range(40):
        descend(weights, optimizer, step, step + 1)
        ours.update()
        theirs.step(weights)
    for a, b in zip(ours.average, theirs.shadow_params, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)  # lerp, against subtract and multiply
    assert not torch.allclose(ours.average[0], weights[0])


def test_the_average_swaps_in_and_out_and_goes_on_from_its_state():
    weights, optimizer = make("adamw")
    average = Ema(weights, 0.9)
    descend(weights, optimizer, 0, 3)
    average.update()
    descend(weights, optimizer, 3, 5)
    average.update()
    trained = weights[0].detach().clone()
    with average.swapped():
        assert torch.equal(weights[0], average.average[0])
        assert not torch.equal(weights[0], trained)
    assert torch.equal(weights[0], trained)

    again = Ema(weights, 0.9)
    again.load_state_dict(average.state_dict())
    for ema in (average, again):
        ema.update()
    assert all(torch.equal(a, b) for a, b in zip(average.average, again.average, strict=True))
    assert math.isclose(again.num_updates, 3)

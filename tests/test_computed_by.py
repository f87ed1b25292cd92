"""Does a deterministic run notice that another GPU, torch or kernel computes it, before it goes on with other bits?"""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

from k5cache.shared.sealed import unseal
from k5train.cli import app
from k5train.forward import checks
from k5train.options.optimizer import OptimConfig
from k5train.training import session
from tests.cli import Cli
from tests.runs import CONFIG, lora_of, same, start_run, state_of

STATE = "state/step-000003/step.json"
CONSTANT = replace(CONFIG, steps=6, deterministic=True, optim=OptimConfig(lr=1e-2, lr_scheduler="constant"))


@pytest.fixture
def cache(toy_cache):
    return toy_cache("fp32")


@pytest.mark.parametrize(("kernel", "torch_version"), [(True, "2.99.0"), (False, None)], ids=["torch", "kernel"])
def test_a_deterministic_run_refuses_what_has_other_last_bits(
    tmp_path, cache, toy_model, monkeypatch, kernel, torch_version
):
    original = session.computed_by

    def with_kernel(*arguments):
        return {**original(*arguments), "kernels": {"rotary.agrees": True}}

    def another(*arguments):
        facts = original(*arguments)
        return {**facts, "torch": torch_version or facts["torch"], "kernels": {"rotary.agrees": kernel}}

    root, cli = tmp_path / "run", Cli(tmp_path)
    monkeypatch.setattr(session, "computed_by", with_kernel)
    start_run(root, cache, toy_model, CONSTANT)
    states, loras = state_of(root), lora_of(root)
    assert unseal((root / STATE).read_bytes())["computed_by"] == {
        "device": "cpu", "torch": torch.__version__, "kernels": {"rotary.agrees": True},
    }  # fmt: skip
    monkeypatch.setattr(session, "computed_by", another)
    refused = cli(app, "resume", "run", "--step", "3")
    assert refused.code == 2
    what = f'torch: "{torch.__version__}", now "2.99.0"' if torch_version else "kernels.rotary.agrees: true, now false"
    assert f"run is deterministic, and what computes here has other last bits: {what}" in refused.err
    assert "go on with other rounding: k5train resume run --set train.deterministic=false" in refused.err
    assert same(state_of(root), states)
    assert same(lora_of(root), loras)
    monkeypatch.setattr(session, "computed_by", with_kernel)  # with what it was begun with it goes on
    done = cli(app, "resume", "run", "--step", "3")
    assert done.code == 0, done.err
    assert same(state_of(root), states)
    assert same(lora_of(root), loras)


def test_a_run_that_is_not_deterministic_goes_on(tmp_path, cache, toy_model, monkeypatch):
    original = session.computed_by
    start_run(tmp_path / "run", cache, toy_model, replace(CONSTANT, deterministic=False))
    monkeypatch.setattr(session, "computed_by", lambda *a: {**original(*a), "torch": "2.99.0"})
    done = Cli(tmp_path)(app, "resume", "run", "--step", "3")
    assert done.code == 0, done.err


def test_outcomes_are_kept_as_json_by_the_names_of_the_kernels(monkeypatch):
    monkeypatch.setattr(checks, "_outcomes", {})

    def numbers_agree(device):
        return device.type == "cpu"

    numbers_agree.__module__ = "k5train.forward.rotary"
    assert checks.triton_works(torch.device("cpu"), numbers_agree) in (True, False)
    assert list(json.loads(json.dumps(checks.outcomes()))) == ["rotary.numbers_agree"]

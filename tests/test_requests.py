"""Save now, sample now: what a run is asked for between two steps is done, and no bit of the training changes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from safetensors.torch import load_file

from k5cache.shared.errors import RunError
from k5train.options.optimizer import OptimConfig
from k5train.options.validation import ValidationConfig
from k5train.runs import requests
from k5train.runs.folder import Run, lock_run, new_run
from k5train.training import loop
from tests.parity import PROMPTS
from tests.runs import CONFIG, go_on, lora_of, metrics_of, numbers, same, start_run, state_of

DRAWN = ValidationConfig(
    prompts=PROMPTS[:1], num_inference_steps=1, guidance_scale=1.0, width=32, height=32, before=False, every=3
)
OPTIMIZERS = {
    "adamw": OptimConfig(lr=1e-2, warmup_steps=2, lr_scheduler="cosine", ema_decay=0.9),
    "schedulefree": OptimConfig(optimizer="schedulefree", lr=1e-2, warmup_steps=2, lr_scheduler="constant"),
    "prodigy": OptimConfig(optimizer="prodigy", lr=1.0, warmup_steps=0, lr_scheduler="constant", ema_decay=0.9),
}


@pytest.fixture(scope="module")
def cache(toy_cache) -> Path:
    return toy_cache("fp32")


@pytest.fixture
def during(monkeypatch):
    """``during(root, {2: ("save",)}, stop=5)`` asks in the step after update 2, and presses Ctrl-C after update 5."""

    accumulate = loop.accumulate

    def arrange(root: Path, asked: dict[int, tuple[requests.Request, ...]], stop: int | None = None) -> None:
        def asking(*args, **kwargs):
            done = max((row["step"] for row in metrics_of(root) if "loss" in row), default=0)
            if done == stop:
                raise KeyboardInterrupt
            for request in asked.pop(done, ()):
                requests.ask(root, request)
            return accumulate(*args, **kwargs)

        monkeypatch.setattr(loop, "accumulate", asking)

    return arrange


@pytest.mark.parametrize("name", ["adamw", "schedulefree", pytest.param("prodigy", marks=pytest.mark.long)])
def test_a_run_that_saves_and_draws_when_asked_ends_with_the_bits_of_one_that_was_not(
    tmp_path, cache, toy_model, during, name, capsys
):
    pytest.importorskip({"schedulefree": "schedulefree", "prodigy": "prodigyopt"}.get(name, "torch"))
    config = replace(
        CONFIG,
        steps=6,
        batch_size=1,
        checkpoint_every=3,
        checkpoints_total_limit=1,
        optim=OPTIMIZERS[name],
        validation=DRAWN,
    )
    whole, root = tmp_path / "whole" / "run", tmp_path / "asked" / "run"
    start_run(whole, cache, toy_model, config)
    during(root, {0: ("save",), 1: ("sample",), 3: ("save", "sample")}, stop=4)
    with pytest.raises(KeyboardInterrupt):
        start_run(root, cache, toy_model, config)
    (root / "sample.request").touch()  # asked for just before a crash
    during(root, {4: ("save",), 5: ("sample",)})
    go_on(root)
    assert same(lora_of(root), lora_of(whole))
    assert same(state_of(root), state_of(whole))
    assert numbers(metrics_of(root)) == numbers(metrics_of(whole))
    if config.optim.ema_decay:
        assert same(load_file(Run(root).ema), load_file(Run(whole).ema))
    assert list(Run(whole).checkpoints()) == [6]
    assert list(Run(root).checkpoints()) == [1, 4, 5, 6]  # what was asked for stays, beyond the limit of 1
    drawn = sorted(path.name for path in (root / "samples").iterdir())
    assert drawn == ["step-000002", "step-000003", "step-000004", "step-000006"]
    for step in (3, 6):
        assert (Run(root).samples(step) / "00.png").read_bytes() == (Run(whole).samples(step) / "00.png").read_bytes()
    assert not list(root.glob("*.request"))
    assert "Did what was asked for at step 4: save" in capsys.readouterr().err


def test_a_run_that_is_not_trained_is_asked_for_nothing(tmp_path, cache, toy_model, during, capsys, monkeypatch):
    root = tmp_path / "run"
    during(root, {0: ("sample",)})
    with pytest.raises(RunError, match="draws no pictures: its recipe has no prompts"):
        start_run(root, cache, toy_model, replace(CONFIG, steps=2))
    during(root, {})
    (root / "sample.request").touch()
    monkeypatch.setattr(requests, "drop", lambda run: None)  # somebody else asks, without asking whether it can be done
    go_on(root)
    assert "the recipe has no validation prompts or pairs to draw" in capsys.readouterr().err
    for folder in (root, tmp_path / "none"):
        with pytest.raises(RunError, match="is not being trained"):
            requests.ask(folder, "save")
    assert not (root / "save.request").exists()


def test_a_run_that_is_refused_at_its_start_leaves_nothing_although_it_was_asked(tmp_path, cache):
    from k5cache.shared.model import ModelConfig

    root = tmp_path / "run"

    def refused() -> None:
        with new_run(root, cache, ModelConfig(), CONFIG) as run:
            with lock_run(run):
                requests.ask(root, "save")
            raise RunError("refused", "do it otherwise")

    with pytest.raises(RunError, match="refused"):
        refused()
    assert not root.exists()

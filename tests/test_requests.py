"""Save now, sample now: what a run is asked for between two steps is done, and no bit of the training changes."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from unittest import mock

import pytest
from safetensors.torch import load_file

from k5cache.shared import interrupt, system
from k5cache.shared.errors import RunError
from k5cache.shared.lock import lock_file
from k5cache.shared.sealed import unseal
from k5train.options.optimizer import OptimConfig
from k5train.options.validation import ValidationConfig
from k5train.runs import folder as run_folder
from k5train.runs import requests
from k5train.runs.folder import Run, lock_run, new_run
from k5train.runs.resume_state import MANIFEST
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


def facts_of(root: Path) -> dict:
    """What the newest state says."""
    return unseal((sorted(Run(root).state.glob("step-*"))[-1] / MANIFEST).read_bytes())


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


@pytest.mark.parametrize(
    "name", ["schedulefree", *(pytest.param(name, marks=pytest.mark.long) for name in ("adamw", "prodigy"))]
)
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
    assert "asked" not in facts_of(whole)["progress"]  # versions that know of no such thing go on with it
    assert facts_of(root)["progress"]["asked"] == [1, 4, 5]
    assert "Did what was asked for at step 4: save" in capsys.readouterr().err


def test_a_run_that_is_not_trained_is_asked_for_nothing(tmp_path, cache, toy_model, during, capsys, monkeypatch):
    root = tmp_path / "run"
    during(root, {0: ("sample",)})
    with pytest.raises(RunError, match="draws no pictures: its recipe has no prompts"):
        start_run(root, cache, toy_model, replace(CONFIG, steps=2))
    during(root, {0: ("sample",)})
    monkeypatch.setattr(requests, "_may_draw", lambda run: True)  # somebody else asks, whether it can be done or not
    go_on(root)
    assert "the recipe has no validation prompts or pairs to draw" in capsys.readouterr().err
    for folder in (root, tmp_path / "none"):
        with pytest.raises(RunError, match="is not being trained"):
            requests.ask(folder, "save")
    assert not (root / "save.request").exists()


def test_what_is_asked_where_a_run_saves_or_ends_is_done_once_and_remembered(tmp_path, cache, toy_model, monkeypatch):
    """After update 2 a checkpoint is due, and the run is stopped in the next step. In update 4, the last, it is asked
    again; and once more while its LoRA is written."""
    root, accumulate, saved = tmp_path / "run", loop.accumulate, list[str]()
    config = replace(CONFIG, steps=4, checkpoint_every=2, checkpoints_total_limit=1, validation=DRAWN)

    def asking(*args, **kwargs):
        done = max((row["step"] for row in metrics_of(root) if "loss" in row), default=0)
        if done == 2 and not saved.count("stopped"):
            saved.append("stopped")
            raise KeyboardInterrupt
        if done in (1, 3):
            requests.ask(root, "save")
        return accumulate(*args, **kwargs)

    def noting(path, *args, write_lora=loop.files.write_lora, **kwargs):
        saved.append(path.name)
        requests.ask(root, "sample")
        return write_lora(path, *args, **kwargs)

    monkeypatch.setattr(loop, "accumulate", asking)
    monkeypatch.setattr(loop.files, "write_lora", noting)
    with pytest.raises(KeyboardInterrupt):
        start_run(root, cache, toy_model, config)
    assert not list(root.glob("*.request"))
    assert facts_of(root)["progress"]["asked"] == [2]
    go_on(root)
    steps = ["step-000002.safetensors", "stopped", "step-000002.safetensors", "step-000004.safetensors"]
    assert saved == [*steps, "run.safetensors", "run-ema.safetensors"]
    assert list(Run(root).checkpoints()) == [2, 4]  # that of step 2 was asked for: it stays
    assert not list(root.glob("*.request"))


@pytest.mark.parametrize("kind", ["folder", "pipe", "link", "fixed"])
def test_what_is_no_request_stops_no_run_and_stays(tmp_path, kind):
    run = Run(tmp_path / "run")
    run.root.mkdir()
    path, other = run.root / "save.request", tmp_path / "other"
    if kind == "folder":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "link":
        path.symlink_to(other)
    with lock_file(run.root / ".lock"):
        if kind == "fixed":
            with mock.patch("pathlib.Path.unlink", side_effect=PermissionError):
                requests.ask(run.root, "save")
                assert requests.take(run) == set()
        else:
            with pytest.raises(RunError, match=r"save\.request cannot be written, by which the run is asked"):
                requests.ask(run.root, "save")
            with requests.dropped(run):
                assert requests.take(run) == set()
    assert os.path.lexists(path)
    assert not other.exists()


def test_a_folder_that_is_called_as_a_request_hides_no_reason_why_a_run_is_refused(tmp_path, cache):
    from k5cache.shared.model import ModelConfig

    def refused() -> None:
        with new_run(tmp_path / "run", cache, ModelConfig(), CONFIG) as run:
            (run.root / "save.request").mkdir()
            raise RunError("refused", "do it otherwise")

    with pytest.raises(RunError, match="refused"):
        refused()
    assert (tmp_path / "run" / "save.request").is_dir()


@pytest.mark.parametrize(
    "end", [RunError("refused", "do it otherwise"), KeyboardInterrupt()], ids=["refused", "Ctrl-C"]
)
def test_a_run_that_is_refused_or_stopped_at_its_start_leaves_nothing_although_it_was_asked(tmp_path, cache, end):
    from k5cache.shared.model import ModelConfig

    root = tmp_path / "run"

    def ended() -> None:
        with new_run(root, cache, ModelConfig(), CONFIG) as run:
            with lock_run(run):
                requests.ask(root, "save")
            raise end

    with pytest.raises(type(end)):
        ended()
    assert not root.exists()


def test_a_run_that_is_stopped_when_a_message_names_it_stays(tmp_path, cache):
    from k5cache.shared.model import ModelConfig

    def stopped() -> None:
        with new_run(tmp_path / "run", cache, ModelConfig(), CONFIG) as run:
            run.keep()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stopped()
    assert (tmp_path / "run" / "recipe.toml").is_file()


def test_a_ctrl_c_while_a_run_is_made_or_a_second_one_while_it_is_undone_leaves_no_folder(tmp_path, cache, monkeypatch):
    from k5cache.shared.model import ModelConfig

    def then_stopped(function):
        def call(*args):
            result = function(*args)
            system.interrupt()
            return result

        return call

    def stopped() -> None:
        with interrupt.installed(), new_run(tmp_path / "run", cache, ModelConfig(), CONFIG):
            system.interrupt()

    for name in ("write_new", "lock_file", "_remove_new"):
        with monkeypatch.context() as patch:
            patch.setattr(run_folder, name, then_stopped(getattr(run_folder, name)))
            with pytest.raises(KeyboardInterrupt):
                stopped()
        assert not (tmp_path / "run").exists(), name


def test_a_run_that_is_stopped_stays_if_its_user_has_written_into_its_recipe_meanwhile(tmp_path, cache):
    from k5cache.shared.model import ModelConfig

    recipe = tmp_path / "run" / "recipe.toml"

    def stopped() -> None:
        with new_run(recipe.parent, cache, ModelConfig(), CONFIG):
            recipe.write_text(f"{recipe.read_text()}# cats\n")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stopped()
    assert recipe.read_text().endswith("# cats\n")


@pytest.mark.parametrize("end", [RunError("refused", "do it otherwise"), KeyboardInterrupt()])
def test_a_folder_that_was_moved_before_its_run_is_refused_or_stopped_hides_no_reason(tmp_path, cache, end):
    from k5cache.shared.model import ModelConfig

    def ended() -> None:
        with new_run(tmp_path / "run", cache, ModelConfig(), CONFIG):
            (tmp_path / "run").rename(tmp_path / "moved")
            raise end

    with pytest.raises(type(end)):
        ended()
    assert (tmp_path / "moved" / "recipe.toml").is_file()
    assert not (tmp_path / "run").exists()

"""Does a deterministic run notice that another GPU, torch or kernel computes it, before it goes on with other bits?"""

from __future__ import annotations

import json
import shlex
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from k5cache.shared.errors import RunError
from k5cache.shared.model import ModelConfig
from k5cache.shared.sealed import unseal
from k5train.cli import app
from k5train.forward import checks, choices, execute
from k5train.forward.block import Modes
from k5train.options.memory import MemoryConfig
from k5train.options.optimizer import OptimConfig
from k5train.parallel.ranks import ALONE
from k5train.runs.folder import Run
from k5train.runs.resume_state import Progress, SavedState
from k5train.training import loop, session
from k5train.training.computed_by import KEY, OTHERS, check_computed_by, computed_by
from k5train.training.loop import Loop
from k5train.training.sweep import sweep
from k5train.training.sweep_runs import SweepRun
from tests.cli import Cli
from tests.runs import CONFIG, lora_of, only_training, same, start_run, state_of

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
    states, loras, result = state_of(root), lora_of(root), (root / "result.json").read_bytes()
    assert unseal((root / STATE).read_bytes())["computed_by"] == {
        "device": "cpu", "torch": torch.__version__, "kernels": {"rotary.agrees": True},
    }  # fmt: skip
    monkeypatch.setattr(session, "computed_by", another)
    refused = cli(app, "resume", "run", "--step", "3")
    assert refused.code == 2
    what = f'torch: "{torch.__version__}", now "2.99.0"' if torch_version else "kernels.rotary.agrees: true, now false"
    assert f"run is deterministic, and its last bits would change here: {what}" in refused.err
    again = "command resume run --step 3 --set train.deterministic=false"
    assert f"Resume it where this is as it was, or without the same bits: {again}" in refused.err
    assert (root / "result.json").read_bytes() == result
    assert same(state_of(root), states)
    assert same(lora_of(root), loras)
    monkeypatch.setattr(session, "computed_by", with_kernel)  # with what it was begun with it goes on
    done = cli(app, "resume", "run", "--step", "3")
    assert done.code == 0, done.err
    assert same(state_of(root), states)
    assert same(lora_of(root), loras)
    monkeypatch.setattr(session, "computed_by", another)
    inexact = cli(app, *shlex.split(again)[1:])
    assert inexact.code == 0, inexact.err


def test_a_lora_that_was_deleted_is_written_again_by_whatever_computes_here(tmp_path, cache, toy_model, monkeypatch):
    original = session.computed_by
    start_run(tmp_path / "run", cache, toy_model, CONSTANT)
    loras = lora_of(tmp_path / "run")
    Run(tmp_path / "run").lora.unlink()
    monkeypatch.setattr(session, "computed_by", lambda *a: {**original(*a), "torch": "2.99.0"})
    done = Cli(tmp_path)(app, "resume", "run")  # no step is left
    assert done.code == 0, done.err
    assert same(lora_of(tmp_path / "run"), loras)


def files_of(root: Path) -> dict[Path, bytes]:
    """Every file of a run but its lock."""
    return {path: path.read_bytes() for path in root.rglob("*") if path.is_file() and path.name != ".lock"}


def test_blocks_that_were_compiled_are_not_gone_on_with_eagerly(tmp_path, cache, toy_model, monkeypatch):
    compiles = torch.compile
    monkeypatch.setattr(execute.torch, "compile", partial(compiles, backend="eager"))
    compiled = replace(CONSTANT, mixed_precision="bf16", memory=MemoryConfig(execution="compiled"))
    start_run(tmp_path / "run", cache, toy_model, compiled)
    assert unseal((tmp_path / "run" / STATE).read_bytes())["computed_by"]["kernels"]["compiled"] is True

    def no_room(*arguments):
        raise OSError("No space left on device")

    monkeypatch.setattr(execute.torch, "compile", partial(compiles, backend=no_room))
    torch._dynamo.reset()
    before = files_of(tmp_path / "run")
    refused = Cli(tmp_path)(app, "resume", "run", "--step", "3")
    assert refused.code == 2
    assert "its last bits would change here: kernels.compiled: true, now false" in refused.err
    assert files_of(tmp_path / "run") == before  # the states and lines after step 3 too, and the result
    monkeypatch.setattr(execute.torch, "compile", partial(compiles, backend="eager"))
    torch._dynamo.reset()
    done = Cli(tmp_path)(app, "resume", "run", "--step", "3")
    assert done.code == 0, done.err


def test_ctrl_c_before_the_first_step_leaves_all_as_it_is_and_says_how_to_go_on(
    tmp_path, cache, toy_model, monkeypatch
):
    def pressed(loop):
        raise KeyboardInterrupt

    start_run(tmp_path / "run", cache, toy_model, CONSTANT)
    before, cli = files_of(tmp_path / "run"), Cli(tmp_path)
    monkeypatch.setattr(Loop, "warm_up", pressed)
    stopped = cli(app, "resume", "run", "--step", "3")
    assert stopped.code == 130
    assert "Stopped before step 4. Go on with: command resume run --step 3" in stopped.err
    longer = ("resume", "run", "--set", "train.steps=8")  # which its recipe does not say yet
    assert f"Stopped before step 7. Go on with: command {' '.join(longer)}" in cli(app, *longer).err
    assert files_of(tmp_path / "run") == before
    newest = tmp_path / "run/state/step-000006/step.json"
    newest.write_bytes(b"damaged, so it was resumed from the one before")
    assert "Go on with: command resume run --step 3" in cli(app, "resume", "run", "--step", "3").err
    newest.write_bytes(before[newest])
    with pytest.raises(KeyboardInterrupt, match=r"Stopped before step 1\. Go on with: k5train resume \S*new$"):
        start_run(tmp_path / "new", cache, toy_model, CONSTANT)
    monkeypatch.undo()
    assert cli(app, "resume", "run", "--step", "3").code == 0
    assert cli(app, "resume", "new").code == 0
    assert same(lora_of(tmp_path / "new"), lora_of(tmp_path / "run"))


def test_a_tracker_that_refuses_does_so_before_anything_of_a_run_changes(tmp_path, cache, toy_model, monkeypatch):
    def refuse(*arguments):
        raise RunError("wandb does not start: no key", "Run: wandb login")

    start_run(tmp_path / "run", cache, toy_model, CONSTANT)
    before = files_of(tmp_path / "run")
    monkeypatch.setattr(loop, "open_trackers", refuse)
    assert "wandb does not start" in Cli(tmp_path)(app, "resume", "run", "--step", "3").err
    assert files_of(tmp_path / "run") == before


def test_a_sweep_trains_its_other_runs_and_goes_on_when_the_advice_was_followed(
    tmp_path, cache, toy_model, monkeypatch, capsys
):
    runs = [SweepRun(f"rank={rank}", replace(CONSTANT, lora=replace(CONSTANT.lora, rank=rank))) for rank in (2, 4)]
    out, original, step = tmp_path / "out", session.computed_by, Loop.step
    again = partial(sweep, cache, out, ModelConfig(path=str(toy_model)), runs)

    def stopped(loop, *arguments):
        if loop.progress.step == 4:
            raise KeyboardInterrupt
        return step(loop, *arguments)

    with monkeypatch.context() as patched:
        patched.setattr(Loop, "step", stopped)
        with pytest.raises(KeyboardInterrupt), only_training():
            again()
    monkeypatch.setattr(session, "computed_by", lambda *a: {**original(*a), "torch": "2.99.0"})
    with only_training():
        refused, trained = again().outcomes
    assert "its last bits would change here: torch: " in refused.problem
    assert (trained.problem, trained.steps) == (None, 6)
    advice = "k5train resume out/rank=2 --set train.deterministic=false"
    assert advice in capsys.readouterr().err.replace(f"{tmp_path}/", "")
    inexact = Cli(tmp_path)(app, *shlex.split(advice)[1:])
    assert inexact.code == 0, inexact.err
    with only_training():
        assert [(outcome.problem, outcome.steps) for outcome in again().outcomes] == [(None, 6), (None, 6)]
    said = capsys.readouterr().err
    assert "out/rank=2 was trained with train.deterministic=false: its last bits are not this sweep's" in said
    assert "rank=4 was trained with" not in said


NOW = {"device": "cpu", "torch": "2.13.0", "kernels": {"compiled": True, "flash": True}}


def different(was: object, others: object = None, is_tried: bool = False) -> str | None:
    """What the error says that differs."""
    saved = SavedState(Path("run/state/step-000003"), Progress(step=3), {KEY: was, OTHERS: others}, None)
    try:
        check_computed_by(saved, NOW, CONSTANT, ALONE, is_tried=is_tried)
    except RunError as error:
        return error.problem.partition(" here: ")[2]
    return None


def test_what_the_first_pass_decides_is_compared_after_it():
    eager = {**NOW, "kernels": {"compiled": False, "flash": True}}
    assert different(NOW, is_tried=True) is None
    assert different(eager) is None
    assert different(eager, is_tried=True) == "kernels.compiled: false, now true"
    assert different({**NOW, "kernels": {"flash": False, "of another version": 1}}) == "kernels.flash: false, now true"


def test_how_code_is_generated_is_said_of_compiled_blocks_only(monkeypatch):
    monkeypatch.setattr(choices, "are_ours", lambda: True)  # since another run of the sweep

    def kernels(is_compiled: bool) -> dict[str, bool]:
        execution = SimpleNamespace(is_compiled=is_compiled, modes=Modes(int8_dynamic=False, cudnn=False))
        return computed_by(torch.device("cpu"), execution)["kernels"]

    assert (kernels(True)["row_steps"], kernels(False)["row_steps"]) == (True, False)


@pytest.mark.parametrize("was", [None, 1, "x", [], [NOW], {}, {"kernels": []}, {"later": 1, "kernels": {"x": [{}]}}])
def test_a_state_that_says_nothing_that_can_be_compared_goes_on(was):
    assert different(was, is_tried=True) is None
    assert different(NOW, was, is_tried=True) is None


def test_a_field_of_another_type_differs():
    assert different({"device": ["cpu"], "torch": None}) == 'device: ["cpu"], now "cpu"; torch: not set, now "2.13.0"'


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

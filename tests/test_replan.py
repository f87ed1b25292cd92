"""Does a run that needs more VRAM than planned plan again before it has trained anything?"""

from __future__ import annotations

import weakref
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from k5cache.shared.errors import DoesNotFit
from k5train.cli import app
from k5train.forward.execute import Execution
from k5train.options.memory import MemoryConfig
from k5train.planning import memory
from k5train.runs.folder import Run, open_run
from k5train.runs.resume_state import latest_state
from k5train.training import loop, session
from tests.cli import Cli
from tests.runs import CONFIG, go_on, lora_of, note_plans, same, start_run, state_of

SHORT = replace(
    CONFIG, steps=3, base_model_precision="int8-quanto", memory=MemoryConfig(vram="0.76GB", execution="eager"),
    lora=replace(CONFIG.lora, dropout=0.0),
)  # fmt: skip


@pytest.fixture
def plans(monkeypatch):
    """The plans that blocks were set up by. Only the toy's few megabytes decide them."""
    monkeypatch.setattr(memory, "_ALLOCATOR_BYTES", 0)
    monkeypatch.setattr("k5cache.shared.vram.CONTEXT_BYTES", int(0.76 * 2**30) - 6 * 2**20)
    return note_plans(monkeypatch)


def run_out(monkeypatch, times: int) -> None:
    """The first ``times`` warm-up steps run out of memory. Later ones must not find their tensors still allocated."""
    left, allocations = iter(range(times)), []

    def warm_up(self, step):
        assert all(reference() is None for reference in allocations)
        if next(left, None) is not None:
            activations = torch.zeros(8)
            allocations.append(weakref.ref(activations))
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 64.00 MiB.")
        step()

    monkeypatch.setattr(Execution, "warm_up", warm_up)


def test_the_run_goes_on_with_a_leaner_plan_and_learns_the_same(
    tmp_path, toy_cache, toy_model, monkeypatch, plans, capsys
):
    cache = toy_cache("bf16")
    start_run(tmp_path / "undisturbed", cache, toy_model, SHORT)
    run_out(monkeypatch, 1)
    start_run(tmp_path / "again", cache, toy_model, SHORT)
    assert plans[0].levels == plans[1].levels
    assert plans[2].peak <= plans[1].peak * 11 // 12
    assert "planning for less" in capsys.readouterr().err
    assert same(lora_of(tmp_path / "again"), lora_of(tmp_path / "undisturbed"))  # what is recomputed is the same


def test_it_is_refused_where_the_leaner_plan_runs_out_too(tmp_path, toy_cache, toy_model, monkeypatch, plans):
    run_out(monkeypatch, 2)
    with pytest.raises(DoesNotFit, match="ran out of memory"):
        start_run(tmp_path / "run", toy_cache("bf16"), toy_model, SHORT)


def test_a_plan_that_the_recipe_fixes_is_not_changed(tmp_path, toy_cache, toy_model, monkeypatch, plans):
    run_out(monkeypatch, 1)
    fixed = replace(SHORT, memory=replace(SHORT.memory, activations="all"))
    monkeypatch.setattr(session, "announce", lambda *_: None)
    with pytest.raises(DoesNotFit, match="ran out of memory"):
        start_run(tmp_path / "run", toy_cache("bf16"), toy_model, fixed)
    assert len(plans) == 1


def test_a_run_that_runs_out_before_its_first_step_stays_for_the_command_that_the_message_names(
    tmp_path, toy_cache, toy_model, monkeypatch
):
    def ends(loop):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 64.00 MiB.")

    cli, options = Cli(tmp_path), ["train.steps=4", "train.device=cpu", "train.base_model_precision=no_change"]
    options += ["train.lora.targets=['qkv']", "train.checkpoint_every=2", "train.optim.lr_scheduler=constant"]
    begins = ["run", str(toy_cache("fp32")), "-o", "run", "--model", str(toy_model)]
    with monkeypatch.context() as patched:
        patched.setattr(loop.Loop, "warm_up", ends)
        refused = cli(app, *begins, *(word for option in options for word in ("--set", option)))
    assert refused.code == 2
    command = refused.err.split("plan for less: k5train ")[1].split()
    assert command[:3] == ["resume", "run", "--vram"]
    done = cli(app, *command)
    assert done.code == 0, done.err
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*.*") if path.name != ".lock"}
    with monkeypatch.context() as patched:
        patched.setattr(loop.Loop, "warm_up", ends)
        refused = cli(app, "resume", "run", "--step", "2", "--vram", "3GB", "--set", "train.max_hours=2")
    command = refused.err.split("plan for less: command ")[1].split()  # --set and --step are nowhere else yet
    assert command[:-2] == ["resume", "run", "--step", "2", "--vram", "3GB", "--set", "train.max_hours=2"]
    assert {path: path.read_bytes() for path in (tmp_path / "run").rglob("*.*") if path.name != ".lock"} == before
    done = cli(app, *command)
    assert done.code == 0, done.err
    config = open_run(tmp_path / "run")[2]
    assert (config.memory.vram, config.max_hours) == (command[-1], 2)


FOUR = replace(CONFIG, steps=4, checkpoint_every=2)


@pytest.fixture(scope="module")
def whole(tmp_path_factory, toy_cache, toy_model) -> Path:
    """Four steps without a break."""
    root = tmp_path_factory.mktemp("whole") / "whole"
    start_run(root, toy_cache("fp32"), toy_model, FOUR)
    return root


@pytest.mark.parametrize("in_update", [False, True], ids=["in a step", "in its update"])
def test_memory_that_ends_in_mid_run_leaves_a_state_to_go_on_from(
    tmp_path, toy_cache, toy_model, monkeypatch, whole, in_update
):
    calls = iter(range(100))
    owner, name = (session.Session, "update") if in_update else (loop, "accumulate")
    real = getattr(owner, name)

    def failing(*args, **kwargs):
        if next(calls) == 3:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 64.00 MiB.")
        return real(*args, **kwargs)

    with monkeypatch.context() as patched:
        patched.setattr(owner, name, failing)
        with pytest.raises(DoesNotFit, match=r"the LoRA so far is in .*step-000003") as ended:
            start_run(tmp_path / "cut", toy_cache("fp32"), toy_model, FOUR)
    assert f"k5train resume {tmp_path / 'cut'} --vram " in ended.value.fix
    saved = latest_state(Run(tmp_path / "cut").state)
    assert saved is not None
    # An interrupted update may have changed only some weights, so the state before it is the last good one.
    assert saved.progress.step == (2 if in_update else 3)
    go_on(tmp_path / "cut")
    assert same(lora_of(tmp_path / "cut"), lora_of(whole))
    assert same(state_of(tmp_path / "cut"), state_of(whole))

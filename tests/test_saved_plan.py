"""Does a deterministic run go on with the memory plan that it began with, whatever VRAM is free by then?"""

from __future__ import annotations

import functools
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from k5cache.shared.errors import DoesNotFit, RunError
from k5cache.shared.model import ModelConfig
from k5cache.shared.sealed import seal, unseal
from k5cache.shared.vram import CONTEXT_BYTES
from k5train.cli import app
from k5train.forward.execute import Execution
from k5train.options.memory import MemoryConfig
from k5train.options.optimizer import OptimConfig
from k5train.planning import memory, vram
from k5train.planning.memory import Plan, Streaming
from k5train.planning.saved_plan import SavedPlan
from k5train.runs.resume_state import latest_state
from k5train.training import carry_out
from k5train.training.sweep import sweep
from k5train.training.sweep_runs import SweepRun
from k5train.training.which_plan import plan_on_shared_base
from tests.cli import Cli
from tests.runs import CONFIG, go_on, lora_of, note_plans, only_training, same, start_run, state_of

EXACT = replace(
    CONFIG, steps=2, deterministic=True, base_model_precision="int8-quanto", memory=MemoryConfig(execution="eager"),
    optim=OptimConfig(lr=1e-2, warmup_steps=0, ema_decay=0.9),
)  # fmt: skip
# Bytes of VRAM, where the allocator takes none, and what the toy's three blocks keep in them.
STREAMING, LITTLE, SOME, PLENTY = 3_735_552, 4_000_000, 4_200_000, 6_000_000
ALL = ("all",) * 3
IN_SOME = ("attention", "attention", "selective")
IN_LITTLE = ("attention",) * 3


@pytest.fixture(scope="module")
def cache(toy_cache) -> Path:
    return toy_cache("fp32")


def free_in(patch: pytest.MonkeyPatch, num_bytes: int) -> None:
    patch.setattr(memory, "_ALLOCATOR_BYTES", 0)
    patch.setattr(vram, "budget", lambda *_: num_bytes)


@pytest.fixture
def free(monkeypatch):
    """``free(n)``: from now on ``n`` bytes of VRAM are free."""
    return lambda num_bytes: free_in(monkeypatch, num_bytes)


@pytest.fixture(scope="module")
def runs(tmp_path_factory, cache, toy_model) -> Callable[[int], Path]:
    """``runs(n)``: a run of ``EXACT`` that began where ``n`` bytes were free. Tests only copy it."""

    def begin(num_bytes: int) -> Path:
        root = tmp_path_factory.mktemp("runs") / "run"
        with pytest.MonkeyPatch.context() as patch:
            free_in(patch, num_bytes)
            start_run(root, cache, toy_model, EXACT)
        return root

    return functools.cache(begin)


@pytest.fixture
def begun(tmp_path, runs) -> Callable[[int], Path]:
    """``begun(n)``: a copy of such a run."""
    return lambda num_bytes: shutil.copytree(runs(num_bytes), tmp_path / "run")


@pytest.fixture
def plans(monkeypatch) -> list[Plan]:
    """The plans that blocks were set up by."""
    return note_plans(monkeypatch)


def document_of(root: Path) -> dict:
    return unseal(path_of(root).read_bytes())


def path_of(root: Path) -> Path:
    saved = latest_state(root / "state")
    assert saved is not None
    return saved.folder / "step.json"


@pytest.mark.parametrize(
    ("at_first", "levels", "streaming"),
    [(SOME, IN_SOME, None), (STREAMING, ("nothing",) * 3, Streaming(3, 2, True))],
    ids=["two levels", "streamed"],
)
def test_it_goes_on_with_its_plan_where_more_is_free(
    tmp_path, cache, toy_model, free, plans, begun, at_first, levels, streaming
):
    cut = begun(at_first)
    plans.clear()
    free(at_first)
    start_run(tmp_path / "whole" / "run", cache, toy_model, replace(EXACT, steps=4))
    free(PLENTY)
    go_on(cut, steps=4)
    assert [plan.levels for plan in plans] == [levels] * 2
    assert plans[1] == replace(plans[0], streaming=streaming, budget=PLENTY, sizes=(18, 14))
    assert same(state_of(cut), state_of(tmp_path / "whole" / "run"))
    assert same(lora_of(cut), lora_of(tmp_path / "whole" / "run"))


def test_a_run_that_is_not_deterministic_plans_anew_and_saves_no_plan(tmp_path, cache, toy_model, free, plans):
    free(SOME)
    start_run(tmp_path / "run", cache, toy_model, replace(EXACT, deterministic=False))
    free(PLENTY)
    go_on(tmp_path / "run", steps=4)
    assert [plan.levels for plan in plans] == [IN_SOME, ALL]
    assert "plan" not in document_of(tmp_path / "run")


def test_the_margin_of_a_new_plan_is_room_for_one_that_has_run(free, plans, begun):
    run = begun(SOME)
    plans.clear()
    free(4_028_096)  # its predicted peak; planned anew, LITTLE's levels would be chosen
    go_on(run, steps=4)
    assert [plan.levels for plan in plans] == [IN_SOME]


def test_it_is_refused_before_loading_where_its_plan_has_no_room_and_goes_on_inexactly_if_told_to(
    tmp_path, free, plans, begun, monkeypatch
):
    begun(PLENTY)
    plans.clear()
    free(SOME)
    result = (tmp_path / "run" / "result.json").read_bytes()
    with monkeypatch.context() as patched:
        patched.setattr("k5train.training.base.load", None)
        refused = Cli(tmp_path)(app, "resume", "run", "--set", "train.steps=4")
    assert refused.code == 2
    assert "run is deterministic and must go on with its saved memory plan, which needs 5.2 MiB of VRAM" in refused.err
    assert "there is 4.0 MiB for torch" in refused.err
    assert "Free VRAM, or resume with a new plan" in refused.err
    assert (tmp_path / "run" / "result.json").read_bytes() == result  # it is still finished
    command = refused.err.split(": command ")[1].split()  # the advice works
    assert command == ["resume", "run", "--set", "train.steps=4", "--set", "train.deterministic=false"]
    done = Cli(tmp_path)(app, *command)
    assert done.code == 0, done.err
    assert [plan.levels for plan in plans] == [IN_SOME]
    assert "plan" not in document_of(tmp_path / "run")
    with pytest.raises(RunError, match=r"train\.deterministic: false, now true"):  # what is lost does not come back
        go_on(tmp_path / "run", deterministic=True)


def test_what_would_make_another_plan_is_refused_by_the_name_of_its_field(tmp_path, free, begun):
    begun(PLENTY)
    free(PLENTY)
    for option, value, named in (
        ("activations", "all", 'train.memory.activations: "auto", now "all"'),
        ("execution", "diffusers", 'train.memory.execution: "eager", now "diffusers"'),
        ("enable_group_offload", True, "train.memory.enable_group_offload: false, now true"),
    ):
        shutil.copytree(tmp_path / "run", tmp_path / option)
        changed = replace(EXACT.memory, **{option: value})
        with pytest.raises(RunError) as caught:
            go_on(tmp_path / option, steps=4, memory=changed)
        assert named in caught.value.problem
        go_on(tmp_path / option, steps=4, memory=changed, deterministic=False)


def test_the_vram_to_plan_for_may_change_and_the_plan_does_not(tmp_path, cache, toy_model, plans):
    start_run(tmp_path / "run", cache, toy_model, replace(EXACT, memory=MemoryConfig("0.9GB", execution="eager")))
    go_on(tmp_path / "run", steps=4, memory=MemoryConfig("12GB", execution="eager"))
    assert plans[1] == replace(plans[0], budget=12 * 2**30 - CONTEXT_BYTES)
    with pytest.raises(DoesNotFit, match="there is 32"):
        go_on(tmp_path / "run", steps=6, memory=MemoryConfig("800MB", execution="eager"))


def test_a_state_of_before_plans_were_saved_goes_on_with_a_warning_and_saves_the_new_one(
    tmp_path, free, plans, begun, capsys
):
    begun(SOME)
    plans.clear()
    path, document = path_of(tmp_path / "run"), document_of(tmp_path / "run")
    del document["plan"]
    path.write_bytes(seal(document))
    free(LITTLE)
    go_on(tmp_path / "run", steps=3)
    assert "saved without its memory plan" in capsys.readouterr().err
    free(PLENTY)
    go_on(tmp_path / "run", steps=4)
    assert "saved without its memory plan" not in capsys.readouterr().err
    assert [plan.levels for plan in plans] == [IN_LITTLE, IN_LITTLE]


def test_the_sizes_that_blocks_are_compiled_at_are_the_saved_ones_too(tmp_path, free, plans, begun, monkeypatch):
    begun(PLENTY)
    plans.clear()
    free(PLENTY)
    path, document = path_of(tmp_path / "run"), document_of(tmp_path / "run")
    assert document["plan"]["sizes"] == [18, 14]
    document["plan"]["sizes"] = [20, 30]  # as of a larger picture, which no row names any more
    path.write_bytes(seal(document))
    kernels_for, determinism = [], carry_out.determinism

    def noting(is_on, compiled_for, **facts):
        kernels_for.append(compiled_for)
        return determinism(is_on, compiled_for, **facts)

    monkeypatch.setattr(carry_out, "determinism", noting)
    go_on(tmp_path / "run", steps=4)
    assert plans[0].sizes == (20, 30)
    assert kernels_for == [((20, 30), EXACT.lora)]


def test_a_plan_of_another_version_is_named_and_does_not_end_the_run(tmp_path, free, begun):
    begun(PLENTY)
    free(PLENTY)
    path, document = path_of(tmp_path / "run"), document_of(tmp_path / "run")
    document["plan"]["levels"] = ["everything"] * 3
    path.write_bytes(seal(document))
    with pytest.raises(RunError, match="another version: levels everything") as caught:
        go_on(tmp_path / "run", steps=4)
    assert "train.deterministic=false" in caught.value.fix
    go_on(tmp_path / "run", steps=4, deterministic=False)


@pytest.mark.parametrize("damage", [{"streaming": {"blocks": 3}}, {"sizes": 18}])
def test_a_plan_that_is_none_is_named(tmp_path, free, begun, damage):
    begun(PLENTY)
    free(PLENTY)
    path, document = path_of(tmp_path / "run"), document_of(tmp_path / "run")
    document["plan"] |= damage
    path.write_bytes(seal(document))
    with pytest.raises(RunError, match=r"step\.json cannot be used"):
        go_on(tmp_path / "run", steps=4)


def run_out_once(monkeypatch) -> None:
    """The next warm-up step runs out of memory."""
    left, warm_up = iter([1]), Execution.warm_up

    def failing(self, step):
        if next(left, None):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 64.00 MiB.")
        warm_up(self, step)

    monkeypatch.setattr(Execution, "warm_up", failing)


def test_a_plan_that_the_first_step_made_leaner_is_the_one_that_is_saved(
    tmp_path, cache, toy_model, free, plans, monkeypatch
):
    free(PLENTY)
    run_out_once(monkeypatch)
    start_run(tmp_path / "run", cache, toy_model, EXACT)
    leaner = plans[1].levels
    assert plans[0].levels == ALL
    assert leaner == ("matmuls", "matmuls", "all")
    go_on(tmp_path / "run", steps=4)
    assert plans[2].levels == leaner
    # What it is resumed with is not made leaner: that would be another plan.
    run_out_once(monkeypatch)
    with pytest.raises(DoesNotFit, match="ran out of memory") as caught:
        go_on(tmp_path / "run", steps=6)
    assert "Free VRAM, or resume with a new plan" in caught.value.fix
    assert len(plans) == 4


class Stop(Exception):
    """Stands for a crash."""


def test_a_sweep_goes_on_with_the_plan_that_its_stopped_run_began_with(
    tmp_path, cache, toy_model, free, plans, monkeypatch
):
    runs = [SweepRun(f"rank={rank}", replace(EXACT, steps=4, lora=replace(EXACT.lora, rank=rank)))
            for rank in (2, 4)]  # fmt: skip
    model = ModelConfig(path=str(toy_model))
    out = tmp_path / "out"

    def crash(*args, **kwargs):
        raise Stop

    with monkeypatch.context() as patched:
        patched.setattr(carry_out, "_result", crash)  # the last state is saved, the run is not finished
        free(SOME)
        with pytest.raises(Stop), only_training():
            sweep(cache, out, model, runs)
    assert document_of(out / "rank=2")["plan"]["levels"] == list(plans[0].levels)
    free(PLENTY)
    with only_training():
        rows = sweep(cache, out, model, runs).outcomes
    assert [row.problem for row in rows] == [None, None]
    assert [plan.levels for plan in plans] == [plans[0].levels] * 3
    assert plans[0].levels != ALL


def test_a_shared_base_takes_a_runs_own_levels_but_not_its_own_streaming(tmp_path):
    shared = Plan(ALL, None, {"weights": 100}, 200, 0, (18, 14))
    saved_plan = SavedPlan(tmp_path / "run", Plan(IN_SOME, None, {"weights": 90}, 150, 0, (18, 14)))
    assert plan_on_shared_base(shared, None) == shared
    assert plan_on_shared_base(shared, saved_plan) == replace(saved_plan.plan, budget=200)
    with pytest.raises(RunError, match="streams other weights") as caught:
        plan_on_shared_base(replace(shared, streaming=Streaming(3)), saved_plan)
    assert f"k5train resume {tmp_path / 'run'}" in caught.value.fix

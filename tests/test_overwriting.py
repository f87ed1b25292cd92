"""A run never writes over a LoRA that it did not make, and never begins again where it would lose one."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from k5cache.shared.errors import RunError
from k5train.cli import app
from k5train.options.optimizer import OptimConfig
from k5train.runs import written
from k5train.runs.folder import Run
from k5train.runs.resume_state import remove_states
from k5train.training.overwriting import check_beginning
from k5train.training.start import resume
from tests.cli import Cli
from tests.runs import CONFIG, go_on, lora_of, metrics_of, same, start_run

VALIDATION = replace(CONFIG.validation, split=0.2, held_out_every=1, held_out_sigmas=1)
FOUR = replace(CONFIG, steps=4, checkpoint_every=2, optim=OptimConfig(lr=1e-2, warmup_steps=0, ema_decay=0.9),
               validation=VALIDATION)  # fmt: skip


@pytest.fixture(scope="module")
def cache(toy_cache) -> Path:
    return toy_cache("fp32")


@pytest.fixture(scope="module")
def whole(tmp_path_factory, cache, toy_model) -> Path:
    """Four steps with checkpoints, a best and an average. Tests only read it."""
    root = tmp_path_factory.mktemp("whole") / "run"
    start_run(root, cache, toy_model, FOUR)
    return root


@pytest.fixture(scope="module")
def other(tmp_path_factory, cache, toy_model) -> Path:
    """A run of the same name with another seed."""
    root = tmp_path_factory.mktemp("other") / "run"
    start_run(root, cache, toy_model, replace(FOUR, seed=7, steps=1))
    return root


@pytest.fixture
def run(tmp_path, whole) -> Run:
    return Run(shutil.copytree(whole, tmp_path / "run"))


def loras(run: Run) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in run.root.rglob("*.safetensors") if "state" not in path.parts}


def delete(run: Run, *names: str) -> None:
    """By hand, together with the state."""
    remove_states(run.state)
    for path in [path for name in names for path in run.root.glob(name)]:
        path.unlink()


@pytest.mark.parametrize(
    ("gone", "problem"),
    [
        ((), " is finished, and its saved state was removed, so it cannot go on from where it ended"),
        (("result.json",), " has no saved state to go on from, and beginning again would overwrite {}/run.safetensors"),
        (("result.json", "loras.json", "metrics.jsonl"), "overwrite {}/run.safetensors"),
        (("result.json", "loras.json", "run*.safe*"), "overwrite {}/checkpoints/step-000002.safetensors"),
    ],
)
def test_a_run_whose_state_is_gone_does_not_begin_again_over_its_loras(run, gone, problem):
    delete(run, *gone)
    before = loras(run)
    with pytest.raises(RunError) as refused:
        resume(run.root, [], None)
    assert problem.format(run.root) in refused.value.problem
    assert loras(run) == before
    start = run.lora if run.lora.is_file() else run.checkpoint(4)
    assert refused.value.fix.startswith("To start another run from its LoRA: k5train run ")
    assert f"--out {run.root}-2 --set train.lora.init_lora={start}" in refused.value.fix


def test_the_other_run_that_is_offered_instead_can_be_started(tmp_path, run, cache):
    delete(run)
    refused = Cli(tmp_path)(app, "resume", "run")
    assert refused.code == 2
    done = Cli(tmp_path)(app, *refused.err.split("from its LoRA: k5train ")[1].split(), "--set", "train.steps=1")
    assert done.code == 0, done.err
    assert (tmp_path / "run-2" / "run-2.safetensors").is_file()
    again = Cli(tmp_path)(app, "run", str(cache), "-r", "run/recipe.toml", "-o", "run")
    assert "run already holds a run" in again.err


def test_what_a_stop_before_the_first_state_leaves_is_trained_again_and_says_so(run, whole, capsys):
    delete(run, "result.json", "run.safetensors", "run-ema.safetensors", "checkpoints/*")
    assert sorted(path.name for path in run.root.glob("*.safetensors")) == ["run-best.safetensors"]
    check_beginning(run, None, None)  # as a sweep does before it loads the base
    go_on(run.root)
    said = "was stopped at step 4 and has no saved state: it begins again at step 0"
    assert capsys.readouterr().err.count(said) == 1
    assert same(lora_of(run.root), lora_of(whole))
    assert [row["step"] for row in metrics_of(run.root) if "loss" in row] == [1, 2, 3, 4]


@pytest.mark.parametrize("listed", [True, False])
@pytest.mark.parametrize("name", ["run.safetensors", "run-best.safetensors", "run-ema.safetensors",
                                  "checkpoints/step-000004.safetensors"])  # fmt: skip
def test_a_lora_of_another_run_or_one_that_was_changed_is_not_overwritten(run, other, name, listed):
    """``run`` and ``other`` differ in their seed only."""
    shutil.copyfile(other / "run.safetensors", run.root / name)
    if not listed:
        (run.root / written.FILE).unlink()
    before = loras(run)
    with pytest.raises(RunError, match="training would overwrite it") as refused:
        go_on(run.root, steps=6)
    assert refused.value.fix == f"To keep it: mv {run.root / name} {run.root / name}.kept"
    assert loras(run) == before
    assert run.is_finished


def test_without_its_list_of_checksums_a_run_knows_its_loras_by_their_headers(run):
    (run.root / written.FILE).unlink()
    go_on(run.root, steps=5)
    assert written.check_recorded(run.lora)


def test_a_checkpoint_of_another_run_is_not_removed_by_the_limit(run, other):
    shutil.copyfile(other / "run.safetensors", run.checkpoint(1))
    with pytest.raises(RunError, match=r"step-000001\.safetensors is not a file that this run wrote"):
        go_on(run.root, steps=6, checkpoints_total_limit=1)
    go_on(run.root, steps=6)
    assert list(run.checkpoints()) == [1, 2, 4, 6]


def test_a_deleted_lora_of_a_finished_run_is_written_again_from_its_state(run, whole):
    run.lora.unlink()
    assert resume(run.root, [], None).steps == 4
    assert same(lora_of(run.root), lora_of(whole))

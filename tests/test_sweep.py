"""Sweeps: each run equals the same run alone, the base is loaded once, and the report compares what differs."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from safetensors.torch import load_file

from k5cache.shared import gpus
from k5cache.shared.errors import RecipeError
from k5cache.shared.origins import Document
from k5cache.shared.outputs import kind_of
from k5train.base import quantize
from k5train.cli import app
from k5train.commands.sweep import overruled, what_helps
from k5train.options.adapter import LoraConfig
from k5train.options.validation import ValidationConfig
from k5train.runs.compared import compare, remarks
from k5train.runs.outcomes import read_outcomes
from k5train.runs.resume_state import Progress, save_state
from k5train.training import session
from k5train.training.shared_base import most_demanding
from k5train.training.start import open_data
from k5train.training.step import ADVICE
from k5train.training.sweep_runs import sweep_runs
from tests.cli import Cli
from tests.parity import PROMPTS
from tests.runs import CONFIG, lora_of, same, start_run

RECIPE = f"""
[model]
path = "MODEL"
[train]
steps = 3
batch_size = 2
base_model_precision = "int8-quanto"
mixed_precision = "fp32"
device = "cpu"
[train.lora]
rank = 2
targets = ["qkv"]
[train.optim]
lr = 1e-2
warmup_steps = 0
[train.validation]
prompts = ["{PROMPTS[0]}"]
num_inference_steps = 1
guidance_scale = 1.0
width = 32
height = 32
every = 0
"""


@pytest.fixture(scope="module")
def swept(tmp_path_factory, toy_cache, toy_model):
    """A sweep over two ranks and two rates: its folder, how often the transformer was loaded, and the output."""
    root = tmp_path_factory.mktemp("sweep")
    (root / "recipe.toml").write_text(RECIPE.replace("MODEL", str(toy_model)))
    loads, any_rank = [], set()
    load, execute = quantize.load_transformer, session.execute
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("k5train.forward.load.load_transformer", lambda *a: loads.append(1) or load(*a))
        patched.setattr("k5train.training.session.execute", lambda *a: any_rank.add(a[4]) or execute(*a))
        done = Cli(root)(
            app, "sweep", str(toy_cache("fp32")), "-r", "recipe.toml",
            "--grid", "train.lora.rank=2,4", "--grid", "train.optim.lr=1e-2,1e5", "-o", "out",
        )  # fmt: skip
    assert done.code == 0, done.err
    assert any_rank == {True}  # where blocks are compiled, once for both ranks
    return root / "out", len(loads), done


def test_the_base_is_loaded_once(swept):
    assert swept[1] == 1


@pytest.mark.parametrize("rank", [2, 4])
def test_each_run_is_the_run_alone_bit_for_bit(tmp_path, swept, toy_cache, toy_model, rank):
    validation = ValidationConfig()
    config = replace(CONFIG, steps=3, checkpoint_every=250, base_model_precision="int8-quanto", validation=validation)
    lora = replace(config.lora, rank=rank, dropout=0.0)
    optim = replace(config.optim, warmup_steps=0, lr_scheduler="constant", ema_decay=0.0)
    start_run(tmp_path / "alone", toy_cache("fp32"), toy_model, replace(config, lora=lora, optim=optim))
    label = f"rank={rank},lr=1e-2"
    assert same(load_file(swept[0] / label / f"{label}.safetensors"), lora_of(tmp_path / "alone"))


def test_two_gpus_train_the_same_runs_in_two_processes(swept, tmp_path, toy_cache, monkeypatch):
    # On this machine neither process sees a GPU, so that both train on the processor.
    two = tuple(gpus.Slot(f"GPU-{n}", n, "a GPU", gpus.NVIDIA) for n in range(2))
    monkeypatch.setattr(gpus, "installed", lambda: two)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    out = swept[0].parent / "on-two"
    done = Cli(out.parent)(
        app, "sweep", str(toy_cache("fp32")), "-r", "recipe.toml", "--gpus", "2", "--set", "train.device=auto",
        "--grid", "train.lora.rank=2,4", "--grid", "train.optim.lr=1e-2", "-o", "on-two",
    )  # fmt: skip
    assert done.code == 0, done.err
    assert {f"on GPU {n}" in done.err for n in range(2)} == {True}
    untimed = [[replace(o, seconds=None, seconds_to_start=None) for o in read_outcomes(of)] for of in (swept[0], out)]
    assert [outcome for outcome in untimed[0] if not outcome.problem] == untimed[1]
    assert (out / "samples.png").read_bytes() == (swept[0] / "samples.png").read_bytes()
    for label in ("rank=2,lr=1e-2", "rank=4,lr=1e-2"):
        files = [load_file(of / label / f"{label}.safetensors") for of in (swept[0], out)]
        assert same(*files)
    assert not list(out.glob("*lr=1e-2/state"))


def test_a_run_whose_loss_explodes_is_marked_and_the_others_go_on(swept):
    rows = {row.label: row for row in read_outcomes(swept[0])}
    assert list(rows) == ["rank=2,lr=1e-2", "rank=2,lr=1e5", "rank=4,lr=1e-2", "rank=4,lr=1e5"]
    assert "nothing was updated" in rows["rank=2,lr=1e5"].problem
    assert rows["rank=4,lr=1e-2"].problem is None
    assert rows["rank=4,lr=1e-2"].steps == 3
    assert "rank=4,lr=1e-2" in swept[2].out


def test_a_second_run_starts_in_under_three_seconds(swept):
    rows = read_outcomes(swept[0])
    assert rows[2].seconds_to_start < 3  # the toy, nothing loaded again; 0.1 s where the machine is free


def test_pictures_stand_under_each_other_on_the_same_noise(swept):
    out = swept[0]
    base = [(out / label / "samples" / "step-000000" / "00.png").read_bytes()
            for label in ("rank=2,lr=1e-2", "rank=4,lr=1e-2")]  # fmt: skip
    assert base[0] == base[1]
    with Image.open(out / "samples.png") as grid, Image.open(out / "rank=2,lr=1e-2" / "samples.png") as single:
        assert grid.height > 1.3 * single.height  # base model and two runs, against base model and one
        assert np.asarray(grid.convert("RGB")).std() > 10


def test_a_run_that_exploded_has_no_row_of_pictures_and_says_how_far_it_came(swept):
    out, _, done = swept
    rows = {row.label: row for row in read_outcomes(out)}
    assert rows["rank=2,lr=1e5"].steps == 2  # after two updates the loss was not finite
    with Image.open(out / "samples.png") as grid, Image.open(out / "rank=2,lr=1e-2" / "samples.png") as single:
        cell = single.height / 2  # base model and step 3; headers are less than a cell
        assert 2.4 * cell < grid.height < 3.4 * cell  # base model and two runs, not four
    assert "Next, see their settings and curves: k5train compare out" in done.out


def test_compare_says_why_a_run_of_a_sweep_ended(swept):
    of_loss = remarks(compare([swept[0]])["rank=2,lr=1e5"])
    assert "nothing was updated" in of_loss[0]
    assert of_loss[1] == "not finished: step 2 of 3"


def test_a_sweep_of_which_no_run_comes_to_its_end_fails(tmp_path, toy_cache, toy_model):
    (tmp_path / "recipe.toml").write_text(RECIPE.replace("MODEL", str(toy_model)))
    done = Cli(tmp_path)(app, "sweep", str(toy_cache("fp32")), "-r", "recipe.toml", "--grid", "train.optim.lr=1e5")
    assert done.code == 2
    problem, fix = done.err.splitlines()[-2:]
    assert problem == "error: No run was finished"
    assert fix.startswith("  fix: Check these rows with `k5cache verify`, or lower train.optim.lr")


def test_a_sweep_that_does_not_fit_says_what_fits_and_not_another_rate():
    smaller = "Use a GPU with at least 12.0 GiB of memory"
    assert what_helps({"rank=8": smaller, "rank=16": smaller}) == smaller
    assert what_helps({"rank=8": smaller, "lr=1": ADVICE}).startswith(f"For rank=8: {smaller}. What helps the others")
    assert what_helps({}) == "Their problems are above"


def test_a_sweep_that_is_stopped_in_its_first_run_is_a_sweep_already(tmp_path, toy_cache, toy_model, monkeypatch):
    def stop(*args: object, **options: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("k5train.training.sweep_setting.train", stop)
    monkeypatch.setattr("k5train.training.shared_base.load_base", lambda *args: None)
    (tmp_path / "recipe.toml").write_text(RECIPE.replace("MODEL", str(toy_model)))
    sweep = ("sweep", str(toy_cache("fp32")), "-r", "recipe.toml", "--grid", "train.lora.rank=2,4", "-o", "out")
    assert [Cli(tmp_path)(app, *sweep).code for _ in range(2)] == [130, 130]
    assert kind_of(tmp_path / "out") == "sweep"
    assert {p.name for p in (tmp_path / "out").iterdir()} == {".lock", "sweep.json", "rank=2"}


def test_settings_that_are_refused_as_they_start_are_marked_and_the_others_go_on(tmp_path, toy_cache, toy_model):
    start_run(tmp_path / "big", toy_cache("fp32"), toy_model, replace(CONFIG, steps=1, lora=LoraConfig(rank=4)))
    (tmp_path / "recipe.toml").write_text(RECIPE.replace("MODEL", str(toy_model)))
    (tmp_path / "runs.toml").write_text(f"""
[[run]]
name = "other modules"
train.lora.init_lora = "{tmp_path / "big" / "big.safetensors"}"
[[run]]
name = "nothing to adapt"
train.lora.targets = ["nonesuch"]
[[run]]
name = "well"
""")
    done = Cli(tmp_path)(app, "sweep", str(toy_cache("fp32")), "-r", "recipe.toml", "--list", "runs.toml", "-o", "out",
                         "--set", "train.lora.alpha=7", "--set", 'train.lora.targets=["qkv"]')  # fmt: skip
    assert done.code == 0, done.err
    assert "does nothing: the" not in done.err  # some run has each
    asked = replace(CONFIG, steps=2)
    assert overruled(["train.steps=2", "cache.flip=true"], asked, [replace(CONFIG, steps=150)] * 2) == [
        "--set train.steps=2 does nothing: the grid or the list sets train.steps for every run"
    ]
    rows = {row.label: row for row in read_outcomes(tmp_path / "out")}
    assert "which train.lora.targets does not" in rows["other_modules"].problem
    assert "matches no module" in rows["nothing_to_adapt"].problem
    assert [row.steps for row in rows.values()] == [0, 0, 3]
    assert (tmp_path / "out" / "well" / "well.safetensors").is_file()


def test_the_plan_is_that_of_the_run_that_takes_most(toy_cache, toy_model):
    small = replace(CONFIG, base_model_precision="int8-quanto", lora=LoraConfig(rank=8, targets=("qkv",)))
    wide = replace(small, lora=LoraConfig(rank=8, targets=("official",)))
    averaged = replace(wide, optim=replace(CONFIG.optim, ema_decay=0.9))
    data = open_data(toy_cache("fp32"), small)
    bad = replace(small, lora=LoraConfig(rank=64, targets=("nonesuch",)))
    plain = replace(wide, optim=replace(CONFIG.optim, ema_decay=0.0))
    assert most_demanding(data, toy_model, [small, plain, averaged, bad]) == averaged
    slip = replace(small, lora=LoraConfig(rank=8000, targets=("qkv",)))
    with pytest.raises(RecipeError, match="rank 8000 is too high for text_transformer_blocks"):
        most_demanding(data, toy_model, [small, slip])


def test_the_same_sweep_again_trains_nothing_that_is_finished(swept, toy_cache):
    out = swept[0]
    before = {p: p.stat().st_mtime_ns for p in out.glob("*lr=1e-2/*.safetensors")}
    state = next(out.glob("*lr=1e-2")) / "state"
    save_state(state, Progress(3), {"adapter": {}}, {})  # a kill came before it was removed
    again = Cli(out.parent)(
        app, "sweep", str(toy_cache("fp32")), "-r", "recipe.toml",
        "--grid", "train.lora.rank=2,4", "--grid", "train.optim.lr=1e-2", "-o", "out",
    )  # fmt: skip
    assert again.code == 0, again.err
    assert "Loading the transformer" not in again.err
    assert {p: p.stat().st_mtime_ns for p in before} == before
    assert not state.exists()


def test_a_list_names_its_runs_and_lays_them_over_the_recipe(tmp_path):
    (tmp_path / "runs.toml").write_text(
        '[[run]]\nname = "small"\ntrain.lora.rank = 4\n[[run]]\nname = "long one"\ntrain.steps = 7\n'
    )
    document = {"train": {"lora": {"rank": 8, "alpha": 4}}}
    _, runs = sweep_runs(Document(document), [], tmp_path / "runs.toml")
    assert [(r.label, r.config.lora.rank, r.config.lora.alpha, r.config.steps) for r in runs] == [
        ("small", 4, 4.0, 1000), ("long_one", 8, 4.0, 7)]  # fmt: skip


def test_values_of_a_grid_may_be_lists():
    grid = ['train.lora.targets=["qkv"],["attention","qkv"]', "train.optim.betas=[0.9, 0.99]"]
    _, runs = sweep_runs(Document(), grid, None)
    assert [(r.config.lora.targets, r.config.optim.betas) for r in runs] == [
        (("qkv",), (0.9, 0.99)), (("attention", "qkv"), (0.9, 0.99))]  # fmt: skip


@pytest.mark.parametrize(
    ("grid", "problem"),
    [
        ([], "needs a grid or a list"),
        (["train.lora.rank"], "is not option=value,value"),
        (["train.lora.rnk=8,16"], r"^--grid train.lora.rnk=8: \[train.lora\] unknown key 'rnk'; did you mean 'rank'"),
        (["cache.resolution=512,1024"], "all runs of a sweep train on the same cache and model"),
        (["lora_rank=8,16"], "--grid lora_rank=8: unknown option 'lora_rank'; did you mean 'train.lora.rank'?"),
        (["train.lora.rank=8,8"], "are the same run"),
        (["train.mixed_precision=bf16,fp32"], "would need another base"),
        (["train.memory.activations=all,nothing"], "would need another base"),
    ],
)
def test_a_grid_that_cannot_be_run_is_refused(grid, problem):
    with pytest.raises(RecipeError, match=problem):
        sweep_runs(Document(), grid, None)


def test_a_problem_in_a_list_is_named_with_its_run(tmp_path):
    (tmp_path / "runs.toml").write_text("[[run]]\n\n[[run]]\ntrain.lora.rank = 0\n")
    with pytest.raises(RecipeError, match=r"runs.toml, \[\[run\]\] 2 on line 3: train.lora.rank must be at least 1"):
        sweep_runs(Document(), [], tmp_path / "runs.toml")


def test_both_a_grid_and_a_list_are_refused(tmp_path):
    with pytest.raises(RecipeError, match="not both"):
        sweep_runs(Document(), ["train.steps=1,2"], Path("runs.toml"))

"""What a person chooses by: how each run of a sweep ended, which is best and by which file, and what is added later."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from k5cache.shared.errors import RecipeError
from k5cache.shared.model import ModelConfig
from k5cache.shared.origins import Document
from k5train.cli import app
from k5train.commands.sweep import print_sweep
from k5train.options.optimizer import OptimConfig
from k5train.options.without_effect import options_without_effect
from k5train.runs.compared import Comparison
from k5train.runs.folder import Run
from k5train.runs.outcomes import Outcome, read_outcomes, write_outcomes
from k5train.runs.record import Loss, Record
from k5train.training.sweep import Swept, sweep
from k5train.training.sweep_folder import outcome_of
from k5train.training.sweep_runs import SweepRun, sweep_runs, warnings_of
from tests.cli import Cli, Done
from tests.parity import PROMPTS
from tests.runs import CONFIG, metrics_of, only_training

STEPS = 6
RECIPE = f"""
[model]
path = "MODEL"
[train]
steps = {STEPS}
batch_size = 2
base_model_precision = "no_change"
mixed_precision = "fp32"
device = "cpu"
loss_limit = 0
[train.lora]
rank = 2
targets = ["^out_layer.out_layer$"]
[train.optim]
warmup_steps = 0
ema_decay = 0.5
[train.validation]
prompts = ["{PROMPTS[0]}"]
num_inference_steps = 1
guidance_scale = 1.0
width = 32
height = 32
every = 0
split = 0.2
held_out_every = 2
held_out_sigmas = 2
probe_images = 2
"""


@pytest.fixture(scope="module")
def cache(toy_cache) -> Path:
    return toy_cache("fp32")


@pytest.fixture(scope="module")
def swept(tmp_path_factory, cache, toy_model) -> tuple[Path, Done]:
    """A rate at which nothing is learned, one at which something is, and one at which the last layer runs away."""
    root = tmp_path_factory.mktemp("sweep")
    (root / "recipe.toml").write_text(RECIPE.replace("MODEL", str(toy_model)))
    done = add(Cli(root), cache, "--grid", "train.optim.lr=1e-9,0.03,0.3")
    assert done.code == 0, done.err
    return root, done


def test_the_run_that_learned_is_the_best_and_the_one_that_diverged_is_marked(swept):
    root, done = swept
    nothing, best, worse = read_outcomes(root / "out")
    assert [outcome.label for outcome in (nothing, best, worse)] == ["lr=1e-9", "lr=0.03", "lr=0.3"]
    assert nothing.base_loss == best.base_loss == worse.base_loss
    assert nothing.final_loss == pytest.approx(nothing.base_loss, rel=1e-6)
    assert best.final_loss < 0.98 * best.base_loss
    assert worse.final_loss > 1.01 * worse.base_loss
    assert best.remarks == ()
    assert worse.remarks == ("ended worse than the base",)
    rows = {row["step"]: row for row in metrics_of(root / "out" / "lr=0.03") if "held_out_loss" in row}
    assert list(rows) == [0, 2, 4, 6]
    measured = ("held_out_loss", "ema_held_out_loss", "probe_loss")
    assert [rows[6][name] for name in measured] == [best.final_loss, best.ema_loss, best.probe_loss]
    assert rows[0]["probe_loss"] == best.base_probe_loss
    lowest = min(rows, key=lambda step: rows[step]["held_out_loss"])
    file = "lr=0.03/lr=0.03.safetensors" if lowest == STEPS else "lr=0.03/lr=0.03-best.safetensors"
    assert (best.best_step, best.best_loss, best.best_lora) == (lowest, rows[lowest]["held_out_loss"], file)
    assert f"best     lr=0.03, step {lowest}, held-out loss {best.best_loss:.4f}, out/{file}" in done.out
    assert "lr=0.3: ended worse than the base" in done.out
    assert f"{best.base_loss:.4f}  {best.final_loss:.4f}  {best.best_loss:.4f}   {lowest}" in done.out
    assert "pictures out/samples.png, after the last step of each run" in done.out


def test_the_grid_has_the_base_each_run_and_its_average(swept):
    out = swept[0] / "out"
    with Image.open(out / "samples.png") as grid, Image.open(out / "lr=0.03" / "samples.png") as single:
        assert 2.0 < grid.height / single.height < 2.5  # seven rows beside three; both have a header
        pixels = np.asarray(grid.convert("RGB"))
    with Image.open(out / "lr=0.03" / "samples" / f"step-{STEPS:06d}" / "ema" / "00.png") as picture:
        average = np.asarray(picture.convert("RGB"))
    assert average[0, 0].tolist() in pixels.reshape(-1, 3).tolist()


@pytest.fixture
def again(tmp_path, swept) -> Cli:
    """A copy of the sweep, to which runs may be added."""
    shutil.copytree(swept[0], tmp_path / "again")
    return Cli(tmp_path / "again")


def add(cli: Cli, cache: Path, *options: str) -> Done:
    return cli(app, "sweep", str(cache), "-r", "recipe.toml", *options, "-o", "out")


def height_of(path: Path) -> int:
    with Image.open(path) as picture:
        return picture.height


def test_runs_are_added_to_a_sweep_and_nothing_of_before_is_lost(again, cache):
    out = again.folder / "out"
    before = {p: p.read_bytes() for p in out.rglob("*.safetensors")}
    earlier = read_outcomes(out)
    height = height_of(out / "samples.png")
    done = add(again, cache, "--grid", "train.lora.rank=3", "--set", "train.steps=1")
    assert done.code == 0, done.err
    assert "warning: rank=3" not in done.err
    assert read_outcomes(out)[:3] == earlier
    assert [outcome.label for outcome in read_outcomes(out)] == ["lr=1e-9", "lr=0.03", "lr=0.3", "rank=3"]
    assert {p: p.read_bytes() for p in before} == before
    assert height_of(out / "samples.png") > 1.2 * height  # nine rows beside seven
    assert "best     lr=0.03," in done.out  # also of runs of the sweep before
    refused = add(again, cache, "--grid", "train.optim.lr=0.03,2", "--set", "train.steps=7")
    assert refused.code == 2
    assert "out/lr=0.03 has a run that was started differently: train.steps: 6, now 7" in refused.err
    assert "fix: Give these options the values that they had, or another folder" in refused.err
    assert not (out / "lr=2").exists()


def test_a_sweep_over_another_cache_or_base_is_not_mixed_up_with_one_in_its_folder(again, cache, tmp_path):
    other = shutil.copytree(cache, tmp_path / "other")
    for grid in ("train.optim.lr=0.03,2", "train.lora.rank=3,4"):  # with runs of the same names, and without
        refused = add(again, other, "--grid", grid)
        assert refused.code == 2
        assert f"cache: {cache}, now {other}" in refused.err
    precision = add(again, cache, "--grid", "train.lora.rank=3,4", "--set", "train.base_model_precision=int8-quanto")
    assert 'train.base_model_precision: "no_change", now "int8-quanto"' in precision.err
    assert {path.name for path in (again.folder / "out").glob("*/")} == {"lr=1e-9", "lr=0.03", "lr=0.3"}


def test_what_is_missing_or_damaged_of_a_finished_run_is_named_and_its_lora_stays(again, cache, toy_model):
    out = again.folder / "out"
    (out / "sweep.json").write_bytes((out / "sweep.json").read_bytes().replace(b"lr=0.3", b"lr=0.4"))
    (out / "lr=0.03" / "result.json").unlink()
    (out / "lr=0.3" / "lr=0.3.safetensors").unlink()
    kept = (out / "lr=0.03" / "lr=0.03.safetensors").read_bytes()
    done = add(again, cache, "--grid", "train.optim.lr=0.03,1e-9")
    assert "sweep.json is not the file that was written: how the runs ended is read from their own folders" in done.err
    assert "Loading the transformer" not in done.err
    problems = {outcome.label: outcome.problem for outcome in read_outcomes(out)}
    assert problems == {
        "lr=0.3": "out/lr=0.3/lr=0.3.safetensors is not there",
        "lr=0.03": "out/lr=0.03 has no saved state to go on from, and beginning again would overwrite "
        "out/lr=0.03/lr=0.03.safetensors",
        "lr=1e-9": None,
    }
    assert (out / "lr=0.03" / "lr=0.03.safetensors").read_bytes() == kept
    shutil.rmtree(out / "lr=0.3")
    add(again, cache, "--grid", "train.optim.lr=1e-9")
    assert [outcome.label for outcome in read_outcomes(out)] == ["lr=0.3", "lr=0.03", "lr=1e-9"]


def test_a_finished_run_whose_folder_was_renamed_is_as_good_as_before(tmp_path, swept):
    before = swept[0] / "out" / "lr=0.03"
    renamed = outcome_of(shutil.copytree(before, tmp_path / "mine"))
    assert (renamed.label, renamed.lora, renamed.problem) == ("mine", "mine/lr=0.03.safetensors", None)
    assert renamed.final_loss == outcome_of(before).final_loss


def test_a_kill_at_any_time_leaves_a_sweep_that_goes_on(tmp_path, cache, toy_model, monkeypatch):
    """In the first run before it saved a state, between two runs, and before a finished run's states are removed."""
    config = replace(CONFIG, steps=1, checkpoint_every=250, optim=OptimConfig(lr=1e-2, warmup_steps=0))
    runs = [SweepRun(name, replace(config, seed=seed)) for name, seed in (("a", 1), ("b", 2))]
    out, model = tmp_path / "out", ModelConfig(path=str(toy_model))
    for where in ("loop.Loop.save_state", "sweep_outcomes.remove_states", "sweep_outcomes.write_outcomes"):
        with monkeypatch.context() as patched:
            patched.setattr(f"k5train.training.{where}", lambda *args: 1 / 0)
            with pytest.raises(ZeroDivisionError), only_training():
                sweep(cache, out, model, runs)
    assert {path.name for path in (out / "a").glob("*.safetensors")} == {"a.safetensors"}
    swept = sweep(cache, out, model, runs)
    assert [(outcome.label, outcome.steps, outcome.problem) for outcome in swept.outcomes] == [
        ("a", 1, None), ("b", 1, None)]  # fmt: skip
    assert not list(out.glob("*/state"))


def test_the_list_of_an_earlier_version_is_read(tmp_path):
    rows = [{"label": "a", "lora": "sweeps/x/a/a.safetensors", "steps": 3, "last_loss": 0.5, "best_loss": None,
             "seconds": 1.0, "seconds_to_start": 0.1, "problem": None}]  # fmt: skip
    (tmp_path / "sweep.json").write_text(json.dumps(rows))
    assert read_outcomes(tmp_path) == [Outcome("a", "a/a.safetensors", 3, 0.5, seconds=1.0, seconds_to_start=0.1)]
    write_outcomes(tmp_path, [Outcome("b", "b/b.safetensors", 1, remarks=("stopped early",))])
    assert read_outcomes(tmp_path) == [Outcome("b", "b/b.safetensors", 1, remarks=("stopped early",))]
    for text in ("", "[3]", '{"runs": []}', "[" * 100_000, '[{"label": 3, "lora": ""}]'):
        (tmp_path / "sweep.json").write_text(text)
        assert read_outcomes(tmp_path) == []


# What is printed


def record(root: Path, best: Loss, final: Loss, ema: Loss | None = None) -> Record:
    return Record(root, root.name, is_finished=True, steps=40, base=Loss(0, 0.5), final=final, best=best, ema=ema)


def test_the_table_and_what_it_recommends(capsys):
    out = Path("sweeps/x")
    outcomes = (
        Outcome("lr=1e-4", "lr=1e-4/lr=1e-4.safetensors", 40, 0.4, 0.5, 0.35, 0.3, 20,
                "lr=1e-4/lr=1e-4-best.safetensors", 0.29, 0.52, 0.2, 61.0, 1.0),
        Outcome("lr=1e-2", "lr=1e-2/lr=1e-2.safetensors", 40, 0.9, 0.5, 2.56, 0.4547, 10,
                "lr=1e-2/lr=1e-2-best.safetensors", 1.0, 0.52, 2.0, 62.0, 1.0, remarks=("ended worse than the base",)),
        Outcome("lr=1e5", "lr=1e5/lr=1e5.safetensors", 2, base_loss=0.5, problem="The loss is nan"),
    )  # fmt: skip
    records = (
        record(out / "lr=1e-4", Loss(20, 0.3, out / "lr=1e-4/lr=1e-4-best.safetensors"), Loss(40, 0.35),
               Loss(40, 0.29, out / "lr=1e-4/lr=1e-4-ema.safetensors")),
        record(out / "lr=1e-2", Loss(10, 0.4547), Loss(40, 2.56)),
    )  # fmt: skip
    grids = (out / "samples.png",)
    print_sweep(Swept(outcomes, Comparison(records, (), (), (), "lr=1e-4"), grids))
    said = capsys.readouterr()
    assert [line.rstrip() for line in said.out.splitlines()] == [
        "Held-out loss, and the loss on images that were trained on (probe)",
        "run      steps    base   final    best  at     EMA   probe       time",
        "lr=1e-4     40  0.5000  0.3500  0.3000  20  0.2900  0.2000  1 min 1 s",
        "lr=1e-2     40  0.5000  2.5600  0.4547  10  1.0000  2.0000  1 min 2 s",
        "lr=1e5       2  0.5000",
        "lr=1e-2: ended worse than the base",
        "lr=1e5: The loss is nan",
        "pictures sweeps/x/samples.png, after the last step of each run",
        "best     lr=1e-4, step 20, held-out loss 0.3000, sweeps/x/lr=1e-4/lr=1e-4-best.safetensors",
        "lower    the EMA of lr=1e-4, 0.2900, sweeps/x/lr=1e-4/lr=1e-4-ema.safetensors",
        "Next, draw the best itself: k5train sample sweeps/x/lr=1e-4 --which best",
    ]
    probed = tuple(replace(o, base_loss=None, final_loss=None, best_loss=None, best_step=None, ema_loss=None)
                   for o in outcomes[:2])  # fmt: skip
    reason = "No run is called the best, because lr=1e-4 and lr=1e-2 held no images out"
    print_sweep(Swept(probed, Comparison(records, (), (), (), None, reason), grids))
    said = capsys.readouterr()
    assert [line.rstrip() for line in said.out.splitlines()[1:4]] == [
        "run      steps  probe base   probe       time",
        "lr=1e-4     40      0.5200  0.2000  1 min 1 s",
        "lr=1e-2     40      0.5200  2.0000  1 min 2 s",
    ]
    assert said.err == f"warning: {reason}\n"
    assert said.out.splitlines()[-1] == "Next, see their settings and curves: k5train compare sweeps/x"


def test_a_sweep_without_a_split_measures_the_probe_and_calls_no_run_the_best(tmp_path, cache, toy_model):
    config = replace(CONFIG, steps=1, optim=OptimConfig(warmup_steps=0))
    runs = [SweepRun(name, replace(config, optim=replace(config.optim, lr=lr))) for name, lr in (("a", 1e-9), ("b", 1))]
    swept = sweep(cache, tmp_path / "out", ModelConfig(path=str(toy_model)), runs)
    a, b = swept.outcomes
    assert a.base_probe_loss == b.base_probe_loss == pytest.approx(a.probe_loss, rel=1e-6)
    assert swept.comparison.best is None
    lowest = min(swept.outcomes, key=lambda outcome: outcome.probe_loss)
    assert "--set train.validation.split=0.1" in swept.comparison.reason
    assert f"{lowest.label} has the lowest loss, {lowest.probe_loss:.4f}" in swept.comparison.reason
    assert outcome_of(Run(tmp_path / "out" / "a").root) == a


# Options that do nothing


def test_what_run_warns_of_is_said_once_with_the_runs_that_it_is_about():
    document = Document({"train": {"objective": {"snr_gamma": 1.0}, "lora": {"decompose_factor": 4}}})
    _, runs = sweep_runs(document, ["train.objective.weighting=none,min_snr", "train.lora.rank=4,8"], None)
    said = warnings_of(runs, lambda run: options_without_effect(run.config))
    assert said == [
        "weighting=none,rank=4, weighting=none,rank=8: train.objective.snr_gamma does nothing here: it belongs to "
        "train.objective.weighting = min_snr",
        "train.lora.decompose_factor does nothing here: it belongs to train.lora.algo = lokr",
    ]


def test_a_line_of_the_grid_that_does_nothing_in_any_run_is_refused():
    grid = ["train.lora.rank=4,8", "train.objective.snr_gamma=5,1"]
    with pytest.raises(RecipeError, match=r"--grid train\.objective\.snr_gamma=5,1 trains the same LoRA again: train"):
        sweep_runs(Document(), grid, None)
    sweep_runs(Document(), ["train.optim.lr=1e-4,1e-3", "train.steps=10,20"], None)  # never reached, and not the same
    assert len(sweep_runs(Document(), [*grid, "train.objective.weighting=none,min_snr"], None)[1]) == 8

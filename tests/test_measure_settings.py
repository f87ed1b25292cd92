"""Does the trial of settings train on the drawings it claims, with the settings it claims, and report what it found?"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, replace
from functools import partial
from itertools import pairwise

import pytest
import typer
from PIL import Image
from typer.testing import CliRunner

from k5cache.shared.errors import RecipeError, RunError
from k5cache.shared.model import ModelConfig
from k5train.options.data import DataConfig
from k5train.runs.folder import Run
from pipelines.measure import judged
from pipelines.measure.settings import __main__ as command
from pipelines.measure.settings import concepts, grid, pictures, tables, trial

pytestmark = pytest.mark.long

# Of the pixels of a concept's first training picture; drawn and looked at with Pillow 13.
PIXELS = {"lines": "5db2343c32ee730d", "mosaic": "480fbda25c5a3fca", "creature": "93a8f561afc94e50"}
CAPTIONS = {
    "lines": ("alien, red ink line drawing style, white background", "ambulance, flat emoji style, white background"),
    "mosaic": ("alien, tile mosaic style, white background", "ambulance, flat emoji style, white background"),
    "creature": (
        "blorp monster jumping, flat emoji style, white background",
        "monster standing, flat emoji style, white background",
    ),
}
"""The first one that is trained on, and the first one without the concept's words."""


@pytest.mark.parametrize("concept", concepts.CONCEPTS)
def test_a_concept_is_drawn_alike_every_time_and_what_it_is_judged_on_is_not_trained_on(concept):
    folders = concepts.folders(concept)
    trained, held_out, unnamed = (folders[name] for name in ("trained", "held_out", "unnamed"))
    assert hashlib.sha256(trained[0].picture.tobytes()).hexdigest()[:16] == PIXELS[concept]
    assert (trained[0].caption, unnamed[0].caption) == CAPTIONS[concept]
    assert (len(trained), len(held_out), len(unnamed)) == (24, 12, 12)
    pictures = [hashlib.sha256(p.picture.tobytes()).digest() for p in (*trained, *held_out)]
    assert len({*pictures}) == len({p.caption for p in (*trained, *held_out)}) == 36
    assert [p.picture.tobytes() for p in unnamed] == [p.picture.tobytes() for p in held_out]


def test_forgetting_is_measured_on_drawings_that_regularisation_does_not_train_on(tmp_path):
    known, of_class = concepts.write_known(tmp_path)
    hashes = [{hashlib.sha256(p.read_bytes()).digest() for p in folder.glob("*.png")} for folder in (known, of_class)]
    assert [len(h) for h in hashes] == [12, 40]
    assert not hashes[0] & hashes[1]
    assert (of_class / "bear.txt").read_text(encoding="utf-8") == "bear, flat emoji style, cream background\n"


def test_every_setting_differs_from_the_centre_in_what_its_name_says_alone(tmp_path):
    def recipe(setting: grid.Setting) -> dict[str, object]:
        return asdict(grid.recipe(grid.Job(setting, "creature", 0), tmp_path / "a", tmp_path / "b", ["a fox"]))

    centre = recipe(grid.Setting("centre", "", {}))
    differing = {}
    for setting in grid.SETTINGS:
        mine = recipe(setting)
        changed = {key: value for key, value in mine.items() if value != centre[key]}
        differing[f"{setting.group}={setting.name}"] = changed.keys() - {"steps", "checkpoint_every", "validation"}
    assert differing == {
        **{f"rate={rate}": {"optim"} for rate in ("3e-5", "1e-4", "3e-4", "1e-3")},
        "trigger=with regularisation data": {"data"},
        "trigger=with regularisation data, 3e-4": {"data", "optim"},
        **{f"rank={rank}": {"lora"} for rank in (4, 16, 64)},
        **{f"targets={name}": {"lora"} for name in ("attention", "qkv")},
        **{f"caption dropout={share}": {"caption_dropout_probability"} for share in (0.0, 0.5)},
        "shift=3": {"flow_schedule_shift"},
        **{f"adapter={name}": {"lora", "optim"} for name in ("rslora, 1.8e-5", "lokr, 2e-3")},
        **{f"adapter={name}": {"lora"} for name in ("rslora, 1e-4", "dora, 1e-4", "lokr, 1e-4")},
        "rollout=0.2": {"rollout"},
        "TREAD=0.5": {"tread"},
        "TREAD=0.5 with a ramp": {"tread"},
        "batch=1": {"batch_size"},
        "batch=4": {"batch_size"},
    }
    with_class = next(setting for setting in grid.SETTINGS if setting.with_class)
    data = grid.recipe(grid.Job(with_class, "creature", 0), tmp_path / "a", tmp_path / "b", []).data
    assert data == (
        DataConfig(str(tmp_path / "a"), weight=1.0),
        DataConfig(str(tmp_path / "b"), weight=1.0, is_regularisation_data=True),
    )


def test_all_settings_are_run_with_one_seed_before_the_next_and_the_longest_first():
    jobs = list(grid.jobs(2))
    assert len({job.key for job in jobs}) == len(jobs) == 2 * (3 * 22 + 2)
    assert all(a.seed <= b.seed for a, b in pairwise(jobs))
    assert all(grid.cost(a.setting) >= grid.cost(b.setting) for a, b in pairwise(jobs) if a.seed == b.seed)


def test_a_group_that_does_not_exist_is_refused_with_the_names_of_those_that_do(monkeypatch):
    monkeypatch.setattr(command.torch, "set_num_threads", lambda count: None)
    with pytest.raises(
        RecipeError, match="no group of settings called ranks\nGive one of: rate, trigger, rank, targets"
    ):
        command.main(only="ranks")


@pytest.fixture
def toy_place(tmp_path, toy_model, toy_cache, monkeypatch):
    """A trial on the toy: all its caches are one, and it compares two settings after one and two steps."""
    monkeypatch.setattr(command.torch, "set_num_threads", lambda count: None)
    monkeypatch.setattr(trial, "MICRO", toy_model)
    monkeypatch.setattr(trial, "MEASURED_ON", ("held_out", "known"))
    monkeypatch.setattr(judged, "held_out_losses", partial(judged.held_out_losses, num_sigmas=1))
    monkeypatch.setattr(trial, "RECIPE", replace(trial.RECIPE, model=ModelConfig(path=str(toy_model))))
    settings = [s for s in grid.SETTINGS if s.name in ("1e-4", "4") and s.group in ("rate", "rank")]
    short = tuple(replace(grid.shortened(s, 1 / 400), is_drawn=False, concepts=("creature",)) for s in settings)
    monkeypatch.setattr(command, "SETTINGS", short)
    monkeypatch.setattr(concepts, "CONCEPTS", ("creature",))
    place = trial.Place(tmp_path / "place")
    (place.root / "caches").mkdir(parents=True)
    for name in ("trained", "held_out", "unnamed", "known", "class"):
        place.cache("creature", name).symlink_to(toy_cache("fp32"))
    monkeypatch.setattr(trial, "prepare", lambda root: place)
    return place


def test_the_command_trains_measures_and_does_nothing_twice(toy_place, tmp_path, monkeypatch):
    app = typer.Typer()
    app.command()(command.main)
    out = tmp_path / "settings.json"
    arguments = ["--seeds", "1", "--workers", "1", "-o", str(out)]
    done = CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert done.exit_code == 0
    results = json.loads(out.read_text(encoding="utf-8"))["results"]
    assert results.keys() == {"base/creature", "rate=1e-4/creature/0", "rank=4/creature/0"}
    base, rate = results["base/creature"], results["rate=1e-4/creature/0"]
    assert rate["measured"].keys() == {"1", "2", "ema"}
    assert rate["seconds_per_step"] > 0
    assert base["measured"]["0"]["known"] == base["measured"]["0"]["held_out"]  # one cache here
    assert rate["measured"]["2"] != rate["measured"]["1"] != base["measured"]["0"]

    monkeypatch.setattr(trial, "make", None)
    again = CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert again.exit_code == 0
    assert again.stdout == done.stdout
    assert json.loads(out.read_text(encoding="utf-8"))["results"] == results


def test_a_run_that_explodes_is_noted_and_the_trial_goes_on(toy_place, monkeypatch):
    def explode(*_):
        raise RunError("the loss is not finite at step 3", "Lower the rate")

    monkeypatch.setattr(judged, "train_lora", explode)
    job = grid.Job(command.SETTINGS[0], "creature", 0)
    assert trial.make(trial.Task(toy_place, "creature", job)) == {
        "error": "the loss is not finite at step 3", "measured": {},
    }  # fmt: skip


def run_of(held_out: float, known: float, seconds: float = 1.0, *steps: str) -> dict[str, object]:
    """What a run has found, with the same losses after all steps."""
    losses = {"held_out": [held_out, held_out], "unnamed": [0.5, 0.5], "known": [known, known]}
    return {"seconds_per_step": seconds, "measured": dict.fromkeys(steps or ("400",), losses)}


def test_tables_show_shares_of_the_base_with_the_spread_of_the_seeds():
    results = {
        "base/creature": {"measured": {"0": {"held_out": [0.2, 0.6], "unnamed": [0.5, 0.5], "known": [0.1, 0.3]}}},
        "rate=1e-4/creature/0": run_of(0.2, 0.2),
        "rate=1e-4/creature/1": run_of(0.24, 0.26),
        "rank=4/creature/0": run_of(0.3, 0.21),
        "rank=16/creature/0": {"error": "exploded", "measured": {}},
        "TREAD=0.5/creature/0": run_of(0.22, 0.2, 0.8, "400", "560"),
        "trigger=with regularisation data/creature/0": run_of(0.1, 0.2),
    }
    assert tables.rates(results).splitlines() == [
        "| rate | line style: learned | line style: forgot | mosaic: learned | mosaic: forgot"
        " | creature: learned | creature: forgot |",
        "| --- | --- | --- | --- | --- | --- | --- |",
        "| 1e-4, 400 steps |  |  |  |  | 0.55 ± 0.05 | 1.15 ± 0.15 |",
    ]
    assert tables.one_option(results).splitlines()[2:] == [
        "| the centre |  |  |  |  | 0.55 ± 0.05 | 1.15 ± 0.15 |",
        "| rank 4 |  |  |  |  | 0.75 | 1.05 |",
        "| TREAD 0.5 |  |  |  |  | 0.55 | 1.00 |",
        "| TREAD 0.5, 560 steps |  |  |  |  | 0.55 | 1.00 |",
    ]
    assert tables.trigger(results).splitlines()[2:] == [
        "| trigger alone, rate 1e-4 | 400 | 0.55 ± 0.05 | 1.00 ± 0.00 | 1.15 ± 0.15 |",
        "| with regularisation data, rate 1e-4 | 400 | 0.25 | 1.00 | 1.00 |",
    ]
    assert "| TREAD 0.5 | 0.80 |" in tables.slower(results)


def test_a_sheet_has_a_row_for_the_base_and_each_run_that_drew_and_is_not_written_without(tmp_path):
    place, out = trial.Place(tmp_path), tmp_path / "settings.json"
    assert pictures.write_sheets(place, out) == []
    setting = next(s for s in grid.SETTINGS if s.name == "with regularisation data")
    for step, colour in ((0, "red"), (800, "blue")):
        folder = Run(place.run(grid.Job(setting, "creature", 0))).samples(step)
        folder.mkdir(parents=True)
        for i in range(3):
            Image.new("RGB", (128, 128), colour).save(folder / f"{i:02}.png")
    assert pictures.write_sheets(place, out) == [tmp_path / "settings-trigger.png"]
    with Image.open(tmp_path / "settings-trigger.png") as sheet:
        colours = {colour: count for count, colour in sheet.convert("RGB").getcolors()}
    assert (colours[255, 0, 0], colours[0, 0, 255]) == (3 * 128 * 128, 3 * 128 * 128)

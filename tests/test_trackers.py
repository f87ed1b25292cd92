"""TensorBoard, wandb and trackio get the numbers of metrics.jsonl and the pictures, all offline."""

from __future__ import annotations

import importlib.util
import sqlite3
from dataclasses import replace

import pytest
from PIL import Image

from k5cache.shared.errors import RunError
from k5cache.shared.model import ModelConfig
from k5train.options.validation import TrackersConfig
from k5train.runs.folder import Run, new_run
from k5train.runs.metrics import Metrics, _numbers
from k5train.runs.trackers import check_trackers, open_trackers
from k5train.training.start import open_data
from k5train.training.train import train
from tests.runs import CONFIG, metrics_of, start_run

RECIPE = {"lora": {"rank": 2}}
PICTURE = Image.new("RGB", (16, 16), "red")


def write_two_steps(run: Run, config: TrackersConfig) -> None:
    """Write three lines and a picture, with a restart in between."""
    run.root.mkdir(parents=True, exist_ok=True)
    with Metrics(run.metrics, 0, open_trackers(config, run, RECIPE, 0)) as metrics:
        metrics.write(step=1, loss=0.5, lr=1e-4)
        metrics.pictures(1, {"a red fox": PICTURE})
        metrics.write(step=2, loss=0.75)
    with Metrics(run.metrics, 1, open_trackers(config, run, RECIPE, 1)) as metrics:
        metrics.write(step=2, loss=0.25, held_out_by_sigma=[0.1, 0.2])


def test_metrics_after_a_restart_have_no_step_twice_and_none_missing(tmp_path):
    run = Run(tmp_path / "run")
    write_two_steps(run, TrackersConfig())
    assert metrics_of(run.root) == [
        {"step": 1, "loss": 0.5, "lr": 1e-4},
        {"step": 2, "loss": 0.25, "held_out_by_sigma": [0.1, 0.2]},
    ]


def test_trackers_get_numbers_and_no_row_numbers_keys_or_nulls():
    values = {
        "loss": 0.5,
        "loss_by_sigma": [0.25, None],
        "rows": [3, 4],
        "num_rows": 2,
        "held_out_key": "ab",
        "lr": None,
    }
    assert _numbers(values) == {"loss": 0.5, "loss_by_sigma/0": 0.25, "num_rows": 2}


def test_a_line_that_a_crash_cut_is_dropped(tmp_path):
    run = Run(tmp_path / "run")
    write_two_steps(run, TrackersConfig())
    with run.metrics.open("a") as file:
        file.write('{"step": 3, "lo')
    with Metrics(run.metrics, 2) as metrics:
        metrics.write(step=3, loss=0.125)
    assert [row["step"] for row in metrics_of(run.root)] == [1, 2, 3]


def test_tensorboard_has_every_number_and_the_pictures(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = Run(tmp_path / "run")
    write_two_steps(run, TrackersConfig(use=("tensorboard",)))
    events = EventAccumulator(str(run.root / "tensorboard"))
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("loss")] == [(1, 0.5), (2, 0.25)]  # repeated steps are gone
    assert {"loss", "lr", "held_out_by_sigma/0", "held_out_by_sigma/1"} <= set(events.Tags()["scalars"])
    assert events.Images("a red fox")[0].width == 16


def test_wandb_writes_offline_into_the_run_and_takes_the_same_run_up_again(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_DISABLE_CODE", "true")
    run = Run(tmp_path / "run")
    write_two_steps(run, TrackersConfig(use=("wandb",), offline=True))
    folders = [p for p in (run.root / "wandb").glob("offline-run-*") if p.is_dir()]
    assert folders
    identity = (run.root / "wandb" / "id").read_text()
    assert all(identity in p.name for p in folders)  # two starts in one second: the second ends in -1
    assert any(path.suffix == ".png" for p in folders for path in p.rglob("*"))
    assert all(any(p.glob("*.wandb")) for p in folders)


def test_wandb_that_does_not_start_is_two_lines_and_leaves_no_run(tmp_path, toy_cache, toy_model, monkeypatch):
    wandb = pytest.importorskip("wandb")

    def no_key(**options):
        raise wandb.Error("No API key configured.\nAnd more")

    monkeypatch.setattr(wandb, "init", no_key)
    config = replace(CONFIG, trackers=TrackersConfig(use=("wandb",)))
    data = open_data(toy_cache("fp32"), config)
    with (
        pytest.raises(RunError, match="wandb does not start: No API key") as caught,
        new_run(tmp_path / "run", toy_cache("fp32"), ModelConfig(path=str(toy_model)), config) as run,
    ):
        train(data, toy_model, config, run)
    assert "\n" not in caught.value.problem
    assert "train.trackers.offline=true" in caught.value.fix
    assert not (tmp_path / "run").exists()


def test_trackio_keeps_numbers_and_pictures_locally_and_prints_no_token(tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))  # trackio reads this only when it is imported
    pytest.importorskip("trackio")
    run = Run(tmp_path / "run")
    write_two_steps(run, TrackersConfig(use=("trackio",), project="test-project"))
    shown = capfd.readouterr()
    assert shown.out + shown.err == ""
    (database,) = (tmp_path / "trackio").rglob("test-project*.db")
    with sqlite3.connect(database) as connection:
        rows = connection.execute("select step, metrics from metrics").fetchall()
    text = " ".join(str(row) for row in rows)
    assert "0.25" in text
    assert "a red fox" in text


def test_a_tracker_that_is_not_installed_is_named_with_its_extra_before_anything_is_loaded(
    tmp_path, toy_cache, toy_model, monkeypatch
):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "wandb" else find(name, *a))
    with pytest.raises(RunError, match="names wandb, which is not installed") as caught:
        check_trackers(TrackersConfig(use=("tensorboard", "wandb")))
    assert 'pip install "kandinsky5-lora[wandb]"' in caught.value.fix
    monkeypatch.setattr("k5train.training.carry_out.load_base", None)
    config = replace(CONFIG, trackers=TrackersConfig(use=("wandb",)))
    with pytest.raises(RunError, match="names wandb"):
        start_run(tmp_path / "run", toy_cache("fp32"), toy_model, config)


def test_a_run_tells_tensorboard_its_steps(tmp_path, toy_cache, toy_model):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    config = replace(CONFIG, steps=2, trackers=TrackersConfig(use=("tensorboard",)))
    start_run(tmp_path / "run", toy_cache("fp32"), toy_model, config)
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    events.Reload()
    losses = [row["loss"] for row in metrics_of(tmp_path / "run")]
    assert [e.value for e in events.Scalars("loss")] == pytest.approx(losses, rel=1e-6)  # it keeps float32

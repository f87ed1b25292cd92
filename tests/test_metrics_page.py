"""docs/metrics.md names every field that runs write, and no other; and says rightly when each is there."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from k5cache.store.manifest import read_manifest, write_manifest
from k5cache.store.reader import open_cache
from k5train.options.data import DataConfig
from k5train.options.objective import ObjectiveConfig, RolloutConfig
from k5train.options.optimizer import OptimConfig
from k5train.options.validation import ValidationConfig
from k5train.training import fields
from tests.runs import CONFIG, metrics_of, start_run
from tests.test_readme import ROOT, table_under

PAGE = ROOT / "docs" / "metrics.md"
SPLIT = "with `split`"
WHEN = {  # what the page says -> whether it is so in the plain run, and in the one with everything
    "always": (True, True),
    "up to 64 rows an update": (True, True),
    "with the optimizer `prodigy`": (False, True),
    "steps with a rollout": (False, True),
    "on a GPU": (False, False),
    "with `epochs`": (False, False),
    SPLIT: (False, True),
    f"{SPLIT}, and in a sweep": (False, True),
    f"{SPLIT} and `ema_decay`, not at step 0": (False, True),
    "with `preservation_weight`": (False, True),
    f"{SPLIT} and regularisation data": (False, True),
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory, toy_cache, toy_model) -> tuple[list[dict], list[dict]]:
    """The lines of a plain run of two steps, and of one step with all that adds a field."""
    pytest.importorskip("prodigyopt")
    root = tmp_path_factory.mktemp("metrics_page")
    cache = toy_cache("fp32")
    prior = Path(shutil.copytree(cache, root / "prior"))
    trained_on = Path(shutil.copytree(cache, root / "trained_on"))
    keys = open_cache(trained_on).columns("caption_keys").column(0).to_pylist()
    classes = {key: key for of_item in keys for key in of_item}  # each caption is its own class caption
    write_manifest(trained_on, replace(read_manifest(trained_on), classes=classes))
    plain = replace(CONFIG, steps=2, checkpoint_every=0, optim=OptimConfig(lr=1e-3))
    everything = replace(
        plain,
        steps=1,
        objective=ObjectiveConfig(preservation_weight=1.0),
        data=(DataConfig(str(trained_on)), DataConfig(str(prior), is_regularisation_data=True)),
        optim=OptimConfig(optimizer="prodigy", lr=1.0, ema_decay=0.9),
        rollout=RolloutConfig(probability=1.0, min_sigma=0.0),
        validation=ValidationConfig(split=0.34, held_out_every=1, held_out_sigmas=3),
    )
    start_run(root / "plain", cache, toy_model, plain)
    start_run(root / "everything", None, toy_model, everything)
    return metrics_of(root / "plain"), metrics_of(root / "everything")


def fields_under(heading: str) -> dict[str, list[str]]:
    """The cells of each field of a table of the page."""
    return {row[0].strip("`"): row for row in table_under(PAGE, heading) if row[0] != "field"}


@pytest.mark.parametrize(("heading", "mark"), [("A step", "loss"), ("A measurement", "probe_loss")])
def test_the_page_lists_every_field_that_runs_write_and_when(runs, heading, mark):
    table = fields_under(heading)
    for number, lines in enumerate(runs):
        written = {name for line in lines if mark in line for name in line}
        expected = {name for name, row in table.items() if WHEN[row[3]][number]}
        assert written == (expected if number or heading == "A step" else set())
    assert all(row[1] and row[2] for row in table.values())


def test_the_fields_of_a_step_have_the_values_that_the_page_says(runs):
    plain, everything = ([line for line in lines if "loss" in line] for lines in runs)
    for line in plain:
        assert line["num_rows"] == len(line["rows"]) in (1, CONFIG.batch_size)  # a bucket of the toy has one row
        assert line["images_per_second"] == pytest.approx(line["num_rows"] / line["seconds"], rel=1e-3)
        parts = [part for part in line["loss_by_sigma"] if part is not None]
        assert len(line["loss_by_sigma"]) == ValidationConfig().held_out_sigmas
        assert len(parts) <= 2
        # Two rows and no weights: the loss is the mean of both errors, in one part of sigma or in two.
        assert sum(parts) / len(parts) == pytest.approx(line["loss"], rel=1e-5)
    for line in everything:
        assert len(line["loss_by_sigma"]) == 3
        assert line["prodigy_d"] > 0
        assert line["rollout_passes"] > 0


def test_of_a_gpu_the_page_lists_what_is_written(monkeypatch):
    stats = {"reserved_bytes.all.peak": 3 * 2**30, "allocated_bytes.all.peak": 2**30}
    monkeypatch.setattr(torch.cuda, "memory_stats", lambda device: stats)
    written = fields.memory_of(torch.device("cuda"), 5 * 2**29)
    assert written == {"peak_reserved_gib": 3.0, "peak_allocated_gib": 1.0, "planned_gib": 2.5}
    assert {name for name, row in fields_under("A step").items() if row[3] == "on a GPU"} == set(written)


def test_a_run_by_epochs_writes_how_many_steps_these_are():
    assert fields.steps_of(replace(CONFIG, steps=120, epochs=3)) == {"steps": 120}
    assert fields.steps_of(CONFIG) == {}


def test_a_long_list_of_rows_is_left_out():
    assert fields.rows_of(range(65), 2.0) == {"num_rows": 65, "images_per_second": 32.5}
    assert fields.rows_of((3, 1), 2.0) == {"num_rows": 2, "rows": [3, 1], "images_per_second": 1.0}

"""A comparison for pages and reports: the verdict, the tables, the curves, the pictures beside each other."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from k5cache.shared.errors import RunError
from k5train.pictures.compared import compare_pictures, shared_steps
from k5train.pictures.saved import files_of, save_pictures
from k5train.runs.compared import compare
from k5train.runs.compared_panels import course_of, part_rows, step_rows, time_rows
from k5train.runs.metrics import Metrics, read_metrics
from k5train.runs.panels import COLOURS
from k5train.ui.runs.compare_view import view_of
from tests.test_compare import DRAWN, make


@pytest.fixture
def two(tmp_path) -> list[Path]:
    """``good`` is better than ``fast``; both drew at step 2 too, in the same way."""
    runs = [make(tmp_path / "good", ema=0.39, lr=1e-4), make(tmp_path / "fast", (0.5, 0.48, 0.47), lr=1e-3)]
    for run in runs:
        save_pictures(run.samples(2), [Image.new("RGB", (16, 16))] * 2, DRAWN)
    return [run.root for run in runs]


def test_a_view_says_which_run_is_best_what_differs_and_has_the_pictures_of_every_shared_step(two):
    view = view_of(two)
    assert view.verdict == "The best is good at step 2: held-out loss 0.4000, in good-best.safetensors"
    assert view.notes == (f"the EMA of good, 0.3900, {two[0] / 'good-ema.safetensors'}, is lower still",)
    assert view.columns == ("Steps", "Base", "Final", "Best", "At step", "LoRA", "EMA", "Time", "Seconds a step",
                            "VRAM, GiB")  # fmt: skip
    best, other = view.results
    assert (best.name, best.is_best, best.remarks) == ("good", True, ("ended above its best",))
    assert best.cells == ("4", "0.5000", "0.4500", "0.4000", "2", "best", "0.3900", "9.0 s", "0.62", "7.5")
    assert (other.name, other.is_best, other.cells[3:5]) == ("fast", False, ("0.4700", "4"))
    assert view.settings.columns == ("train.optim.lr",)
    assert view.settings.rows == (("good", ("0.0001",)), ("fast", ("0.001",)))
    assert [(step.label, len(step.prompts)) for step in view.pictures] == [("Step 2", 2), ("Step 4", 2)]
    prompt, tiles = view.pictures[0].prompts[1]
    assert prompt == "an owl"
    assert [(tile.label, tile.path) for tile in tiles] == [
        ("base model", two[0] / "samples/step-000000/01.png"),
        ("good", two[0] / "samples/step-000002/01.png"),
        ("fast", two[1] / "samples/step-000002/01.png"),
    ]


def test_runs_that_ended_apart_share_their_common_steps_and_then_have_their_last_pictures(two, tmp_path):
    longer = make(tmp_path / "longer", (0.5, 0.4, 0.4, 0.4))
    save_pictures(longer.samples(2), [Image.new("RGB", (16, 16))] * 2, DRAWN)
    view = view_of([two[0], longer.root])
    assert [step.label for step in view.pictures] == ["Step 2", "The last of each run"]
    labels = [tile.label for tile in view.pictures[1].prompts[0][1]]
    assert labels == ["base model", "good, step 4", "good EMA, step 4", "longer, step 6"]
    other = make(tmp_path / "other", seed=7)
    assert view_of([*two, other.root]).without_pictures == ("No pictures of other: it drew with seed 7 instead of 42",)
    assert shared_steps(compare([*two, longer.root]).runs) == [2]
    assert not compare_pictures(compare(two).runs, 3).rows


def test_a_run_that_was_damaged_costs_only_what_its_files_say(two, tmp_path):
    (two[1] / "metrics.jsonl").write_bytes(b"{\n")
    (two[1] / "samples" / "step-000004" / "drawn.json").write_text("{")
    (two[1] / "samples" / "step-000002" / "01.png").unlink()
    view = view_of(two)
    assert view.results[1].remarks[0] == f"{two[1] / 'metrics.jsonl'}, line 1, is not what the run wrote"
    assert view.by_step
    assert view.pictures[0].label == "Step 2"
    assert files_of(two[1] / "samples" / "step-000004") == []
    empty = make(tmp_path / "empty", (), seed=None)
    assert (view_of([empty.root]).by_step, view_of([empty.root]).pictures) == ((), ())
    with pytest.raises(RunError, match="There is no"):
        view_of([tmp_path / "gone"])


def test_each_run_has_one_colour_in_all_charts_over_steps_time_and_parts_of_sigma(tmp_path):
    runs = [make(tmp_path / name, ()) for name in ("a", "b")]
    for i, run in enumerate(runs):
        with Metrics(run.metrics) as metrics:
            for step in range(401):
                if step:
                    metrics.write(step=step, loss=1 / step, lr=1e-4, seconds=0.5 + i)
                if step % 100 == 0:
                    metrics.write(step=step, held_out_loss=0.4, held_out_key="k", held_out_by_sigma=[0.1, 0.2, 0.6])
    comparison = compare([tmp_path])
    courses = {run.name: course_of(read_metrics(run.root / "metrics.jsonl")) for run in comparison.runs}
    over_steps = {panel.title: panel for row in step_rows(comparison, courses) for panel in row.panels}
    assert [*over_steps] == ["held-out loss", "training loss", "learning rate"]
    for panel in over_steps.values():
        assert [(line.name, line.colour) for line in panel.lines] == [("a", COLOURS[0]), ("b", COLOURS[1])]
    (row,) = time_rows(comparison, courses)
    held_out, training = row.panels
    assert held_out.x_label == "minutes of training, without measurements and pictures"  # 10 minutes of b
    assert [line.points[-1] for line in held_out.lines] == [(pytest.approx(200 / 60), 0.4), (10, 0.4)]
    assert [line.points[-1][0] for line in training.lines] == [pytest.approx(200 / 60), 10]
    (parts,) = part_rows(comparison, courses)
    assert [panel.title for panel in parts.panels] == [
        "sigma 0 to 0.333, least noise", "sigma 0.333 to 0.667", "sigma 0.667 to 1, most noise",
    ]  # fmt: skip
    assert parts.panels[2].lines[1].points[0] == (0, 0.6)


def test_a_course_of_a_long_run_keeps_few_points_and_its_ends():
    course = course_of([{"step": i, "loss": 1.0, "lr": i / 1e6, "seconds": 1.0} for i in range(1, 10_001)])
    assert len(course.rate) < 3100
    assert (course.rate[0], course.rate[-1]) == ((1, 1e-6), (10_000, 0.01))
    assert course.time(10_000) == 10_000
    assert course.time(0) == 0

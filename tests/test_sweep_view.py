"""A sweep as a grid: its axes, how each run stands, the best of them, and why others failed."""

from __future__ import annotations

from pathlib import Path

from k5train.runs.outcomes import Outcome, write_outcomes
from k5train.ui.runs.sweep_view import SweepView, axes_of, read_sweep
from tests.test_compare import make


def view_of(root: Path, *running: str) -> SweepView:
    runs = sorted(path for path in root.iterdir() if path.is_dir())
    return read_sweep(root, runs, lambda run: run.name in running)


def test_the_axes_of_a_grid_are_read_from_the_labels_and_ordered_by_their_numbers():
    assert axes_of(["rank=16,lr=0.0001", "rank=8,lr=5e-05", "rank=8,lr=0.0001"]) == {
        "rank": ("8", "16"),
        "lr": ("5e-05", "0.0001"),
    }
    assert axes_of(["betas=_0.9,0.95_,kind=lora", "betas=_0.9,0.99_,kind=lokr"]) == {
        "betas": ("_0.9,0.95_", "_0.9,0.99_"),
        "kind": ("lokr", "lora"),
    }
    assert axes_of(["rank=8", "small"]) == axes_of(["rank=8", "lr=1"]) == axes_of([]) == {}


def test_every_run_has_a_place_in_the_grid_with_its_state_and_the_best_is_marked(tmp_path):
    make(tmp_path / "rank=8,lr=0.0001", (0.5, 0.45, 0.46))
    make(tmp_path / "rank=8,lr=5e-05", (0.5, 0.4, 0.3))
    make(tmp_path / "rank=16,lr=0.0001", (0.5, 0.1), is_finished=False)
    make(tmp_path / "rank=32,lr=5e-05", (0.5,), is_finished=False)
    failed = Outcome("rank=16,lr=5e-05", "x", problem="The loss is not finite at step 7")
    stopped = Outcome("rank=32,lr=5e-05", "x", problem="not finished: step 0 of 1")
    write_outcomes(tmp_path, [failed, stopped])
    view = view_of(tmp_path, "rank=16,lr=0.0001")
    assert view.columns == ("lr=5e-05", "lr=0.0001")
    assert [name for name, _ in view.rows] == ["rank=8", "rank=16", "rank=32"]
    words = [[cell and cell.word for cell in cells] for _, cells in view.rows]
    assert words == [["finished", "finished"], ["failed", "running"], ["stopped", None]]
    assert view.verdict == "The best is rank=8,lr=5e-05 at step 4: held-out loss 0.3000"  # of the finished ones
    assert view.counts == (("running", 1), ("finished", 2), ("stopped", 1), ("failed", 1))
    best = view.rows[0][1][0]
    assert (best.is_best, best.loss, best.at, best.picture) == (True, 0.3, 4, best.root / "samples/step-000004/00.png")
    assert view.rows[1][1][0].why == "The loss is not finite at step 7"
    assert (view.rows[1][1][1].step, view.rows[1][1][1].steps) == (2, 2)


def test_a_sweep_over_a_list_has_no_axes_and_a_damaged_run_says_what_is_wrong(tmp_path):
    make(tmp_path / "small"), make(tmp_path / "large")
    (tmp_path / "large" / "metrics.jsonl").write_bytes(b"{\n")
    view = view_of(tmp_path)
    assert (view.axes, [cell.word for cell in view.cells]) == ((), ["damaged", "finished"])
    assert "line 1, is not what the run wrote" in view.cells[0].why
    (tmp_path / "small" / "result.json").unlink()  # it is trained again
    again = view_of(tmp_path)
    assert (again.cells[1].word, again.verdict) == ("stopped", "No run is finished yet")
    assert read_sweep(tmp_path, [], lambda run: False).cells == []

"""The first page: what it suggests next, from an empty folder to several runs, and what it reads of a run."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from k5cache.shared.lock import lock_file
from k5train.ui.overview_view import read_overview
from k5train.ui.project import Project
from tests.store_samples import make_cache
from tests.test_compare import make as make_run
from tests.test_jobs import written
from tests.ui_project import client_of


@pytest.fixture
def project(tmp_path) -> Project:
    return Project(tmp_path.resolve())


def suggested(project: Project) -> list[str]:
    return [f"{step.words}: {step.label}" for step in read_overview(project).steps]


def test_the_next_step_is_the_one_that_comes_next(project):
    root = project.root
    first = "There are no pictures yet. Drop some on the page Data, or put them into datasets/NAME: Add pictures"
    assert suggested(project) == [first]
    (root / "datasets" / "cats").mkdir(parents=True)
    assert suggested(project) == ["cats is not encoded yet: Look at it and encode it"]
    make_cache_in(root / "cache" / "cats")
    assert suggested(project) == ["The cache cats can be trained on: Train a LoRA"]
    make_run(root / "runs" / "cats", cache="../../cache/cats")
    assert suggested(project) == ["cats is trained: See its pictures"]
    make_run(root / "runs" / "more", is_finished=False)
    assert suggested(project)[0] == "more has not ended, and can go on: Look at it"
    with lock_file(root / "runs" / "more" / ".lock"):
        view = read_overview(project)
        assert [(run.entry.name, run.state) for run in view.runs] == [("more", "running"), ("cats", "finished")]
        assert suggested(project) == ["cats is trained: See its pictures"]
    written(project, ended={"exit_code": 1, "at": 2.0})
    assert suggested(project)[0].startswith("x ")
    assert suggested(project)[0].endswith(": See why")


def test_a_run_whose_job_failed_is_called_failed(project):
    make_run(project.root / "runs" / "x", is_finished=False)
    written(project, ended={"exit_code": 1, "at": 2.0})
    assert [run.state for run in read_overview(project).runs] == ["failed"]


def make_cache_in(path: Path) -> None:
    path.parent.mkdir(parents=True)
    make_cache(path)


def test_a_card_says_how_far_a_run_is_whatever_its_files_hold(project):
    run = make_run(project.root / "runs" / "cats", (0.5, 0.4), is_finished=False)
    (card,) = read_overview(project).runs
    assert (card.step, card.steps, card.loss, card.held_out) == (2, 2, 1.0, 0.4)
    assert card.picture.startswith(f"/runs/{card.entry.id}/pictures/run/2/0?v=")
    with run.metrics.open("ab") as file:
        file.write(b'nonsense\n[1]\n{"step": "x", "loss": "y"}\n{"step": 3, "loss": 3.0}\n{"step": 4, "lo')
    (card,) = read_overview(project).runs
    assert (card.step, card.loss) == (3, 5 / 3)
    for name in ("metrics.jsonl", "recipe.toml"):
        (run.root / name).unlink()
        (run.root / name).symlink_to("/dev/zero")
    (card,) = read_overview(project).runs
    assert (card.step, card.steps, card.loss) == (None, None, None)


def test_the_first_page_names_links_that_lead_out_and_shows_parts_that_change(project, tmp_path_factory):
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    (project.root / "datasets").mkdir()
    (project.root / "datasets" / "cats").symlink_to(elsewhere)
    Image.new("RGB", (8, 8)).save(elsewhere / "a.png")
    with client_of(project)[0] as client:
        html, events = client.get("/").text, client.get("/events").text
    assert "links that lead out of the project: datasets/cats" in html
    assert [line for line in events.splitlines() if line.startswith("event:")] == [
        "event: overview-now", "event: overview-next", "event: overview-runs",
    ]  # fmt: skip

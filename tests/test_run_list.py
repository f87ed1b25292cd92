"""The list of runs: how each goes, filters, pages, states, and that it stays fast with many."""

from __future__ import annotations

import json
import os
import shutil
import time
from dataclasses import replace

import pytest
from starlette.testclient import TestClient

from k5cache.shared.lock import lock_file
from k5train.ui.app import create_app
from k5train.ui.ids import id_of
from k5train.ui.jobs.job import Job
from k5train.ui.project import Project
from k5train.ui.runs.listed import PAGE, read_facts, read_list
from tests.test_compare import make


@pytest.fixture
def project(tmp_path) -> Project:
    """A finished and a stopped run, and a sweep of two."""
    make(tmp_path / "runs" / "good", ema=0.39)
    make(tmp_path / "runs" / "Half", (0.5, 0.48), is_finished=False)
    for name in ("rank=8", "rank=16"):
        make(tmp_path / "sweeps" / "ranks" / name, is_finished=name == "rank=8")
    (tmp_path / "sweeps" / "ranks" / "sweep.json").write_text("[]")
    return Project(tmp_path)


def names(project: Project, **asked: object) -> list[str]:
    return [item.entry.name for item in read_list(project, **asked).items]  # type: ignore[arg-type]


def test_each_run_says_how_far_it_is_and_what_its_lowest_loss_was(project):
    facts = read_facts(project.root / "runs" / "good")
    assert (facts.step, facts.steps, facts.loss, facts.at, facts.training) == (4, 4, 0.4, 2, 1.0)
    assert (facts.curve, facts.is_held_out) == (((0, 0.5), (2, 0.4), (4, 0.45)), True)
    assert facts.picture == project.root / "runs/good/samples/step-000004/00.png"


def test_a_sweep_has_the_lowest_loss_of_its_runs_and_that_runs_curve_and_picture(project):
    sweep = project.root / "sweeps" / "ranks"
    make(sweep / "rank=32", (0.5, 0.3125, 0.45))
    (item,) = read_list(project, search="ranks").items
    assert (item.lowest.name, item.facts.loss, item.facts.at) == ("rank=32", 0.3125, 2)
    page = TestClient(create_app(project), base_url="http://127.0.0.1:8001").get("/runs?q=ranks").text
    assert "lowest: rank=32" in page
    assert "<strong>0.3125</strong>" in page
    assert f"/runs/{id_of('sweeps/ranks/rank=32')}/pictures/" in page
    for run in sweep.iterdir():
        if run.is_dir():
            (run / "metrics.jsonl").write_text('{"step": 1, "loss": 0.5}\n')
    (item,) = read_list(project, search="ranks").items
    assert (item.lowest, item.facts.loss) == (None, None)


def test_the_list_is_filtered_by_name_and_state_and_sorted_with_what_runs_first(project):
    for i, name in enumerate(("runs/good", "runs/Half", "sweeps/ranks", "sweeps/ranks/rank=8", "sweeps/ranks/rank=16")):
        for path in (project.root / name, project.root / name / "metrics.jsonl"):
            if path.exists():
                os.utime(path, (i, i))
    assert names(project) == ["ranks", "Half", "good"]
    assert names(project, sort="name") == ["good", "Half", "ranks"]
    assert names(project, search="HA") == ["Half"]
    assert names(project, word="stopped") == ["ranks", "Half"]
    assert read_list(project).items[0].counts == (("finished", 1), ("stopped", 1))
    with lock_file(project.root / "runs" / "good" / ".lock"):
        assert names(project) == ["good", "ranks", "Half"]
        assert names(project, word="running") == ["good"]


def test_a_run_whose_job_failed_says_why_and_one_that_waits_says_that(project, monkeypatch):
    about = {"runs/Half": Job("1", project.root, "", (), "run", "runs/Half", "failed", 1, exit_code=2)}
    monkeypatch.setattr("k5train.ui.runs.listed.jobs_of", lambda project: about)
    monkeypatch.setattr("k5train.ui.runs.state.error_of", lambda job: ("It does not <fit>", "Take less"))
    page = TestClient(create_app(project), base_url="http://127.0.0.1:8001")
    assert "It does not &lt;fit&gt;" in page.get("/runs?state=failed").text
    about["runs/Half"] = replace(about["runs/Half"], state="waiting")
    assert names(project, word="waiting") == ["Half"]


@pytest.mark.parametrize(
    "text", [b"", b"{", b'{"step": 1, "loss": 0.5}\n{"step": 2, "lo', b"\0" * 99, b'[1]\n{"step": "x"}\n']
)
def test_a_damaged_or_half_written_file_costs_only_its_numbers(project, text):
    run = project.root / "runs" / "good"
    (run / "metrics.jsonl").write_bytes(text)
    (run / "recipe.toml").write_text("?")
    facts = read_facts(run)
    assert (facts.step, facts.steps, facts.loss) == (int(b"loss" in text), None, None)
    assert "good" in names(project)
    shutil.rmtree(run)
    assert "good" not in names(project)


def test_of_a_very_long_run_only_places_of_its_file_are_read(project, monkeypatch):
    rows = [{"step": i, "loss": 1 / i, "held_out_loss": 0.5} if i % 10 == 0 else {"step": i, "loss": 1 / i}
            for i in range(1, 20_001)]  # fmt: skip
    path = project.root / "runs" / "good" / "metrics.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.setattr("k5train.ui.runs.listed._WHOLE", 1000)
    facts = read_facts(path.parent)
    assert (facts.step, facts.training) == (20_000, 1 / 20_000)
    assert 20 < len(facts.curve) < 120
    assert [x for x, _ in facts.curve] == sorted(x for x, _ in facts.curve)


def test_many_runs_stand_on_pages_and_the_first_comes_fast(project, monkeypatch):
    for i in range(200):
        (copy := project.root / "runs" / f"copy-{i:03d}").mkdir()
        for name in ("run.json", "recipe.toml", "metrics.jsonl"):
            os.link(project.root / "runs" / "Half" / name, copy / name)
    page = TestClient(create_app(project), base_url="http://127.0.0.1:8001")
    page.get("/static/page.css")  # the app is ready
    began = time.monotonic()
    answer = page.get("/runs")
    assert time.monotonic() - began < 3  # 0.1 s alone; other tests may run beside it
    assert answer.text.count('<input type="checkbox" name="run"') == PAGE
    assert "Page 1 of 9" in answer.text
    last = page.get("/runs?page=99&sort=name&q=copy")
    assert "Page 9 of 9" in last.text
    assert "copy-199" in last.text
    assert 'href="/runs?q=copy&amp;sort=name&amp;page=8"' in last.text


def test_the_page_links_to_runs_and_sweeps_and_says_what_to_do_first(project, tmp_path_factory):
    page = TestClient(create_app(project), base_url="http://127.0.0.1:8001")
    answer = page.get("/runs")
    assert f'href="/runs/{id_of("runs/good")}"' in answer.text
    assert f'href="/sweeps/{id_of("sweeps/ranks")}"' in answer.text
    assert 'action="/compare"' in answer.text
    assert "No run is like this" in page.get("/runs?q=nosuch").text
    assert page.get("/runs?page=x&state=%3Cscript%3E&sort=?").status_code == 200
    empty = TestClient(create_app(Project(tmp_path_factory.mktemp("empty"))), base_url="http://127.0.0.1:8001")
    assert "There are no runs yet" in empty.get("/runs").text


def test_a_row_is_sent_again_when_its_run_goes_on(project):
    app = create_app(project)
    app.state.listeners.close()
    page = TestClient(app, base_url="http://127.0.0.1:8001")
    sent = page.get("/runs/events").text
    ids = {f"run-{id_of(name)}" for name in ("runs/good", "runs/Half", "sweeps/ranks")}
    assert {line.removeprefix("event: ") for line in sent.splitlines() if line.startswith("event: ")} >= ids

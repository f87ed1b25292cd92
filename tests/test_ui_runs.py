"""The page of a run: what it follows, says, shows and hands out; damaged, deleted and hostile runs."""

from __future__ import annotations

import json
import os
import re
from dataclasses import replace
from pathlib import Path

import pytest
from starlette.testclient import TestClient

from k5cache.shared.lock import lock_file
from k5train.ui import run_pages
from k5train.ui.app import create_app
from k5train.ui.ids import id_of
from k5train.ui.jobs.job import Job, Progress, Task
from k5train.ui.project import Project
from k5train.ui.runs import metrics as run_metrics
from k5train.ui.runs.metrics import Follower, last_lines
from k5train.ui.runs.state import RunState, read_state
from k5train.ui.runs.view import read_run
from tests.test_compare import make

HOSTILE = "</textarea><script>alert(1)</script>\x1b[31m"


@pytest.fixture
def project(tmp_path) -> Path:
    """A finished run whose average was kept."""
    make(tmp_path / "runs" / "cats", ema=0.39, lr=1e-4)
    return tmp_path


@pytest.fixture
def page(project) -> TestClient:
    return TestClient(create_app(Project(project)), base_url="http://127.0.0.1:8001", raise_server_exceptions=False)


def write(path: Path, *rows: dict, tail: str = "", mode: str = "a") -> None:
    with path.open(mode) as file:
        file.write("".join(json.dumps(row) + "\n" for row in rows) + tail)


def test_a_growing_file_is_read_from_where_it_was_left_and_a_half_line_when_it_is_whole(tmp_path):
    path = tmp_path / "metrics.jsonl"
    follower = Follower(path)
    assert follower.lines().rows == ()
    write(path, {"step": 1, "loss": 0.5, "seconds": 2.0, "loader_seconds": 0.5}, tail='{"step": 2, "lo')
    assert [row["step"] for row in follower.lines().rows] == [1]
    write(path, tail='ss": 0.25, "seconds": 2.0}\n')
    lines = follower.lines()
    assert [(row["step"], row["loss"]) for row in lines.rows] == [(1, 0.5), (2, 0.25)]
    assert (lines.seconds, lines.waited, lines.num_broken) == (2.0, 0.125, 0)
    assert follower.lines() is lines  # nothing has changed, and nothing was read


def test_a_file_that_was_cut_and_goes_on_is_read_anew_even_if_it_is_longer_than_before(tmp_path):
    path = tmp_path / "metrics.jsonl"
    write(path, {"step": 1, "loss": 0.5}, {"step": 2, "loss": 9.0})
    follower = Follower(path)
    assert follower.lines().rows[-1]["loss"] == 9.0
    write(path, *({"step": step, "loss": 0.25} for step in (1, 2, 3)), mode="w")
    assert [row["loss"] for row in follower.lines().rows] == [0.25] * 3


def test_what_is_no_line_of_ours_is_passed_over_and_counted(tmp_path):
    path = tmp_path / "metrics.jsonl"
    broken = ['{"step": 1', "[]", '{"step": true}', '{"step": -1}', '{"step": 1e9}', '{"loss": 1}', '"x"']
    row = {"step": 4, "loss": "high", "lr": 1e301, "grad_norm": float("nan"), "loss_by_sigma": [1, None, "x", True]}
    write(path, tail="\n".join([json.dumps({"step": 3, "loss": 0.5}), *broken]) + "\n")
    write(path, row)
    lines = Follower(path).lines()
    assert (len(lines.rows), lines.num_broken, lines.first_broken) == (2, len(broken), 2)
    assert lines.rows[1] == {
        "step": 4, "loss": None, "lr": None, "grad_norm": None, "loss_by_sigma": [1, None, None, None],
    }  # fmt: skip
    assert [row["step"] for row in last_lines(path, 120)] == [4]


def test_a_long_run_becomes_few_rows_with_the_mean_of_its_steps(tmp_path, monkeypatch):
    monkeypatch.setattr(run_metrics, "MOST_ROWS", 50)
    path = tmp_path / "metrics.jsonl"
    steps = [{"step": s, "loss": float(s), "peak_reserved_gib": float(s), "loss_by_sigma": [s, None]}
             for s in range(1, 1001)]  # fmt: skip
    write(path, *steps, {"step": 1000, "held_out_loss": 0.5, "held_out_key": "k"})
    lines = Follower(path).lines()
    *merged, measured = lines.rows
    assert len(merged) <= 101
    assert lines.steps_per_row == 16
    assert merged[0] == {"step": 16, "loss": 8.5, "peak_reserved_gib": 16.0, "loss_by_sigma": [8.5, None]}
    assert measured == {"step": 1000, "held_out_loss": 0.5, "held_out_key": "k"}


def test_a_run_is_running_while_its_lock_is_held_and_damaged_without_its_facts(project):
    root = project / "runs" / "cats"
    assert read_state(root).word == "finished"
    with lock_file(root / ".lock"):
        assert read_state(root).word == "running"
    (root / "result.json").unlink()
    assert read_state(root).word == "stopped"
    (root / "run.json").unlink()
    assert read_state(root).word == "damaged"


def test_a_run_that_had_ended_and_is_resumed_is_said_to_be_prepared_until_its_result_is_gone(page, project):
    root, address = project / "runs" / "cats", f"/runs/{id_of('runs/cats')}"
    assert "Preparing" not in page.get(address).text
    with lock_file(root / ".lock"):
        at = (root / "result.json").stat().st_mtime_ns
        text = page.get(address).text
        assert "Preparing to go on after step 4" in text
        assert "Steps done" not in text  # the bar
        os.utime(root / ".lock", ns=(at - 10**9, at - 10**9))  # it ends now: its result is newer than its lock
        assert "Step 4 of 4" in page.get(address).text
        (root / "result.json").unlink()
        assert "Step 4 of 4" in page.get(address).text
    job = Job("0123456789ab", project, "resume cats", (), "resume", "runs/cats", "running", 0, since=at / 1e9 - 1)
    write(root / "result.json", {})
    assert not read_state(root, job).begins_again
    later = replace(job, since=at / 1e9 + 99)
    assert read_state(root, later).begins_again
    job.log.write_text("error: Too little VRAM\n  fix: Use less\n", encoding="utf-8")
    failed = replace(later, state="failed", exit_code=2)
    assert read_state(root, failed) == RunState("finished", ("Too little VRAM", "Use less"))
    assert read_state(root, replace(failed, since=job.since)).error is None  # it ended since


def test_the_view_says_how_the_held_out_loss_goes_and_what_each_lora_has(project):
    run = read_run(project / "runs" / "cats")
    assert (run.headline, run.steps) == ("Finished after 4 steps in 9.0 s", 4)
    assert run.advice.startswith("The held-out loss has risen to 0.")
    assert [file.which for file in run.files][:2] == ["final", "best"]
    assert [step.label for step in run.pictures] == ["Step 4"]
    assert {setting.name for setting in run.settings if not setting.is_default} >= {"train.steps", "train.optim.lr"}
    assert "train.name" not in {setting.name for setting in run.settings}
    assert 'prompts = ["a fox", "an owl"]' in run.recipe


def test_the_page_shows_the_run_its_pictures_and_its_loras(page, project):
    id = id_of("runs/cats")
    answer = page.get(f"/runs/{id}")
    assert answer.status_code == 200
    assert "Finished after 4 steps" in answer.text
    assert answer.text.count('<figure class="tile">') == 6  # two prompts: the base, the LoRA and its average
    assert "<title>Training loss</title>" in answer.text
    assert f'href="/new?run={id}"' in answer.text
    assert "k5train sample runs/cats" in answer.text
    for which, name in (("final", "cats.safetensors"), ("best", "cats-best.safetensors")):
        file = page.get(f"/runs/{id}/files/{which}")
        assert file.content == (project / "runs" / "cats" / name).read_bytes()
        assert f'filename="{name}"' in file.headers["content-disposition"]
    assert page.get(f"/runs/{id}/files/final", headers={"Range": "bytes=0-1"}).status_code == 206
    for which in ("nosuch", "7", "%2e%2e%2frun.json", "cats.safetensors"):
        assert page.get(f"/runs/{id}/files/{which}").status_code == 404


def test_a_lora_behind_a_link_that_leads_out_is_not_handed_out(page, project, tmp_path_factory):
    secret = tmp_path_factory.mktemp("outside") / "secret.safetensors"
    secret.write_text("secret")
    lora = project / "runs" / "cats" / "cats.safetensors"
    lora.unlink()
    lora.symlink_to(secret)
    answer = page.get(f"/runs/{id_of('runs/cats')}")
    assert "secret" not in answer.text.replace(str(secret), "")
    assert page.get(f"/runs/{id_of('runs/cats')}/files/final").status_code == 404


def test_what_others_wrote_stays_text(tmp_path):
    make(tmp_path / "runs" / "a<b>&c", lr=1e-4)
    root = tmp_path / "runs" / "a<b>&c"
    drawn = next((root / "samples").rglob("drawn.json"))
    write(root / "metrics.jsonl", tail=HOSTILE + "\n")
    for path in (drawn.parent.parent).rglob("drawn.json"):
        path.write_text(path.read_text().replace("a fox", json.dumps(HOSTILE)[1:-1]))
    page = TestClient(create_app(Project(tmp_path)), base_url="http://127.0.0.1:8001")
    text = page.get(f"/runs/{id_of('runs/a<b>&c')}").text
    assert "<script>alert" not in text
    assert "\x1b" not in text
    assert "a&lt;b&gt;&amp;c" in text
    assert "A line is none that the run wrote, the first in line" in text


def test_buttons_are_those_that_the_state_allows(page, project):
    id, root = id_of("runs/cats"), project / "runs" / "cats"

    def actions() -> set[str]:
        return set(re.findall(rf'action="/runs/{id}/(\w+)"', page.get(f"/runs/{id}").text))

    assert actions() == {"resume"}
    with lock_file(root / ".lock"):
        assert actions() == {"stop", "sample", "save"}


def test_what_a_run_does_besides_its_steps_is_shown_too(page, project, monkeypatch):
    tasks = Task("training cats", 0, 40), Task("sampling at step 0", 3, 75)
    job = Job("0123456789ab", project, "run cats", (), "run", "runs/cats", "running", 0)
    jobs = [replace(job, state="finished")]
    monkeypatch.setattr(run_pages.queue, "jobs", lambda project: jobs)
    monkeypatch.setattr(run_pages, "progress", lambda job: Progress(tasks))
    assert "sampling at step 0" not in page.get(f"/runs/{id_of('runs/cats')}").text  # it has finished
    jobs[0] = job
    with lock_file(project / "runs" / "cats" / ".lock"):
        text = page.get(f"/runs/{id_of('runs/cats')}").text
    assert "sampling at step 0" in text
    assert "training cats" not in text


@pytest.mark.parametrize("name", ["metrics.jsonl", "run.json", ".lock", "result.json"])
def test_a_pipe_in_a_run_blocks_no_page(page, project, name):
    path = project / "runs" / "cats" / name
    path.unlink(missing_ok=True)
    os.mkfifo(path)
    for url in (f"/runs/{id_of('runs/cats')}", "/runs", "/"):
        assert page.get(url).status_code in (200, 404)


def test_a_run_that_is_deleted_while_it_is_shown_says_so(page, project):
    import shutil

    id = id_of("runs/cats")
    shutil.rmtree(project / "runs" / "cats")
    assert page.get(f"/runs/{id}").status_code == 404
    answer = page.get(f"/runs/{id}/events")
    assert answer.status_code == 404
    assert "deleted, moved or renamed" in answer.text

"""The pages of the queue: what runs, waits and has ended, one job with its log as text, and what a button does."""

from __future__ import annotations

import os
import re
import time
from pathlib import Path

import pytest

from k5cache.shared.lock import lock_file
from k5train.ui.ids import id_of
from k5train.ui.jobs import folder as job_files
from k5train.ui.jobs import queue, slots, view, waits
from k5train.ui.jobs.job import Job
from k5train.ui.project import Project
from tests import fake_jobs

testclient = pytest.importorskip("starlette.testclient")
EVIL = "\x1b[31m<script>alert(1)</script></textarea>\u202eabc\"'"


@pytest.fixture
def project(tmp_path, monkeypatch) -> Project:
    """A project with a GPU that another command has, so that nothing begins."""
    (tmp_path / "other").touch()
    monkeypatch.setattr(queue, "WORKER", fake_jobs.ME)
    monkeypatch.setattr(queue, "_spawn", lambda *args: pytest.fail("nothing begins here"))
    monkeypatch.setattr(waits, "external", fake_jobs.external)
    monkeypatch.setattr(slots, "slots", fake_jobs.gpus)
    monkeypatch.setenv(fake_jobs.OTHERS, str(tmp_path / "other"))
    monkeypatch.setattr(queue, "_start_waiter", lambda project: None)
    return Project(tmp_path)


@pytest.fixture
def client(project):
    from k5train.ui.app import create_app

    with testclient.TestClient(create_app(project), base_url="http://127.0.0.1:8001") as client:
        yield client


def post(client, path: str, **fields: str):
    return client.post(
        path, data={"x": "", **fields}, headers={"Origin": "http://127.0.0.1:8001"}, follow_redirects=False
    )


def ended(project: Project, label: str, log: str = "", about: str = "", kind: str = "run", **end: object) -> Job:
    document = {
        "argv": ["k5train", "run", label],
        "label": label,
        "kind": kind,
        "about": about,
        "order": 1,
        "added": 5.0,
    }
    folder = job_files.new_folder(job_files.make_queue_folder(project), document, {"recipe.toml": "[train]\n"})
    job_files.write(folder, "ended.json", {"at": time.time(), "seconds": 75.0, **end})
    (folder / "log.txt").write_text(log, encoding="utf-8", newline="")
    return queue.read_job(folder)


def test_an_empty_queue_says_the_first_step_and_writes_nothing(client, project):
    (project.root / "other").unlink()
    page = client.get("/queue").text
    assert "Nothing is running and nothing waits." in page
    assert 'href="/new"' in page
    assert "free" in page
    assert [path.name for path in project.root.iterdir()] == []


def test_the_queue_shows_what_runs_waits_and_has_ended_and_its_buttons_do_what_they_say(client, project):
    first = queue.add(project, ["k5train", "run", "a"], f"run {EVIL}", "run", "runs/a")
    second = queue.add(project, ["k5train", "run", "b"], "run b", "run", "runs/b")
    ended(project, "old", exit_code=1)
    page = client.get("/queue").text
    assert "<script>alert" not in page
    assert "run \\x1b[31m&lt;script&gt;" in page
    assert "k5train sample runs/a (process 7)" in page  # in a terminal
    assert "and the job before it" in page
    assert '<span class="badge failed">failed</span>' in page
    assert "1 min 15 s" in page
    answer = post(client, f"/jobs/{second.id}/move", to="up")
    assert (answer.status_code, answer.headers["location"]) == (303, "/queue")
    assert [job.id for job in queue.jobs(project)][:2] == [first.id, second.id]
    assert post(client, f"/jobs/{first.id}/stop").headers["location"] == f"/jobs/{first.id}"
    assert queue.find(project, first.id).state == "stopped"
    assert post(client, f"/jobs/{second.id}/remove").status_code == 303
    assert post(client, "/queue/clear").status_code == 303
    assert queue.jobs(project) == []
    for path in ("stop", "remove", "move", "start", "again"):
        assert post(client, f"/jobs/{first.id}/{path}").status_code in (400, 404), path
    for path in (f"/jobs/{first.id}", "/jobs/..%2f..", "/jobs/%00", f"/jobs/{first.id}/events"):
        assert client.get(path).status_code == 404, path


def test_a_job_shows_its_command_and_its_log_as_text_and_the_two_lines_of_its_error(client, project):
    log = f"loading 1 %\rloading 100 %\n{EVIL}\nerror: no cache <b>here</b>\n  fix: encode it\n"
    job = ended(project, EVIL, log, about="runs/gone", exit_code=2)
    page = client.get(f"/jobs/{job.id}").text
    assert "<script>alert" not in page
    assert "\x1b" not in page
    assert "\u202e" not in page
    assert "loading 1 %" not in page
    assert "loading 100 %\n\\x1b[31m&lt;script&gt;" in page
    assert "<p>no cache &lt;b&gt;here&lt;/b&gt;</p>" in page
    assert '<p class="fix">encode it</p>' in page
    assert "k5train run" in page
    assert "Try again" in page
    killed = ended(project, "run cats", exit_code=None, signal=9)
    assert "It was killed by signal 9, as the system does when memory runs out" in client.get(f"/jobs/{killed.id}").text
    answer = post(client, f"/jobs/{killed.id}/again")
    again = queue.find(project, answer.headers["location"].removeprefix("/jobs/"))
    assert (again.state, again.argv, again.label) == ("waiting", killed.argv, killed.label)
    assert (again.folder / "recipe.toml").read_text() == "[train]\n"
    for kind in ("run", "resume"):  # the page of the old job leads to the new one, and makes no third
        done_again = ended(project, "run dogs", "", "runs/dogs", kind, exit_code=1)
        going_on = queue.add(project, ["k5train", "resume", "runs/dogs"], "resume dogs", "resume", "runs/dogs")
        page = client.get(f"/jobs/{done_again.id}").text
        assert f'href="/jobs/{going_on.id}"' in page
        assert "Try again" not in page
        assert post(client, f"/jobs/{done_again.id}/again").status_code == 400
        queue.remove(project, going_on.id)
    cache = project.root / "cache" / "cats"
    cache.mkdir(parents=True)
    (cache / "manifest.json").write_text("{}")
    done = ended(project, "encode cats", "", "cache/cats", "encode", exit_code=0)
    page = client.get(f"/jobs/{done.id}").text
    assert f'href="/data/c/{id_of("cache/cats")}"' in page
    assert f'href="/new?cache={id_of("cache/cats")}"' in page
    assert "It printed nothing." in page


def test_a_lost_job_says_how_long_it_surely_ran_and_stands_where_it_was_last_seen(client, project):
    """Its watcher was killed: the mark that it left every ten seconds is the last that is known."""
    began = time.time() - 1000
    job, older = ended(project, "run cats"), ended(project, "run dogs", at=began - 4000)
    gone = {"pid": 1, "host": "elsewhere", "mark": "x"}
    (job.folder / "ended.json").unlink()
    job_files.write(job.folder, "started.json", {"worker": gone, "launcher": gone, "at": began})
    job_files.write(job.folder, "worker.json", {"worker": gone, "command": gone})
    os.utime(job.folder / "worker.json", (began + 75, began + 75))
    page = client.get("/queue").text
    assert '<td class="number" data-label="took">at least 1 min 15 s</td>' in page
    assert page.index(f"remove-{job.id}") < page.index(f"remove-{older.id}")
    assert re.search(r"Last seen</dt><dd><time .*</time>, after 1 min 15 s</dd>", client.get(f"/jobs/{job.id}").text)
    os.utime(job.folder / "worker.json", (1, 1))  # a clock that was set back: nothing is known
    assert '<td class="number" data-label="took"></td>' in client.get("/queue").text


def test_bars_and_states_are_sent_while_somebody_looks(client, project):
    from k5train.ui.jobs import view

    job = ended(project, "run cats", about="runs/cats")
    (job.folder / "ended.json").unlink()
    me = job_files.process_of(os.getpid())
    started = {"worker": me, "launcher": me, "slot": "GPU-0abc", "gpu": "GPU 0", "at": time.time(), **{"boot": "x"}}
    job_files.write(job.folder, "started.json", started)
    job_files.write(job.folder, "worker.json", {"worker": me, "command": me})
    task = {
        "name": "training cats",
        "completed": 620,
        "total": 2000,
        "unit": "step",
        "note": "loss 0.1",
        "per_second": 2,
    }
    job_files.write(job.folder, "progress.json", {"tasks": [task]})
    assert [place.job.id for place in view.queue_view(project).places if place.job] == [job.id]
    page = client.get("/queue").text
    assert '<progress aria-label="training cats" max="2000.0" value="620.0">' in page
    assert "620 of 2,000 steps" in page
    assert "2.0 step/s" in page
    assert f'action="/jobs/{job.id}/stop"' in page
    queue.stop(project, job.id)
    assert "End at once" in client.get("/queue").text
    assert "It was told to stop" not in client.get(f"/jobs/{job.id}").text  # it has bars, which say more


def run_of(project: Project, name: str) -> Path:
    root = project.root / "runs" / name
    root.mkdir(parents=True)
    (root / "run.json").write_text("{}")
    return root


def test_a_run_is_resumed_saved_and_drawn_from_its_page(client, project):
    root = run_of(project, "cats")
    url = f"/runs/{id_of('runs/cats')}"
    for what in ("save", "sample", "stop"):
        assert post(client, f"{url}/{what}").status_code == 400  # nothing trains it
    for steps in ("0", "-1", "1e3", "x" * 30, "9" * 30, "١"):
        assert post(client, f"{url}/resume", steps=steps).status_code == 400, steps
    assert queue.jobs(project) == []
    answer = post(client, f"{url}/resume", steps="4,000")
    job = queue.find(project, answer.headers["location"].removeprefix("/jobs/"))
    assert job.line == "k5train resume runs/cats --set train.steps=4000"
    assert post(client, f"{url}/resume").status_code == 400  # it is in the queue already
    queue.remove(project, job.id)
    with lock_file(root / ".lock"):
        assert post(client, f"{url}/resume").status_code == 400  # it is being trained
        assert post(client, f"{url}/save").headers["location"] == url
        assert post(client, f"{url}/sample").headers["location"] == url
        assert post(client, f"{url}/stop").status_code == 400  # by this process, which is none of ours
    assert {path.name for path in root.iterdir()} == {"run.json", ".lock", "save.request", "sample.request"}
    assert post(client, f"/runs/{id_of('runs/other')}/resume").status_code == 404


def test_a_job_that_was_stopped_says_that_something_was_saved_only_where_its_run_is(client, project):
    job = ended(project, "run cats", about="runs/cats", exit_code=130)
    assert view.job_view(project, job.id).ended == "It was stopped"
    run_of(project, "cats")
    assert view.job_view(project, job.id).ended == "It was stopped, and what it had was saved"

"""The page of a new run: form, checks, paths, saving, starting and planning. No process with torch is started here."""

from __future__ import annotations

import html
import json
import os
import re
import subprocess
import sys
import threading
import tomllib
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

pytest.importorskip("starlette")

from starlette.testclient import TestClient

from k5cache.shared import system
from k5cache.shared.model import ModelConfig
from k5train.options.data import DataConfig
from k5train.options.train import TrainConfig
from k5train.recipes.listed import PACKAGED
from k5train.runs.folder import Run, create_run
from k5train.runs.metrics import Metrics
from k5train.ui.app import create_app
from k5train.ui.ids import id_of
from k5train.ui.jobs.slots import NVIDIA, PROCESSOR, Slot
from k5train.ui.new_run import launching, planner, planning, to_encode
from k5train.ui.new_run.fields import fields
from k5train.ui.new_run.planner import Planner
from k5train.ui.new_run.planner_process import Question, answer, answers
from k5train.ui.new_run.planning import Room, room, view_of
from k5train.ui.project import Project

HOSTILE = ["<script>alert(1)</script>", "</textarea><b>", '"quoted" & \\', "\x1b[31mred", "\u202eleft", "x" * 5000]
HERE = {"origin": "http://127.0.0.1:8001"}


@pytest.fixture
def project(tmp_path, monkeypatch) -> Project:
    """A folder with two caches, whose files are of no use; nothing uses the processor."""
    root = tmp_path / "project"
    for name in ("cats", "dogs"):
        (root / "cache" / name).mkdir(parents=True)
        (root / "cache" / name / "manifest.json").write_text("{}")
    monkeypatch.setattr(planning.slots, "slots", lambda: (PROCESSOR,))
    monkeypatch.setattr(planning.queue, "gpu_in_use", lambda project: None)
    return Project(root.resolve())


@pytest.fixture
def page(project) -> TestClient:
    return client(project)


def client(project: Project) -> TestClient:
    """A browser, and a planner that plans nothing."""
    app = create_app(project)
    app.state.planner = SimpleNamespace(ask=lambda question, slot: {"rows": [("weights", "1 MiB")]}, end=lambda: None)
    return TestClient(app, base_url="http://127.0.0.1:8001", headers=HERE, follow_redirects=False)


@pytest.fixture
def added(monkeypatch) -> list[SimpleNamespace]:
    """What was put into the queue."""
    jobs: list[SimpleNamespace] = []

    def add(project, argv, label, kind, about, files=None, uses=()):
        jobs.append(
            SimpleNamespace(id="0" * 12, argv=argv, kind=kind, about=about, files=files, uses=uses, state="waiting")
        )
        return jobs[-1]

    monkeypatch.setattr(launching.queue, "add", add)
    monkeypatch.setattr(launching.queue, "jobs", lambda project: list(jobs))
    return jobs


def form_of(recipe: str, /, **changes: str | list[str]) -> dict[str, str | list[str]]:
    """What a browser sends of the form after it showed ``recipe``; ``train__steps`` is the field of that option."""
    document = tomllib.loads(recipe)
    form: dict[str, str | list[str]] = {"text": recipe, "base": recipe}
    for name, field in fields().items():
        shown = field.text_in(document)
        form[f"o.{name}"] = shown.split("\n") if field.control == "several" else shown
    typed = {f"o.{name.replace('__', '.')}" if "__" in name else name: value for name, value in changes.items()}
    return {**form, **typed}


def error_of(response) -> tuple[str, str]:
    """The two lines of the first error on a page."""
    lines = re.search(r'class="error".*?<p>(.*?)</p>\s*<p class="fix">(.*?)</p>', response.text, re.DOTALL)
    assert lines, response.text[:2000]
    return html.unescape(lines[1]), html.unescape(lines[2])


def text_on(response) -> str:
    """The recipe on a page."""
    return html.unescape(re.search(r'<textarea name="text".*?>\n(.*?)</textarea>', response.text, re.DOTALL)[1])


def test_the_form_shows_what_a_recipe_sets_and_marks_what_differs_from_the_defaults(page):
    shown = page.get("/new?recipe=style-16gb").text

    boxes = {
        name: classes.split() for classes, name in re.findall(r'class="field([^"]*)" data-option="([^"]+)"', shown)
    }
    assert set(boxes) == set(fields())
    changed = [name for name, classes in boxes.items() if "changed" in classes]
    assert changed == ["train.steps", "train.optim.lr", "train.memory.vram", "train.validation.prompts",
                       "train.validation.split", "train.validation.num_inference_steps",
                       "train.validation.held_out_every"]  # fmt: skip
    assert 'name="o.train.optim.lr" value="1e-4"' in shown
    assert 'name="o.train.seed" value="" placeholder="42"' in shown
    assert text_on(page.get("/new?recipe=style-16gb")) == PACKAGED["style-16gb"].as_file("style-16gb.toml")
    assert page.get("/new?recipe=none").status_code == page.get("/new?file=" + "0" * 12).status_code == 404


def test_all_problems_come_at_once_each_beside_its_field_or_with_its_line(page):
    text = "[train]\nstepz = 5\nsteps = 'x'\n[train.lora]\nrank = 0\n[[train.data]]\nweight = 0.5\n"
    said = page.post("/new/check", data=form_of(text)).json()
    assert said["options"]["train.steps"]["problem"] == "must be a whole number, found 'x'"
    assert said["options"]["train.lora.rank"]["problem"] == "must be at least 1, found 0"
    assert "line 2: [train] unknown key &#39;stepz&#39;; did you mean &#39;steps&#39;?" in said["said"]
    assert "line 6: train.data[0].cache is required" in said["said"]
    assert ("4 problems" in said["said"], said["plan"]) == (True, False)


def test_cautions_stand_beside_their_fields_and_stop_nothing(page):
    said = page.post("/new/check", data=form_of("", train__validation__guidance_scale="9")).json()
    assert "tend to look burnt" in said["options"]["train.validation.guidance_scale"]["caution"]
    said = page.post("/new/check", data=form_of("", train__objective__huber_c="2")).json()
    wanted = "does nothing here: it belongs to train.objective.loss_type = huber"
    assert (said["options"]["train.objective.huber_c"]["caution"], said["plan"]) == (wanted, True)


def test_what_is_typed_into_fields_and_into_the_text_comes_together(page):
    before = "# mine\n[train]\nsteps = 10  # few\n"
    form = form_of(
        before, train__steps="20", train__deterministic=["false", "true"], train__trackers__use=["", "wandb"]
    )
    form["text"] = before + "seed = 7\n"
    said = page.post("/new/check", data=form).json()
    assert tomllib.loads(said["text"]) == {
        "train": {"steps": 20, "seed": 7, "deterministic": True, "trackers": {"use": ["wandb"]}}
    }
    assert said["text"].startswith("# mine\n[train]\nsteps = 20  # few\nseed = 7\n")
    assert (said["base"], said["options"]["train.seed"]["text"]) == (said["text"], "7")


def test_while_the_text_is_no_toml_the_fields_keep_what_was_typed_and_join_it_later(page):
    before = "[train]\nsteps = 10\n"
    form = {**form_of(before, train__seed="7"), "text": "[train]\nsteps = \n"}
    said = page.post("/new/check", data=form).json()
    assert "at line 2" in said["said"]
    assert (said["text"], said["base"], said["options"]["train.seed"]["text"]) == (form["text"], before, "7")
    shown = page.post("/new", data=form)
    assert 'name="o.train.seed" value="7"' in shown.text
    assert text_on(shown) == form["text"]
    said = page.post("/new/check", data={**form, "text": "[train]\nsteps = 11\n"}).json()
    assert tomllib.loads(said["text"]) == {"train": {"steps": 11, "seed": 7}}


@pytest.mark.parametrize("prompt", HOSTILE)
def test_texts_of_others_are_text_in_the_form_and_come_back_as_they_were(page, prompt):
    text = f"[train.validation]\nprompts = {json.dumps([prompt])}\n[[train.data]]\ncache = {json.dumps(prompt[:60])}\n"
    shown = page.post("/new", data=form_of(text))
    assert shown.status_code == 200
    assert not re.search(r"<script>alert|</textarea><b>|\x1b", shown.text)
    assert text_on(shown) == text
    said = page.post("/new/check", data=form_of(text)).json()
    assert (said["text"], "<script>alert" in said["said"]) == (text, False)


@pytest.mark.parametrize(
    "data", [{}, {"text": "x" * 99999}, {"text": "a" + "[" * 5000}, {"o.train.steps": "\0"}, {"cache": "../.."}]
)
def test_forms_that_no_browser_sends_are_answered(page, data):
    assert page.post("/new/check", data={"text": "", **data}).status_code == 200
    assert page.post("/new", data={"text": "", **data}).status_code in (200, 400)


@pytest.mark.parametrize(
    ("name", "path"),
    [
        ("model.path", "/etc"), ("model.path", "../model"), ("model.path", "~/model"),
        ("model.path", "/tmp/a/../../etc"),
        ("model.path", "out/model"), ("model.path", "a\0b"), ("train.lora.init_lora", "/x.safetensors"),
        ("train.lora.init_lora", "out/x.safetensors"), ("train.validation.prompt_library", "out/p.json"),
        ("train.lora.init_lora", "org/../../x.safetensors"),
    ],
)  # fmt: skip
def test_paths_that_lead_out_of_the_project_are_refused_with_what_to_do(page, project, name, path):
    (project.root / "out").symlink_to(project.root.parent)
    text = f"[{name.rpartition('.')[0]}]\n{name.rpartition('.')[2]} = {json.dumps(path)}\n"
    said = page.post("/new/check", data=form_of(text)).json()
    assert "which is outside the project. " in said["options"][name]["problem"] or "\0" in path
    assert said["plan"] is False


def test_paths_in_entries_are_refused_too(page, project):
    text = '[[train.data]]\ncache = "/elsewhere"\n[[train.validation.edits]]\nsource = "../x.png"\nprompt = "blue"\n'
    said = page.post("/new/check", data=form_of(text)).json()["said"]
    assert "line 2: train.data[0].cache names /elsewhere, which is outside the project" in said
    assert "train.validation.edits[0].source names ../x.png, which is outside the project" in said


def test_what_is_inside_a_repository_and_the_model_of_the_page_may_be_named(project, tmp_path):
    page = client(replace(project, model=str(tmp_path / "m")))
    for path in ("org/name", str(tmp_path / "m"), "models/k5", str(project.root / "k5")):
        said = page.post("/new/check", data=form_of("", model__path=path)).json()
        assert (said["options"]["model.path"]["problem"], said["plan"]) == ("", True), path
    assert tomllib.loads(text_on(page.get("/new?recipe=quick-512")))["model"]["path"] == str(tmp_path / "m")


def test_a_recipe_is_saved_whole_and_opened_again_with_its_caches(page, project):
    text = "# mine\n[train]\nsteps = 10\n"
    done = page.post("/new/save", data=form_of(text, save_as="mine", cache=id_of("cache/cats")))
    assert (done.status_code, done.headers["location"]) == (
        303, f"/new?file={id_of('mine.toml')}&cache={id_of('cache/cats')}"
    )  # fmt: skip
    assert (project.root / "mine.toml").read_text() == text
    shown = page.get(done.headers["location"])
    assert text_on(shown) == text
    assert f'value="{id_of("cache/cats")}" checked' in shown.text
    assert page.post("/new/recipe.toml", data=form_of(text)).text == text


def test_a_recipe_that_was_edited_meanwhile_is_saved_over_only_if_that_is_told(page, project):
    file = project.root / "mine.toml"
    file.write_text("[train]\nsteps = 1\n")
    opened = page.get(f"/new?file={id_of('mine.toml')}").text
    seen = re.search(r'name="seen" value="(\w+)"', opened)[1]
    form = form_of("[train]\nsteps = 2\n", file=id_of("mine.toml"), seen=seen, save_as="mine.toml")
    file.write_text("[train]\nsteps = 3  # by an editor\n")
    assert "mine.toml was changed since you opened it" in page.post("/new/check", data=form).json()["said"]
    refused = page.post("/new/save", data=form)
    assert refused.status_code == 409
    assert error_of(refused)[0] == "mine.toml was changed since you opened it, and was not saved over"
    assert file.read_text() == "[train]\nsteps = 3  # by an editor\n"
    assert text_on(refused) == "[train]\nsteps = 2\n"
    told = re.search(r'name="replaces" value="(\w+)"', refused.text)[1]
    file.write_text("[train]\nsteps = 4\n")  # changed once more: what was told is no longer true
    assert page.post("/new/save", data={**form, "replaces": told}).status_code == 409
    file.write_text("[train]\nsteps = 3  # by an editor\n")
    assert page.post("/new/save", data={**form, "replaces": told}).status_code == 303
    assert file.read_text() == "[train]\nsteps = 2\n"
    file.unlink()
    assert "mine.toml is not there any more" in page.post("/new/check", data=form).json()["said"]
    assert page.post("/new/save", data=form).status_code == 303


def test_files_that_are_not_ours_to_replace_and_names_that_cannot_be_are_refused(page, project):
    (project.root / "pyproject.toml").write_text("[project]\nname = 'x'\n")
    (project.root / "other.toml").write_text("[train]\n")
    outside = project.root.parent / "outside.toml"
    outside.write_text("[train]\n")
    (project.root / "link.toml").symlink_to(outside)
    answers_of = {
        name: error_of(page.post("/new/save", data=form_of("[train]\nsteps = 2\n", save_as=name)))[0]
        for name in ("pyproject.toml", "other", "link", "", "a/b", "../x", "con", "x" * 300)
    }
    assert answers_of["pyproject.toml"] == "pyproject.toml is there already, and is no recipe"
    assert answers_of["other"] == "other.toml is there already"
    assert "leads out of" in answers_of["link"]
    assert all(answers_of[name].startswith("The name of the recipe ") for name in ("", "a/b", "../x", "con", "x" * 300))
    assert sorted(path.name for path in project.root.iterdir()) == [
        ".k5",
        "cache",
        "link.toml",
        "other.toml",
        "pyproject.toml",
    ]
    assert outside.read_text() == "[train]\n"
    shown = page.get("/new").text
    assert ("other.toml" in shown, "pyproject.toml" in shown, "link.toml" in shown) == (True, False, False)


def test_a_run_is_the_command_that_a_person_would_type(page, added):
    both = [id_of("cache/cats"), id_of("cache/dogs")]
    done = page.post("/new/start", data=form_of("[train]\nsteps = 9\n", train__seed="7", cache=both, name="mine"))
    assert (done.status_code, done.headers["location"]) == (303, "/jobs/" + "0" * 12)
    (job,) = added
    assert job.argv == [
        "k5train",
        "run",
        "cache/cats",
        "cache/dogs",
        "--recipe",
        "{job}/recipe.toml",
        "--out",
        "runs/mine",
    ]
    assert (job.kind, job.about, job.uses) == ("run", "runs/mine", ("cache/cats", "cache/dogs"))
    assert tomllib.loads(job.files["recipe.toml"]) == {"train": {"steps": 9, "seed": 7}}
    page.post("/new/start", data=form_of("[[train.data]]\ncache = 'cache/cats'\n", name="own"))
    assert added[1].argv[:3] == ["k5train", "run", "--recipe"]
    page.post("/new/start", data=form_of("", cache=both[0]))
    page.post("/new/start", data=form_of("", cache=both[0]))
    assert [job.about for job in added[2:]] == ["runs/cats", "runs/cats-2"]


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"name": "taken"}, "runs/taken is there already"),
        ({"name": "a/b"}, "The name of the run must be the name of one folder"),
        ({"name": "x" * 201}, "The name of the run has 201 bytes"),
        ({"name": "nul"}, "The name of the run is a name that Windows keeps for devices"),
        ({"name": "waits"}, "A run named waits waits in the queue"),
        ({"cache": []}, "No cache is chosen"),
        ({"train__steps": "0", "train__lora__rank": "0"}, "train.lora.rank must be at least 1, found 0; and 1 more"),
        ({"text": "[train"}, "The recipe is not valid TOML"),
    ],
)
def test_a_run_that_cannot_start_is_refused_and_everything_typed_stays(page, project, added, changes, problem):
    (project.root / "runs" / "taken").mkdir(parents=True)
    page.post("/new/start", data=form_of("", cache=id_of("cache/cats"), name="waits"))
    done = page.post("/new/start", data=form_of("", **{"cache": id_of("cache/cats"), "train__seed": "7", **changes}))
    assert (done.status_code, len(added)) == (400, 1)
    assert error_of(done)[0].startswith(problem)
    assert 'name="o.train.seed" value="7"' in done.text


def test_the_button_says_whether_the_run_begins_or_waits(page, monkeypatch):
    for used_by, button in ((None, "Start"), ("run first", "Put in the queue")):
        monkeypatch.setattr(planning.queue, "gpu_in_use", lambda project, used_by=used_by: used_by)
        assert f'formaction="/new/start">{button}</button>' in page.get("/new?from=defaults").text


def test_prompts_that_the_cache_lacks_are_encoded_before_the_run(page, project, added, monkeypatch):
    held = to_encode.Held("m", "t2i", frozenset(["", "a cat"]), frozenset())
    monkeypatch.setattr(to_encode, "held_by", lambda project, cache: held)
    (project.root / "p.json").write_text('{"dog": "--a dog"}')
    text = '[train.validation]\nprompts = ["a cat", "a bird"]\nprompt_library = "p.json"\nnegative_prompt = "blurry"\n'
    form = form_of(text, cache=id_of("cache/cats"), name="mine")
    note = "3 prompts are not in cache/cats yet: they are encoded before the run starts"
    assert page.post("/new/check", data=form).json()["options"]["train.validation.prompts"]["caution"] == note
    page.post("/new/start", data=form)
    first, second = added
    assert first.argv == ["k5cache", "prompts", "add", "cache/cats", "--", "a bird", "--a dog", "blurry"]
    assert (first.about, second.argv[:2], "cache/cats" in second.uses) == ("cache/cats", ["k5train", "run"], True)
    held = to_encode.Held("m", "i2i", frozenset(), frozenset([("a.png", "blue")]))
    pairs = (("a", "blue"), ("a", "red"), ("b", "red"))
    edits = "".join(f'[[train.validation.edits]]\nsource = "{s}.png"\nprompt = "{p}"\n' for s, p in pairs)
    page.post("/new/start", data=form_of(edits, cache=id_of("cache/cats"), name="edit"))
    assert [job.argv[4:] for job in added[2:4]] == [
        ["--source", "a.png", "--", "red"],
        ["--source", "b.png", "--", "red"],
    ]


def test_a_sweep_tries_the_values_of_options(page, added, monkeypatch):
    form = form_of("", cache=id_of("cache/cats"), axis=["train.lora.rank", "train.optim.lr"], values=["8, 16", ""])
    done = page.post("/new/sweep", data={**form, "name": "ranks"})
    assert done.status_code == 303
    assert added[0].argv == ["k5train", "sweep", "cache/cats", "--recipe", "{job}/recipe.toml",
                             "--grid", "train.lora.rank=8, 16", "--out", "sweeps/ranks"]  # fmt: skip
    assert 'name="gpus"' not in page.get("/new?recipe=style-16gb").text  # there is only the processor
    monkeypatch.setattr(planning.slots, "slots", lambda: tuple(Slot(f"GPU-{n}", n, "", NVIDIA) for n in range(2)))
    monkeypatch.setattr(planning.queue, "in_use", lambda *args: {})
    assert 'name="gpus" type="number" min="1" max="2" value="1"' in page.get("/new?recipe=style-16gb").text
    for gpus, words in (("2", ["--gpus", "2"]), ("1", []), ("x", [])):
        page.post("/new/sweep", data={**form, "name": "on", "gpus": gpus})
        assert added.pop().argv[7:] == [*words, "--out", "sweeps/on"]
    wrong = {
        "": "No values are given to try",
        "8, x": "train.lora.rank=x: train.lora.rank must be a whole number",
        ",".join("1" * 300): "That may be more than 200 runs",
    }
    for values, problem in wrong.items():
        refused = page.post("/new/sweep", data={**form, "values": values})
        assert (refused.status_code, problem in error_of(refused)[0]) == (400, True), error_of(refused)
    path = {**form, "axis": "train.lora.init_lora", "values": "/etc/a, /etc/b"}
    assert "outside the project" in error_of(page.post("/new/sweep", data=path))[0]
    assert len(added) == 1


def test_an_earlier_run_is_begun_again_from_its_recipe_and_tells_how_long_its_steps_took(project, page, monkeypatch):
    monkeypatch.chdir(project.root)
    lora = replace(TrainConfig().lora, rank=8)
    config = TrainConfig(name="first", steps=30, lora=lora, objective=replace(TrainConfig().objective, huber_c=2.0))
    run: Run = create_run(project.root / "runs" / "first", Path("cache/cats"), ModelConfig(), config)
    with Metrics(run.metrics) as metrics:
        for step in (1, 2, 3):
            metrics.write(step=step, loss=1.0, seconds=step / 2)
    shown = page.get(f"/new?run={id_of('runs/first')}")
    assert tomllib.loads(text_on(shown)) == {"train": {"steps": 30, "lora": {"rank": 8}, "objective": {"huber_c": 2.0}}}
    assert "# Rank of each pair of matrices" in text_on(shown)
    assert f'value="{id_of("cache/cats")}" checked' in shown.text
    earlier = planning.earlier_run(project, replace(config, steps=99, seed=1), ("cache/cats",))
    assert (earlier.name, earlier.seconds_per_step) == ("runs/first", 1.0)
    assert planning.earlier_run(project, config, ("cache/dogs",)) is None
    assert planning.earlier_run(project, replace(config, batch_size=2), ("cache/cats",)) is None
    planned = view_of({"rows": [("a", "b")], "steps": 90, "images": 40, "passes": 2.25}, Room(PROCESSOR), earlier)
    assert (planned.total, planned.amount) == (
        "1 min 30 s for 90 steps",
        "90 steps, which go 2.2 times through 40 images",
    )


def test_a_run_on_caches_at_urls_is_shown_with_them_as_they_are_written(project, page, monkeypatch):
    monkeypatch.chdir(project.root)
    create_run(project.root / "runs/one", Path("s3://bucket/cats"), ModelConfig(), TrainConfig(name="one"))
    data = (DataConfig(cache="s3://bucket/cats"), DataConfig(cache="cache/cats"))
    create_run(project.root / "runs/two", Path("s3://bucket/cats"), ModelConfig(), TrainConfig(name="two", data=data))
    for name in ("one", "two"):
        shown = page.get(f"/runs/{id_of(f'runs/{name}')}").text
        assert "Its cache, s3://bucket/cats, is not in this project." in shown
        assert "s3:/b" not in shown
    started = page.get(f"/new?run={id_of('runs/one')}").text
    problem = (
        "runs/one was trained on s3://bucket/cats, which is not under cache/: choose another one, or get it here: "
    )
    assert f"{problem}k5cache pull s3://bucket/cats" in started
    assert "s3:/b" not in page.get(f"/new?run={id_of('runs/two')}").text


def test_a_plan_says_what_fits_and_what_a_run_would_warn_of(toy_cache, toy_model, monkeypatch):
    cache = toy_cache("fp32")
    recipe = f"[model]\npath = {json.dumps(str(toy_model))}\n[train]\nbatch_size = 64\nsteps = 12\n"
    reply = answer(Question(recipe, (str(cache),)))
    assert any(line.startswith("train.batch_size is 64, but") for line in reply["cautions"])
    assert (reply["steps"], reply["images"]) == (12, 6)
    assert "predicted peak, torch reserved" in dict(reply["rows"])
    tiny = answer(Question(f'{recipe}[train.memory]\nvram = "0.1GB"\n', (str(cache),)))
    assert tiny["does_not_fit"][0]
    assert "a card of 24GB" in answer(Question(recipe, (str(cache),), card="24GB"))["title"]
    gone = answer(Question(recipe, (str(cache / "gone"),)))
    assert "is not a cache" in gone["problem"][0]
    said = json.loads(next(answers(iter(["nonsense\n"]), 60)))
    assert said["problem"][0].startswith("The plan failed with JSONDecodeError")


def test_what_is_said_of_time_without_a_gpu_and_while_a_run_uses_it(project, monkeypatch):
    reply = {"rows": [("a", "b")]}
    assert view_of(reply, Room(PROCESSOR), None).time == "not known: there is no GPU here to time it on"
    assert view_of(reply, Room(None, "runs/cats", "24GB"), None).time == "not known while runs/cats uses the GPU"
    gpu = Slot("GPU-1", 0, "a card", "CUDA_VISIBLE_DEVICES")
    assert view_of(reply, Room(gpu), None).time == "timing a few blocks..."
    assert view_of({**reply, "time": "9 ms a step"}, Room(gpu), None, True).time == "9 ms a step"
    monkeypatch.setattr(planning.slots, "slots", lambda: (gpu,))
    monkeypatch.setattr(planning.queue, "in_use", lambda *_: {"GPU-1": "runs/cats"})
    monkeypatch.setattr(planning, "_card_of", lambda slot: "24576MB")
    assert room(project) == Room(None, "runs/cats", "24576MB")
    monkeypatch.setattr(planning.queue, "in_use", lambda *_: {})
    assert room(project).is_gpu


@pytest.fixture
def toy_planner(project, monkeypatch) -> Planner:
    """A planner whose process answers with the question, its GPU and its own number, and ends at an empty recipe."""
    code = (
        "import sys, json, os\nfor line in sys.stdin:\n q = json.loads(line)\n"
        " if not q['recipe']: os._exit(3)\n if q['recipe'] == 'idle': os._exit(0)\n"
        " print(json.dumps([q['recipe'], os.environ.get('CUDA_VISIBLE_DEVICES'), os.getpid()] and "
        "{'recipe': q['recipe'], 'gpu': os.environ.get('CUDA_VISIBLE_DEVICES'), 'pid': os.getpid()}), flush=True)\n"
    )
    monkeypatch.setattr(planner, "COMMAND", [sys.executable, "-S", "-c", code])
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    return Planner(project.root)


def test_one_process_answers_until_the_gpu_changes_or_it_ends(toy_planner):
    first, second = (toy_planner.ask(Question(text, ()), PROCESSOR) for text in "ab")
    assert (first["recipe"], second["recipe"], first["pid"] == second["pid"]) == ("a", "b", True)
    hidden = toy_planner.ask(Question("a", ()), None)
    assert (hidden["gpu"], hidden["pid"] == first["pid"]) == ("", False)
    gone = toy_planner.ask(Question("", ()), None)
    assert gone["problem"] == ["The planner ended with exit code 3", "Try k5train plan in a terminal"]
    assert toy_planner.ask(Question("a", ()), None)["recipe"] == "a"
    toy_planner.end()
    assert toy_planner.ask(Question("c", ()), PROCESSOR)["recipe"] == "c"
    pid = toy_planner.ask(Question("c", ()), PROCESSOR)["pid"]
    toy_planner.close()
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)
    assert toy_planner.ask(Question("c", ()), PROCESSOR)["problem"][0] == "The page has ended"


def test_the_end_of_the_page_ends_a_plan_that_is_being_made(toy_planner, monkeypatch):
    monkeypatch.setattr(planner, "COMMAND", [sys.executable, "-S", "-c", "import time; time.sleep(60)"])
    replies: list[object] = []
    thread = threading.Thread(target=lambda: replies.append(toy_planner.ask(Question("a", ()), None)))
    thread.start()
    while toy_planner._process is None:
        assert thread.is_alive()
    toy_planner.close()
    thread.join(10)
    assert replies == [None]


def test_of_several_questions_only_the_newest_is_answered(toy_planner, monkeypatch):
    begun, may_end = threading.Event(), threading.Event()
    asked: list[str] = []

    def slow(line, env, is_timed):
        asked.append(json.loads(line)["recipe"])
        begun.set()
        assert may_end.wait(10)
        return {"recipe": asked[-1]}

    monkeypatch.setattr(toy_planner, "_asked", slow)
    replies: dict[str, object] = {}
    threads = []
    for text in "abc":
        threads.append(
            threading.Thread(target=lambda t=text: replies.update({t: toy_planner.ask(Question(t, ()), None)}))
        )
        threads[-1].start()
        assert begun.wait(10)
        while toy_planner._newest < len(threads):
            pass
    may_end.set()
    for thread in threads:
        thread.join()
    assert (asked, replies) == (["a", "c"], {"a": None, "b": None, "c": {"recipe": "c"}})


def test_a_file_of_the_project_that_is_named_as_a_module_is_not_imported_by_the_planner(tmp_path, monkeypatch):
    (tmp_path / "wave.py").write_text("raise SystemExit(3)")
    before = planner.COMMAND[: planner.COMMAND.index("-m")]
    monkeypatch.setenv("PYTHONPATH", os.pathsep)  # an empty place is the current folder
    command = [*before, "-c", "import wave"]
    assert subprocess.run(command, cwd=tmp_path, env=system.environment(), check=False).returncode == 0

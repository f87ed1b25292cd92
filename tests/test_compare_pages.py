"""The compare and the sweep page: what they show, what they refuse, and the pictures that they ask for."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from PIL import Image
from starlette.testclient import TestClient

from k5train.pictures.saved import save_pictures
from k5train.runs.outcomes import Outcome, write_outcomes
from k5train.ui.app import create_app
from k5train.ui.ids import id_of
from k5train.ui.project import Project
from tests.test_compare import DRAWN, make


@pytest.fixture
def project(tmp_path) -> Path:
    """Two runs, one with an average and pairs, and a sweep with a run that failed."""
    pair = {**DRAWN, "pairs": [{"source": "a"}, {"source": "b"}]}
    good = make(tmp_path / "runs" / "good", ema=0.39, lr=1e-4)
    make(tmp_path / "runs" / "other", (0.5, 0.48, 0.47), lr=1e-3)
    save_pictures(good.root / "samples" / "pairs" / "source", [Image.new("RGB", (8, 8))] * 2, pair)
    make(tmp_path / "sweeps" / "ranks" / "rank=8")
    make(tmp_path / "sweeps" / "ranks" / "rank=16", (0.5, 0.3, 0.3))
    write_outcomes(tmp_path / "sweeps" / "ranks", [Outcome("rank=32", "x", problem="It did not fit: <8 GB>")])
    return tmp_path


@pytest.fixture
def page(project) -> TestClient:
    return TestClient(create_app(Project(project)), base_url="http://127.0.0.1:8001", raise_server_exceptions=False)


def test_runs_are_compared_with_pictures_that_can_be_fetched(page, project):
    good, other = id_of("runs/good"), id_of("runs/other")
    answer = page.get(f"/compare?run={good}&run={other}")
    assert answer.status_code == 200
    assert "The best is good at step 2: held-out loss 0.4000" in answer.text
    assert f'href="/runs/{good}"' in answer.text
    sources = re.findall(r' src="(/runs/[^"]+)"', answer.text.replace("&amp;", "&"))
    assert len(sources) == 8  # the base, good, its average and other, for two prompts
    assert f"/runs/{good}/pictures/ema/4/1" in " ".join(sources)
    for source in sources:
        picture = page.get(source)
        assert (picture.status_code, picture.headers["content-type"]) == (200, "image/webp")
        assert "immutable" in picture.headers["cache-control"]
    whole = page.get(sources[0].partition("&")[0])
    assert (whole.status_code, whole.headers["content-type"]) == (200, "image/png")
    kinds = [page.get(f"/runs/{good}/pictures/{kind}/0/0").status_code for kind in ("source", "target", "secret")]
    assert kinds == [200, 404, 404]


def test_the_list_has_what_can_be_compared_and_a_sweep_stands_for_its_runs(page, project):
    answer = page.get("/compare")
    assert [id in answer.text for id in (id_of("runs/good"), id_of("sweeps/ranks"), id_of("sweeps/ranks/rank=8"))] == [
        True, True, True,
    ]  # fmt: skip
    compared = page.get(f"/compare?run={id_of('sweeps/ranks')}")
    assert "2 runs compared" in compared.text
    assert f'value="{id_of("sweeps/ranks")}" checked' in compared.text
    assert page.get("/compare?run=0123456789ab").status_code == 404
    assert page.get("/compare?run=../../etc").status_code == 404


def test_an_empty_project_says_what_to_do_first(tmp_path):
    page = TestClient(create_app(Project(tmp_path)), base_url="http://127.0.0.1:8001")
    assert "There are no runs to compare yet" in page.get("/compare").text


def test_a_sweep_is_a_grid_with_the_best_marked_and_the_reason_of_a_failure(page, project):
    sweep = id_of("sweeps/ranks")
    answer = page.get(f"/sweeps/{sweep}")
    assert answer.status_code == 200
    assert "The best is rank=16 at step 2: held-out loss 0.3000" in answer.text
    assert "It did not fit: &lt;8 GB&gt;" in answer.text
    assert f'data-live="/sweeps/{sweep}/events"' in answer.text
    assert f'href="/compare?run={sweep}"' in answer.text
    (chosen,) = re.findall(r'<a class="tile cell chosen" href="([^"]+)"', answer.text)
    assert chosen == f"/runs/{id_of('sweeps/ranks/rank=16')}"
    assert page.get("/sweeps/0123456789ab").status_code == 404


def test_a_picture_through_a_link_that_leads_out_is_not_shown(page, project, tmp_path_factory):
    outside = tmp_path_factory.mktemp("outside") / "secret.png"
    Image.new("RGB", (8, 8)).save(outside)
    picture = project / "runs" / "good" / "samples" / "step-000004" / "00.png"
    picture.unlink()
    picture.symlink_to(outside)
    assert page.get(f"/runs/{id_of('runs/good')}/pictures/run/4/0").status_code == 404
    assert page.get(f"/runs/{id_of('runs/good')}/pictures/run/4/1").status_code == 200
    assert page.get(f"/runs/{id_of('runs/good')}/pictures/run/4/7").status_code == 404

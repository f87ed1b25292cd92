"""A model of the hub: when is the hub asked, when is anything downloaded, and what if it cannot be reached?"""

from __future__ import annotations

import errno
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

from k5cache.config import ModelConfig
from k5cache.errors import ModelError
from k5cache.hub import model_folder
from k5train.cli import app
from tests.cli import Cli

PARTS = ("transformer", "vae", "scheduler")
COMMIT, NEWER = "1111aaaa" * 5, "2222bbbb" * 5
MODEL = ModelConfig(path="someone/toy")
NO_ROUTE = HfHubHTTPError.__mro__[1]("no route to host")  # what httpx's own errors descend from


class Hub:
    """A stand-in for the hub: which commit ``main`` is, and what was asked of it."""

    def __init__(self, home: Path, model: Path) -> None:
        self.snapshots = home / "models--someone--toy" / "snapshots"
        self.here = self.snapshots / COMMIT
        shutil.copytree(model, self.here)
        self.refs = home / "models--someone--toy" / "refs" / "main"
        self.refs.parent.mkdir()
        self.refs.write_text(COMMIT, encoding="utf-8")
        self.commit, self.problem = COMMIT, None
        self.asked, self.downloads = 0, []

    def model_info(self, repo: str, revision: str | None = None, timeout: float | None = None) -> SimpleNamespace:
        self.asked += 1
        if self.problem:
            raise self.problem
        return SimpleNamespace(sha=self.commit)

    def snapshot_download(self, repo: str, revision: str | None = None, allow_patterns: object = None) -> str:
        if self.problem:
            raise self.problem
        self.downloads.append(allow_patterns)
        return str(shutil.copytree(self.here, self.snapshots / self.commit))


@pytest.fixture
def hub(tmp_path, toy_model, monkeypatch) -> Hub:
    made = Hub(tmp_path / "hub", toy_model)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.model_info", made.model_info)
    monkeypatch.setattr("huggingface_hub.snapshot_download", made.snapshot_download)
    return made


def test_a_snapshot_that_is_whole_and_the_newest_costs_one_question_and_no_download(hub, capsys):
    assert model_folder(MODEL, PARTS) == hub.here
    assert (hub.asked, hub.downloads) == (1, [])
    assert capsys.readouterr() == ("", "")


def test_a_revision_that_moved_is_downloaded(hub):
    hub.commit = NEWER
    assert model_folder(MODEL, PARTS) == hub.snapshots / NEWER
    assert hub.downloads == [["model_index.json", "transformer/*", "vae/*", "scheduler/*"]]


def test_a_pinned_commit_that_is_here_is_not_asked_for(hub):
    assert model_folder(ModelConfig(path="someone/toy", revision=COMMIT), PARTS) == hub.here
    assert (hub.asked, hub.downloads) == (0, [])


@pytest.mark.parametrize("problem", [NO_ROUTE, ConnectionError("refused")])
def test_where_the_hub_cannot_be_reached_the_last_download_serves_and_one_line_says_so(hub, capsys, problem):
    hub.problem = problem
    assert model_folder(MODEL, PARTS) == hub.here
    said = f"someone/toy as last downloaded, commit 1111aaaa: the hub cannot be asked ({problem})\n"
    assert capsys.readouterr() == ("", said)


def test_who_asked_to_be_offline_is_not_told_so(hub, capsys, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    hub.problem = OfflineModeIsEnabled("offline")
    assert model_folder(MODEL, PARTS) == hub.here
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("lost", "words"),
    [
        ("transformer/diffusion_pytorch_model.safetensors", "a weight file of transformer is missing"),
        ("scheduler/scheduler_config.json", "scheduler/scheduler_config.json is missing"),
    ],
)
def test_of_half_a_download_it_is_said_what_is_missing_where_the_hub_cannot_complete_it(hub, lost, words):
    (hub.here / lost).unlink()
    hub.problem = NO_ROUTE
    with pytest.raises(ModelError, match=rf"someone/toy is not on this machine as a whole: {words}, and cannot be"):
        model_folder(MODEL, PARTS)


def test_a_model_that_was_never_downloaded_needs_the_hub(hub):
    hub.problem = NO_ROUTE
    with pytest.raises(ModelError, match=r"someone/other is not on this machine, and cannot be downloaded \(no route"):
        model_folder(ModelConfig(path="someone/other"), PARTS)


def test_a_full_disk_is_not_taken_for_a_hub_that_is_away(hub):
    hub.problem = OSError(errno.ENOSPC, "No space left on device")
    with pytest.raises(OSError, match="No space left"):
        model_folder(MODEL, PARTS)


def test_a_run_trains_on_what_is_here_while_the_hub_is_away(hub, tmp_path, toy_cache):
    hub.problem = NO_ROUTE
    small = ("--set", "train.steps=1", "--set", "train.mixed_precision=fp32", "--set", "train.lora.rank=2")
    done = Cli(tmp_path)(app, "run", str(toy_cache("bf16")), "--model", "someone/toy", "-o", "runs/a", *small)
    assert done.code == 0, done.err
    assert done.err.count("the hub cannot be asked") == 1
    assert (tmp_path / "runs" / "a" / "a.safetensors").is_file()

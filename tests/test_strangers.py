"""Folders that somebody else made: no link leads a command out of them, and no name does."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from k5cache.shared.errors import CacheError, OutputError, RecipeError
from k5cache.shared.inside import check_inside, name_problem
from k5cache.shared.model import ModelConfig
from k5cache.store.manifest import lock
from k5cache.store.reader import open_cache
from k5cache.upkeep.gc import collect
from k5cache.upkeep.verify import verify_cache
from k5train.options.train import TrainConfig
from k5train.runs.folder import check_new, create_run, open_run
from k5train.training.start import start
from tests.store_samples import make_cache


def contents(folder: Path) -> dict[str, tuple[bytes, int]]:
    """Every file below a folder, with its bytes and its time."""
    return {
        str(p.relative_to(folder)): (p.read_bytes(), p.stat().st_mtime_ns) for p in folder.rglob("*") if p.is_file()
    }


def linked(folder: Path, name: str, target: Path) -> Path:
    """``folder/name`` replaced by a link to ``target``."""
    path = folder / name
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
    path.symlink_to(target)
    return path


# Caches


@pytest.mark.parametrize("name", ["masks", "latents", "text", ".lock", "manifest.json"])
@pytest.mark.parametrize("is_folder", [True, False])
def test_no_writer_of_a_cache_follows_a_link_out_of_it(tmp_path: Path, name: str, is_folder: bool) -> None:
    make_cache(tmp_path / "other")
    make_cache(tmp_path / "cache")
    target = tmp_path / "other" / ("latents" if is_folder else "manifest.json")
    linked(tmp_path / "cache", name, target)
    before = contents(tmp_path / "other")
    with pytest.raises((OutputError, CacheError), match=r"is a link|is not empty"), lock(tmp_path / "cache"):
        pass
    with pytest.raises((OutputError, CacheError)):
        collect(tmp_path / "cache")
    assert contents(tmp_path / "other") == before


def test_a_cache_reached_through_a_link_and_links_that_stay_in_it_are_followed(tmp_path: Path) -> None:
    make_cache(tmp_path / "disk" / "cache")
    (tmp_path / "disk" / "cache" / "latents").rename(tmp_path / "disk" / "cache" / "elsewhere")
    (tmp_path / "disk" / "cache" / "latents").symlink_to("elsewhere")
    (tmp_path / "cache").symlink_to(tmp_path / "disk" / "cache")
    assert len(open_cache(tmp_path / "cache")) == 4
    assert collect(tmp_path / "cache").dropped == ()
    assert verify_cache(tmp_path / "cache").problems == ()


def test_a_link_in_a_circle_in_a_cache_is_named(tmp_path: Path) -> None:
    make_cache(tmp_path)
    linked(tmp_path, "text", tmp_path / "text")
    with pytest.raises(CacheError, match="text"):
        open_cache(tmp_path).text("t-cat")
    with pytest.raises(OutputError, match="text is a link"), lock(tmp_path):
        pass


# Runs

RUN_ENTRIES = (
    ".lock", "checkpoints", "state", "samples", "metrics.jsonl", "recipe.toml", "run.json", "result.json",
    "samples/step-000001", "checkpoints/step-000001.safetensors", "state/step-000001", "loss.png", "tensorboard",
)  # fmt: skip


@pytest.fixture
def run(tmp_path: Path) -> Iterator[Path]:
    """A run without a step, beside a folder that must stay as it is."""
    outside = tmp_path / "outside"
    (outside / "inner").mkdir(parents=True)
    (outside / "file").write_text("theirs", encoding="utf-8")
    (outside / "inner" / "file").write_text("theirs", encoding="utf-8")
    root = tmp_path / "run"
    create_run(root, tmp_path / "cache", ModelConfig(), TrainConfig(name="run"))
    (root / "state").mkdir()
    before = contents(outside)
    yield root
    assert contents(outside) == before


@pytest.mark.parametrize("name", RUN_ENTRIES)
def test_no_command_opens_a_run_with_a_link_that_leads_out_of_it(run: Path, name: str) -> None:
    for target in (run.parent / "outside", run.parent / "outside" / "file", run.parent / "outside" / "nothing"):
        linked(run, name, target)
        with pytest.raises(OutputError, match=r"is a link to .*outside") as raised:
            open_run(run)
        assert "Remove the link" in raised.value.fix


def test_a_pipe_in_a_run_is_named_before_anything_waits_for_it(run: Path) -> None:
    os.mkfifo(run / "metrics.jsonl")
    with pytest.raises(OutputError, match=r"metrics\.jsonl is neither a file nor a folder"):
        open_run(run)


def test_a_new_run_is_not_begun_in_a_folder_whose_samples_lead_out_of_it(run: Path) -> None:
    root = run.parent / "new"
    root.mkdir()
    (root / "samples").symlink_to(run.parent / "outside" / "inner")
    with pytest.raises(OutputError, match="samples is a link"):
        check_new(root)


def test_a_run_reached_through_a_link_and_links_that_stay_in_it_are_followed(run: Path) -> None:
    (run.parent / "short").symlink_to(run)
    (run / "latest").symlink_to("checkpoints")
    assert open_run(run.parent / "short")[0].name == "short"


# Names


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("../../x", "name of one folder"),
        ("a/b", "name of one folder"),
        ("/tmp/x", "name of one folder"),
        ("a\\b", "name of one folder"),
        ("C:x", "name of one folder"),
        ("..", "begin or end with a dot"),
        (".hidden", "begin or end with a dot"),
        ("x.", "begin or end with a dot"),
        ("x ", "begin or end with a dot or a space"),
        ("a\0b", "control character"),
        ("a\x1b[31m", "control character"),
        ("", "is empty"),
        ("  ", "is empty"),
        ("con", "Windows"),
        ("NUL.txt", "Windows"),
        ("Lpt1", "Windows"),
        ("x" * 201, "201 bytes"),
        ("é" * 101, "202 bytes"),
        ("a\udcff", "not valid text"),
    ],
)
def test_a_name_that_is_not_one_folder_is_refused(tmp_path: Path, monkeypatch, name: str, reason: str) -> None:
    monkeypatch.chdir(tmp_path)
    assert reason in str(name_problem(name))
    with pytest.raises(RecipeError, match=r"train\.name"):
        start(None, TrainConfig(name=name), None, ModelConfig(), is_new=False)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["my_run", "try 2", "rank=8,lr=1e-4", "кошки", "v1.2", "x" * 200, "console", "猫"])
def test_ordinary_names_are_names(name: str) -> None:
    assert name_problem(name) is None


def test_a_run_folder_whose_lora_could_not_be_written_at_the_end_is_refused_at_the_start(tmp_path: Path) -> None:
    check_new(tmp_path / ("x" * 200))
    with pytest.raises(OutputError, match="more than 200 bytes"):
        check_new(tmp_path / ("x" * 201))


def test_a_folder_that_is_not_there_has_no_links(tmp_path: Path) -> None:
    check_inside(tmp_path / "nothing")
    check_inside(tmp_path / "nothing", ("a",))

"""A picture or a caption for which the transformer has no positions is refused before anything is loaded."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from k5cache.shared.errors import CacheError
from k5cache.shared.model import ModelConfig
from k5cache.store.reader import open_cache
from k5train.cli import app
from k5train.data.compatible import check_fit
from k5train.options.train import TrainConfig
from k5train.runs.folder import create_run
from tests.cli import Cli

WIDE = "train.validation.width=2064"


def test_every_command_that_draws_refuses_a_side_beyond_the_last_position(tmp_path, monkeypatch):
    monkeypatch.setattr("k5train.training.start.model_folder", None)  # nothing is looked for
    create_run(tmp_path / "done", Path("cache"), ModelConfig(), TrainConfig())
    (tmp_path / "recipe.toml").write_text("[train.validation]\nwidth = 2064\n", encoding="utf-8")
    for arguments in (
        ("run", "cache", "--set", WIDE),
        ("run", "cache", "-r", "recipe.toml"),
        ("resume", "done", "--set", WIDE),
        ("sample", "done", "--set", WIDE),
        ("sweep", "cache", "--grid", "train.validation.width=1024,2064"),
        ("plan", "cache", "--set", WIDE),
    ):
        done = Cli(tmp_path)(app, *arguments)
        assert done.code == 2, arguments
        assert "train.validation.width must be a multiple of 16 from 16 to 2048, found 2064" in done.err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["done", "recipe.toml"]


@pytest.mark.parametrize(("option", "value"), [("--resolution", 2064), ("--resolution", 1000), ("--text-tokens", 1025)])
def test_no_plan_is_made_for_what_the_transformer_does_not_take(tmp_path, option, value):
    done = Cli(tmp_path)(app, "plan", option, str(value))
    assert (done.code, f"{option} {value} is not a" in done.err) == (2, True)


def test_a_cache_of_another_program_with_larger_rows_is_refused(toy_cache, toy_model):
    cache = open_cache(toy_cache("fp32"))
    check_fit(cache, toy_model)
    shards = tuple(replace(s, bucket=(2064, 64)) if s.bucket else s for s in cache.manifest.shards)
    cache.manifest = replace(cache.manifest, shards=shards)
    with pytest.raises(CacheError, match="has no positions for: 2064x64\n"):
        check_fit(cache, toy_model)

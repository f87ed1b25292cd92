"""The README and the recipes: every command, option and file they name exists."""

from __future__ import annotations

import re
import shlex
import tomllib
from pathlib import Path
from typing import Any

import pytest
import typer

from k5cache.cli import app as cache_app
from k5cache.config import CacheConfig, ModelConfig
from k5cache.recipe import parse, read
from k5train.cli import app as train_app
from k5train.config import TrainConfig

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "docs" / "training.md", *ROOT.glob("pipelines/**/*.toml")]
COMMANDS = {"k5cache": typer.main.get_command(cache_app), "k5train": typer.main.get_command(train_app)}


def command_lines() -> list[str]:
    """Every line of a page that starts with one of our commands, continued lines joined."""
    lines = []
    for page in PAGES:
        text = page.read_text(encoding="utf-8").replace("\\\n", " ")
        lines += re.findall(r"^#?\s*\$?\s*(k5(?:cache|train) [a-z].*)$", text, flags=re.MULTILINE)
    return sorted(set(lines))


@pytest.mark.parametrize("line", command_lines())
def test_a_command_that_a_page_names_exists_with_its_options(line):
    words = shlex.split(line, comments=True)
    command: Any = COMMANDS[words.pop(0)]
    while hasattr(command, "commands"):
        command = command.commands[words.pop(0)]
    options = {name for parameter in command.params for name in parameter.opts if name.startswith("-")}
    used = {word.partition("=")[0] for word in words if word.startswith("-")}
    assert used <= options | {"--help"}


def test_there_are_commands_to_check():
    assert len(command_lines()) > 15


def test_every_file_that_the_readme_names_is_there():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    named = re.findall(r"`((?:k5cache|k5train|tests|docs|pipelines)/[\w/*]+\.\w+)`", text)
    assert named
    assert [name for name in named if not list(ROOT.glob(name))] == []


@pytest.mark.parametrize("path", sorted(ROOT.glob("pipelines/**/*.toml")), ids=lambda p: p.name)
def test_every_recipe_on_disk_parses(path):
    model, cache, train = parse(
        read(path, []), {"model": ModelConfig, "cache": CacheConfig, "train": TrainConfig}, path
    )
    assert (model, cache, train) != (ModelConfig(), CacheConfig(), TrainConfig())


@pytest.mark.parametrize("page", ["README.md", "docs/training.md"])
def test_every_option_in_a_toml_block_is_toml(page):
    text = (ROOT / page).read_text(encoding="utf-8")
    for block in re.findall(r"```toml\n(.*?)```", text, flags=re.DOTALL):
        tomllib.loads(block)

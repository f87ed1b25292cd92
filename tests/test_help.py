"""Help: commands in groups, nothing cut, examples that fit a terminal and parse; ``--version`` and completion."""

from __future__ import annotations

import shlex
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import version
from os import environ
from typing import Any

import typer

from k5cache.cli import app as cache_app
from k5cache.shared import help
from k5train.cli import app as train_app
from tests.cli import Cli

APPS = {"k5cache": cache_app, "k5train": train_app}


def commands(command: Any, *above: str) -> Iterator[tuple[tuple[str, ...], Any]]:
    """(words, command) of a group and of everything below it."""
    yield above, command
    for name, inner in getattr(command, "commands", {}).items():
        yield from commands(inner, *above, name)


ALL = {
    words: command for program, app in APPS.items() for words, command in commands(typer.main.get_command(app), program)
}


def examples_of(command: Any) -> list[str]:
    lines = (command.epilog or "").splitlines()[2:]
    return [line.strip() for line in lines]


def test_every_command_belongs_to_a_group_and_the_first_is_the_one_that_everybody_needs():
    for program, first in (("k5cache", ("Make a cache", "encode")), ("k5train", ("Train", "run"))):
        groups = {name: command.rich_help_panel for name, command in ALL[(program,)].commands.items()}
        assert all(isinstance(group, str) for group in groups.values()), groups
        assert next((group, name) for name, group in groups.items()) == first


def test_every_example_is_a_command_line_that_this_version_understands():
    for words, command in ALL.items():
        assert examples_of(command) or hasattr(command, "commands"), words
        for line in examples_of(command):
            assert len(line) <= help.MOST_EXAMPLE, line
            program, *rest = shlex.split(line, comments=True)
            rest = rest[: rest.index(">")] if ">" in rest else rest
            named, path = ALL[(program,)], [program]
            while hasattr(named, "commands"):
                path.append(rest.pop(0))
                named = named.commands[path[-1]]
            assert words in ((program,), tuple(path)) or words[0] != program, line
            if rest != ["--help"]:
                named.make_context(path[-1], rest)


def test_help_cuts_nothing_and_breaks_no_example(monkeypatch):
    for words, command in ALL.items():
        context = command.make_context(" ".join(words), [], resilient_parsing=True)
        for columns in ("80", "120"):
            monkeypatch.setenv("COLUMNS", columns)
            shown = command.get_help(context)
            lines = shown.splitlines()
            assert max(map(len, lines)) <= 80, words
            assert {f"    {line}" for line in examples_of(command)} <= set(lines), words
            text = " ".join(shown.split())
            for name, inner in getattr(command, "commands", {}).items():
                assert help.first_sentence(inner.help) in text, name


def test_the_version_names_the_libraries_that_a_report_of_a_fault_needs(tmp_path):
    for program, app in APPS.items():
        done = Cli(tmp_path)(app, "--version")
        assert done.code == 0
        own, torch, *_ = done.out.strip().split(", ")
        assert own == f"{program} {version('kandinsky5-lora')}"
        assert torch == f"torch {version('torch')}"
        assert f"diffusers {version('diffusers')}" in done.out


def test_python_m_and_completion_work_as_the_installed_commands_do():
    """bash sets these variables when TAB is pressed after ``k5train re``."""
    code = "import sys; from k5train.__main__ import main; sys.argv = ['k5train']; main()"
    asked = {"_K5TRAIN_COMPLETE": "complete_bash", "COMP_WORDS": "k5train re", "COMP_CWORD": "1"}
    outputs = [
        subprocess.run([sys.executable, *words], capture_output=True, text=True, env=environ | more, check=True).stdout
        for words, more in ((("-c", code), asked), (("-m", "k5train", "--version"), {}))
    ]
    assert "resume" in outputs[0].split()
    assert outputs[1].startswith("k5train ")

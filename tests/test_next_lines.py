"""Every command that is advised works when it is pasted: quoted, and with the model, options and recipe of before."""

from __future__ import annotations

import re
import shlex
import shutil
from pathlib import Path
from typing import Any

import pytest
import typer

from k5cache.cli import app as cache_app
from k5cache.shared import console
from k5cache.shared.command_line import this_command_alone
from k5train.cli import app as train_app
from tests.cli import Cli, Done
from tests.workshop import Workshop

RECIPE = """
[cache]
resolution = 64
[train]
steps = 1
mixed_precision = "fp32"
base_model_precision = "no_change"
[train.lora]
rank = 2
[train.validation]
prompts = ["it's a fox"]
num_inference_steps = 1
before = false
"""


def advised(done: Done) -> list[list[str]]:
    """The commands at the ends of the lines of an output, as a shell splits them."""
    lines = re.findall(r": (k5(?:cache|train) .*)$", done.out + done.err, re.MULTILINE)
    return [shlex.split(line) for line in lines]


def parsed(words: list[str]) -> tuple[str, dict[str, Any]]:
    """The command that these words run, and its arguments that are given. Refuses what the command line refuses."""
    command, rest = typer.main.get_command({"k5cache": cache_app, "k5train": train_app}[words[0]]), words[1:]
    path = []
    while hasattr(command, "commands"):
        path.append(rest[0])
        command, rest = command.commands[rest[0]], rest[1:]
    values = command.make_context(path[-1], list(rest)).params
    return " ".join(path), {name: value for name, value in values.items() if value}


@pytest.fixture(scope="module")
def place(tmp_path_factory, toy_model) -> Cli:
    """A folder in which every name has a space: pictures, a model, a recipe and a cache."""
    root = tmp_path_factory.mktemp("next lines")
    shop = Workshop(root, toy_model)
    shop.put("cat.png", "a cat")
    shop.source.rename(root / "my pics")
    shutil.copytree(toy_model, root / "my model")
    (root / "my recipe.toml").write_text(RECIPE, encoding="utf-8")
    return Cli(root)


OPTIONS = ("--model", "my model", "-r", "my recipe.toml", "--set", "train.name=a run")


@pytest.fixture(scope="module")
def encoded(place) -> list[str]:
    """What an encode advises, after what its plan advises."""
    arguments = ("my pics", "-o", "my cache", *OPTIONS, "--set", "cache.crop=none", "--device", "cpu")
    planned = place(cache_app, "plan", *arguments, "--vram", "12GB")
    assert planned.code == 0, planned.err
    [command] = advised(planned)
    assert parsed(command) == parsed(["k5cache", "encode", *arguments, "--vram", "12GB"])
    done = place(cache_app, *command[1:])
    assert done.code == 0, done.err
    [following] = advised(done)
    return following


def test_an_encode_advises_the_run_of_its_recipe_model_and_options(place, encoded):
    assert parsed(encoded) == parsed(["k5train", "run", "my cache", *OPTIONS])
    done = place(train_app, *encoded[1:])
    assert done.code == 0, done.err
    [following] = advised(done)
    assert parsed(following) == ("sample", {"run": Path("runs/a run")})
    drawn = place(train_app, *following[1:])
    assert drawn.code == 0, drawn.err
    exported = place(train_app, "export", "runs/a run/a run.safetensors", "--model", "my model")
    [check] = advised(exported)
    assert place(train_app, *check[1:]).code == 1  # diffusers ignores kohya's keys


def test_a_run_without_prompts_advises_how_to_draw_one(place, encoded):
    done = place(train_app, "run", "my cache", *OPTIONS, "-o", "no prompts", "--set", "train.validation.prompts=[]")
    assert done.code == 0, done.err
    add, draw = advised(done)
    for app, words in ((cache_app, add), (train_app, draw)):
        pasted = place(app, *words[1:], *(["--device", "cpu"] if words is add else []))
        assert pasted.code == 0, pasted.err
    assert (place.folder / "no prompts" / "samples" / "sample-001.png").is_file()


def test_a_recipe_that_names_its_caches_is_advised_without_another(place, encoded):
    recipe = place.folder / "own caches.toml"
    recipe.write_text(RECIPE + '[[train.data]]\ncache = "my cache"\n', encoding="utf-8")
    done = place(cache_app, "encode", "my pics", "-o", "my cache", "--model", "my model", "-r", recipe.name,
                 "--set", "cache.crop=none")  # fmt: skip
    assert done.code == 0, done.err
    [command] = advised(done)
    assert parsed(command) == parsed(["k5train", "run", "--model", "my model", "-r", recipe.name])


def test_info_names_a_model_that_is_there_and_no_other(place, encoded):
    [command] = advised(place(cache_app, "info", "my cache"))
    assert parsed(command) == parsed(["k5train", "run", "my cache", "--model", "my model"])
    (place.folder / "my model").rename(place.folder / "elsewhere")
    try:
        [command] = advised(place(cache_app, "info", "my cache"))
        assert parsed(command) == parsed(["k5train", "run", "my cache"])
    finally:
        (place.folder / "elsewhere").rename(place.folder / "my model")


def test_what_an_error_advises_can_be_pasted(place, encoded):
    done = place(
        train_app, "run", "my cache", *OPTIONS, "-o", "other run", "--set", 'train.validation.prompts=["-it\'s new"]'
    )
    [command] = advised(done)
    name, values = parsed(command)
    assert (name, values["cache"], values["prompts"]) == ("prompts add", Path("my cache"), ["-it's new"])
    done = place(train_app, "run", "no cache", *OPTIONS)
    assert parsed(advised(done)[0]) == parsed(["k5cache", "encode", "SOURCE", "-o", "no cache"])


def test_which_of_several_caches_is_answered_with_the_same_command(tmp_path):
    for name in ("a b", "c"):
        (tmp_path / "cache" / name).mkdir(parents=True)
        (tmp_path / "cache" / name / "manifest.json").touch()
    arguments = ("sweep", "--grid", "train.steps=1,2", "-o", "my sweep")
    done = Cli(tmp_path)(train_app, *arguments)
    assert done.err.splitlines()[-1] == f"  fix: Say which one: command {shlex.join(arguments)} 'cache/a b'"


def test_a_program_is_named_as_its_user_knows_it(monkeypatch):
    for program, name in (("/usr/bin/k5cache", "k5cache"), ("/src/k5train/cli.py", "k5train")):
        monkeypatch.setattr("sys.argv", [program, "run", "my cache"])
        assert console.this_command(set="train.steps=1") == f"{name} run 'my cache' --set train.steps=1"


@pytest.mark.parametrize(
    ("here", "all_of_them", "line"),
    [
        ("2", "2", "torchrun --nproc-per-node 2 -m k5train run cats --model m"),
        ("2", "4", "torchrun ... -m k5train run cats --model m"),  # it does not tell where its machines meet
    ],
)
def test_under_torchrun_the_same_command_is_torchruns(monkeypatch, here, all_of_them, line):
    monkeypatch.setattr("sys.argv", ["/site-packages/k5train/__main__.py", "run", "cats"])
    monkeypatch.setenv("LOCAL_WORLD_SIZE", here)
    monkeypatch.setenv("WORLD_SIZE", all_of_them)
    assert console.this_command() == "k5train run cats"  # a cluster sets such variables too, as --gpus does
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    assert console.this_command(model="m") == line
    assert this_command_alone(gpus=2) == "k5train run cats --gpus 2"

"""The packaged recipes are what their answers compose, and each holds to the options and its sources."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest

from k5cache.options import CacheConfig
from k5cache.shared import packaged
from k5cache.shared.errors import RecipeError
from k5cache.shared.model import ModelConfig
from k5cache.shared.recipe import parse, read, to_dict
from k5train.cli import app as train_app
from k5train.options.extremes import extreme_values
from k5train.options.rate import rate_warnings
from k5train.options.train import TrainConfig
from k5train.options.without_effect import options_without_effect
from k5train.recipes.amounts import between_looks, split_for, usual_steps
from k5train.recipes.answers import Answers
from k5train.recipes.compose import compose
from k5train.recipes.listed import PACKAGED
from k5train.training.sweep_runs import sweep_runs
from tests import test_moving as moving
from tests.cli import Cli
from tests.test_defaults_of_pages import OFFICIAL, QUICKSTART

FOLDER = Path(__file__).parent.parent / "pipelines"
SCHEMAS = {"model": ModelConfig, "cache": CacheConfig, "train": TrainConfig}


def values_of(text: str) -> dict[str, Any]:
    """Every option that a recipe sets, by its whole name, as our own parser reads it."""
    tables = tomllib.loads(text)
    whole = dict(zip(SCHEMAS, map(to_dict, parse(tables, SCHEMAS)), strict=True))
    read = flat(whole)
    return {name: read[name] for name in flat(tables)}


def flat(tables: dict[str, Any], above: str = "") -> dict[str, Any]:
    values = {}
    for key, value in tables.items():
        values |= flat(value, f"{above}{key}.") if isinstance(value, dict) else {f"{above}{key}": value}
    return values


DEFAULTS = flat({name: to_dict(schema()) for name, schema in SCHEMAS.items()})


@pytest.mark.parametrize("name", sorted(PACKAGED))
def test_a_packaged_recipe_is_what_its_answers_compose_and_needs_no_warning(name):
    text = (FOLDER / f"{name}.toml").read_text(encoding="utf-8")
    assert text == PACKAGED[name].text, "Run: python -m k5train.recipes.write pipelines"
    train = parse(tomllib.loads(text), SCHEMAS)[2]
    assert [*options_without_effect(train), *rate_warnings(train), *extreme_values(train)] == []
    assert max(map(len, text.splitlines())) <= 120


def test_every_value_of_a_packaged_recipe_has_a_comment_that_says_why():
    for name, recipe in PACKAGED.items():
        body = "\n" + recipe.text.split("\n# Regularisation data")[0]
        for match in re.finditer(r"\n([^\n]*)\n(\w+) = ", body):
            assert match[1].startswith("# "), f"{name}: {match[2]}"


def test_the_official_recipe_has_the_official_values():
    values = values_of(PACKAGED["official"].text)
    assert {name: values[name] for name in OFFICIAL} == OFFICIAL
    assert values["train.lora.targets"] == ["official"]


def test_the_recipe_of_simpletuners_quickstart_has_its_values():
    values = values_of(PACKAGED["simpletuner"].text)
    assert {name: values[name] for name in QUICKSTART} == QUICKSTART


def test_the_recipe_of_simpletuners_quickstart_is_what_import_makes_of_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, content in (("config.json", moving.QUICKSTART), ("multidatabackend.json", moving.BACKENDS),
                          ("user_prompt_library.json", moving.LIBRARY)):  # fmt: skip
        moving.write(f"config/{name}", json.dumps(content))
    imported = values_of(moving.turn(Path("config/config.json")).text)
    del imported["train.validation.prompt_library"]  # a file of theirs
    packaged_one = DEFAULTS | values_of(PACKAGED["simpletuner"].text)
    assert len(imported) > 10
    assert {name: packaged_one[name] for name in imported} == imported


def test_steps_for_some_numbers_of_images():
    assert [usual_steps("style", n) for n in (1, 20, 300, 1000)] == [200, 500, 1900, 3500]
    assert [usual_steps("character", n) for n in (20, 300)] == [800, 3100]
    assert usual_steps("style", 3000, num_rows=4) == 3000  # half of the 6,000 of one row
    assert [between_looks(steps) for steps in (200, 500, 1900, 3100)] == [50, 50, 250, 400]
    assert [split_for(n) for n in (10, 20, 300, 3000)] == [0.0, 0.1, 0.05, 0.02]


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"goal": "styles"}, "goal must be one of style, character, object, edit, found 'styles'"),
        ({"goal": "edit"}, "flavour must be an i2i flavour for goal edit, found t2i-lite-sft"),
        ({"flavour": "sft"}, "flavour must be one of t2i-lite-sft, t2i-lite-pretrain, i2i-lite-sft, i2i-lite-pretrain"),
        ({"vram": "much"}, "vram must be the size of a card such as \"12GB\", found 'much'"),
        ({"num_images": 0}, "num_images must be at least 1, found 0"),
        ({"caption_strategy": "txt"}, "caption_strategy must be one of textfile, filename, instanceprompt, metadata"),
        ({"caption_strategy": "instanceprompt"}, "instance_prompt and caption_strategy"),
        ({"source": " "}, "source is empty"),
        ({"goal": "edit", "flavour": "i2i-lite-sft", "prompts": ("a cat",)}, "prompts must be empty for goal edit"),
    ],
)
def test_answers_that_cannot_be_are_named(wrong, said):
    with pytest.raises(RecipeError, match=f"^{re.escape(said)}"):
        compose(Answers(**wrong))


def test_a_recipe_of_odd_answers_says_what_was_answered():
    answers = Answers(
        goal="object", vram="10 GB", num_images=12, trigger='ohwx "mug"', prompts=("a\\b\u007f [x] #", "Кот\n# x = 1"),
        source="my 'own' pictures", cache="cache/ö", recipe="my recipe.toml",
        caption_strategy="instanceprompt", instance_prompt="a # mug",
    )  # fmt: skip
    text = compose(answers)
    values = values_of(text)
    assert values["train.validation.prompts"] == list(answers.prompts)
    assert values["cache.trigger"] == answers.trigger
    assert values["cache.instance_prompt"] == "a # mug"
    assert values["train.memory.vram"] == "10 GB"
    assert "train.validation.split" not in values
    assert values["train.steps"] == 500
    assert "k5cache encode 'my '\"'\"'own'\"'\"' pictures' --recipe 'my recipe.toml' -o 'cache/ö'\n" in text


def test_a_packaged_recipe_is_taken_by_its_name_and_a_file_of_that_name_wins(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    packaged_one, said = packaged.located(Path("style-16gb"))
    assert (packaged_one, said) == (FOLDER / "style-16gb.toml", "")
    assert read(Path("style-16gb"), []) == read(FOLDER / "style-16gb.toml", [])
    (tmp_path / "style-12gb").mkdir()  # a folder is no recipe
    assert packaged.located(Path("style-12gb")) == (FOLDER / "style-12gb.toml", "")
    Path("style-16gb.toml").write_text("[train]\nsteps = 7\n", encoding="utf-8")
    assert read(Path("style-16gb.toml"), []) == {"train": {"steps": 7}}
    assert read(Path("style-16gb"), [])["train"]["steps"] == 1900
    assert "packaged recipe style-16gb, not the file style-16gb.toml" in " ".join(capsys.readouterr().err.split())
    Path("style-16gb").write_text("[train]\nsteps = 8\n", encoding="utf-8")
    assert read(Path("style-16gb"), []) == {"train": {"steps": 8}}
    assert "Using the file style-16gb, not the packaged" in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize(
    ("given", "fix"),
    [
        ("stile-16gb", "Give the path of a .toml file, or a name that `k5train recipes` lists (such as style-16gb"),
        ("official.toml", "There is a packaged one of that name: --recipe official"),
        ("pipelines/quick_512.toml", "There is a packaged one of that name: --recipe quick-512"),
        ("\0", "Give the path of a .toml file, or a name that `k5train recipes` lists"),
    ],
)
def test_a_recipe_that_is_not_there_is_answered_with_what_there_is(tmp_path, monkeypatch, given, fix):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(RecipeError) as error:
        read(Path(given), [])
    assert fix in error.value.fix


def test_the_list_of_rates_is_taken_by_its_name():
    _, by_name = sweep_runs(read(None, []), [], Path("which-rate"))
    _, by_path = sweep_runs(read(None, []), [], FOLDER / "which-rate.toml")
    assert by_name == by_path
    for given, fix in (("pipelines/which_rate.toml", "name: --list which-rate"), ("rates", "(such as which-rate)")):
        with pytest.raises(RecipeError) as error:
            sweep_runs(read(None, []), [], Path(given))
        assert fix in error.value.fix
    assert set(packaged.names()) == {*PACKAGED, *packaged.LISTS}


def test_the_command_lists_prints_and_writes_recipes(tmp_path):
    cli = Cli(tmp_path)
    listed = cli(train_app, "recipes")
    assert listed.code == 0
    assert all(name in listed.out for name in packaged.names())
    written = cli(train_app, "recipes", "object-12gb", "-o", "cups/my cup.toml")
    assert written.code == 0
    assert (
        "k5cache encode datasets/my_images --recipe 'cups/my cup.toml' -o cache/my_images" in written.out + written.err
    )
    text = (tmp_path / "cups" / "my cup.toml").read_text(encoding="utf-8")
    assert values_of(text) == values_of(PACKAGED["object-12gb"].text)
    printed = cli(train_app, "recipes", "object-12gb")
    assert printed.out == text.replace("'cups/my cup.toml'", "my.toml")
    assert printed.out.isascii()  # any encoding of a redirected output writes the same
    again = cli(train_app, "recipes", "object-12gb", "-o", "cups/my cup.toml")
    assert again.code == 0  # the same text
    other = cli(train_app, "recipes", "object-16gb", "-o", "cups/my cup.toml")
    assert (other.code, "-o 'cups/my cup-2.toml'" in other.err) == (2, True)
    assert (tmp_path / "cups" / "my cup.toml").read_text(encoding="utf-8") == text
    rates = cli(train_app, "recipes", "which-rate")
    assert rates.out == (FOLDER / "which-rate.toml").read_text(encoding="utf-8")
    unknown = cli(train_app, "recipes", "rates")
    assert (unknown.code, "There is no recipe rates" in unknown.err) == (2, True)


def test_a_wheel_carries_the_recipes_and_finds_them(tmp_path):
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE", "k5cache/__init__.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(FOLDER.parent / name, tmp_path / name)
    for name in ("k5cache/shared", "k5train/recipes", "k5train/ui"):
        shutil.copytree(FOLDER.parent / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "pipelines").mkdir()
    for path in FOLDER.glob("*.toml"):
        shutil.copy(path, tmp_path / "pipelines")
    build = [sys.executable, "setup.py", "-q", "build_py", "--build-lib", "lib"]
    done = subprocess.run(build, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    library = tmp_path / "lib" / "k5cache" / "shared"
    assert {path.stem for path in (library / "recipes").iterdir()} == set(packaged.names())
    assert (tmp_path / "lib" / "k5train" / "recipes" / "needs.json").is_file()
    page = {
        path.name for path in (FOLDER.parent / "k5train" / "ui").rglob("*.*") if path.suffix in (".html", ".css", ".js")
    }
    assert (
        {path.name for path in (tmp_path / "lib" / "k5train" / "ui").rglob("*.*")}
        >= page
        >= {"layout.html", "page.css"}
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(packaged, "_HERE", library)
        assert packaged.path("official") == library / "recipes" / "official.toml"

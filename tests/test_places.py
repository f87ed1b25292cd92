"""Where things are: a run finds its cache and its model from any folder, and after either was moved or renamed."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from k5cache.shared import places
from k5cache.shared.errors import RunError
from k5cache.shared.model import ModelConfig
from k5cache.shared.places import model_near
from k5cache.shared.sealed import unseal, write_sealed
from k5train.cli import app
from k5train.options.adapter import LoraConfig
from k5train.options.data import DataConfig
from k5train.options.train import TrainConfig
from k5train.runs.folder import Run, create_run, open_run
from k5train.runs.recipe import comparable, read_facts, read_recipe, write_recipe
from k5train.training import more_pictures, start
from tests.cli import Cli, Done
from tests.runs import CONFIG


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with two caches, a model, a LoRA and a run that names all of them as a user in it would."""
    folder = tmp_path / "home"
    for name in ("cache/cats/manifest.json", "cache/dogs/manifest.json", "models/k5/transformer/config.json", "start"):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(name, encoding="utf-8")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(folder)
    places._say.cache_clear()
    create_run(Path("runs/cats"), Path("cache/cats"), MODEL, TrainConfig(data=DATA, lora=LoraConfig(init_lora="start")))
    return folder


MODEL = ModelConfig(path="models/k5")
DATA = (DataConfig(cache="cache/cats"), DataConfig(cache="./cache/dogs"))


def named_by(root: Path) -> list[str]:
    """The paths of what a run names, from the working directory: cache, caches of the recipe, model, LoRA."""
    _, model, config, cache = open_run(root)
    return [str(cache), *(entry.cache for entry in config.data), str(model.path), str(config.lora.init_lora)]


NAMED = ["cache/cats", "cache/cats", "./cache/dogs", "models/k5", "start"]


def below(folder: Path) -> list[str]:
    """Where what the run names is, if all of it is below ``folder``."""
    return [str(folder / name) for name in NAMED]


def test_what_a_run_names_is_found_from_any_folder_and_after_any_move(home, monkeypatch):
    root, tmp_path = home / "runs" / "cats", home.parent
    assert named_by(Path("runs/cats")) == named_by(root) == NAMED  # as its user wrote it
    monkeypatch.chdir(root)
    assert named_by(Path()) == below(home)
    monkeypatch.chdir(tmp_path)  # a readable path where it is below the working directory
    assert named_by(root) == below(Path("home"))
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert named_by(root) == below(home)

    moves = {  # what is moved where, and where all that the run names is below then
        "the run renamed": ("home/runs/cats", "home/runs/tigers", "home"),
        "the run moved deeper": ("home/runs/tigers", "home/runs/old/2024/tigers", "home"),
        "the run moved away": ("home/runs/old/2024/tigers", "elsewhere/tigers", "home"),
        "the run moved back": ("elsewhere/tigers", "home/runs/tigers", "home"),
        "both moved": ("home", "moved/home", "moved/home"),
        "both moved, then the run deeper": ("moved/home/runs/tigers", "moved/home/a/b/c/tigers", "moved/home"),
    }
    for what, (before, after, where) in moves.items():
        (tmp_path / after).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / before).rename(tmp_path / after)
        (root,) = (path.parent for path in tmp_path.rglob("run.json"))
        assert named_by(root) == below(tmp_path / where), what

    # Nothing is left anywhere: the place that it had is named, for the error.
    for name in ("cache", "models", "start"):
        (tmp_path / "moved" / "home" / name).rename(tmp_path / "moved" / f"other {name}")
    assert named_by(root)[0] == str(home / "cache" / "cats")
    monkeypatch.chdir(tmp_path / "moved")
    Path("other cache").rename("cache")  # beside the folder that the run is in, and below the working directory
    assert named_by(root)[:3] == [str(Path("cache", "cats")), str(Path("cache", "cats")), "./cache/dogs"]


def test_a_copy_of_both_uses_its_own_cache_and_says_so(home, monkeypatch, capsys):
    copy = home.parent / "copy"
    shutil.copytree(home, copy)
    monkeypatch.chdir(home)  # where the cache of the same name is the one that the copied run was made with
    assert named_by(copy / "runs" / "cats") == below(copy)
    said = " ".join(capsys.readouterr().err.split())
    assert f"was made with {home / 'cache' / 'cats'}. Using {copy / 'cache' / 'cats'}" in said
    shutil.rmtree(home / "cache")
    assert named_by(copy / "runs" / "cats")[0] == str(copy / "cache" / "cats")


def test_links_of_the_user_may_be_pointed_elsewhere(home, monkeypatch):
    big = home.parent / "big disk"
    (home / "cache").rename(big)
    (home / "cache").symlink_to(big)
    create_run(home / "runs" / "linked", Path("cache/cats"), MODEL, TrainConfig())
    place = read_facts(home / "runs" / "linked").places["cache/cats"]
    assert (place.from_here, place.absolute) == ("../../cache/cats", str(home / "cache" / "cats"))
    bigger = big.rename(home.parent / "bigger disk")
    (home / "cache").unlink()
    (home / "cache").symlink_to(bigger)
    monkeypatch.chdir(home.parent / "elsewhere")
    assert open_run(home / "runs" / "linked")[3] == home / "cache" / "cats"
    # A folder of runs that is a link: the way from the run is that of the system, which leaves .. after the link.
    (home.parent / "fast").mkdir()
    (home / "links").symlink_to(home.parent / "fast")
    create_run(home / "links" / "a", home / "cache" / "cats", MODEL, TrainConfig())
    assert read_facts(home / "links" / "a").places[str(home / "cache" / "cats")].from_here == "../../bigger disk/cats"
    home.rename(home.parent / "gone")
    assert open_run(home.parent / "fast" / "a")[3] == bigger / "cats"


def test_a_run_of_an_earlier_version_finds_what_it_names_by_its_name(home, monkeypatch):
    root = home / "runs" / "cats"
    facts = unseal((root / "run.json").read_bytes())
    for document in ({**facts, "places": {}}, {name: facts[name] for name in ("cache", "versions")}):
        if "recipe" in document:
            write_sealed(root / "run.json", {name: v for name, v in document.items() if name != "places"})
        else:  # without a checksum
            (root / "run.json").write_text(json.dumps(document), encoding="utf-8")
        for folder, found in ((home, NAMED), (home.parent / "elsewhere", below(home))):
            monkeypatch.chdir(folder)
            assert named_by(root) == found


def test_an_option_is_a_path_from_here_and_the_recipe_keeps_the_names_that_were_found(home, monkeypatch):
    root = home / "runs" / "cats"
    monkeypatch.chdir(home.parent / "elsewhere")
    text = (root / "recipe.toml").read_text(encoding="utf-8")
    _, model, config, _ = open_run(root)
    write_recipe(root, model, config)
    assert (root / "recipe.toml").read_text(encoding="utf-8") == text
    write_recipe(root, model, replace(config, steps=7))
    assert (root / "recipe.toml").read_text(encoding="utf-8") == text.replace("steps = 1000\n", "steps = 7\n") != text
    assert named_by(root) == below(home)

    shutil.copytree(home / "models", "models")
    document = read_recipe(root, ["model.path=models/k5"])
    assert document["model"]["path"] == "models/k5"  # of this folder: an option is written now
    _, model, config, _ = open_run(root, ["model.path=models/k5"])
    shutil.copytree(home / "cache" / "cats", "cats")
    write_recipe(root, model, config, Path("cats"))
    monkeypatch.chdir(home)
    assert named_by(root)[0] == str(home.parent / "elsewhere" / "cats")
    assert named_by(root)[3] == str(home.parent / "elsewhere" / "models" / "k5")


def test_two_ways_to_one_place_are_one_recipe(home, monkeypatch):
    from_home = comparable(MODEL, TrainConfig(data=DATA))
    absolute = tuple(DataConfig(cache=str(home / entry.cache)) for entry in DATA)
    assert comparable(ModelConfig(path=str(home / "models" / "k5")), TrainConfig(data=absolute)) == from_home
    assert comparable(ModelConfig(path="owner/name"), TrainConfig())["model"]["path"] == "owner/name"


def test_the_model_of_a_cache_is_found_near_it(home, monkeypatch):
    monkeypatch.chdir(home.parent / "elsewhere")
    cache = home / "cache" / "cats"
    assert model_near(MODEL, cache).path == str(home / "models" / "k5")
    for other in (ModelConfig(), ModelConfig(path="owner/name"), ModelConfig(path="/nowhere/models/k5")):
        assert model_near(other, cache) == other


def test_a_run_is_drawn_and_resumed_wherever_it_and_its_cache_are(toy_cache, toy_model, tmp_path, monkeypatch):
    used: list[tuple[Path, list[Path]]] = []  # the cache, and the LoRAs that are drawn

    def resample(run, model, config, cache, choices, out, measured):
        used.append((cache, [choice.path for choice in choices]))
        return more_pictures.Resampled(run.grid)

    def train(data, folder, config, run, accepted, step, ranks):
        accepted()
        used.append((data.first.root, [run.lora]))
        raise RunError("far enough", "")

    monkeypatch.setattr(more_pictures, "resample", resample)
    monkeypatch.setattr(start, "train", train)
    home, moved = tmp_path / "home", tmp_path / "moved"
    for name in ("away", "home/cache", "home/models"):
        (tmp_path / name).mkdir(parents=True)
    shutil.copytree(toy_cache("fp32"), home / "cache" / "cats")
    (home / "models" / "toy").symlink_to(toy_model)
    monkeypatch.chdir(home)
    config = replace(CONFIG, name="cats")
    run = create_run(Path("runs/cats"), Path("cache/cats"), ModelConfig(path="models/toy"), config)
    (home / "runs" / "cats" / "cats.safetensors").touch()
    assert run.lora == Path("runs/cats/cats.safetensors")

    (home / "runs" / "cats").rename(home / "runs" / "tigers")
    home.rename(moved)
    root, lora = moved / "runs" / "tigers", moved / "runs" / "tigers" / "cats.safetensors"  # the file keeps its name
    felines = tmp_path / "away" / "felines"

    def call(command: str, *options: str) -> Done:
        return Cli(tmp_path / "away")(app, command, str(root), *options)

    assert call("sample").code == 0
    assert call("resume").code == 2
    assert used == [(moved / "cache" / "cats", [lora])] * 2
    (moved / "cache" / "cats").rename(felines)
    for command in ("sample", "resume"):
        done = call(command)
        words = f"{root} was trained on {moved / 'cache' / 'cats'}, which is not there"
        assert (done.code, words in " ".join(done.err.split())) == (2, True), done.err
    used.clear()
    assert call("sample", "--cache", "felines").code == 0
    assert "far enough" in call("resume", "--cache", "felines").err
    assert used == [(Path("felines"), [lora])] * 2
    assert Cli(tmp_path)(app, "sample", str(root)).code == 0  # the run knows now where it is
    assert used[2:] == [(Path("away/felines"), [lora])]


def test_loras_are_found_by_the_name_that_they_have(tmp_path):
    run = create_run(tmp_path / "cats", Path("cache"), ModelConfig(), TrainConfig(name="cats"))
    tigers = Run(tmp_path / "tigers")
    run.root.rename(tigers.root)
    assert tigers.lora == tigers.root / "tigers.safetensors"  # none is there yet
    (tigers.root / "cats-best.safetensors").touch()
    assert [path.name for path in (tigers.lora, tigers.best, tigers.ema)] == [
        "cats.safetensors", "cats-best.safetensors", "cats-ema.safetensors",
    ]  # fmt: skip
    (tigers.root / "tigers.safetensors").touch()
    assert tigers.best.name == "tigers-best.safetensors"
    for name in ("tigers.safetensors", "cats-best.safetensors"):
        (tigers.root / name).unlink()
    # Of an earlier version, by how it ended; nothing in there leads out of the folder.
    (tigers.root / "run.json").write_text('{"cache": "cache", "versions": {}}', encoding="utf-8")
    for lora, stem in (("lynx.safetensors", "lynx"), ("../lynx.safetensors", "tigers"), (7, "tigers")):
        (tigers.root / "result.json").write_text(json.dumps({"lora": lora}), encoding="utf-8")
        (tigers.root / "lynx.safetensors").touch()
        assert tigers.lora.stem == stem

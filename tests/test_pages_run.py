"""Every command line that a page shows is run, in the order of the page, on toy models and in a few steps."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from pathlib import Path

import pytest
from PIL import Image

from k5cache.cli import app as cache_app
from k5train.cli import app as train_app
from tests import test_moving as moving
from tests.cli import Cli, Done
from tests.test_readme import PAGES, ROOT, command_lines, command_of, words_of

APPS = {"k5cache": cache_app, "k5train": train_app}
STEPS = {"250": "1", "500": "2"}
"""Which step of a run here stands for which of a page."""
ENCODE = ("cache.resolution=64",)
TRAIN = (
    "train.steps=2", "train.checkpoint_every=1", "train.mixed_precision=fp32", "train.device=cpu",
    "train.base_model_precision=no_change", "train.lora.rank=2", "train.optim.warmup_steps=0",
    "train.validation.num_inference_steps=1", "train.validation.before=false", "train.validation.every=0",
)  # fmt: skip
KEEPS = ("train.validation.split=0.5", "train.validation.held_out_every=1", "train.optim.ema_decay=0.9")
PROMPTS = (
    "a lighthouse on a cliff at dusk",
    "a portrait of an old fisherman",
    "a red bicycle leaning against a brick wall",
)
NOT_HERE = {
    "k5train bench": "times a GPU",
    "k5cache bench": "times a GPU",
    "k5cache push": "asks the hub",
    "k5cache pull": "asks the hub",
    "k5train push": "asks the hub",
    "k5train ui": "serves until it is stopped",
}
"""Commands that are not run, and why."""
WORDS_NOT_HERE = {
    "--gpus": "needs several GPUs",
    "--engine": "starts a cluster",
    "s3://": "asks a store",
    "$": "is a line of a shell's loop",
}
"""The same for lines with such a word in them; that their options exist, ``test_readme.py`` checks."""
DRAWN = "►"  # in a picture of the two stages, not a command
FIRST_PAGES = ("README.md",)
RUN = [page for page in PAGES if any(shown == page for shown, line in command_lines() if DRAWN not in line)]


def shrunk(words: list[str]) -> list[str]:
    """The same command on a toy model, with a small resolution and two steps."""
    command, _ = command_of(words)
    names = {name for parameter in command.params for name in parameter.opts}
    line = " ".join(words)
    words = [STEPS.get(word, word) for word in words]
    edits = any(part in line for part in ("edit", "pairs", "source", "i2i"))
    if "--model" in words:
        words[words.index("--model") + 1] = "toy"
    elif "--model" in names and "--into-base" not in words:
        words += ["--model", "toy_edit" if edits else "toy"]
    if "--device" in names:
        words += ["--device", "cpu"]
    if "--set" in names and words[1] != "sample":
        sets = TRAIN if words[0] == "k5train" else ENCODE
        sets = ("train.steps=3",) if words[1] == "resume" else sets
        taken = {word.partition("=")[0] for word in words}
        words += [part for option in sets if option.partition("=")[0] not in taken for part in ("--set", option)]
    return words


def run(cli: Cli, line: str) -> Done:
    words = shrunk(words_of(line))
    files = [str(found.relative_to(cli.folder)) for word in words if "*" in word for found in cli.folder.glob(word)]
    return cli(APPS[words[0]], *[word for word in words[1:] if "*" not in word], *files)


def picture(path: Path, colour: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (64, 64), colour).save(path)


@pytest.fixture(scope="module")
def with_pictures(once, toy_model, toy_edit_model) -> Path:
    """What a page supposes that begins at the beginning: pictures, pairs and recipes under the names that it uses."""
    return once("pages_pictures", lambda root: put_pictures(root, toy_model, toy_edit_model))


@pytest.fixture(scope="module")
def with_runs(once, with_pictures) -> Path:
    """What the other pages suppose: caches, runs and LoRAs too."""
    return once("pages_runs", lambda root: make_runs(root, with_pictures))


def put_pictures(root: Path, toy_model: Path, toy_edit_model: Path) -> None:
    root.mkdir(exist_ok=True)
    (root / "toy").symlink_to(toy_model)
    (root / "toy_edit").symlink_to(toy_edit_model)
    (root / "DIR").symlink_to(toy_model)
    (root / "pipelines").mkdir()
    for path in (ROOT / "pipelines").iterdir():
        (root / "pipelines" / path.name).symlink_to(path)
    rates = (ROOT / "pipelines" / "which-rate.toml").read_text(encoding="utf-8")
    # A file of this name has priority over the packaged list.
    (root / "which-rate").write_text(re.sub(r"(?m)^(train\.steps) = \d+", r"\1 = 2", rates), encoding="utf-8")
    for name, colour in (("cat", "teal"), ("dog", "navy")):
        for folder, caption in (
            ("datasets/my_images", f"a {name}"),
            ("datasets/her", "a sks woman"),
            ("datasets/after", "paint it"),
            ("targets", "x"),
        ):
            picture(root / folder / f"{name}.png", colour)
            (root / folder / f"{name}.txt").write_text(caption, encoding="utf-8")
        for folder in ("datasets/before", "sources"):
            picture(root / folder / f"{name}.png", "olive")
    for number in ("001", "002"):
        picture(root / "datasets" / "my_cat" / f"{number}.jpg", "teal")
        (root / "datasets" / "my_cat" / f"{number}.txt").write_text("sits on a red sofa", encoding="utf-8")
    for suffix, colour in (("_start.png", "olive"), ("_end.png", "teal")):
        picture(root / "pairs" / f"cat{suffix}", colour)
    (root / "pairs" / "cat.txt").write_text("paint it", encoding="utf-8")
    (root / "pairs.csv").write_text("source,image,text\nsources/cat.png,targets/cat.png,paint it\n", encoding="utf-8")
    for name in ("photo.png", "house.jpg", "kitchen.jpg"):
        picture(root / name, "maroon")
    for name, text in {
        "config/config.json": json.dumps(moving.QUICKSTART),
        "config/multidatabackend.json": json.dumps(moving.BACKENDS),
        "config/user_prompt_library.json": json.dumps(moving.LIBRARY),
        "train.sh": moving.MUSUBI,
        "dataset.toml": moving.MUSUBI_DATA,
        "train.yaml": moving.AI_TOOLKIT,
        "my_recipe.toml": f"[train.validation]\nprompts = {json.dumps(PROMPTS)}\n",
        "runs.toml": '[[run]]\nname = "one"\ntrain.lora.alpha = 8\n',
    }.items():
        (root / name).parent.mkdir(exist_ok=True)
        (root / name).write_text(text, encoding="utf-8")


def make_runs(root: Path, with_pictures: Path) -> None:
    shutil.copytree(with_pictures, root, symlinks=True, dirs_exist_ok=True)
    cli, prompts = Cli(root), f"--set train.validation.prompts='{json.dumps(PROMPTS)}'"
    keep = " ".join(f"--set {option}" for option in KEEPS)
    do(cli, f"k5cache encode datasets/my_images {prompts}")
    do(cli, "k5cache encode datasets/after --sources datasets/before -o cache/my_edit")
    for name in ("my_edits", "my_pairs"):
        shutil.copytree(root / "cache" / "my_edit", root / "cache" / name)
    for name in ("a", "b", "part_a", "part_b"):
        shutil.copytree(root / "cache" / "my_images", root / "cache" / name)
    do(cli, f"k5train run cache/my_images {prompts} {keep}")
    do(cli, "k5train run cache/my_images -o runs/my_dora --set train.lora.algo=dora")
    do(cli, "k5train run cache/my_edit")
    do(cli, "k5train run cache/my_pairs")
    for name in ("first", "second"):
        shutil.copytree(root / "runs" / "my_images", root / "runs" / name)
    for name in ("FILE", "A", "B", "a.safetensors", "b.safetensors", "other.safetensors"):
        shutil.copy(root / "runs" / "my_images" / "my_images.safetensors", root / name)


def do(cli: Cli, line: str) -> None:
    done = run(cli, line)
    assert done.code == 0, f"{line}\n{done.err}"


@pytest.mark.parametrize("page", [p for p in RUN if p.name in FIRST_PAGES], ids=lambda page: page.name)
def test_every_command_line_of_a_first_page_runs(with_pictures, tmp_path, page):
    run_page(page, with_pictures, tmp_path)


@pytest.mark.long
@pytest.mark.parametrize("page", [p for p in RUN if p.name not in FIRST_PAGES], ids=lambda page: page.name)
def test_every_command_line_of_a_page_runs(with_runs, tmp_path, page):
    run_page(page, with_runs, tmp_path)


def run_page(page: Path, stage: Path, tmp_path: Path) -> None:
    shutil.copytree(stage, tmp_path / "here", symlinks=True)
    cli, failed = Cli(tmp_path / "here"), []
    for shown, line in command_lines():
        if shown != page or DRAWN in line or re.match("|".join(NOT_HERE), line):
            continue
        if any(word in line for word in WORDS_NOT_HERE):
            continue
        done = run(cli, line)
        if done.code != 0:
            failed.append(f"{line}\n  {shlex.join(shrunk(words_of(line)))}\n{done.code} {done.err[-600:]}")
    assert not failed, "\n".join(failed)

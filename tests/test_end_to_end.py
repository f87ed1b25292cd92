"""The main job: images in, a cache, a LoRA and pictures out; the LoRA changes diffusers' own pipeline."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import k5cache
from k5cache.cli import app as cache_app
from k5train.cli import app as train_app
from tests.cli import Cli

RECIPE = """
[cache]
resolution = 128
[train]
steps = 6
batch_size = 2
gradient_accumulation_steps = 2
checkpoint_every = 3
[train.lora]
rank = 4
[train.optim]
lr = 1e-2
warmup_steps = 2
[train.validation]
prompts = ["a red square", "nothing but noise"]
num_inference_steps = 2
width = 64
height = 64
every = 3
"""


@pytest.fixture(scope="module")
def workplace(tmp_path_factory, toy_model) -> Path:
    """A folder as a user has it: images of several shapes with captions, a recipe, and a model beside them."""
    root = tmp_path_factory.mktemp("workplace")
    images = root / "datasets" / "my_images"
    (images / "more").mkdir(parents=True)
    random = np.random.default_rng(0)
    for i, (width, height) in enumerate([(300, 300), (500, 300), (200, 420), (128, 128), (260, 300)]):
        folder = images / ("more" if i % 2 else "")
        Image.fromarray(random.integers(0, 255, (height, width, 3), dtype=np.uint8)).save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text(f"picture {i} of" + " many" * i, encoding="utf-8")
    (root / "recipe.toml").write_text(RECIPE, encoding="utf-8")
    return root


@pytest.fixture(scope="module")
def trained(workplace, toy_model) -> Path:
    """The run that the two everyday commands leave."""
    cli = Cli(workplace)
    common = ["--recipe", "recipe.toml", "--model", str(toy_model)]
    encoded = cli(cache_app, "encode", "datasets/my_images", *common)
    assert encoded.code == 0, encoded.err
    assert "Next, train a LoRA: k5train run cache/my_images" in encoded.out
    run = cli(train_app, "run", *common)
    assert run.code == 0, run.err
    assert "runs/my_images/my_images.safetensors" in run.out
    return workplace / "runs" / "my_images"


def test_encode_puts_every_caption_and_prompt_into_the_cache(workplace, trained):
    cache = k5cache.open(workplace / "cache" / "my_images")
    assert [cache.row(i).path for i in range(len(cache))] == ["0.png", "2.png", "4.png", "more/1.png", "more/3.png"]
    assert set(cache.manifest.prompts) == {"", "a red square", "nothing but noise"}
    assert [item["bucket"] for item in cache] == [(128, 128), (80, 176), (112, 144), (160, 96), (128, 128)]
    assert all(item["mean"].shape == (item["bucket"][1] // 8, item["bucket"][0] // 8, 16) for item in cache)


def test_a_second_encode_reuses_every_row_and_changes_no_byte(workplace, trained, toy_model):
    cache = workplace / "cache" / "my_images"
    before = {p.name: p.read_bytes() for p in cache.glob("*/*.parquet")}
    again = Cli(workplace)(
        cache_app, "encode", "datasets/my_images", "--recipe", "recipe.toml", "--model", str(toy_model)
    )
    assert again.code == 0, again.err
    assert {p.name: p.read_bytes() for p in cache.glob("*/*.parquet")} == before


def test_info_shows_items_buckets_and_model(workplace, trained, toy_model):
    shown = Cli(workplace)(cache_app, "info", "cache/my_images")
    assert shown.code == 0
    assert "128x128" in shown.out
    assert "a red square" in shown.out


def test_a_run_leaves_its_recipe_metrics_checkpoints_samples_and_lora(trained):
    metrics = [json.loads(line) for line in (trained / "metrics.jsonl").read_text().splitlines()]
    assert [m["step"] for m in metrics] == [1, 2, 3, 4, 5, 6]
    assert [round(m["lr"], 6) for m in metrics] == [0.005, 0.01, 0.01, 0.01, 0.01, 0.01]
    assert sorted(p.name for p in (trained / "checkpoints").iterdir()) == [
        "step-000003.safetensors", "step-000006.safetensors"]  # fmt: skip
    assert sorted(p.name for p in (trained / "samples").iterdir()) == ["step-000000", "step-000003", "step-000006"]
    assert 'base_model_precision = "int8-quanto"' in (trained / "recipe.toml").read_text()
    with Image.open(trained / "samples.png") as grid:
        assert np.asarray(grid.convert("RGB")).std() > 10


def test_the_lora_loads_whole_into_diffusers_and_changes_its_picture(trained, toy_model):
    from diffusers import Kandinsky5T2IPipeline
    from peft import get_peft_model_state_dict

    pipe = Kandinsky5T2IPipeline.from_pretrained(toy_model, dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    pipe.resolutions = [(64, 64)]

    def draw() -> np.ndarray:
        noise = torch.Generator("cpu").manual_seed(1)
        result = pipe("a red square", height=64, width=64, num_inference_steps=2, generator=noise, output_type="np")
        return result.image

    before = draw()
    path = trained / "my_images.safetensors"
    pipe.load_lora_weights(path, adapter_name="mine")
    after = draw()
    loaded = {
        f"transformer.{k}": v for k, v in get_peft_model_state_dict(pipe.transformer, adapter_name="mine").items()
    }
    saved = load_file(path)
    assert loaded.keys() == saved.keys()
    assert all(torch.equal(loaded[name], saved[name].to(loaded[name].dtype)) for name in saved)
    assert np.abs(after - before).max() > 1e-3


def test_sample_draws_more_from_a_finished_run(workplace, trained):
    drawn = Cli(workplace)(
        train_app, "sample", "runs/my_images", "--step", "3", "--prompt", "a red square", "--seed", "7"
    )
    assert drawn.code == 0, drawn.err
    assert (trained / "samples" / "sample-001.png").is_file()
    unknown = Cli(workplace)(train_app, "sample", "runs/my_images", "--prompt", "not in the cache")
    assert unknown.code == 2
    assert "'not in the cache'" in unknown.err


def test_a_run_that_names_no_model_trains_the_one_the_cache_was_made_with(workplace, trained, toy_model):
    ran = Cli(workplace)(
        train_app, "run", "cache/my_images", "-o", "runs/unnamed", "--set", "train.steps=1",
        "--set", "train.base_model_precision=no_change", "--set", "train.mixed_precision=fp32",
    )  # fmt: skip
    assert ran.code == 0, ran.err
    recipe = (workplace / "runs" / "unnamed" / "recipe.toml").read_text(encoding="utf-8")
    assert str(toy_model) in recipe


def test_the_same_seed_gives_the_same_lora_whatever_ran_before(workplace, trained, toy_model):
    torch.randn(3)
    again = Cli(workplace)(
        train_app, "run", "cache/my_images", "-r", "recipe.toml", "--model", str(toy_model), "-o", "runs/again",
        "--set", "train.validation.every=0", "--set", "train.validation.before=false",
    )  # fmt: skip
    assert again.code == 0, again.err
    first, second = load_file(trained / "my_images.safetensors"), load_file(workplace / "runs/again/again.safetensors")
    assert all(torch.equal(first[name], second[name]) for name in first)


RECIPES = [path for path in sorted((Path(__file__).parent.parent / "pipelines").glob("**/*.toml"))
           if "[[run]]" not in path.read_text(encoding="utf-8")]  # fmt: skip  # that one is the list of a sweep
OF_EACH_KIND = ("demo", "edit-8gb", "official", "simpletuner")
"""The others differ from these in numbers; tests/test_recipes.py plans them."""


@pytest.mark.parametrize(
    "recipe",
    [pytest.param(path, id=path.name, marks=() if path.stem in OF_EACH_KIND else pytest.mark.long) for path in RECIPES],
)
def test_every_recipe_on_disk_encodes_and_trains_two_steps(tmp_path, toy_model, toy_edit_model, recipe):
    text = recipe.read_text(encoding="utf-8")
    edits = "i2i" in text or "[[train.validation.edits]]" in text
    (tmp_path / "set").mkdir()
    for name, colour in (("a", "teal"), ("b", "navy")):  # two, because a recipe may hold one out
        Image.new("RGB", (64, 64), colour).save(tmp_path / "set" / f"{name}.png")
        (tmp_path / "set" / f"{name}.txt").write_text(f"paint all of it in {colour}", encoding="utf-8")
        if edits:
            Image.new("RGB", (64, 64), "olive").save(tmp_path / "set" / f"{name}.source.png")
    if "pipelines/" in text:  # sources to draw, relative to the checkout
        (tmp_path / "pipelines").symlink_to(Path(__file__).parent.parent / "pipelines")
    model = toy_edit_model if edits else toy_model
    small = ["--set", "cache.resolution=64", "--set", "train.steps=2", "--set", "train.device=cpu",
             "--set", "train.validation.num_inference_steps=1", "--set", "train.memory.execution=eager"]  # fmt: skip
    if recipe.stem == "simpletuner":  # its route goes from block 2 to block -2, and the toy has fewer
        small += ["--set", "train.tread.routes=[]"]
    if not edits:  # a pair is drawn at the size of its source
        small += ["--set", "train.validation.width=64", "--set", "train.validation.height=64"]
    common = ["--recipe", str(recipe), "--model", str(model), *small]
    encoded = Cli(tmp_path)(cache_app, "encode", "set", *common)
    assert encoded.code == 0, encoded.err
    run = Cli(tmp_path)(train_app, "run", "cache/set", *common)
    assert run.code == 0, run.err
    assert (tmp_path / "runs" / "set" / "set.safetensors").is_file()

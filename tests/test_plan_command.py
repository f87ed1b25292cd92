"""Do `k5train plan`, `bench` and `base` print what they should, and does a streamed int8 run leave a LoRA?"""

from __future__ import annotations

import re
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from k5cache.cli import app as cache_app
from k5cache.shared.errors import RunError
from k5train.base.architecture import FULL_SIZE
from k5train.cli import app as train_app
from k5train.options.adapter import LoraConfig
from k5train.options.train import TrainConfig
from k5train.planning import vram
from k5train.planning.plan import plan_for
from tests.cli import Cli
from tests.edit_training import make_pairs

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def workplace(tmp_path_factory, toy_model) -> Path:
    root = tmp_path_factory.mktemp("lean")
    (root / "images").mkdir()
    for i in range(2):
        pixels = np.random.default_rng(i).integers(0, 255, (64, 64, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(root / "images" / f"{i}.png")
        (root / "images" / f"{i}.txt").write_text(f"picture {i}", encoding="utf-8")
    size = ["--set", "cache.resolution=64", "--set", "cache.buckets=square"]
    done = Cli(root)(cache_app, "encode", "images", "-o", "cache", "--model", str(toy_model), *size)
    assert done.code == 0, done.err
    return root


@pytest.fixture
def cli(workplace, monkeypatch) -> Cli:
    monkeypatch.setenv("K5_HOME", str(workplace / "home"))
    return Cli(workplace)


def test_a_run_on_int8_tensor_core_arithmetic_with_streamed_weights_leaves_a_lora(cli, toy_model):
    options = ["train.steps=2", "train.base_model_precision=int8-dynamic", "train.memory.enable_group_offload=true"]
    chosen = [word for option in options for word in ("--set", option)]
    done = cli(train_app, "run", "cache", "-o", "run", "--model", str(toy_model), *chosen)
    assert done.code == 0, done.err
    assert "blocks streamed" in done.err
    assert "predicted peak" in done.err
    assert (cli.folder / "run" / "run.safetensors").is_file()
    shutil.rmtree(cli.folder / "run")


def test_a_run_that_cannot_fit_is_refused_before_anything_is_loaded(cli, toy_model):
    done = cli(train_app, "run", "cache", "-o", "run", "--model", str(toy_model), "--set", "train.memory.vram=0.8GB")
    assert done.code == 2
    assert "needs" in done.err
    assert "Loading" not in done.err
    shutil.rmtree(cli.folder / "run", ignore_errors=True)


def test_vram_is_an_option_of_the_recipe_for_run_resume_and_every_run_of_a_sweep(cli, toy_model, monkeypatch):
    given: list[object] = []

    def take(*arguments: object) -> None:
        given.extend(arguments)
        raise RunError("taken", "nothing")

    for name in ("start.start", "start.resume", "sweep.sweep"):
        monkeypatch.setattr(f"k5train.training.{name}", take)
    size = ("--model", str(toy_model), "--vram", "12", "--set", "train.memory.vram=8GB")
    assert "taken" in cli(train_app, "run", "cache", *size).err
    assert "taken" in cli(train_app, "sweep", "cache", "--grid", "train.lora.rank=2,4", *size).err
    assert "taken" in cli(train_app, "resume", "run", "--vram", "10GB").err
    configs = [c for value in given for c in (value if isinstance(value, list) else [value])]
    kept = [getattr(c, "config", c).memory.vram for c in configs if hasattr(getattr(c, "config", c), "memory")]
    assert kept == ["12", "12", "12"]
    assert ['train.memory.vram="10GB"'] in given


def test_plan_needs_neither_a_cache_nor_a_model_nor_a_gpu(cli):
    done = cli(train_app, "plan", "--vram", "12GB")
    assert done.code == 0, done.err
    assert "predicted peak" in done.out
    assert "4096 picture tokens" in done.out


def test_plan_of_image_to_image_is_for_its_flavour_or_a_cache_of_pairs(cli, toy_edit_model, once):
    options = ("--vram", "12GB", "--text-tokens", "1024")
    done = cli(train_app, "plan", "--i2i", *options)
    assert done.code == 0, done.err
    assert "image-to-image (I2I), 4096 picture tokens, 1024 text tokens" in " ".join(done.out.split())
    assert cli(train_app, "plan", "--set", "model.flavour=i2i-lite-sft", *options).out == done.out
    assert "image-to-image" not in cli(train_app, "plan", *options).out
    pairs = once("toy_pairs", lambda folder: make_pairs(folder, toy_edit_model))
    done = cli(train_app, "plan", str(pairs), "--vram", "12GB")
    assert "image-to-image (I2I), 32 picture tokens, 16 text tokens" in " ".join(done.out.split()), done.err


def test_plan_reads_the_sizes_of_a_cache(cli, toy_model):
    done = cli(train_app, "plan", "cache", "--model", str(toy_model), "--vram", "12GB")
    assert done.code == 0, done.err
    assert "16 picture tokens" in done.out
    # Without --model it plans for the model of the cache, as a run does.
    assert cli(train_app, "plan", "cache", "--vram", "12GB").out == done.out


def test_plan_refuses_a_card_that_is_too_small_with_advice(cli):
    done = cli(train_app, "plan", "--vram", "3GB")
    assert done.code == 2
    assert "fix:" in done.err
    assert "there is 0 B for torch" in cli(train_app, "plan", "--vram", "300MB").err  # CUDA itself takes all of it


def test_without_a_gpu_the_plan_and_the_run_are_held_to_the_free_ram(cli, toy_model, monkeypatch):
    from k5train.planning import plan, without_loading

    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    done = cli(train_app, "plan", "cache", "--model", str(toy_model))
    assert done.code == 0, done.err
    assert "free RAM" in done.out
    for module in (plan, without_loading):
        monkeypatch.setattr(module, "free_ram", lambda: 100 * 2**20)
    for words in (("plan", "cache"), ("run", "cache", "-o", "small", "--set", "train.device=cpu")):
        refused = cli(train_app, *words, "--model", str(toy_model))
        assert refused.code == 2
        assert "of RAM, there is 100.0 MiB free" in refused.err
        assert "Loading" not in refused.err
    assert not (cli.folder / "small").exists()


def test_a_rank_beyond_every_matrix_is_refused_by_the_plan(cli, toy_model):
    refused = cli(train_app, "plan", "--vram", "24GB", "--set", "train.lora.rank=100000")
    assert refused.code == 2
    assert "rank 100000 is too high" in refused.err
    assert "whose matrix is 2560 x 2560" in refused.err


def test_bench_without_a_gpu_says_so(cli, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    done = cli(train_app, "bench")
    assert done.code == 2
    assert "no GPU" in done.err


def test_a_base_is_prepared_listed_and_removed(cli, toy_model):
    assert "There is none" in cli(train_app, "base", "list").out
    prepared = cli(train_app, "base", "prepare", "--model", str(toy_model))
    assert prepared.code == 0, prepared.err
    name = Path(prepared.out.strip()).name
    assert name[:8] in cli(train_app, "base", "list").out
    assert cli(train_app, "base", "rm", name[:8]).code == 0
    assert cli(train_app, "base", "rm", name[:8]).code == 2


LEVELS = {"keep everything": "all", "keep all matmuls": "matmuls", "selective": "selective",
          "keep attention only": "attention", "recompute all": "nothing"}  # fmt: skip


@pytest.mark.parametrize(
    ("heading", "lora", "num_text_tokens"),
    [
        ("The setting of [training steps]", LoraConfig(rank=16, targets=("qkv",)), 256),
        ("The defaults,", LoraConfig(), 512),
    ],
)
def test_the_pages_show_the_plans_that_the_planner_makes(heading, lora, num_text_tokens):
    measurements = (ROOT / "docs" / "measurements.md").read_text(encoding="utf-8")
    readme = (
        (ROOT / "README.md").read_text(encoding="utf-8").split("## What fits which card")[1].split("Measured on")[0]
    )
    section = measurements.split("## What the planner chooses for a card")[1].split(f"\n{heading}")[1]
    rows = re.findall(r"^\| (\d+ GB) \| (.*) \| ([\d.]+) GiB \|$", section.split("\n\n")[1], flags=re.MULTILINE)
    assert [card for card, _, _ in rows] == ["24 GB", "16 GB", "12 GB", "8 GB"]
    for card, shown, peak in rows:
        budget = vram.budget(torch.device("cpu"), card)
        config = TrainConfig(lora=lora, base_model_precision="int8-dynamic")  # what auto is on such a card
        plan = plan_for(FULL_SIZE, config, torch.device("cuda"), (4096, num_text_tokens), budget)
        assert f"{plan.peak / 2**30:.1f}" == peak, card
        counts = {
            LEVELS[words]: count for count, words in re.findall(rf"(\d*) ?(?:blocks )?({'|'.join(LEVELS)})", shown)
        }
        assert {level: int(count or 50) for level, count in counts.items()} == Counter(plan.levels), card
        streamed = re.search(r"(\d+) blocks' weights", shown)
        assert (int(streamed[1]) if streamed else None) == (plan.streaming and plan.streaming.num_blocks), card
        if num_text_tokens == 256:  # README shows the same plans in other words
            (line,) = [line for line in readme.splitlines() if line.startswith(f"| {card} ")]
            assert line.endswith(f"| {peak} GiB |")
            numbers = {int(number) for number in re.findall(r"\b\d+\b", line.split("|")[2])}
            assert numbers <= {50, *Counter(plan.levels).values(), plan.streaming and plan.streaming.num_blocks}

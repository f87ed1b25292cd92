"""What does `k5train run` do with a cache that has a flipped bit? It names the row and exits with 2."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import k5cache
from k5cache.cli import app as cache_app
from k5cache.store.manifest import read_manifest
from k5cache.store.shards import Shard
from k5train.cli import app as train_app
from tests.cli import Cli, Done
from tests.runs import same

STEPS = 6


@pytest.fixture(scope="module")
def place(tmp_path_factory, toy_model) -> Cli:
    """Three images, encoded, in a folder as a user has it."""
    cli = Cli(tmp_path_factory.mktemp("damage"))
    (cli.folder / "set").mkdir()
    for i in range(3):
        pixels = np.random.default_rng(i).integers(0, 255, (64, 64, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(cli.folder / "set" / f"{i}.png")
        (cli.folder / "set" / f"{i}.txt").write_text(f"picture number {i}", encoding="utf-8")
    done = encode(cli, toy_model)
    assert done.code == 0, done.err
    return cli


def encode(cli: Cli, model: Path, *options: str) -> Done:
    return cli(cache_app, "encode", "set", "--model", str(model), "--set", "cache.resolution=64", *options)


def run(cli: Cli, model: Path, out: str) -> Done:
    options = [
        *(f"steps={STEPS}", "batch_size=1", "checkpoint_every=1", "lora.rank=2", "optim.warmup_steps=1"),
        *("device=cpu", "caption_dropout_probability=0.0"),
    ]
    chosen = [f"--set=train.{option}" for option in options]
    return cli(train_app, "run", "cache/set", "-o", out, "--model", str(model), *chosen)


def damage(root: Path, kind: str) -> str:
    """Flip one bit in the largest value of the second image's row; returns what an error must call it."""
    row = k5cache.open(root).row(1)
    key = row.latent_key if kind == "latents" else row.caption_keys[0]
    (shard,) = (shard for shard in read_manifest(root).shards if shard.kind == kind and key in Shard(root, shard).keys)
    number = Shard(root, shard).keys.index(key)
    chunk = pq.read_metadata(root / shard.file).row_group(number).column(1)
    raw = bytearray((root / shard.file).read_bytes())
    raw[chunk.data_page_offset + chunk.total_compressed_size - 9] ^= 1
    (root / shard.file).write_bytes(raw)
    return f"{shard.file}, row {number} (key {key})"


@pytest.fixture(scope="module")
def undisturbed(place, toy_model) -> dict[str, torch.Tensor]:
    """The LoRA of a run whose cache was never damaged."""
    done = run(Cli(place.folder), toy_model, "runs/set")
    assert done.code == 0, done.err
    return load_file(place.folder / "runs" / "set" / "set.safetensors")


@pytest.mark.parametrize("kind", ["latents", "text"])
def test_a_run_ends_at_the_row_with_a_flipped_bit_and_after_a_repair_goes_on_as_if_nothing_had_been(
    place, undisturbed, tmp_path, toy_model, kind
):
    cli = Cli(tmp_path)
    shutil.copytree(place.folder / "cache", tmp_path / "cache")
    (tmp_path / "set").symlink_to(place.folder / "set")
    name = damage(tmp_path / "cache" / "set", kind)
    done = run(cli, toy_model, "runs/set")
    assert done.code == 2, done.out + done.err
    assert f"cache/set/{name}: its bytes are not those that were written" in done.err
    assert "--repair encodes only what is damaged" in done.err
    assert not (tmp_path / "runs/set/set.safetensors").exists()
    metrics = tmp_path / "runs/set/metrics.jsonl"
    lines = metrics.read_text(encoding="utf-8").splitlines() if metrics.exists() else []
    assert sum("loss" in json.loads(line) for line in lines) < 3  # three images: each is read in the first three steps
    assert encode(cli, toy_model, "--repair").code == 0
    again = run(cli, toy_model, "runs/set")
    assert again.code == 0, again.err
    assert same(load_file(tmp_path / "runs/set/set.safetensors"), undisturbed)


@pytest.mark.parametrize("name", ["manifest.json", "index", "locations"])
def test_a_run_on_a_cache_whose_tables_have_a_flipped_bit_does_not_begin(place, tmp_path, toy_model, name):
    cli = Cli(tmp_path)
    root = tmp_path / "cache" / "set"
    shutil.copytree(place.folder / "cache" / "set", root)
    (path,) = root.glob(f"{name}*")
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 1
    path.write_bytes(raw)
    done = run(cli, toy_model, "runs/set")
    assert done.code == 2, done.out + done.err
    assert f"cache/set/{path.name} is not the file that was written" in done.err
    assert not list(tmp_path.glob("runs/**/*.safetensors"))
    assert not list(tmp_path.glob("runs/**/metrics.jsonl"))

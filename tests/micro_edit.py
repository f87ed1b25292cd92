"""What the tests of k5-micro-edit share: its folder, caches of pairs, short runs, and losses at fixed noise."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from diffusers import Kandinsky5Transformer3DModel

import k5cache
from k5cache.cli import app
from k5cache.options import CacheConfig
from k5cache.shared.checkpoint import read_config
from k5cache.shared.model import ModelConfig
from k5cache.shared.recipe import parse, read
from k5train.adapter.files import load_lora
from k5train.base.quantize import load_transformer
from k5train.forward.condition import condition_of
from k5train.forward.predict_velocity import predict_velocity
from k5train.options.train import TrainConfig
from tests.cli import Cli

DEMO = Path(__file__).parent.parent / "pipelines" / "demo"
NUM_PAIRS = 30
NO_EDITS = "train.validation.edits=[]"  # the demo draws pairs whose paths begin at the repository's root
Once = Callable[[str, Callable[[Path], object]], Path]


def model(once: Once) -> Path:
    """The whole model folder, put together from the repository's weights."""
    from pipelines.demo.micro_edit.model import assemble

    return once("k5_micro_edit", assemble)


def cache(once: Once, name: str) -> Path:
    """The first 30 pairs of ``images``, or the 12 of ``held_out``, encoded once for all tests."""
    return once(f"micro_edit_{name}", lambda root: encode(root, name, model(once))) / "cache" / name


def encode(root: Path, name: str, model: Path) -> None:
    """Encode pairs by the demo's recipe, encoders in float32."""
    for folder, source in (("targets", DEMO / name), ("sources", DEMO / "sources" / name)):
        (root / folder).mkdir()
        for picture in sorted(source.glob("*.png"))[:NUM_PAIRS]:
            shutil.copy(picture, root / folder)
    precisions = [f"cache.{part}_precision=fp32" for part in ("text_encoder_1", "text_encoder_2", "vae")]
    options = [word for option in (*precisions, NO_EDITS) for word in ("--set", option)]
    recipe = ["--recipe", str(DEMO / "edit.toml"), "--model", str(model)]
    done = Cli(root)(app, "encode", "targets", "--sources", "sources", *recipe, "-o", f"cache/{name}", *options)
    assert done.code == 0, done.err


def config(steps: int) -> TrainConfig:
    """The recipe with this many steps, on a CPU, without pictures."""
    settings = [f"train.steps={steps}", "train.device=cpu", "train.checkpoint_every=0", "train.validation.pairs=0"]
    schemas = {"model": ModelConfig, "cache": CacheConfig, "train": TrainConfig}
    chosen = parse(read(DEMO / "edit.toml", [*settings, NO_EDITS]), schemas)[2]
    assert isinstance(chosen, TrainConfig)
    return chosen


@torch.no_grad()
def loss(model: Path, cache: Path, lora: Path | None = None, shift: int = 0) -> float:
    """The mean squared error of the velocity over a cache's pairs at four noise levels each, with fixed noise.

    Args:
        shift: each target gets the source and the instruction's embeddings of the pair that is so many further on.
    """
    transformer: Kandinsky5Transformer3DModel = load_transformer(model, "int8-quanto", torch.float32, "cpu")
    if lora:
        load_lora(transformer, lora)
    sigma, items, losses = torch.tensor([0.2, 0.4, 0.6, 0.8]), list(k5cache.open(cache)), []
    factor = read_config(model, "vae")["scaling_factor"]
    for i, item in enumerate(items):
        given = items[(i + shift) % len(items)]
        noise = torch.randn(4, 1, 16, 16, 16, generator=torch.Generator().manual_seed(i))
        clean, source = (entry["mean"].float()[None, None] * factor for entry in (item, given["source"]))
        noisy = (1 - sigma.view(4, 1, 1, 1, 1)) * clean + sigma.view(4, 1, 1, 1, 1) * noise
        text = given["captions"][0]
        embeds, pooled = (tensor.expand(4, *tensor.shape) for tensor in (text.prompt_embeds, text.pooled))
        condition = condition_of(source).expand(4, -1, -1, -1, -1)
        velocity = predict_velocity(transformer, noisy, sigma, embeds, pooled, condition=condition)
        losses.append((velocity.float() - (noise - clean)).square().mean().item())
    return sum(losses) / len(losses)

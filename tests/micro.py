"""What the tests of k5-micro share: its caches, short runs of the demo's recipe, and losses at fixed noise."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from diffusers import Kandinsky5Transformer3DModel

import k5cache
from k5cache.cli import app
from k5cache.options import CacheConfig
from k5cache.shared.model import ModelConfig
from k5cache.shared.recipe import parse, read
from k5train.adapter.files import load_lora
from k5train.base.quantize import load_transformer
from k5train.forward.predict_velocity import predict_velocity
from k5train.options.train import TrainConfig
from tests.cli import Cli
from tests.runs import start_run

DEMO = Path(__file__).parent.parent / "pipelines" / "demo"
MODEL = DEMO / "k5-micro"


def cache(once: Callable[[str, Callable[[Path], object]], Path], name: str) -> Path:
    """What ``encode`` returns, encoded once for all tests; the pictures are beside it in ``../../NAME``."""
    return once(f"micro_{name}", lambda root: encode(root, name)) / "cache" / name


def encode(root: Path, name: str) -> Path:
    """The cache of one of the demo's folders of pictures, by the demo's recipe, encoders in float32."""
    source = root / name
    shutil.copytree(DEMO / name, source)
    precisions = [f"cache.{part}_precision=fp32" for part in ("text_encoder_1", "text_encoder_2", "vae")]
    options = [word for precision in precisions for word in ("--set", precision)]
    recipe = ["--recipe", str(DEMO / "demo.toml"), "--model", str(MODEL)]
    done = Cli(root)(app, "encode", name, *recipe, "-o", f"cache/{name}", *options)
    assert done.code == 0, done.err
    return root / "cache" / name


def config(*changes: str, steps: int) -> TrainConfig:
    """The demo's recipe with this many steps, on a CPU, without validation pictures."""
    settings = [f"train.steps={steps}", "train.device=cpu", "train.validation.prompts=[]", "train.checkpoint_every=0"]
    schemas = {"model": ModelConfig, "cache": CacheConfig, "train": TrainConfig}
    parsed = parse(read(DEMO / "demo.toml", [*settings, *changes]), schemas)
    chosen = parsed[2]
    assert isinstance(chosen, TrainConfig)
    return chosen


def train_lora(root: Path, cache: Path, chosen: TrainConfig) -> Path:
    """Train in a new run at ``root``; returns its LoRA."""
    return Path(start_run(root, cache, MODEL, chosen).lora)


def base(precision: str = "int8-quanto", dtype: torch.dtype = torch.float32) -> Kandinsky5Transformer3DModel:
    """The frozen transformer."""
    return load_transformer(MODEL, precision, dtype, "cpu")


def loss(cache: Path, lora: Path | None = None, **of_the_base: object) -> float:
    """The mean squared error of the velocity over a cache's pictures at four noise levels each, with fixed noise."""
    transformer = base(**of_the_base)
    if lora:
        load_lora(transformer, lora)
    return sum(each_loss(transformer, cache)) / len(k5cache.open(cache))


@torch.no_grad()
def each_loss(transformer: Kandinsky5Transformer3DModel, cache: Path) -> list[float]:
    """The same loss, one value for each picture."""
    sigma = torch.tensor([0.2, 0.4, 0.6, 0.8])
    losses = []
    for i, item in enumerate(k5cache.open(cache)):
        noise, clean = torch.randn(4, 1, 16, 16, 16, generator=torch.Generator().manual_seed(i)), latents(item["mean"])
        noisy = (1 - sigma.view(4, 1, 1, 1, 1)) * clean + sigma.view(4, 1, 1, 1, 1) * noise
        text = item["captions"][0]
        embeds, pooled = (tensor.expand(4, *tensor.shape) for tensor in (text.prompt_embeds, text.pooled))
        velocity = predict_velocity(transformer, noisy, sigma, embeds, pooled)
        losses.append((velocity.float() - (noise - clean)).square().mean().item())
    return losses


def latents(mean: torch.Tensor) -> torch.Tensor:
    """A cached mean as the transformer learns it, ``[1, 1, 16, 16, 16]``."""
    from k5cache.shared.checkpoint import read_config

    return mean.float()[None, None] * read_config(MODEL, "vae")["scaling_factor"]

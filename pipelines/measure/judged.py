"""What do trials share that train LoRAs and judge them on pictures that nothing was trained on?

A LoRA is trained and drawn with as a user would. It is judged by the held-out loss over all rows of a cache, at fixed
sigmas and noise, so that any two LoRAs can be compared.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from diffusers import Kandinsky5Transformer3DModel
from PIL import Image

from k5cache.encode.encode import encode_source
from k5cache.encode.request import EncodeOptions
from k5cache.options import CacheConfig
from k5cache.shared import console
from k5cache.shared.checkpoint import read_config
from k5cache.shared.model import ModelConfig
from k5cache.shared.recipe import parse, read
from k5cache.store.reader import open_cache
from k5train.adapter.files import load_lora
from k5train.base.quantize import Precision, load_transformer
from k5train.data.mixture import Mixture, Source
from k5train.forward.predict_velocity import predict_velocity
from k5train.options.train import TrainConfig
from k5train.options.validation import ValidationConfig
from k5train.pictures import sample
from k5train.pictures.drawings import drawings_for
from k5train.runs.folder import Run
from k5train.training.held_out_loss import HeldOutLoss
from k5train.training.start import start

PRECISION: Precision = "int8-quanto"  # of the base that a LoRA is judged on, unless a trial says another


@dataclass(frozen=True)
class Recipe:
    """The tables of a recipe."""

    model: ModelConfig
    cache: CacheConfig
    train: TrainConfig


def read_recipe(path: Path, *options: str) -> Recipe:
    """A recipe, with options such as ``train.steps=40``."""
    document = read(path, list(options))
    return Recipe(*parse(document, {"model": ModelConfig, "cache": CacheConfig, "train": TrainConfig}))


def encode(pictures: Path, root: Path, recipe: Recipe, prompts: Sequence[str] = (), device: str = "cpu") -> Path:
    """Encode a folder of pictures with captions, and prompts, into the cache at ``root``, or bring it up to date."""
    with console.progress() as bars:
        encode_source(pictures, root, recipe.model, recipe.cache, prompts, bars, EncodeOptions(device=device))
    return root


def train_lora(root: Path, cache: Path | None, recipe: Recipe) -> Path:
    """Train the run at ``root`` as ``k5train run`` does, unless it is finished; returns its LoRA.

    Args:
        cache: None: those of the recipe.
    """
    run = Run(root)
    if not run.is_finished:
        start(cache, recipe.train, root, recipe.model, is_new=False)
    return run.lora


def with_lora(
    model_folder: Path, lora: Path | None, device: str = "cpu", precision: Precision = PRECISION
) -> Kandinsky5Transformer3DModel:
    """The frozen transformer, computing in float32, and the LoRA on it."""
    transformer = load_transformer(model_folder, precision, torch.float32, device)
    if lora:
        load_lora(transformer, lora)
    return transformer.eval()


def held_out_loss(
    model_folder: Path, lora: Path | None, cache: Path, num_sigmas: int = 4, device: str = "cpu"
) -> list[float]:
    """The held-out loss in each part of (0, 1), low noise first: means over all rows of the cache.

    Args:
        lora: None: the base alone.
    """
    return held_out_losses(model_folder, lora, [cache], num_sigmas, device)[0]


def held_out_losses(
    model_folder: Path, lora: Path | None, caches: Sequence[Path], num_sigmas: int = 4, device: str = "cpu",
    precision: Precision = PRECISION,
) -> list[list[float]]:  # fmt: skip
    """``held_out_loss`` on each of several caches; the transformer is loaded once."""
    predict = partial(predict_velocity, with_lora(model_folder, lora, device, precision))
    scaling_factor = read_config(model_folder, "vae")["scaling_factor"]
    losses = []
    for cache in caches:
        rows = open_cache(cache)
        data = Mixture([Source(rows, split=frozenset(range(len(rows))))])
        losses.append(HeldOutLoss(data, num_sigmas, scaling_factor).measure(predict, torch.device(device)))
    return losses


def draw(
    model_folder: Path, lora: Path | None, cache: Path, validation: ValidationConfig, prompts: Sequence[str],
    device: str = "cpu", precision: Precision = PRECISION,
) -> list[Image.Image]:  # fmt: skip
    """Prompts that the cache holds, drawn as ``[train.validation]`` says, all from the same noise."""
    drawings = drawings_for(open_cache(cache), replace(validation, prompts=tuple(prompts)))
    with console.progress() as bars:
        return sample.draw(with_lora(model_folder, lora, device, precision), model_folder, drawings, bars, "drawing")

"""What the parity tests share: a small cache made by the command itself, and diffusers as its pipeline calls it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from diffusers import Kandinsky5T2IPipeline, Kandinsky5Transformer3DModel
from PIL import Image

from tests.cli import Cli

PROMPTS = ("a red fox in the snow", "“nothing” but noise &amp; grain", "blurry")
# Three buckets, four lengths of caption; two pictures of one bucket have captions of one length.
PICTURES = {
    (70, 70): "a red fox",
    (64, 66): "a blue fox",
    (90, 88): "a green fox asleep in the deep snow of a very long winter",
    (160, 70): "two birds on a wire",
    (150, 70): "birds",
    (70, 130): "a tall tower",
}


def make_cache(root: Path, model: Path, precision: str, resolution: int = 64) -> Path:
    """``k5cache encode`` on six pictures of noise, text encoders and VAE in ``precision``. Returns the cache."""
    from k5cache.cli import app

    source = root / "datasets" / "pictures"
    source.mkdir(parents=True)
    random = np.random.default_rng(0)
    for i, ((width, height), caption) in enumerate(PICTURES.items()):
        Image.fromarray(random.integers(0, 256, (height, width, 3), dtype=np.uint8)).save(source / f"{i}.png")
        (source / f"{i}.txt").write_text(caption, encoding="utf-8")
    prompts = ", ".join(f"'{p}'" for p in PROMPTS)
    recipe = f"[cache]\nresolution = {resolution}\n" + "".join(
        f'{part}_precision = "{precision}"\n' for part in ("text_encoder_1", "text_encoder_2", "vae")
    )
    (root / "recipe.toml").write_text(f"{recipe}[train.validation]\nprompts = [{prompts}]\n", encoding="utf-8")
    done = Cli(root)(app, "encode", "datasets/pictures", "-r", "recipe.toml", "--model", str(model))
    assert done.code == 0, done.err
    return root / "cache" / "pictures"


def pipeline_of(model: Path, dtype: torch.dtype, size: tuple[int, int], device: str = "cpu") -> Kandinsky5T2IPipeline:
    """diffusers' pipeline as a user loads it, set to draw at ``size`` (width, height): native sizes take minutes."""
    pipeline = Kandinsky5T2IPipeline.from_pretrained(model, dtype=dtype).to(device)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.resolutions = [size]
    return pipeline


def reference_transformer(model: Path, dtype: torch.dtype, device: str = "cpu") -> Kandinsky5Transformer3DModel:
    """diffusers' transformer as a user loads it, frozen."""
    loaded = Kandinsky5Transformer3DModel.from_pretrained(model, subfolder="transformer", dtype=dtype)
    return loaded.to(device).requires_grad_(False)


def as_the_pipeline_calls_it(transformer, latents, sigma, prompt_embeds, pooled_projections) -> torch.Tensor:
    """``Kandinsky5T2IPipeline.__call__``, sections 6 to 9, for one step at a given sigma."""
    dtype, device = transformer.dtype, latents.device
    height, width = latents.shape[2:4]
    return transformer(
        hidden_states=latents.to(dtype),
        encoder_hidden_states=prompt_embeds.to(dtype),
        pooled_projections=pooled_projections.to(dtype),
        timestep=(sigma * 1000).to(dtype),
        visual_rope_pos=[torch.arange(n, device=device) for n in (1, height // 2, width // 2)],
        text_rope_pos=torch.arange(prompt_embeds.shape[1], device=device),
        scale_factor=[1.0, 1.0, 1.0],
        sparse_params=None,
        return_dict=True,
    ).sample


def with_strength(transformer, std: float = 0.1, seed: int = 3) -> None:
    """Give every ``lora_B`` random values: an adapter starts as zero and would change nothing."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in transformer.named_parameters():
        if "lora_B" in name:
            parameter.data = (std * torch.randn(parameter.shape, generator=generator)).to(parameter)

"""What tests of editing share: a toy transformer that edits images, and diffusers' I2I pipeline around it."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace

import torch
from diffusers import Kandinsky5I2IPipeline, Kandinsky5Transformer3DModel


def make_transformer(folder: Path, toy_model: Path) -> None:
    """The toy model with a transformer that takes a source: 33 channels, the new ones with random weights."""
    shutil.copytree(toy_model, folder, dirs_exist_ok=True)
    plain = Kandinsky5Transformer3DModel.from_pretrained(toy_model / "transformer", torch_dtype=torch.bfloat16)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        edit = Kandinsky5Transformer3DModel.from_config({**plain.config, "visual_cond": True}).to(torch.bfloat16)
    edit.load_state_dict({n: t for n, t in plain.state_dict().items() if "visual_embeddings" not in n}, strict=False)
    shutil.rmtree(folder / "transformer")
    edit.save_pretrained(folder / "transformer")


def pipeline_around(
    transformer: Kandinsky5Transformer3DModel, scheduler: object, vae: object, size: tuple[int, int]
) -> Kandinsky5I2IPipeline:
    """diffusers' pipeline without its text encoders, set to draw at ``size`` (width, height)."""
    pipeline = Kandinsky5I2IPipeline(
        transformer=transformer, scheduler=scheduler, vae=vae,
        **dict.fromkeys(("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2")),
    )  # fmt: skip
    pipeline.set_progress_bar_config(disable=True)
    pipeline.resolutions = [size]
    return pipeline


def rows(size: tuple[int, int], batch: int = 1, num_tokens: int = 11) -> SimpleNamespace:
    """Inputs of the toy transformer for pictures of ``size`` (height, width) in pixels."""
    generator = torch.Generator().manual_seed(5)
    shape = (batch, 1, size[0] // 8, size[1] // 8)
    latents, source = torch.randn(2, *shape, 16, generator=generator)
    return SimpleNamespace(
        latents=latents,
        condition=torch.cat([source, torch.ones(*shape, 1)], dim=-1),
        sigma=torch.rand(batch, generator=generator),
        embeds=torch.randn(batch, num_tokens, 64, generator=generator).bfloat16(),
        pooled=torch.randn(batch, 48, generator=generator).bfloat16(),
    )

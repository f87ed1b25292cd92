"""What tests of editing share: a cache of pairs for the toy model, and diffusers' I2I pipeline around it."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from diffusers import Kandinsky5I2IPipeline, Kandinsky5Transformer3DModel
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution

from k5cache.shared.checkpoint import ENCODER_PARTS, read_config
from k5cache.shared.fingerprint import fingerprint
from k5cache.shared.template import installed_template
from k5cache.store.index import IndexRow, with_index
from k5cache.store.manifest import Edit, Manifest, ShardInfo, ShardKind, lock, write_manifest
from k5cache.store.shards import ShardWriter
from k5cache.store.tensors import TensorSpec

BUCKETS = ((64, 64), (64, 64), (128, 64), (64, 64))


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


class GivenPosterior(torch.nn.Module):
    """A VAE whose ``encode`` gives what a cache holds, in the VAE's dtype: what follows can be compared bit for bit."""

    def __init__(
        self, moments: dict[str, torch.Tensor], scaling_factor: float, dtype: torch.dtype, device: str = "cpu"
    ) -> None:
        super().__init__()
        self.device = torch.device(device)
        self.dtype = dtype
        self.config = SimpleNamespace(scaling_factor=scaling_factor, block_out_channels=(8, 16, 16, 16))
        self.mean, self.std = (moments[n].to(device, dtype).permute(2, 0, 1)[None] for n in ("mean", "std"))

    def encode(self, pixels: torch.Tensor) -> SimpleNamespace:
        posterior = DiagonalGaussianDistribution(torch.cat([self.mean, torch.zeros_like(self.mean)], dim=1))
        posterior.std = self.std
        return SimpleNamespace(latent_dist=posterior)


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


PICTURE = b"any bytes: nothing decodes a picture that is looked up"


def make_pairs(root: Path, model: Path, with_empty: bool = True, buckets: Sequence[tuple[int, int]] = BUCKETS) -> Path:
    """A cache of pairs of random numbers that fits the toy model. Item i has 1 + i % 2 instructions of 9 + i tokens and
    more, its source's empty instruction has 5 tokens, and the manifest has one pair to draw: ``PICTURE``, made blue."""
    generator = torch.Generator().manual_seed(1)
    text_recipe = {part: fingerprint(model, part, with_vision=True) for part in ENCODER_PARTS if part != "vae"}
    template = installed_template("i2i")
    recipe = {
        "model": {"source": str(model), "flavour": "i2i-lite-sft"},
        "text": {**text_recipe, "pipeline": "i2i", "prompt_template": template.text,
                 "prompt_template_encode_start_idx": template.encode_start_idx},
        "latents": {"vae": fingerprint(model, "vae"), "scaling_factor": read_config(model, "vae")["scaling_factor"]},
        "selection": {"resolution": 64},
    }  # fmt: skip

    def moments(key: str, bucket: tuple[int, int]) -> dict[str, Any]:
        mean, std = torch.randn(2, bucket[1] // 8, bucket[0] // 8, 16, generator=generator).half()
        return {"key": key, "mean": mean, "std": 0.1 * std.abs()}

    def text(key: str, caption: str, num_tokens: int) -> dict[str, Any]:
        embeds, pooled = (torch.randn(n, generator=generator).bfloat16() for n in (num_tokens * 64, 48))
        return {"key": key, "caption": caption, "n_tokens": num_tokens, "prompt_embeds": embeds.view(num_tokens, 64),
                "pooled": pooled}  # fmt: skip

    def shard(kind: ShardKind, rows: Iterable[dict[str, Any]], bucket: tuple[int, int] | None) -> ShardInfo:
        rows = list(rows)
        specs = {n: TensorSpec("float16", tuple(rows[0][n].shape)) for n in ("mean", "std") if n in rows[0]} or {
            n: TensorSpec("bfloat16", shape) for n, shape in (("prompt_embeds", (None, 64)), ("pooled", (48,)))
        }
        with ShardWriter(root, kind, specs, bucket) as writer:
            for row in rows:
                writer.append(row)
            return writer.finish()

    numbers = range(len(buckets))
    with lock(root):
        shards = [
            shard("latents", [moments(f"{side}-{i}", bucket) for i in numbers if buckets[i] == bucket
                              for side in ("target", "source")], bucket)
            for bucket in sorted(set(buckets))
        ]  # fmt: skip
        captions = [(f"text-{i}-{n}", f"make {i} {n}", 9 + i + 4 * n) for i in numbers for n in range(1 + i % 2)]
        empties = [(f"empty-{i}", "", 5) for i in numbers if with_empty]
        to_draw = [("text-edit", "make it blue", 12)]
        shards.append(shard("text", [text(*row) for row in (*captions, *empties, *to_draw)], None))
        rows = [
            IndexRow(
                f"{i}.png", f"{i}" * 32, 9, 9, 9, *bucket, *bucket, *bucket, 0, 0, False, f"target-{i}",
                tuple(key for key, _, _ in captions if key.startswith(f"text-{i}-")),
                source_path=f"{i}.jpg", source_hash=f"{i + 1}" * 32, source_width=bucket[0], source_height=bucket[1],
                source_key=f"source-{i}", empty_key=f"empty-{i}" if with_empty else None,
            )
            for i, bucket in enumerate(buckets)
        ]  # fmt: skip
        digest = hashlib.sha256(PICTURE).hexdigest()[:32]
        edit = Edit("new.png", digest, "make it blue", "text-edit", "empty-0" if with_empty else None, "source-1",
                    *buckets[1])  # fmt: skip
        manifest = Manifest(recipe=recipe, shards=tuple(shards), created_by={"k5cache": "0.1.0"}, edits=(edit,))
        write_manifest(root, with_index(root, manifest, rows))
    return root

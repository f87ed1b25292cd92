"""The encoders' passes: every new caption through CLIP and Qwen, every new image through the VAE, into shards.

One encoder is loaded at a time and freed before the next; each row is written as it comes.
"""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.progress import Progress

from k5cache import images, items, plan
from k5cache.buckets import Bucket
from k5cache.commit import Committer
from k5cache.config import CacheConfig
from k5cache.hub import read_config
from k5cache.store.tensors import TensorSpec

if TYPE_CHECKING:
    import torch

DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}


@dataclass(frozen=True)
class Job:
    """What an encode needs to know all the way through."""

    read: Callable[[str], items.Content]
    """An image by its path in the source: a file, or its bytes."""
    root: Path
    folder: Path
    recipe: dict[str, Any]
    config: CacheConfig
    device: str
    bars: Progress


def encode_texts(job: Job, commit: Committer, jobs: Sequence[plan.TextJob]) -> tuple[tuple[str, int], ...]:
    """CLIP over every new caption, then Qwen, which writes each row as it comes. Returns the captions that were cut.

    CLIP goes first because its vectors are small (1.5 KB a caption): Qwen's (2 MB) then never pile up in memory.
    """
    if not jobs:
        return ()
    from k5cache.encoders import clip, qwen

    with _bar(job.bars, "CLIP", len(jobs), "caption") as advance:
        tower = clip.load_clip(job.folder, job.device, _dtype(job.config.text_encoder_2_precision))
        pooled = []
        for one in jobs:
            pooled.append(clip.encode_pooled(tower, [one.caption])[0])
            advance(1)
        del tower
    _free()
    with _bar(job.bars, "Qwen2.5-VL", len(jobs), "caption") as advance:
        tokenizer = qwen.load_tokenizer(job.folder)
        tokens = [qwen.tokenize(tokenizer, one.caption, job.config.max_sequence_length) for one in jobs]
        encoder = qwen.load_qwen(job.folder, job.device, _dtype(job.config.text_encoder_1_precision))
        width = encoder.model.config.hidden_size
        specs = {
            "prompt_embeds": TensorSpec(DTYPES[job.config.text_encoder_1_precision], (None, width)),
            "pooled": TensorSpec(DTYPES[job.config.text_encoder_2_precision], (len(pooled[0]),)),
        }
        with commit.shards("text", specs) as append:
            for one, text, vector in zip(jobs, tokens, pooled, strict=True):
                (embeds,) = qwen.encode_prompt_embeds(encoder, [text])
                append({"key": one.key, "prompt_embeds": embeds, "pooled": vector,
                        "n_tokens": text.n_tokens, "caption": one.caption})  # fmt: skip
                advance(1)
        del encoder
    _free()
    return tuple((j.caption, len(t.truncated)) for j, t in zip(jobs, tokens, strict=True) if t.truncated)


def encode_latents(job: Job, commit: Committer, jobs: Sequence[plan.LatentJob]) -> dict[str, str]:
    """The VAE over every new image, one bucket after another. Returns latent key -> reason for unreadable images."""
    if not jobs:
        return {}
    from k5cache.encoders import vae

    failed: dict[str, str] = {}
    by_bucket: dict[Bucket, list[plan.LatentJob]] = {}
    for one in jobs:
        by_bucket.setdefault(one.geometry.bucket, []).append(one)
    encoder = None  # loaded for the first image that can be read: a broken one alone is no reason to
    with _bar(job.bars, "VAE", len(jobs), "image") as advance:
        for bucket, members in sorted(by_bucket.items()):
            advance(0, f"VAE: {bucket.name}")
            height, width = bucket.latent_shape
            names = ("mean", "std") if job.config.posterior == "sample" else ("mean",)
            channels = read_config(job.folder, "vae")["latent_channels"]
            specs = {name: TensorSpec("float16", (height, width, channels)) for name in names}
            wanted = ((one.path, one.geometry, one.content_hash) for one in members)
            with commit.shards("latents", specs, bucket) as append:
                for i, pixels in images.load_many(wanted, job.read, _workers()):
                    if isinstance(pixels, items.UnreadableImage):
                        failed[members[i].key] = pixels.reason
                    else:
                        if encoder is None:
                            encoder = vae.load_vae(job.folder, job.device, _dtype(job.config.vae_precision))
                        batch = vae.to_model_range(pixels.unsqueeze(0))
                        posterior = vae.encode_pixels(encoder, batch)
                        moments = {"mean": posterior.mean, "std": posterior.std}
                        append({"key": members[i].key} | {n: moments[n][0].half().cpu() for n in names})
                    advance(1)
        del encoder
    _free()
    return failed


@contextmanager
def _bar(bars: Progress, description: str, total: int, unit: str) -> Iterator[Callable[..., None]]:
    task = bars.add_task(description, total=total, unit=unit, note="")

    def advance(count: int, description: str | None = None) -> None:
        bars.update(task, advance=count, description=description)

    try:
        yield advance
    finally:
        bars.remove_task(task)


def _workers() -> int:
    """Threads that decode ahead of the VAE: Pillow and torch release the GIL."""
    return min(8, os.cpu_count() or 1)


def _dtype(precision: str) -> torch.dtype:
    import torch

    dtype: torch.dtype = getattr(torch, DTYPES[precision])
    return dtype


def _free() -> None:
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()

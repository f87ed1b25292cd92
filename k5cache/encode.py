"""Stage 1's loop: plan, then CLIP, Qwen and the VAE one after another, each freed before the next, shard by shard.

Commit order: a shard is whole on disk before the manifest names it, and the index is written last. A crash at any
instant loses at most the shard in flight; the next run finds what the manifest names and goes on from there.
"""

from __future__ import annotations

import gc
import os
import platform
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.progress import Progress

from k5cache import fingerprint, images, plan
from k5cache.buckets import Bucket, bucket_table
from k5cache.config import CacheConfig, ModelConfig
from k5cache.errors import CacheStale, DatasetError
from k5cache.hub import ENCODER_PARTS, model_folder, read_config
from k5cache.store.index import IndexRow, index_rows, read_index, with_index
from k5cache.store.manifest import Manifest, ShardInfo, ShardKind, lock, read_manifest, write_manifest
from k5cache.store.shards import ShardWriter, read_keys
from k5cache.store.tensors import TensorSpec

if TYPE_CHECKING:
    import torch

DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}
RESIZE = "bicubic-antialias"  # images.load_pixels


@dataclass(frozen=True)
class EncodeReport:
    """What one encode did. Counts are of rows unless a name says otherwise."""

    num_items: int
    num_latents: int
    num_texts: int
    reused_latents: int
    reused_texts: int
    skipped: tuple[images.Skipped, ...]
    truncated: tuple[tuple[str, int], ...]
    """Cleaned caption and how many of its characters no token stands for."""
    upscaled: tuple[str, ...]
    removed: tuple[str, ...]
    num_buckets: int
    num_bytes: int
    seconds: float


def build_recipe(model: ModelConfig, config: CacheConfig, folder: Path) -> dict[str, Any]:
    """Everything that changes the numbers in a cache, as plain values for its manifest.

    ``text`` enters every text key, ``latents`` every latent key; ``selection`` decides only which rows there are.
    """
    from k5cache.encoders.pipeline import pipeline_facts

    facts = pipeline_facts()
    vae = read_config(folder, "vae")
    return {
        "model": {"source": model.source, "flavour": model.flavour},
        "text": {
            **{part: fingerprint.fingerprint(folder, part) for part in ENCODER_PARTS if part != "vae"},
            "prompt_template": facts.prompt_template,
            "prompt_template_encode_start_idx": facts.encode_start_idx,
            "max_sequence_length": config.max_sequence_length,
            "text_encoder_1_precision": config.text_encoder_1_precision,
            "text_encoder_2_precision": config.text_encoder_2_precision,
        },
        "latents": {
            "vae": fingerprint.fingerprint(folder, "vae"),
            "scaling_factor": vae["scaling_factor"],
            "vae_precision": config.vae_precision,
            "posterior": config.posterior,
            "resize": RESIZE,
        },
        "selection": {
            "resolution": config.resolution,
            "buckets": config.buckets,
            "caption_strategy": config.caption_strategy,
        },
    }


def encode(
    source: Path,
    root: Path,
    model: ModelConfig,
    config: CacheConfig,
    prompts: Sequence[str],
    device: str,
    bars: Progress,
) -> EncodeReport:
    """Bring the cache at ``root`` up to date with the images and captions in ``source``.

    Raises:
        DatasetError: ``source`` holds no usable image.
        ModelError: the checkpoint lacks an encoder.
        CacheStale: ``root`` was made by another recipe.
        CacheLocked: another process is writing ``root``.
    """
    started = time.monotonic()
    if not source.is_dir():
        raise DatasetError(f"There is no folder {source}", "Give a folder of images with .txt captions beside them")
    items, skipped = images.find_items(source, config)
    if not items:
        seen = "; ".join(f"{s.path}: {s.reason}" for s in skipped[:3])
        found = f"no image with a caption ({len(skipped)} skipped: {seen})" if skipped else "no image"
        suffixes = " ".join(sorted(images.IMAGE_SUFFIXES))
        raise DatasetError(
            f"{source} holds {found}", f"Put images ({suffixes}) there, each with a .txt caption beside it"
        )
    folder = model_folder(model, ENCODER_PARTS)
    recipe = build_recipe(model, config, folder)
    root.mkdir(parents=True, exist_ok=True)
    with lock(root):
        job = _Job(source, root, folder, recipe, config, device, bars)
        return _encode_locked(job, items, skipped, prompts, started)


@dataclass(frozen=True)
class _Job:
    """What an encode needs to know all the way through."""

    source: Path
    root: Path
    folder: Path
    recipe: dict[str, Any]
    config: CacheConfig
    device: str
    bars: Progress


def _encode_locked(
    job: _Job, items: list[images.SourceItem], skipped: list[images.Skipped], prompts: Sequence[str], started: float
) -> EncodeReport:
    from k5cache.encoders.pipeline import clean

    commit = _Committer(job.root, _open_or_create(job), job.config.shard_mb * 2**20)
    made = _plan(job, commit, items, skipped, prompts, clean)
    truncated = _encode_texts(job, commit, made.text_jobs)
    failed = _encode_latents(job, commit, made.latent_jobs)
    rows = [row for row in made.rows if row.latent_key not in failed]
    unreadable = tuple(
        images.Skipped(row.path, failed[row.latent_key]) for row in made.rows if row.latent_key in failed
    )
    if not rows:
        reasons = "; ".join(f"{s.path}: {s.reason}" for s in unreadable[:3])
        raise DatasetError(
            f"No image in {job.source} could be read ({reasons})", "Replace these files and encode again"
        )
    commit.index(rows, {raw: plan.text_key(clean(raw), job.recipe["text"]) for raw in prompts})
    return EncodeReport(
        num_items=len(rows),
        num_latents=len(made.latent_jobs) - len(failed),
        num_texts=len(made.text_jobs),
        reused_latents=made.num_reused_latents,
        reused_texts=made.num_reused_texts,
        skipped=(*made.skipped, *unreadable),
        truncated=truncated,
        upscaled=made.upscaled,
        removed=made.removed,
        num_buckets=len({(r.bucket_width, r.bucket_height) for r in rows}),
        num_bytes=sum(s.num_bytes for s in commit.manifest.shards),
        seconds=time.monotonic() - started,
    )


def _open_or_create(job: _Job) -> Manifest:
    """The manifest of this cache, or a first one; refused where its recipe differs from the one asked for."""
    if not (job.root / "manifest.json").exists():
        return Manifest(recipe=job.recipe, created_by=_versions())
    manifest = read_manifest(job.root)
    differences = recipe_differences(manifest.recipe, job.recipe)
    if differences:
        raise CacheStale(
            f"{job.root} was encoded with another recipe: {'; '.join(differences)}",
            f"Encode into a new cache (k5cache encode {job.source} -o OTHER), or set these options back",
        )
    return manifest


def recipe_differences(cached: dict[str, Any], wanted: dict[str, Any]) -> list[str]:
    """``table.key is X in the cache, Y now`` for each value that changes the numbers or the rows, in order."""
    return [
        f"{table}.{key} is {was.get(key)!r} in the cache, {now.get(key)!r} now"
        for table in ("text", "latents", "selection")
        for was, now in [(cached.get(table, {}), wanted.get(table, {}))]
        for key in dict.fromkeys([*was, *now])
        if was.get(key) != now.get(key)
    ]


def _plan(
    job: _Job,
    commit: _Committer,
    items: list[images.SourceItem],
    skipped: list[images.Skipped],
    prompts: Sequence[str],
    clean: Callable[[str], str],
) -> plan.Plan:
    index = commit.manifest.index
    known = {row.path: row for row in index_rows(read_index(job.root, index))} if index else {}
    task = job.bars.add_task("reading image headers", total=len(items), unit="image", note="")

    def probe(item: images.SourceItem) -> tuple[str, int, int]:
        job.bars.advance(task)
        path = job.source / item.path
        return (images.hash_file(path), *images.image_size(path))

    made = plan.make_plan(
        items,
        skipped,
        known,
        commit.keys("latents"),
        commit.keys("text"),
        prompts,
        bucket_table(job.config.resolution, job.config.buckets),
        job.recipe["latents"],
        job.recipe["text"],
        clean,
        probe,
    )
    job.bars.remove_task(task)
    return made


def _encode_texts(job: _Job, commit: _Committer, jobs: Sequence[plan.TextJob]) -> tuple[tuple[str, int], ...]:
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


def _encode_latents(job: _Job, commit: _Committer, jobs: Sequence[plan.LatentJob]) -> dict[str, str]:
    """The VAE over every new image, one bucket after another. Returns latent key -> reason for unreadable images."""
    if not jobs:
        return {}
    from k5cache.encoders import vae

    failed: dict[str, str] = {}
    by_bucket: dict[Bucket, list[plan.LatentJob]] = {}
    for one in jobs:
        by_bucket.setdefault(one.geometry.bucket, []).append(one)
    with _bar(job.bars, "VAE: loading", len(jobs), "image") as advance:
        encoder = vae.load_vae(job.folder, job.device, _dtype(job.config.vae_precision))
        for bucket, members in sorted(by_bucket.items()):
            advance(0, f"VAE: {bucket.name}")
            height, width = bucket.latent_shape
            names = ("mean", "std") if job.config.posterior == "sample" else ("mean",)
            channels = encoder.config.latent_channels
            specs = {name: TensorSpec("float16", (height, width, channels)) for name in names}
            wanted = [(job.source / one.path, one.geometry) for one in members]
            with commit.shards("latents", specs, bucket) as append:
                for i, pixels in images.load_many(wanted, _workers()):
                    if isinstance(pixels, images.UnreadableImage):
                        failed[members[i].key] = pixels.reason
                    else:
                        batch = vae.to_model_range(pixels.unsqueeze(0))
                        posterior = vae.encode_pixels(encoder, batch)
                        moments = {"mean": posterior.mean, "std": posterior.std}
                        append({"key": members[i].key} | {n: moments[n][0].half().cpu() for n in names})
                    advance(1)
        del encoder
    _free()
    return failed


class _Committer:
    """The manifest as it grows: a shard is whole on disk before the manifest names it."""

    def __init__(self, root: Path, manifest: Manifest, shard_bytes: int) -> None:
        self.root, self.manifest, self.shard_bytes = root, manifest, shard_bytes

    def keys(self, kind: str) -> set[str]:
        """Keys of every row of this kind that is committed."""
        return {key for shard in self.manifest.shards if shard.kind == kind for key in read_keys(self.root, shard)}

    @contextmanager
    def shards(
        self, kind: ShardKind, specs: dict[str, TensorSpec], bucket: Bucket | None = None
    ) -> Iterator[Callable[[dict[str, Any]], None]]:
        """Yield ``append``; a shard is committed whenever it has grown to ``shard_bytes``, and at the end."""
        size = (bucket.width, bucket.height) if bucket else None
        writer: ShardWriter | None = None

        def append(row: dict[str, Any]) -> None:
            nonlocal writer
            writer = writer or ShardWriter(self.root, kind, specs, size)
            writer.append(row)
            if writer.num_bytes >= self.shard_bytes:
                finished, writer = writer, None
                self._add(finished.finish())

        try:
            yield append
        except BaseException:
            if writer:
                writer.abort()
            raise
        if writer:
            self._add(writer.finish())

    def index(self, rows: Sequence[IndexRow], prompts: dict[str, str]) -> None:
        """Write the index and name it: from here on readers see these rows."""
        prompts = {**self.manifest.prompts, **prompts}
        self.manifest = with_index(self.root, replace(self.manifest, prompts=prompts), rows)
        write_manifest(self.root, self.manifest)

    def _add(self, shard: ShardInfo) -> None:
        self.manifest = replace(self.manifest, shards=(*self.manifest.shards, shard))
        write_manifest(self.root, self.manifest)


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


def _versions() -> dict[str, str]:
    names = ("kandinsky5-lora", "diffusers", "transformers", "torch", "pillow", "ftfy", "pyarrow")
    return {"python": platform.python_version(), **{name: version(name) for name in names}}

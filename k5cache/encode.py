"""Stage 1's loop: plan, then CLIP, Qwen and the VAE one after another, each freed before the next, shard by shard.

Commit order: a shard is whole on disk before the manifest names it, and the index is written last. A crash at any
instant loses at most the shard in flight; the next run finds what the manifest names and goes on from there.
"""

from __future__ import annotations

import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from rich.progress import Progress

from k5cache import fingerprint, images, plan
from k5cache.buckets import bucket_table
from k5cache.commit import Committer
from k5cache.config import CacheConfig, ModelConfig
from k5cache.errors import CacheStale, DatasetError
from k5cache.hub import ENCODER_PARTS, model_folder, read_config
from k5cache.passes import Job, encode_latents, encode_texts
from k5cache.store.index import index_rows, read_index
from k5cache.store.manifest import Manifest, lock, read_manifest

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
        job = Job(source, root, folder, recipe, config, device, bars)
        return _encode_locked(job, items, skipped, prompts, started)


def _encode_locked(
    job: Job, items: list[images.SourceItem], skipped: list[images.Skipped], prompts: Sequence[str], started: float
) -> EncodeReport:
    from k5cache.encoders.pipeline import clean

    commit = Committer(job.root, _open_or_create(job), job.config.shard_mb * 2**20)
    made = _plan(job, commit, items, skipped, prompts, clean)
    truncated = encode_texts(job, commit, made.text_jobs)
    failed = encode_latents(job, commit, made.latent_jobs)
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


def _open_or_create(job: Job) -> Manifest:
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
    job: Job,
    commit: Committer,
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


def _versions() -> dict[str, str]:
    names = ("kandinsky5-lora", "diffusers", "transformers", "torch", "pillow", "ftfy", "pyarrow")
    return {"python": platform.python_version(), **{name: version(name) for name in names}}

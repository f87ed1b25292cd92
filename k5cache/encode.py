"""Stage 1's loop: plan, then CLIP, Qwen and the VAE one after another, each freed before the next, shard by shard.

Commit order: a shard is whole on disk before the manifest names it, and the index is written last, together with the
recipe that its rows were made by. A crash at any instant loses at most the shard in flight; the next run finds what
the manifest names and goes on from there. A run that finds nothing to do loads no model and writes nothing.
"""

from __future__ import annotations

import platform
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich.progress import Progress

from k5cache import fingerprint, images, masks, plan, sources, stale
from k5cache.commit import Committer, drop_damaged, require_shards
from k5cache.config import CacheConfig, ModelConfig
from k5cache.device import pick_device
from k5cache.errors import DatasetError
from k5cache.facts import cached_facts, cleaning, version
from k5cache.hub import ENCODER_PARTS, model_folder, read_config
from k5cache.passes import Job, encode_latents, encode_texts
from k5cache.store.index import SCHEMA, index_rows, read_index
from k5cache.store.manifest import Manifest, lock, read_manifest
from k5cache.store.tables import open_table, read_table

RESIZE = "bicubic-antialias"  # images.load_pixels


@dataclass(frozen=True)
class EncodeOptions:
    """How to encode, besides what."""

    update: bool = False
    """Take the recipe asked for where the cache has another one, and encode again what depends on the difference."""
    rehash: bool = False
    """Read every image's bytes instead of trusting size, mtime and inode."""
    repair: bool = False
    """Check every stored byte first, and encode again the rows of damaged shards."""
    wait_seconds: float = 0
    """How long to wait for another process that writes the same cache."""
    device: str = "auto"


@dataclass(frozen=True)
class EncodeReport:
    """What one encode did. Counts are of rows unless a name says otherwise."""

    num_items: int
    num_latents: int = 0
    num_texts: int = 0
    reused_latents: int = 0
    reused_texts: int = 0
    added: tuple[str, ...] = ()
    changed: tuple[str, ...] = ()
    removed: tuple[str, ...] = ()
    renamed: tuple[tuple[str, str], ...] = ()
    """(path before, path now)."""
    skipped: tuple[images.Skipped, ...] = ()
    truncated: tuple[tuple[str, int], ...] = ()
    """Cleaned caption and how many of its characters no token stands for."""
    upscaled: tuple[str, ...] = ()
    repaired: tuple[str, ...] = ()
    """Shards that were damaged, whose rows were encoded again."""
    num_buckets: int = 0
    num_bytes: int = 0
    seconds: float = 0.0
    is_unchanged: bool = False
    """Nothing was to be done, and nothing was written."""


def build_recipe(model: ModelConfig, config: CacheConfig, folder: Path) -> dict[str, Any]:
    """Everything that changes the numbers in a cache, as plain values for its manifest.

    ``text`` enters every text key, ``latents`` every latent key; ``selection`` decides only which rows there are.
    ``cleaning`` says when captions that did not change must be cleaned again; keys are of cleaned captions.
    """
    facts = cached_facts()
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
        "cleaning": cleaning(),
        "selection": config.selection,
    }


def encode(
    source: Path,
    root: Path,
    model: ModelConfig,
    config: CacheConfig,
    prompts: Sequence[str],
    bars: Progress,
    options: EncodeOptions = EncodeOptions(),
) -> EncodeReport:
    """Bring the cache at ``root`` up to date with the images and captions in ``source``.

    Raises:
        DatasetError: ``source`` holds no usable image.
        ModelError: the checkpoint lacks an encoder.
        CacheStale: ``root`` was made by another recipe, and ``update`` is not set.
        CacheCorrupt: a file of ``root`` is damaged, and ``repair`` is not set.
        CacheLocked: another process is writing ``root``.
    """
    started = time.monotonic()
    asked = look(source, root, model, config, prompts, options)
    if not (options.rehash or options.repair) and is_up_to_date(asked):
        return EncodeReport(
            num_items=asked.manifest.index.num_rows if asked.manifest.index else 0,
            skipped=tuple(asked.found.skipped), is_unchanged=True,
            num_bytes=sum(s.num_bytes for s in asked.manifest.shards), seconds=time.monotonic() - started,
        )  # fmt: skip
    root.mkdir(parents=True, exist_ok=True)
    with lock(root, options.wait_seconds):
        report = _encode_locked(replace(asked, manifest=_manifest(asked)), options, bars)  # as it is now: we waited
    return replace(report, seconds=time.monotonic() - started)


@dataclass(frozen=True)
class Asked:
    """What an encode was asked for, and the cache as it is."""

    source: Path
    root: Path
    folder: Path
    """Of the checkpoint."""
    config: CacheConfig
    recipe: dict[str, Any]
    found: sources.Source
    prompts: tuple[str, ...]
    """Raw, the empty one among them, with those that the cache holds already."""
    manifest: Manifest
    """Of the cache; a first one, without index and shards, where there is none."""

    @property
    def differences(self) -> list[stale.Difference]:
        """Between the cache's recipe and the one asked for."""
        return stale.differences(self.manifest.recipe, self.recipe)


def look(
    source: Path,
    root: Path,
    model: ModelConfig,
    config: CacheConfig,
    prompts: Sequence[str],
    options: EncodeOptions = EncodeOptions(),
) -> Asked:
    """Read what is asked for and what there is; nothing is written and no model is loaded. Raises as ``encode``."""
    found = sources.find(source, config)
    folder = model_folder(model, ENCODER_PARTS)
    recipe = build_recipe(model, config, folder)
    asked = Asked(source, root, folder, config, recipe, found, tuple(prompts), Manifest(recipe=recipe))
    asked = replace(asked, manifest=_manifest(asked))
    asked = replace(asked, prompts=tuple(dict.fromkeys(["", *asked.manifest.prompts, *prompts])))
    if asked.differences and not options.update:
        raise stale.refuse(root, asked.differences, f"k5cache encode {source} -o {root}")
    return asked


def is_up_to_date(asked: Asked) -> bool:
    """Whether an encode would change nothing. Reads the index, the captions and the stat of every file, no image.

    Raises:
        CacheCorrupt: a shard is missing or has another size.
    """
    manifest = asked.manifest
    same = manifest.index is not None and not asked.differences
    if not same or manifest.index is None or not _has_prompts(asked) or not _is_clean_as_before(asked):
        return False
    require_shards(asked.root, manifest)
    columns = read_table(open_table(asked.root, manifest.index, SCHEMA), plan.STAT_COLUMNS)
    return plan.is_unchanged(asked.found.items, columns.to_pydict())


def make_plan(asked: Asked, commit: Committer, rehash: bool, bars: Progress | None) -> plan.Plan:
    """What is new, changed and gone. Images are read where their stat is not the one in the index."""
    from k5cache.encoders.pipeline import clean

    manifest = asked.manifest
    known = index_rows(read_index(asked.root, manifest.index)) if manifest.index else []
    task = bars.add_task("reading image headers", total=len(asked.found.items), unit="image", note="") if bars else None

    def probe(item: images.SourceItem) -> tuple[str, int, int]:
        try:
            content = asked.found.read(item.path)
            return (images.hash_content(content), *images.image_size(content))
        finally:
            if bars and task is not None:
                bars.advance(task)

    def probe_mask(item: images.SourceItem, width: int, height: int) -> str:
        return masks.check(asked.found.read, item, width, height)

    texts_differ = any(d.table == "text" for d in asked.differences)
    made = plan.make_plan(
        asked.found.items,
        asked.found.skipped,
        known,
        commit.keys("latents"),
        commit.keys("text"),
        asked.prompts,
        asked.config.framing,
        asked.recipe["latents"],
        asked.recipe["text"],
        clean,
        probe,
        rehash=rehash,
        stored_masks=commit.keys("masks"),
        probe_mask=probe_mask,
        known_prompts=manifest.prompts if not texts_differ and _is_clean_as_before(asked) else None,
    )
    if bars and task is not None:
        bars.remove_task(task)
    return made


def _encode_locked(asked: Asked, options: EncodeOptions, bars: Progress) -> EncodeReport:
    if asked.differences and not options.update:  # another process has changed it while we waited
        raise stale.refuse(asked.root, asked.differences, f"k5cache encode {asked.source} -o {asked.root}")
    manifest, repaired = drop_damaged(asked.root, asked.manifest) if options.repair else (asked.manifest, ())
    require_shards(asked.root, manifest)
    asked = replace(asked, manifest=manifest)
    commit = Committer(asked.root, manifest, asked.config.shard_mb * 2**20)
    made = make_plan(asked, commit, options.rehash, bars)
    if not made.rows:
        raise _nothing_readable(asked, made.skipped)
    truncated: tuple[tuple[str, int], ...] = ()
    failed: dict[str, str] = {}
    if made.mask_jobs:
        failed |= masks.encode_masks(asked.found.read, commit, made.mask_jobs)
    if made.text_jobs or made.latent_jobs:
        device = pick_device(options.device)
        job = Job(asked.found.read, asked.root, asked.folder, asked.recipe, asked.config, device, bars)
        truncated = encode_texts(job, commit, made.text_jobs)
        failed |= encode_latents(job, commit, made.latent_jobs)
    rows = [row for row in made.rows if not failed.keys() & {row.latent_key, row.mask_key}]
    lost = {
        row.path: failed.get(row.latent_key) or failed[row.mask_key or ""]
        for row in made.rows
        if failed.keys() & {row.latent_key, row.mask_key}
    }
    unreadable = tuple(images.Skipped(path, reason) for path, reason in lost.items())
    if not rows:
        raise _nothing_readable(asked, unreadable)
    is_written = commit.index(rows, made.prompts, asked.recipe, _versions())
    return EncodeReport(
        num_items=len(rows),
        num_latents=sum(job.key not in failed for job in made.latent_jobs),
        num_texts=len(made.text_jobs),
        reused_latents=made.num_reused_latents,
        reused_texts=made.num_reused_texts,
        added=tuple(path for path in made.added if path not in lost),
        changed=tuple(path for path in made.changed if path not in lost),
        removed=made.removed,
        renamed=made.renamed,
        skipped=(*made.skipped, *unreadable),
        truncated=truncated,
        upscaled=made.upscaled,
        repaired=repaired,
        num_buckets=len({(r.bucket_width, r.bucket_height) for r in rows}),
        num_bytes=sum(s.num_bytes for s in commit.manifest.shards),
        is_unchanged=not is_written,
    )


def _nothing_readable(asked: Asked, skipped: Sequence[images.Skipped]) -> DatasetError:
    reasons = "; ".join(f"{s.path}: {s.reason}" for s in skipped[:3])
    return DatasetError(f"No image in {asked.source} could be read ({reasons})", "Replace these files and encode again")


def _manifest(asked: Asked) -> Manifest:
    """The manifest of this cache, or a first one."""
    if not (asked.root / "manifest.json").exists():
        return Manifest(recipe=asked.recipe, created_by=_versions())
    return read_manifest(asked.root)


def _is_clean_as_before(asked: Asked) -> bool:
    """Whether captions are cleaned by the code that cleaned those of the cache."""
    return bool(asked.manifest.recipe.get("cleaning") == asked.recipe["cleaning"])


def _has_prompts(asked: Asked) -> bool:
    return asked.manifest.prompts.keys() >= set(asked.prompts)


def _versions() -> dict[str, str]:
    names = ("kandinsky5-lora", "diffusers", "transformers", "torch", "pillow", "ftfy", "pyarrow")
    return {"python": platform.python_version(), **{name: version(name) or "none" for name in names}}

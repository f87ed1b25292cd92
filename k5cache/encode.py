"""Encode: what is asked for, what is there, and is there anything to do? If not, within a second and without a write.

This file imports nothing heavy; the work itself is in ``update``.
"""

from __future__ import annotations

import hashlib
import platform
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich.progress import Progress

from k5cache import fingerprint, items, sources, stale
from k5cache.config import CacheConfig, ModelConfig
from k5cache.facts import cached_facts, cleaning, version
from k5cache.hub import ENCODER_PARTS, model_folder, read_config
from k5cache.store.manifest import Manifest, lock, read_manifest, require_files

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
    vram: int | None = None
    """Bytes of VRAM to plan for, as if the card had no more; None takes what is free."""


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
    skipped: tuple[items.Skipped, ...] = ()
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
            "text_batching": config.text_batching,
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
    from k5cache.update import bring_up_to_date  # pyarrow, numpy and Pillow: not needed for nothing

    with lock(root, options.wait_seconds):
        report = bring_up_to_date(replace(asked, manifest=_manifest(asked)), options, bars)  # as it is now: we waited
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
    """Whether an encode would change nothing. Reads the manifest, the captions and the stat of every file, no image.

    Raises:
        CacheCorrupt: a shard is missing or has another size.
    """
    manifest = asked.manifest
    same = manifest.index is not None and not asked.differences and is_clean_as_before(asked)
    if not same or not manifest.prompts.keys() >= set(asked.prompts) or manifest.source != digest(asked.found):
        return False
    require_files(asked.root, manifest)
    return True


def digest(found: sources.Source) -> str:
    """One hash over all that was found: paths, sizes, times, inodes, raw captions, masks, and what is skipped."""
    sha256 = hashlib.sha256()
    for entry in (*found.items, *found.skipped):
        sha256.update(repr(entry).encode("utf-8", "surrogatepass"))
    return sha256.hexdigest()[:32]


def _manifest(asked: Asked) -> Manifest:
    """The manifest of this cache, or a first one."""
    if not (asked.root / "manifest.json").exists():
        return Manifest(recipe=asked.recipe, created_by=versions())
    return read_manifest(asked.root)


def is_clean_as_before(asked: Asked) -> bool:
    """Whether captions are cleaned by the code that cleaned those of the cache."""
    return bool(asked.manifest.recipe.get("cleaning") == asked.recipe["cleaning"])


def versions() -> dict[str, str]:
    names = ("kandinsky5-lora", "diffusers", "transformers", "torch", "pillow", "ftfy", "pyarrow")
    return {"python": platform.python_version(), **{name: version(name) or "none" for name in names}}

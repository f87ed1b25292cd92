"""What is an encode asked for, and what is there? The recipe, the images found, the manifest: nothing is loaded.

This file imports nothing heavy: an encode with nothing to do ends within a second.
"""

from __future__ import annotations

import hashlib
import platform
import time
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from k5cache.encode import differences
from k5cache.encoders.pipeline import prompt_template
from k5cache.options import CacheConfig
from k5cache.shared import fingerprint
from k5cache.shared.checkpoint import ENCODER_PARTS, model_folder, read_config
from k5cache.shared.errors import CacheError, DatasetError, RecipeError
from k5cache.shared.model import ModelConfig
from k5cache.shared.template import cleaning, version
from k5cache.sources import find, items
from k5cache.sources.unchanged import glance, is_settled
from k5cache.store.manifest import Manifest, read_manifest

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
    ``model`` is only where the weights came from, for a run that names no model: it is in no key, and ``stale`` does
    not compare it.
    """
    template = prompt_template()
    vae = read_config(folder, "vae")
    return {
        "model": {
            "source": model.source,
            "flavour": model.flavour,
            **({"revision": model.revision} if model.revision else {}),  # caches from before it was noted have no key
        },
        "text": {
            **{part: fingerprint.fingerprint(folder, part) for part in ENCODER_PARTS if part != "vae"},
            "prompt_template": template.text,
            "prompt_template_encode_start_idx": template.encode_start_idx,
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


def config_of(recipe: dict[str, Any]) -> CacheConfig:
    """The options that a recipe was built from.

    Raises:
        CacheError: the recipe is not one that this version writes.
    """
    tables = [recipe.get(name) for name in differences.TABLES]
    known = {f.name for f in fields(CacheConfig)}
    try:
        values = {key: value for table in tables for key, value in dict(table or {}).items() if key in known}
        return CacheConfig(**values)
    except (TypeError, ValueError) as error:
        raise CacheError(f"The recipe in the manifest is not complete: {error}", "Encode again") from None


@dataclass(frozen=True)
class Request:
    """What an encode was asked for, and the cache as it is; the source is not looked at."""

    source: Path
    root: Path
    folder: Path
    """Of the checkpoint."""
    config: CacheConfig
    recipe: dict[str, Any]
    prompts: tuple[str, ...]
    """Raw, the empty one among them, with those that the cache holds already."""
    manifest: Manifest
    """Of the cache; a first one, without index and shards, where there is none."""

    @property
    def differences(self) -> list[differences.Difference]:
        """Between the cache's recipe and the one asked for."""
        return differences.differences(self.manifest.recipe, self.recipe)

    @property
    def is_clean_as_before(self) -> bool:
        """Whether captions are cleaned by the code that cleaned those of the cache."""
        return bool(self.manifest.recipe.get("cleaning") == self.recipe["cleaning"])


@dataclass(frozen=True)
class Asked(Request):
    """A request, and the images that its source holds."""

    found: find.Source


def request(
    source: Path, root: Path, folder: Path, model: ModelConfig, config: CacheConfig, prompts: Sequence[str]
) -> Request:
    """Read the checkpoint's fingerprints and the manifest.

    Raises:
        ModelError: the checkpoint lacks an encoder.
        CacheCorrupt: the manifest is damaged.
    """
    recipe = build_recipe(model, config, folder)
    manifest = manifest_of(root, recipe)
    raw = tuple(dict.fromkeys(["", *manifest.prompts, *prompts]))
    return Request(source, root, folder, config, recipe, raw, manifest)


def look(
    source: Path,
    root: Path,
    model: ModelConfig,
    config: CacheConfig,
    prompts: Sequence[str],
    options: EncodeOptions = EncodeOptions(),
    found: find.Source | None = None,
) -> Asked:
    """Read what is asked for and what there is; nothing is written and no model is loaded. Raises as ``encode``.

    The hub is asked for the model, if it comes from there.

    Args:
        found: what ``origin.find`` gave a moment ago.
    """
    if model.flavour.startswith("i2i"):
        raise RecipeError(
            f'model.flavour = "{model.flavour}" edits images (I2I), and k5cache encodes captions alone (T2I) so far',
            'Set model.flavour = "t2i-lite-sft" or "t2i-lite-pretrain"',
        )
    found = found or find.find(source, config)
    wanted = request(source, root, model_folder(model, ENCODER_PARTS), model, config, prompts)
    if wanted.differences and not options.update:
        raise differences.refuse(root, wanted.differences)
    return Asked(**vars(wanted), found=found)


def note(asked: Asked) -> str:
    """What the manifest keeps of the source: ``digest``, and ``glance`` where stats alone can tell that it is the same.

    Call it when all is encoded. The captions are read once more, after the stats were taken, so that a file that was
    being written when it was first read is not taken for settled.
    """
    before = digest(asked.found)
    if not asked.found.is_plain or asked.found.skipped:
        return before
    seen, read_ns = glance(asked.source), time.time_ns()
    if seen is None or not is_settled(seen, read_ns):
        return before
    try:
        is_same = digest(find.find(asked.source, asked.config)) == before
    except DatasetError:  # emptied meanwhile
        return before
    return before + seen.digest if is_same else before


def digest(found: find.Source) -> str:
    """One hash over all that was found: paths, sizes, times, inodes, raw captions, masks, and what is skipped."""
    sha256 = hashlib.sha256()
    for entry in (*found.items, *found.skipped):
        sha256.update(repr(entry).encode("utf-8", "surrogatepass"))
    return sha256.hexdigest()[:32]


def manifest_of(root: Path, recipe: dict[str, Any]) -> Manifest:
    """The manifest of this cache, or a first one."""
    if not (root / "manifest.json").exists():
        return Manifest(recipe=recipe, created_by=versions())
    return read_manifest(root)


def versions() -> dict[str, str]:
    """Package to version, of all that has a part in what is encoded."""
    names = ("kandinsky5-lora", "diffusers", "transformers", "torch", "pillow", "ftfy", "pyarrow")
    return {"python": platform.python_version(), **{name: version(name) or "none" for name in names}}

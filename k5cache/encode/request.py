"""What is an encode asked for, and what is there? The recipe, the source's listing and the manifest; loads nothing.

This file imports nothing heavy: an encode with nothing to do ends within a second.
"""

from __future__ import annotations

import platform
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from k5cache.encode import differences
from k5cache.encode.engine import Engine
from k5cache.encoders.pipeline import prompt_template
from k5cache.options import CacheConfig
from k5cache.shared import fingerprint
from k5cache.shared.checkpoint import ENCODER_PARTS, folder_without_weights, model_folder, read_config
from k5cache.shared.errors import ModelError, RecipeError
from k5cache.shared.kind import LONG_NAMES, Kind, kind_at_hand, kind_of_model, kind_of_recipe
from k5cache.shared.model import Drawn, ModelConfig, WantedEdit
from k5cache.shared.preprocessor import preprocessor_values
from k5cache.shared.template import cleaning, version
from k5cache.sources import find, items
from k5cache.store.manifest import Manifest, read_manifest
from k5cache.store.notes import Part

RESIZE = "bicubic-antialias"  # images.load_pixels
SOURCE_RESIZE = "same as target, else lanczos"  # buckets.source_geometry, images.load_pixels


@dataclass(frozen=True)
class EncodeOptions:
    """How to encode, as opposed to what."""

    update: bool = False
    """If the cache has another recipe, take the one asked for and encode again what depends on the difference."""
    rehash: bool = False
    """Read every image's bytes instead of trusting size, mtime and inode."""
    repair: bool = False
    """Check every stored byte first, and encode the rows of damaged shards again."""
    wait_seconds: float = 0
    """How long to wait for another process that is writing the same cache."""
    is_preview: bool = False
    """Nothing will be encoded: encoders that are not on this machine are not downloaded."""
    device: str = "auto"
    vram: int | None = None
    """Bytes of VRAM to plan for, as if the card had no more; None plans for what is free."""
    engine: Engine | None = None
    """What runs the encoders' passes; None: this process."""
    part: Part | None = None
    """The part of the source to encode; None for the whole of it. It changes no number, so no recipe has it."""


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
    """(cleaned caption, how many of its last characters were cut off)."""
    upscaled: tuple[str, ...] = ()
    num_multiline: int = 0
    """As in ``find.Source``; 0 if there was nothing to do."""
    notices: tuple[str, ...] = ()
    """As in ``find.Source``; none if there was nothing to do."""
    stretched: tuple[str, ...] = ()
    """Images whose source has another shape and is stretched to theirs. Only for image-to-image, as the next two."""
    turned: tuple[str, ...] = ()
    """Images whose source has their width for its height and the reverse: usually an EXIF orientation that was lost."""
    same_as_target: tuple[str, ...] = ()
    """Images whose source is the same file: such a pair teaches to change nothing."""
    flawed: tuple[items.Flawed, ...] = ()
    """Images that are used although their file is damaged. Named when they are first read."""
    repaired: tuple[str, ...] = ()
    """Shards that were damaged, whose rows were encoded again."""
    num_buckets: int = 0
    num_bytes: int = 0
    seconds: float = 0.0
    is_unchanged: bool = False
    """There was nothing to do, and nothing was written."""


def build_recipe(
    model: ModelConfig,
    config: CacheConfig,
    folder: Path,
    cached: Mapping[str, Any] = MappingProxyType({}),
    is_preview: bool = False,
) -> dict[str, Any]:
    """Everything that changes the numbers in a cache, as plain values for its manifest.

    ``text`` is part of every text key, ``latents`` of every latent key; ``selection`` only decides which rows there
    are. ``cleaning`` tells whether captions that did not change must be cleaned again; keys are of cleaned captions.
    ``model`` only says where the weights came from, for a run that names no model: it is part of no key, and
    ``differences`` does not compare it.

    Args:
        cached: the recipe of the cache that is there already.
        is_preview: take its fingerprints for parts that are not in ``folder``, which are else an error.
    """

    kind = kind_of_model(model, folder)
    is_i2i = kind == "i2i"

    def weights(folder: Path, part: str) -> str:
        return fingerprint.fingerprint(folder, part, is_i2i, str(cached.get("text", {}).get(part) or ""))

    def identity(table: str, part: str, read: Callable[[Path, str], Any] = weights) -> Any:
        try:
            return read(folder, part)
        except (ModelError, OSError):
            if not is_preview:
                raise
            return cached.get(table, {}).get(part, "not downloaded")

    template = prompt_template(kind)
    vae = read_config(folder, "vae")
    return {
        "model": {
            "source": model.source,
            "flavour": model.flavour,
            **({"revision": model.revision} if model.revision else {}),  # caches from before it was noted have no key
        },
        "text": {
            **{part: identity("text", part) for part in ENCODER_PARTS if part != "vae"},
            "prompt_template": template.text,
            "prompt_template_encode_start_idx": template.encode_start_idx,
            "max_sequence_length": config.text_limit(kind),
            "text_encoder_1_precision": config.text_encoder_1_precision,
            "text_encoder_2_precision": config.text_encoder_2_precision,
            "text_batching": config.text_batching,
            **(_text_with_sources(config, identity) if is_i2i else {}),  # no key of text-to-image depends on it
        },
        "latents": {
            "vae": identity("latents", "vae"),
            "scaling_factor": vae["scaling_factor"],
            "vae_precision": config.vae_precision,
            "posterior": config.posterior,
            "resize": RESIZE,
            **({"source_resize": SOURCE_RESIZE} if is_i2i else {}),
        },
        "cleaning": cleaning(),
        "selection": config.selection | ({"empty_instruction": config.empty_instruction} if is_i2i else {}),
    }


def _text_with_sources(config: CacheConfig, identity: Callable[..., Any]) -> dict[str, Any]:
    """What decides how Qwen sees a source."""
    return {
        "pipeline": "i2i",
        "image_processor": identity("text", "image_processor", lambda folder, _: preprocessor_values(folder)),
        "source_view": config.source_view,
    }


def check_options(config: CacheConfig, kind: Kind, model: ModelConfig) -> None:
    """Refuse options that act only for the other kind of model, a class without anything that it replaces, and captions
    in files of images.

    Raises:
        RecipeError: one is set.
    """
    if config.class_word is not None and not (config.class_replaces or config.trigger or "").strip():
        raise RecipeError(
            "cache.class_word is set, and there is no word in the captions that it replaces",
            "Set cache.trigger, or cache.class_replaces to a word that stands in the captions",
        )
    if config.caption_suffixes and config.caption_suffixes[0] in items.IMAGE_SUFFIXES:
        raise RecipeError(
            f"cache.caption_extension is {config.caption_extension}, which is the suffix of images",
            "Give that of the caption files beside them, such as txt",
        )
    if names := config.refused_for(kind):
        options = " and ".join(f"cache.{name}" for name in names)
        raise RecipeError(
            f"{options} {'is' if len(names) == 1 else 'are'} only for image-to-image models, and {model.source} is "
            f"{LONG_NAMES[kind]}",
            "Leave it out (--sources sets cache.source_dir), or set model.flavour to i2i-lite-sft or i2i-lite-pretrain",
        )


@dataclass(frozen=True)
class Request:
    """What an encode was asked for, and the cache as it is. The source has not been looked at."""

    source: Path
    root: Path
    folder: Path
    """Of the checkpoint."""
    config: CacheConfig
    recipe: dict[str, Any]
    prompts: tuple[str, ...]
    """Raw: the empty one, those that the cache has already, and those asked for. None for image-to-image."""
    manifest: Manifest
    """Of the cache; a first one, without index and shards, if there is no cache."""
    edits: tuple[WantedEdit, ...]
    """Pairs to draw that are asked for. Only for image-to-image; the manifest has more."""

    @property
    def differences(self) -> list[differences.Difference]:
        """Between the cache's recipe and the one asked for."""
        return differences.differences(self.manifest.recipe, self.recipe)

    @property
    def is_cleaned_as_before(self) -> bool:
        """Whether captions are cleaned by the code that cleaned those of the cache."""
        return bool(self.manifest.recipe.get("cleaning") == self.recipe["cleaning"])


@dataclass(frozen=True)
class ListedRequest(Request):
    """A request, and what its source holds."""

    listing: find.Source


def read_request(
    source: Path,
    root: Path,
    folder: Path,
    model: ModelConfig,
    config: CacheConfig,
    drawn: Drawn,
    is_preview: bool = False,
    part: Part | None = None,
) -> Request:
    """Read the checkpoint's fingerprints and the manifest.

    Raises:
        ModelError: the checkpoint lacks an encoder.
        RecipeError: an option, or what is to be drawn, is for the other kind of model.
        CacheStale: the cache was encoded for the other kind of model, or holds another part.
        CacheCorrupt: the manifest is damaged.
    """
    recipe = build_recipe(model, config, folder, manifest_of(root, {}, part).recipe, is_preview)
    kind = kind_of_recipe(recipe)
    check_options(config, kind, model)
    drawn.check(kind)
    manifest = manifest_of(root, recipe, part)
    if manifest.kind != kind:
        raise differences.refuse_kind(root, manifest.kind, kind, model, source)
    raw_prompts = () if kind == "i2i" else tuple(dict.fromkeys(["", *manifest.prompts, *drawn.prompts]))
    return Request(source, root, folder, config, recipe, raw_prompts, manifest, drawn.edits)


def read_listed_request(
    source: Path,
    root: Path,
    model: ModelConfig,
    config: CacheConfig,
    drawn: Drawn,
    options: EncodeOptions = EncodeOptions(),
    listing: find.Source | None = None,
) -> ListedRequest:
    """Read what is asked for and what is there. Writes nothing and loads no model. Raises as ``encode_source``.

    If the model is one of the hub, the hub is asked for its newest revision. A preview downloads no weights: those that
    are not on this machine are taken for those that the cache was made with.

    Args:
        listing: what ``find.find`` returned a moment ago, so that the source is not listed twice.
    """
    kind = kind_at_hand(model)
    check_options(config, kind, model)
    listing = listing or find.find(source, config, kind)
    find_folder = folder_without_weights if options.is_preview else model_folder
    folder = find_folder(model, ENCODER_PARTS)
    request = read_request(source, root, folder, model, config, drawn, options.is_preview, options.part)
    if request.differences and not options.update:
        raise differences.refuse(root, request.differences)
    if (kind := kind_of_recipe(request.recipe)) != listing.kind:  # a repository of the hub, unknown until it was here
        listing = find.find(source, config, kind)
    return ListedRequest(**vars(request), listing=listing)


def manifest_of(root: Path, recipe: dict[str, Any], part: Part | None) -> Manifest:
    """The manifest of this cache, or a first one.

    Raises:
        CacheStale: the cache holds another part of its source than ``part``.
        CacheCorrupt: the manifest is damaged.
    """
    if not (root / "manifest.json").exists():
        return Manifest(recipe=recipe, created_by=versions(), part=part)
    manifest = read_manifest(root)
    if manifest.part != part:
        raise differences.refuse_part(root, manifest.part, part)
    return manifest


def versions() -> dict[str, str]:
    """Package to version, for every package that affects what is encoded."""
    names = ("kandinsky5-lora", "diffusers", "transformers", "torch", "pillow", "ftfy", "pyarrow")
    return {"python": platform.python_version(), **{name: version(name) or "none" for name in names}}

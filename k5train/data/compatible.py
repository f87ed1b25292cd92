"""Does a cache fit a transformer? Compares widths, encoders' weights and template, before anything is loaded."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from k5cache.buckets import MAX_TEXT_TOKENS, Bucket, is_side
from k5cache.shared.checkpoint import ENCODER_PARTS, has_part, read_config
from k5cache.shared.command_line import command
from k5cache.shared.errors import CacheError, CacheStale
from k5cache.shared.fingerprint import fingerprint
from k5cache.shared.kind import LONG_NAMES, Kind, kind_of_recipe
from k5cache.shared.model import model_name
from k5cache.store.notes import arguments_of
from k5train.data.template import check_template

if TYPE_CHECKING:
    from k5cache.store.reader import Cache

_REASONS = {
    "text_encoder": "its captions were encoded by another Qwen2.5-VL",
    "tokenizer": "its captions were tokenised with another vocabulary",
    "text_encoder_2": "its captions were encoded by another CLIP",
    "tokenizer_2": "its captions were tokenised with another CLIP vocabulary",
    "vae": "its images were encoded by another VAE",
}


def check_encoders(cache: Cache, folder: Path) -> None:
    """Refuse a cache that was not made by the encoders beside the transformer. Takes under 0.2 s and loads no model.

    Only the parts that are in ``folder`` are compared: a training machine needs no text encoder, and the sft and
    pretrain flavours have the same ones.

    Raises:
        CacheStale: names each part that differs.
    """
    recipe = cache.manifest.recipe
    _check_kind(cache, folder)
    different = [
        f"{_REASONS[part]} (part {part})"
        for part in ENCODER_PARTS
        if (cached := _cached(recipe, part)) and _differs(folder, part, cached, kind_of_recipe(recipe))
    ]
    if different:
        of_part = arguments_of(cache.manifest.part)
        again = command("k5cache", "encode", "SOURCE", *of_part, "-o", cache.root, "--update", model=folder)
        raise CacheStale(
            f"{cache.root} does not belong to the model in {folder}: {'; '.join(different)}",
            f"Train with the model that encoded it ({model_name(recipe)}), or encode with this one: {again}",
        )


def _differs(folder: Path, part: str, cached: str, kind: Kind) -> bool:
    """Whether a part is here, and is another. A plan leaves configs without weights, and a training machine may lack
    the text encoder's vision tower."""
    return has_part(folder, part) and fingerprint(folder, part, kind == "i2i", cached) != cached


def _check_kind(cache: Cache, folder: Path) -> None:
    """Refuse a cache for image-to-image with a transformer for text-to-image, and the reverse."""
    encoded = kind_of_recipe(cache.manifest.recipe)
    takes: Kind = "i2i" if read_config(folder, "transformer").get("visual_cond") else "t2i"
    if encoded != takes:
        sources = ("--sources", "SOURCES") if takes == "i2i" else ()
        again = command("k5cache", "encode", "SOURCE", *sources, "-o", "OTHER", model=folder)
        raise CacheStale(
            f"{cache.root} was encoded for {LONG_NAMES[encoded]}, and the transformer in {folder} is for "
            f"{LONG_NAMES[takes]}",
            f"Train with the model that encoded it ({model_name(cache.manifest.recipe)}), or encode for this one: "
            f"{again}",
        )


def _cached(recipe: dict[str, Any], part: str) -> str:
    table = recipe.get("latents" if part == "vae" else "text", {})
    return str(table.get(part) or "")


def check_fit(cache: Cache, folder: Path) -> None:
    """Refuse a cache whose tensors this transformer cannot take, before anything is loaded.

    Raises:
        CacheStale: it is for the other kind of model, widths differ, the cache was not made by the encoders beside the
            transformer, or the installed diffusers has another template.
        CacheError: another program made the cache.
    """
    check_manifest(cache, folder)
    check_widths(cache, folder)


def check_manifest(cache: Cache, folder: Path) -> None:
    """What ``check_fit`` finds without reading a row, and so without torch. Raises what it says."""
    check_template(cache)
    check_encoders(cache, folder)
    if not isinstance(cache.manifest.recipe.get("selection", {}).get("resolution"), int):
        raise CacheError(
            f"{cache.root} was not made by `k5cache encode`: its recipe has no selection.resolution",
            "Encode into a new cache: k5cache encode SOURCE -o OTHER",
        )
    _check_sizes(cache)
    if cache.kind == "i2i" and cache.columns("source_key").column(0).null_count:
        again = command("k5cache", "encode", "TARGETS", "--sources", "SOURCES", "-o", "OTHER")
        raise CacheError(
            f"{cache.root} has rows without a source: it was not made by `k5cache encode`",
            f"Encode pairs into a new cache: {again}",
        )


def check_widths(cache: Cache, folder: Path) -> None:
    """What ``check_fit`` finds in a row. Raises what it says."""
    config = read_config(folder, "transformer")
    text = cache.prompt("") if cache.kind == "t2i" else cache.text(cache.row(0).caption_keys[0])
    widths = {"in_text_dim": text.prompt_embeds.shape[-1], "in_text_dim2": text.pooled.shape[-1]}
    for name, width in widths.items():
        if width != config[name]:
            raise CacheStale(
                f"{cache.root} holds text embeddings {width} wide, the transformer in {folder} takes {config[name]}",
                "Encode with the same model: k5cache encode SOURCE -o OTHER --model DIR",
            )


def _check_sizes(cache: Cache) -> None:
    """Refuse latents and captions for which the transformer has no positions. Our own encode makes none."""
    buckets = {Bucket(*shard.bucket) for shard in cache.manifest.shards if shard.bucket}
    too_large = sorted(b.name for b in buckets if not (is_side(b.width) and is_side(b.height)))
    longest = int(cache.texts().n_tokens.max(initial=0))
    if longest > MAX_TEXT_TOKENS:
        too_large.append(f"a caption of {longest} tokens")
    if too_large:
        raise CacheError(
            f"{cache.root} holds what the transformer has no positions for: {', '.join(too_large)}",
            "Encode into a new cache: k5cache encode SOURCE -o OTHER",
        )

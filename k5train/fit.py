"""Was this cache encoded by the encoders that belong to this transformer? Weights are compared, not names."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from k5cache.config import model_name
from k5cache.errors import CacheStale
from k5cache.fingerprint import fingerprint
from k5cache.hub import ENCODER_PARTS, read_config

if TYPE_CHECKING:
    from k5cache.store.reader import Cache

WORDS = {
    "text_encoder": "its captions went through another Qwen2.5-VL",
    "tokenizer": "its captions were cut into tokens by another vocabulary",
    "text_encoder_2": "its captions went through another CLIP",
    "tokenizer_2": "its captions were cut into tokens by another CLIP vocabulary",
    "vae": "its images went through another VAE",
}


def check_encoders(cache: Cache, folder: Path) -> None:
    """Refuse a cache that other encoders made than those beside the transformer; under 0.2 s, no model is loaded.

    Only the parts that are in ``folder`` are compared: a training machine needs no text encoder, and T2I and its
    pretrain have the same ones.

    Raises:
        CacheStale: names each part that is another.
    """
    recipe = cache.manifest.recipe
    edits = bool(read_config(folder, "transformer").get("visual_cond"))
    flavour = str(recipe.get("model", {}).get("flavour", ""))
    if flavour and flavour.startswith("i2i") != edits:
        kinds = ("images to edit (I2I)", "captions alone (T2I)")
        raise CacheStale(
            f"{cache.root} was encoded for {flavour}, and the transformer in {folder} takes {kinds[not edits]}",
            "Encode with the flavour that is trained: k5cache encode SOURCE -o OTHER --set model.flavour=FLAVOUR",
        )
    others = [
        f"{WORDS[part]} (part {part})"
        for part in ENCODER_PARTS
        if (cached := _cached(recipe, part)) and (folder / part).is_dir() and fingerprint(folder, part) != cached
    ]
    if others:
        raise CacheStale(
            f"{cache.root} does not belong to the model in {folder}: {'; '.join(others)}",
            f"Train with the model that encoded it ({model_name(recipe)}), "
            f"or encode with this one: k5cache encode SOURCE -o {cache.root} --model {folder} --update",
        )


def _cached(recipe: dict[str, Any], part: str) -> str:
    table = recipe.get("latents" if part == "vae" else "text", {})
    return str(table.get(part) or "")

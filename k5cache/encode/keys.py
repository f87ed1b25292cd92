"""What is a row called? A hash of everything that decides its numbers: content, crop or caption, and recipe."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from k5cache.buckets import Geometry

_ENCODER = json.JSONEncoder(sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)


def latent_key(content_hash: str, geometry: Geometry, latent_recipe: Mapping[str, Any]) -> str:
    """Key of the latents that these bytes, this crop and this VAE recipe give: 32 hex digits."""
    return latent_key_of(content_hash, geometry, canonical(latent_recipe))


def text_key(cleaned_caption: str, text_recipe: Mapping[str, Any]) -> str:
    """Key of the embeddings that this cleaned caption and this text recipe give: 32 hex digits."""
    return text_key_of(cleaned_caption, canonical(text_recipe))


def mask_key(content_hash: str, geometry: Geometry) -> str:
    """Key of a mask under a crop: 32 hex digits."""
    return _digest(canonical({"crop": _crop(geometry), "mask": content_hash}))


def latent_key_of(content_hash: str, geometry: Geometry, canonical_recipe: str) -> str:
    """``latent_key`` for many rows: the recipe is made ``canonical`` once."""
    crop = canonical(_crop(geometry))
    return _digest(f'{{"content":{canonical(content_hash)},"crop":{crop},"recipe":{canonical_recipe}}}')


def text_key_of(cleaned_caption: str, canonical_recipe: str, canonical_source: str = "") -> str:
    """``text_key`` for many captions: the recipe is made ``canonical`` once.

    Args:
        canonical_source: for image-to-image, ``source_of`` what Qwen sees together with the caption.
    """
    source = f',"source":{canonical_source}' if canonical_source else ""
    return _digest(f'{{"caption":{canonical(cleaned_caption)},"recipe":{canonical_recipe}{source}}}')


def source_of(content_hash: str, geometry: Geometry, source_view: str) -> str:
    """What Qwen sees of a source, ``canonical``: the crop that the VAE sees too, or ``"whole"``, all of the picture."""
    if source_view == "whole":
        return canonical({"content": content_hash, "flipped": geometry.flipped})
    return canonical({"content": content_hash, "crop": _crop(geometry)})


def canonical(value: Any) -> str:
    """``value`` as JSON with sorted keys and no spaces."""
    return _ENCODER.encode(value)


def _crop(geometry: Geometry) -> dict[str, Any]:
    return {
        "bucket": [geometry.bucket.width, geometry.bucket.height],
        "flipped": geometry.flipped,
        "left_top": [geometry.left, geometry.top],
        "resized": [geometry.resized_width, geometry.resized_height],
        **({"stretched": True} if geometry.stretched else {}),  # the keys of all others stay what they were
    }


def _digest(canonical_json: str) -> str:
    return hashlib.sha256(canonical_json.encode("ascii")).hexdigest()[:32]

"""The plan: what is new, changed and gone since the last encode, and what is left to compute. Pure, no torch."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from dataclasses import dataclass
from typing import Any

from k5cache.buckets import Bucket, Geometry, choose_bucket, cover
from k5cache.images import Skipped, SourceItem, UnreadableImage
from k5cache.store.index import IndexRow

Probe = Callable[[SourceItem], tuple[str, int, int]]
"""An item's (content hash, width, height); raises ``UnreadableImage``."""


@dataclass(frozen=True)
class LatentJob:
    """Encode one crop of one image with the VAE."""

    key: str
    path: str
    geometry: Geometry


@dataclass(frozen=True)
class TextJob:
    """Encode one caption or prompt with Qwen and CLIP."""

    key: str
    caption: str
    """Cleaned."""


@dataclass(frozen=True)
class Plan:
    """What the cache will hold (``rows``), and what must be computed for it (the jobs, one a key)."""

    rows: tuple[IndexRow, ...]
    latent_jobs: tuple[LatentJob, ...]
    text_jobs: tuple[TextJob, ...]
    num_reused_latents: int
    """Latents that ``rows`` need and the cache has; each counts once however many rows share it."""
    num_reused_texts: int
    """The same for texts, the prompts' among them."""
    removed: tuple[str, ...]
    """Paths that the previous index had and ``rows`` have not."""
    added: tuple[str, ...]
    changed: tuple[str, ...]
    """Paths whose latents or texts have other keys than in the previous index."""
    skipped: tuple[Skipped, ...]
    upscaled: tuple[str, ...]
    """Paths of images smaller than their bucket."""

    @property
    def num_upscaled(self) -> int:
        return len(self.upscaled)


def latent_key(content_hash: str, geometry: Geometry, latent_recipe: Mapping[str, Any]) -> str:
    """Name of the latents that these bytes, this crop and this VAE recipe give: 32 hex digits."""
    return _latent_key(content_hash, geometry, _canonical(latent_recipe))


def text_key(cleaned_caption: str, text_recipe: Mapping[str, Any]) -> str:
    """Name of the embeddings that this cleaned caption and this text recipe give: 32 hex digits."""
    return _text_key(cleaned_caption, _canonical(text_recipe))


def make_plan(
    items: Iterable[SourceItem],
    skipped: Iterable[Skipped],
    known: Mapping[str, IndexRow],
    stored_latents: Set[str],
    stored_texts: Set[str],
    prompts: Sequence[str],
    table: Sequence[Bucket],
    latent_recipe: Mapping[str, Any],
    text_recipe: Mapping[str, Any],
    clean: Callable[[str], str],
    probe: Probe,
    rehash: bool = False,
) -> Plan:
    """Compare a folder with the cache it has.

    Args:
        items: the images found, in the order that the rows will have.
        skipped: what was found and cannot be used; unreadable images are added to it.
        known: the previous index, by path.
        stored_latents: keys that the cache's shards hold.
        stored_texts: keys that the cache's shards hold.
        prompts: raw prompts that the cache must hold besides the captions.
        table: the buckets to choose from.
        latent_recipe: all that changes latents besides image and crop. Plain JSON values.
        text_recipe: all that changes embeddings besides the caption. Plain JSON values.
        clean: the pipeline's own prompt cleaning.
        probe: reads an image's hash and header; called only for items whose size, time or inode is not the known one.
        rehash: probe every item.
    """
    texts = _Texts(text_recipe, clean)
    for prompt in prompts:
        texts.key(prompt)
    rows: list[IndexRow] = []
    recipe = _canonical(latent_recipe)
    geometries: dict[tuple[int, int], Geometry] = {}
    latent_jobs: dict[str, LatentJob] = {}  # one a key: an image found twice is encoded once
    unusable = list(skipped)
    upscaled: list[str] = []
    for item in items:
        try:
            content_hash, width, height = _identity(item, known.get(item.path), probe, rehash)
        except UnreadableImage as error:
            unusable.append(Skipped(item.path, error.reason))
            continue
        geometry = geometries.get((width, height))  # a camera's images share a few sizes
        if geometry is None:
            geometry = geometries[width, height] = cover(width, height, choose_bucket(width, height, table))
        key = _latent_key(content_hash, geometry, recipe)
        caption_keys = tuple(texts.key(caption) for caption in item.captions)
        rows.append(_row(item, content_hash, geometry, key, caption_keys))
        latent_jobs.setdefault(key, LatentJob(key, item.path, geometry))
        if geometry.upscaled:
            upscaled.append(item.path)
    paths = {row.path for row in rows}
    return Plan(
        rows=tuple(rows),
        latent_jobs=tuple(job for key, job in latent_jobs.items() if key not in stored_latents),
        text_jobs=tuple(TextJob(key, text) for text, key in texts.keys.items() if key not in stored_texts),
        num_reused_latents=len(latent_jobs.keys() & stored_latents),
        num_reused_texts=len(set(texts.keys.values()) & stored_texts),
        removed=tuple(path for path in known if path not in paths),
        added=tuple(row.path for row in rows if row.path not in known),
        changed=tuple(row.path for row in rows if row.path in known and not _same_keys(row, known[row.path])),
        skipped=tuple(unusable),
        upscaled=tuple(upscaled),
    )


class _Texts:
    """Raw captions to keys; each caption is cleaned and hashed once."""

    def __init__(self, recipe: Mapping[str, Any], clean: Callable[[str], str]) -> None:
        self._recipe, self._clean = _canonical(recipe), clean
        self._by_raw: dict[str, str] = {}
        self.keys: dict[str, str] = {}
        """Cleaned caption to key, in the order first met."""

    def key(self, raw: str) -> str:
        if raw not in self._by_raw:
            cleaned = self._clean(raw)
            self._by_raw[raw] = self.keys.setdefault(cleaned, _text_key(cleaned, self._recipe))
        return self._by_raw[raw]


def _identity(item: SourceItem, row: IndexRow | None, probe: Probe, rehash: bool) -> tuple[str, int, int]:
    """(content hash, width, height), read from the file only when its stat is not the one in the index."""
    if row is None or rehash or (item.num_bytes, item.mtime_ns, item.inode) != (row.num_bytes, row.mtime_ns, row.inode):
        return probe(item)
    return row.content_hash, row.width, row.height


def _row(item: SourceItem, content_hash: str, geometry: Geometry, key: str, caption_keys: tuple[str, ...]) -> IndexRow:
    return IndexRow(
        path=item.path,
        content_hash=content_hash,
        num_bytes=item.num_bytes,
        mtime_ns=item.mtime_ns,
        inode=item.inode,
        width=geometry.width,
        height=geometry.height,
        bucket_width=geometry.bucket.width,
        bucket_height=geometry.bucket.height,
        resized_width=geometry.resized_width,
        resized_height=geometry.resized_height,
        left=geometry.left,
        top=geometry.top,
        flipped=geometry.flipped,
        latent_key=key,
        caption_keys=caption_keys,
        mask_key=None,
    )


def _same_keys(row: IndexRow, before: IndexRow) -> bool:
    return (row.latent_key, row.caption_keys) == (before.latent_key, before.caption_keys)


def _latent_key(content_hash: str, geometry: Geometry, recipe: str) -> str:
    crop = {
        "bucket": [geometry.bucket.width, geometry.bucket.height],
        "flipped": geometry.flipped,
        "left_top": [geometry.left, geometry.top],
        "resized": [geometry.resized_width, geometry.resized_height],
    }
    return _digest(f'{{"content":{_canonical(content_hash)},"crop":{_canonical(crop)},"recipe":{recipe}}}')


def _text_key(cleaned_caption: str, recipe: str) -> str:
    return _digest(f'{{"caption":{_canonical(cleaned_caption)},"recipe":{recipe}}}')


_ENCODER = json.JSONEncoder(sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)


def _canonical(value: Any) -> str:
    """JSON with sorted keys and no spaces. A recipe is written once and set into the JSON of every key."""
    return _ENCODER.encode(value)


def _digest(canonical: str) -> str:
    return hashlib.sha256(canonical.encode("ascii")).hexdigest()[:32]

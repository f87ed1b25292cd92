"""The plan: what is new, changed and gone since the last encode, and what is left to compute. Pure, no torch."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from dataclasses import dataclass
from typing import Any

from k5cache.buckets import Bucket, Framing, Geometry
from k5cache.sources.items import Skipped, SourceItem, UnreadableImage
from k5cache.store.index import IndexRow

Probe = Callable[[SourceItem], tuple[str, int, int]]
"""An item's (content hash, width, height); raises ``UnreadableImage``."""


ProbeMask = Callable[[SourceItem, int, int], str]
"""The content hash of an item's mask, given the image's width and height; raises ``UnreadableImage``."""


@dataclass(frozen=True)
class MaskJob:
    """Bring one mask to latent size under one crop."""

    key: str
    path: str
    geometry: Geometry
    content_hash: str = ""


@dataclass(frozen=True)
class LatentJob:
    """Encode one crop of one image with the VAE."""

    key: str
    path: str
    geometry: Geometry
    content_hash: str = ""
    """Of the bytes that ``key`` stands for: what is encoded must be these."""


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
    mask_jobs: tuple[MaskJob, ...]
    prompts: dict[str, str]
    """Raw prompt to text key."""
    num_reused_latents: int
    """Latents that ``rows`` need and the cache has; each counts once however many rows share it."""
    num_reused_texts: int
    """The same for texts, the prompts' among them."""
    removed: tuple[str, ...]
    """Paths that the previous index had and ``rows`` have not, those of ``renamed`` left out."""
    added: tuple[str, ...]
    """Paths that the previous index had not, those of ``renamed`` left out."""
    renamed: tuple[tuple[str, str], ...]
    """(path in the previous index, path now) of images whose bytes are the same."""
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


_MASK_COLUMNS = ("mask_num_bytes", "mask_mtime_ns", "mask_inode")


def captions_hash(item: SourceItem) -> str:
    """What an index row keeps of the raw captions: unchanged means that its ``caption_keys`` still hold."""
    return hashlib.sha256("\0".join(item.captions).encode("utf-8", "surrogatepass")).hexdigest()[:16]


def make_plan(
    items: Sequence[SourceItem],
    skipped: Iterable[Skipped],
    known: Iterable[IndexRow],
    stored_latents: Set[str],
    stored_texts: Set[str],
    prompts: Sequence[str],
    framing: Framing,
    latent_recipe: Mapping[str, Any],
    text_recipe: Mapping[str, Any],
    clean: Callable[[str], str],
    probe: Probe,
    rehash: bool = False,
    stored_masks: Set[str] = frozenset(),
    probe_mask: ProbeMask | None = None,
    known_prompts: Mapping[str, str] | None = None,
) -> Plan:
    """Compare a folder with the cache it has.

    Args:
        items: the images found, in the order that the rows will have.
        skipped: what was found and cannot be used; unreadable images are added to it.
        known: the previous index.
        stored_latents: keys that the cache's shards hold.
        stored_texts: keys that the cache's shards hold.
        prompts: raw prompts that the cache must hold besides the captions.
        framing: the buckets to choose from, and which part of an image is used.
        latent_recipe: all that changes latents besides image and crop. Plain JSON values.
        text_recipe: all that changes embeddings besides the caption. Plain JSON values.
        clean: the pipeline's own prompt cleaning.
        probe: reads an image's hash and header; called only for items whose size, time or inode is not the known one.
        rehash: probe every item.
        stored_masks: keys that the cache's shards hold.
        probe_mask: reads a mask's hash, and checks its size.
        known_prompts: raw prompt to key, given when the text recipe and the cleaning are those that made ``known``:
            then captions and prompts that did not change keep their keys and are not cleaned.
    """
    before = _Before(known, items)
    texts = _Texts(text_recipe, clean)
    kept = known_prompts or {}
    keys_of_prompts = {
        prompt: kept[prompt] if kept.get(prompt) in stored_texts else texts.key(prompt) for prompt in prompts
    }
    rows: list[IndexRow] = []
    recipe = _canonical(latent_recipe)
    crops = _Crops(framing)
    latent_jobs: dict[str, LatentJob] = {}  # one a key: an image found twice is encoded once
    mask_jobs: dict[str, MaskJob] = {}
    unusable = list(skipped)
    upscaled: list[str] = []
    for item in items:
        try:
            content_hash, width, height = _identity(item, before, probe, rehash)
            geometries = crops.of(width, height, content_hash)
            mask_hash = _mask_identity(item, width, height, before, probe_mask, rehash)
        except UnreadableImage as error:
            unusable.append(Skipped(item.path, error.reason))
            continue
        caption_keys = before.caption_keys.get(captions_hash(item), ()) if known_prompts is not None else ()
        if not caption_keys or any(key not in stored_texts for key in caption_keys):
            caption_keys = tuple(texts.key(caption) for caption in item.captions)
        for geometry in geometries:
            key = _latent_key(content_hash, geometry, recipe)
            mask_key = _mask_key(mask_hash, geometry) if mask_hash else None
            rows.append(_row(item, content_hash, geometry, key, caption_keys, mask_key, mask_hash))
            latent_jobs.setdefault(key, LatentJob(key, item.path, geometry, content_hash))
            if mask_key and item.mask:
                mask_jobs.setdefault(mask_key, MaskJob(mask_key, item.mask.path, geometry, mask_hash or ""))
        if geometries[0].upscaled:
            upscaled.append(item.path)
    needed_texts = {key for row in rows for key in row.caption_keys} | set(keys_of_prompts.values())
    firsts = [row for row in rows if not row.flipped]
    added, removed, renamed = before.compare(firsts)
    return Plan(
        rows=tuple(rows),
        latent_jobs=tuple(job for key, job in latent_jobs.items() if key not in stored_latents),
        mask_jobs=tuple(job for key, job in mask_jobs.items() if key not in stored_masks),
        prompts=keys_of_prompts,
        text_jobs=tuple(TextJob(key, text) for text, key in texts.keys.items() if key not in stored_texts),
        num_reused_latents=len(latent_jobs.keys() & stored_latents),
        num_reused_texts=len(needed_texts & stored_texts),
        removed=removed,
        added=added,
        renamed=renamed,
        changed=tuple(row.path for row in firsts if row.path in before.at and not _same_keys(row, before.at[row.path])),
        skipped=tuple(unusable),
        upscaled=tuple(upscaled),
    )


def num_unknown(items: Sequence[SourceItem], known: Iterable[IndexRow], rehash: bool = False) -> int:
    """How many of ``items`` ``make_plan`` will probe."""
    before = _Before(known, items)
    return sum(rehash or before.same_file(item) is None for item in items)


class _Crops:
    """Geometries of images; a camera's images share a few sizes, so each is worked out once."""

    def __init__(self, framing: Framing) -> None:
        self._framing = framing
        self._known: dict[tuple[int, int], tuple[Geometry, ...]] = {}

    def of(self, width: int, height: int, content_hash: str) -> tuple[Geometry, ...]:
        """One crop, or two with a flip; ``UnreadableImage`` where a guard refuses the image."""
        found = self._known.get((width, height))
        if found is None or self._framing.crop == "random":
            found = self._known[width, height] = self._framing.frame(width, height, content_hash)
        reason = self._framing.refusal(found[0])
        if reason:
            raise UnreadableImage(reason)
        return found


class _Before:
    """The previous index, looked up by path and, for images that were renamed, by stat and by content."""

    def __init__(self, known: Iterable[IndexRow], items: Sequence[SourceItem]) -> None:
        self.at = {row.path: row for row in known if not row.flipped}
        here = {item.path for item in items}
        self.caption_keys = {row.captions_hash: row.caption_keys for row in self.at.values()}
        self._gone = {_stat(row): row for row in self.at.values() if row.path not in here}

    def same_file(self, item: SourceItem) -> IndexRow | None:
        """The row of this very file: same path, or a path that is gone, and same size, time and inode."""
        row = self.at.get(item.path)
        if row is not None:
            return row if _stat(row) == _stat(item) else None
        return self._gone.get(_stat(item))

    def compare(self, rows: Sequence[IndexRow]) -> tuple[tuple[str, ...], tuple[str, ...], tuple[tuple[str, str], ...]]:
        """(added, removed, renamed) of ``rows`` against the previous index."""
        paths = {row.path for row in rows}
        gone: dict[str, list[str]] = {}
        for row in self.at.values():
            if row.path not in paths:
                gone.setdefault(row.content_hash, []).append(row.path)
        added, renamed = [], []
        for row in rows:
            if row.path not in self.at:
                if gone.get(row.content_hash):
                    renamed.append((gone[row.content_hash].pop(0), row.path))
                else:
                    added.append(row.path)
        left = {path for paths_left in gone.values() for path in paths_left}
        return tuple(added), tuple(path for path in self.at if path in left), tuple(renamed)


def _stat(of: IndexRow | SourceItem) -> tuple[int, int, int]:
    return of.num_bytes, of.mtime_ns, of.inode


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


def _identity(item: SourceItem, before: _Before, probe: Probe, rehash: bool) -> tuple[str, int, int]:
    """(content hash, width, height), read from the file only when its stat is not the one in the index."""
    row = None if rehash else before.same_file(item)
    return probe(item) if row is None else (row.content_hash, row.width, row.height)


def _mask_identity(
    item: SourceItem, width: int, height: int, before: _Before, probe: ProbeMask | None, rehash: bool
) -> str | None:
    """The content hash of the mask, if there is one, read only when the stat of mask or image is not in the index."""
    if item.mask is None or probe is None:
        return None
    row = None if rehash else before.same_file(item)
    if row is not None and row.mask_hash and _mask_stat(item) == tuple(getattr(row, name) for name in _MASK_COLUMNS):
        return row.mask_hash
    return probe(item, width, height)


def _mask_stat(item: SourceItem) -> tuple[int, int, int]:
    return (item.mask.num_bytes, item.mask.mtime_ns, item.mask.inode) if item.mask else (0, 0, 0)


def _row(
    item: SourceItem,
    content_hash: str,
    geometry: Geometry,
    key: str,
    caption_keys: tuple[str, ...],
    mask_key: str | None,
    mask_hash: str | None,
) -> IndexRow:
    mask_stat = _mask_stat(item)
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
        mask_key=mask_key,
        mask_hash=mask_hash,
        mask_num_bytes=mask_stat[0],
        mask_mtime_ns=mask_stat[1],
        mask_inode=mask_stat[2],
        captions_hash=captions_hash(item),
    )


def geometry_of(row: IndexRow) -> Geometry:
    """The crop of an index row."""
    return Geometry(
        width=row.width, height=row.height, bucket=Bucket(row.bucket_width, row.bucket_height),
        resized_width=row.resized_width, resized_height=row.resized_height,
        left=row.left, top=row.top, flipped=row.flipped,
    )  # fmt: skip


def _same_keys(row: IndexRow, before: IndexRow) -> bool:
    now, then = ((r.latent_key, r.mask_key, r.caption_keys) for r in (row, before))
    return now == then


def _latent_key(content_hash: str, geometry: Geometry, recipe: str) -> str:
    crop = _canonical(_crop(geometry))
    return _digest(f'{{"content":{_canonical(content_hash)},"crop":{crop},"recipe":{recipe}}}')


def _mask_key(content_hash: str, geometry: Geometry) -> str:
    return _digest(_canonical({"crop": _crop(geometry), "mask": content_hash}))


def _crop(geometry: Geometry) -> dict[str, Any]:
    return {
        "bucket": [geometry.bucket.width, geometry.bucket.height],
        "flipped": geometry.flipped,
        "left_top": [geometry.left, geometry.top],
        "resized": [geometry.resized_width, geometry.resized_height],
    }


def _text_key(cleaned_caption: str, recipe: str) -> str:
    return _digest(f'{{"caption":{_canonical(cleaned_caption)},"recipe":{recipe}}}')


_ENCODER = json.JSONEncoder(sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)


def _canonical(value: Any) -> str:
    """JSON with sorted keys and no spaces. A recipe is written once and set into the JSON of every key."""
    return _ENCODER.encode(value)


def _digest(canonical: str) -> str:
    return hashlib.sha256(canonical.encode("ascii")).hexdigest()[:32]

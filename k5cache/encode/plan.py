"""The plan: what is new, changed and gone since the last encode, and what is left to compute? Pure, no torch."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, field
from typing import Any

from k5cache.buckets import Bucket, Framing, Geometry
from k5cache.encode.keys import canonical, latent_key_of, mask_key, text_key_of
from k5cache.encode.previous_index import PreviousIndex, captions_hash, mask_stat
from k5cache.sources.items import Flawed, Skipped, SourceItem, UnreadableImage
from k5cache.store.index import IndexRow


@dataclass(frozen=True)
class Wanted:
    """What the cache is to hold."""

    items: Sequence[SourceItem]
    """The images of the source, in the order that the rows will have."""
    skipped: Sequence[Skipped]
    """What the source has and cannot be used; unreadable images are added to it."""
    prompts: Sequence[str]
    """Raw prompts that the cache must hold in addition to the captions."""
    framing: Framing
    """The buckets to choose from, and which part of an image is used."""
    latent_recipe: Mapping[str, Any]
    """Everything but image and crop that changes latents. Plain JSON values."""
    text_recipe: Mapping[str, Any]
    """Everything but the caption that changes embeddings. Plain JSON values."""


@dataclass(frozen=True)
class Stored:
    """What the cache holds now."""

    rows: Sequence[IndexRow] = ()
    """Its index."""
    latents: Set[str] = frozenset()
    """Keys of the latents in its shards."""
    texts: Set[str] = frozenset()
    masks: Set[str] = frozenset()
    failed: Mapping[str, str] = field(default_factory=dict)
    """Keys of latents and masks whose image or mask is known not to be decodable -> why."""
    prompts: Mapping[str, str] | None = None
    """Raw prompt to text key. Given only if text recipe and cleaning are still those that made ``rows``: captions and
    prompts that did not change then keep their keys and are not cleaned."""


@dataclass(frozen=True)
class Probes:
    """How images and captions are looked at. ``make_plan`` itself opens no file."""

    image: Callable[[SourceItem], tuple[str, int, int]]
    """An image's (content hash, width, height). Raises ``UnreadableImage``."""
    mask: Callable[[SourceItem, int, int], str]
    """The content hash of an item's mask, given the image's width and height. Raises ``UnreadableImage``."""
    clean: Callable[[str], str]
    """The pipeline's own prompt cleaning."""


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
    is_source: bool = False
    """``path`` is that of a source, the picture that is edited: ``Job.read_source`` reads it."""


@dataclass(frozen=True)
class SourceView:
    """The source that Qwen sees together with an instruction."""

    path: str
    """``Job.read_source`` reads it."""
    content_hash: str
    """Of its bytes: what is encoded must be these."""
    geometry: Geometry
    """Of the crop that the VAE sees. Qwen sees that crop too, or with ``source_view = "whole"`` the whole picture."""


@dataclass(frozen=True)
class TextJob:
    """Encode one caption or prompt with Qwen and CLIP."""

    key: str
    caption: str
    """Cleaned."""
    source: SourceView | None = None
    """Only for image-to-image, where every caption is an instruction for a source."""


@dataclass(frozen=True)
class Plan:
    """What the cache will hold (``rows``), and what must be computed for it (the jobs, one per key)."""

    rows: tuple[IndexRow, ...]
    latent_jobs: tuple[LatentJob, ...]
    text_jobs: tuple[TextJob, ...]
    mask_jobs: tuple[MaskJob, ...]
    prompts: dict[str, str]
    """Raw prompt to text key."""
    num_reused_latents: int
    """Latents that ``rows`` need and the cache has; each counts once, however many rows share it."""
    num_reused_texts: int
    """The same for texts, those of the prompts included."""
    added: tuple[str, ...]
    """This and the next three are the paths that differ from the previous index, as in ``Changes``."""
    removed: tuple[str, ...]
    renamed: tuple[tuple[str, str], ...]
    changed: tuple[str, ...]
    skipped: tuple[Skipped, ...]
    upscaled: tuple[str, ...]
    """Paths of images smaller than their bucket."""
    failed: Mapping[str, str] = field(default_factory=dict)
    """The keys of ``Stored.failed`` that images of ``skipped`` would have."""
    flawed: tuple[Flawed, ...] = ()
    """Images that are used although their file is damaged, of those that were looked at."""


def make_plan(wanted: Wanted, stored: Stored, probes: Probes, rehash: bool = False) -> Plan:
    """Compare a source with the cache that was made of it.

    Args:
        rehash: probe every item, also those whose size, time and inode are the ones in the index.
    """
    previous = PreviousIndex(stored.rows, wanted.items)
    texts = _TextKeys(wanted.text_recipe, probes.clean, stored, previous)
    prompts = {prompt: texts.of_prompt(prompt) for prompt in wanted.prompts}
    images, unreadable = _probe_images(wanted, previous, probes, rehash)
    rows: list[IndexRow] = []
    failed: dict[str, str] = {}
    recipe, empty = canonical(wanted.latent_recipe), texts.of_prompt("")
    for image in images:
        caption_keys = tuple(key for key in texts.of_captions(image.item) if key != empty)
        rows_of_image = [_row(image, geometry, recipe, caption_keys) for geometry in image.geometries]
        known = {key: stored.failed[key] for key in _image_keys(rows_of_image) if key in stored.failed}
        failed |= known
        if not caption_keys:  # such as ``&nbsp;``: it would be trained on as if its caption were dropped
            unreadable.append(Skipped(image.item.path, "empty caption"))
        elif known:
            unreadable.append(_skipped_again(image.item, rows_of_image, known))
        else:
            rows += rows_of_image
    changes = previous.changes(rows)
    needed_texts = {key for row in rows for key in row.caption_keys} | set(prompts.values())
    return Plan(
        rows=tuple(rows),
        latent_jobs=_latent_jobs(rows, stored.latents),
        text_jobs=tuple(
            TextJob(key, text)
            for text, key in texts.by_cleaned.items()
            if key in needed_texts and key not in stored.texts
        ),
        mask_jobs=_mask_jobs(images, rows, stored.masks),
        prompts=prompts,
        num_reused_latents=len({row.latent_key for row in rows} & stored.latents),
        num_reused_texts=len(needed_texts & stored.texts),
        added=changes.added,
        removed=changes.removed,
        renamed=changes.renamed,
        changed=changes.changed,
        skipped=(*wanted.skipped, *unreadable),
        upscaled=tuple(dict.fromkeys(row.path for row in rows if geometry_of(row).upscaled)),
        failed=failed,
    )


def num_unknown(items: Sequence[SourceItem], rows: Iterable[IndexRow], rehash: bool = False) -> int:
    """How many of ``items`` ``make_plan`` will probe, given the previous index."""
    previous = PreviousIndex(rows, items)
    return sum(rehash or previous.same_file(item) is None for item in items)


def geometry_of(row: IndexRow) -> Geometry:
    """The crop of an index row."""
    return Geometry(
        width=row.width,
        height=row.height,
        bucket=Bucket(row.bucket_width, row.bucket_height),
        resized_width=row.resized_width,
        resized_height=row.resized_height,
        left=row.left,
        top=row.top,
        flipped=row.flipped,
    )


@dataclass(frozen=True)
class _Image:
    """An item that can be used, and what is known about its bytes."""

    item: SourceItem
    content_hash: str
    geometries: tuple[Geometry, ...]
    """One crop, or two with a flip."""
    mask_hash: str | None


def _probe_images(
    wanted: Wanted, previous: PreviousIndex, probes: Probes, rehash: bool
) -> tuple[list[_Image], list[Skipped]]:
    """The images that can be used, and those that cannot. A file is read only if its stat is not that in the index."""
    images: list[_Image] = []
    unreadable: list[Skipped] = []
    crops = _Crops(wanted.framing)
    for item in wanted.items:
        row = None if rehash else previous.same_file(item)
        try:
            identity = probes.image(item) if row is None else (row.content_hash, row.width, row.height)
            content_hash, width, height = identity
            geometries = crops.of(width, height, content_hash)
            mask_hash = None if rehash else previous.mask_hash(item)
            if item.mask and mask_hash is None:
                mask_hash = probes.mask(item, width, height)
        except UnreadableImage as error:
            unreadable.append(Skipped(item.path, error.reason, error.is_lasting))
        else:
            images.append(_Image(item, content_hash, geometries, mask_hash))
    return images, unreadable


class _Crops:
    """The crops of images. A camera's images share a few sizes, so each size is worked out once."""

    def __init__(self, framing: Framing) -> None:
        self._framing = framing
        self._by_size: dict[tuple[int, int], tuple[Geometry, ...]] = {}

    def of(self, width: int, height: int, content_hash: str) -> tuple[Geometry, ...]:
        """One crop, or two with a flip. Raises ``UnreadableImage`` if a size guard refuses the image."""
        geometries = self._by_size.get((width, height))
        if geometries is None or self._framing.crop == "random":
            geometries = self._by_size[width, height] = self._framing.frame(width, height, content_hash)
        reason = self._framing.refusal(geometries[0])
        if reason:
            raise UnreadableImage(reason)
        return geometries


class _TextKeys:
    """Raw captions to text keys; each caption is cleaned and hashed once."""

    def __init__(
        self, recipe: Mapping[str, Any], clean: Callable[[str], str], stored: Stored, previous: PreviousIndex
    ) -> None:
        self._recipe, self._clean = canonical(recipe), clean
        self._stored, self._previous = stored, previous
        self._by_raw: dict[str, str] = {}
        self.by_cleaned: dict[str, str] = {}
        """Cleaned caption to key, in the order of first use."""

    def of_prompt(self, prompt: str) -> str:
        key = (self._stored.prompts or {}).get(prompt)
        return key if key is not None and key in self._stored.texts else self._of(prompt)

    def of_captions(self, item: SourceItem) -> tuple[str, ...]:
        """The keys of the item's captions, in their order."""
        keys = () if self._stored.prompts is None else self._previous.caption_keys(item)
        if keys and all(key in self._stored.texts for key in keys):
            return keys
        return tuple(self._of(caption) for caption in item.captions)

    def _of(self, raw: str) -> str:
        if raw not in self._by_raw:
            cleaned = self._clean(raw)
            self._by_raw[raw] = self.by_cleaned.setdefault(cleaned, text_key_of(cleaned, self._recipe))
        return self._by_raw[raw]


def mask_reason(path: str, reason: str) -> str:
    """What is said of an image whose mask cannot be used."""
    return f"its mask {path} {reason}"


def _image_keys(rows: Sequence[IndexRow]) -> Iterator[str]:
    for row in rows:
        yield row.latent_key
        if row.mask_key:
            yield row.mask_key


def _skipped_again(item: SourceItem, rows: Sequence[IndexRow], failed: Mapping[str, str]) -> Skipped:
    """An image that could not be decoded, or its mask, when these very bytes were last tried."""
    of_latents = [failed[row.latent_key] for row in rows if row.latent_key in failed]
    if of_latents or item.mask is None:
        return Skipped(item.path, of_latents[0])
    return Skipped(item.path, mask_reason(item.mask.path, next(iter(failed.values()))))


def _latent_jobs(rows: Sequence[IndexRow], stored: Set[str]) -> tuple[LatentJob, ...]:
    """One job per key that is not stored: an image that is there twice is encoded once."""
    firsts: dict[str, IndexRow] = {}
    for row in rows:
        firsts.setdefault(row.latent_key, row)
    return tuple(
        LatentJob(key, row.path, geometry_of(row), row.content_hash) for key, row in firsts.items() if key not in stored
    )


def _mask_jobs(images: Sequence[_Image], rows: Sequence[IndexRow], stored: Set[str]) -> tuple[MaskJob, ...]:
    """One job per key that is not stored."""
    paths = {image.item.path: image.item.mask.path for image in images if image.item.mask}
    firsts: dict[str, IndexRow] = {}
    for row in rows:
        if row.mask_key:
            firsts.setdefault(row.mask_key, row)
    return tuple(
        MaskJob(key, paths[row.path], geometry_of(row), row.mask_hash or "")
        for key, row in firsts.items()
        if key not in stored
    )


def _row(image: _Image, geometry: Geometry, canonical_recipe: str, caption_keys: tuple[str, ...]) -> IndexRow:
    """The index row of one crop of one image."""
    item = image.item
    mask_num_bytes, mask_mtime_ns, mask_inode = mask_stat(item)
    return IndexRow(
        path=item.path,
        content_hash=image.content_hash,
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
        latent_key=latent_key_of(image.content_hash, geometry, canonical_recipe),
        caption_keys=caption_keys,
        mask_key=mask_key(image.mask_hash, geometry) if image.mask_hash else None,
        mask_hash=image.mask_hash,
        mask_num_bytes=mask_num_bytes,
        mask_mtime_ns=mask_mtime_ns,
        mask_inode=mask_inode,
        captions_hash=captions_hash(item),
    )

"""The plan: what is new, changed and gone since the last encode, and what is left to compute? Pure, no torch."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, field, replace

from k5cache.buckets import Geometry, is_turned, source_geometry
from k5cache.encode.examined import Image, examine_images, mask_reason, source_reason
from k5cache.encode.job import LatentJob, MaskJob, TextJob, no_sources
from k5cache.encode.keys import canonical, latent_key_of, mask_key
from k5cache.encode.previous_index import PreviousIndex, captions_hash, mask_stat
from k5cache.encode.text_keys import Seen, TextKeys
from k5cache.encode.wanted import ExaminedEdit, Probes, Stored, Wanted
from k5cache.sources.items import Content, Flawed, Skipped, SourceItem
from k5cache.store.geometry import geometry_of, source_of_row
from k5cache.store.index import IndexRow
from k5cache.store.manifest import Edit


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
    """Latents that ``rows`` and ``edits`` need and the cache has; each counts once, however many rows share it."""
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
    edits: tuple[Edit, ...] = ()
    """Pairs to draw."""
    classes: Mapping[str, str] = field(default_factory=dict)
    """Key of a caption -> that of its class caption."""
    stretched: tuple[str, ...] = ()
    """Paths of images whose source has another shape and is stretched."""
    turned: tuple[str, ...] = ()
    """Paths of images whose source has their width for its height and the reverse."""
    same_as_target: tuple[str, ...] = ()
    """Paths of images whose source has the same bytes: such a pair teaches to change nothing."""
    read_source: Callable[[str], Content] = no_sources
    """A source by its path in a job: of an item or of a pair to draw."""


def make_plan(wanted: Wanted, stored: Stored, probes: Probes, rehash: bool = False) -> Plan:
    """Compare a source with the cache that was made of it.

    Args:
        rehash: probe every item, also those whose size, time and inode are the ones in the index.
    """
    previous = PreviousIndex(stored.rows, wanted.items)
    keys = _Keys(wanted, stored.latents, TextKeys(wanted.text_recipe, probes.clean, stored, previous))
    prompts = {prompt: keys.texts.of_prompt(prompt) for prompt in wanted.prompts}
    images, unreadable = examine_images(wanted, previous, probes, rehash)
    rows: list[IndexRow] = []
    failed: dict[str, str] = {}
    for image in images:
        rows_of_image = [keys.row(image, geometry) for geometry in image.geometries]
        known = {key: stored.failed[key] for key in _image_keys(rows_of_image) if key in stored.failed}
        failed |= known
        if not rows_of_image[0].caption_keys:  # such as ``&nbsp;``: it would be trained on as if it were dropped
            unreadable.append(Skipped(image.item.path, "empty caption"))
        elif known:
            unreadable.append(_skipped_again(image.item, rows_of_image, known))
        else:
            rows += rows_of_image
    edits = (*wanted.kept_edits, *(keys.edit(edit) for edit in wanted.edits))
    changes = previous.changes(rows)
    needed_texts = {key for row in rows for key in row.text_keys} | {*prompts.values()}
    needed_texts |= {key for edit in edits for key in edit.text_keys}
    classes = {key: keys.classes[key] for row in rows for key in row.caption_keys if key in keys.classes}
    needed_texts |= {*classes.values()}
    needed_latents = {key for row in rows for key in row.latent_keys} | {edit.source_key for edit in edits}
    return Plan(
        rows=tuple(rows),
        latent_jobs=tuple(job for key, job in keys.latent_jobs.items() if key in needed_latents),
        text_jobs=tuple(job for key, job in keys.texts.jobs.items() if key in needed_texts and key not in stored.texts),
        mask_jobs=_mask_jobs(images, rows, stored.masks),
        prompts=prompts,
        num_reused_latents=len(needed_latents & stored.latents),
        num_reused_texts=len(needed_texts & stored.texts),
        added=changes.added,
        removed=changes.removed,
        renamed=changes.renamed,
        changed=changes.changed,
        skipped=(*wanted.skipped, *unreadable),
        upscaled=_paths(row for row in rows if geometry_of(row).upscaled),
        failed=failed,
        edits=edits,
        classes=classes,
        stretched=_paths(row for row in rows if row.source_path and source_of_row(row).stretched),
        turned=_paths(row for row in rows if row.source_path and _is_turned(row)),
        same_as_target=_paths(row for row in rows if row.source_hash == row.content_hash),
    )


def _is_turned(row: IndexRow) -> bool:
    return is_turned(geometry_of(row), row.source_width, row.source_height)


def _paths(rows: Iterable[IndexRow]) -> tuple[str, ...]:
    """Each path once: a flip is a row of its own."""
    return tuple(dict.fromkeys(row.path for row in rows))


class _Keys:
    """The keys of rows and pairs to draw. What their rows would be made of is collected as jobs."""

    def __init__(self, wanted: Wanted, stored: Set[str], texts: TextKeys) -> None:
        self._wanted, self._stored, self.texts = wanted, stored, texts
        self._recipe = canonical(wanted.latent_recipe)
        self.classes: dict[str, str] = {}
        """Key of a caption -> that of its class caption."""
        self.latent_jobs: dict[str, LatentJob] = {}
        """One job per key that is not stored, in the order of first use: an image that is there twice is encoded once.
        """

    def row(self, image: Image, geometry: Geometry) -> IndexRow:
        """The index row of one crop of one image."""
        item = image.item
        latent_key = self._latents(item.path, geometry, image.content_hash)
        seen = Seen()
        if item.source and image.source:
            of_source = source_geometry(geometry, image.source.width, image.source.height)
            source_key = self._latents(item.source.path, of_source, image.source.content_hash, is_source=True)
            seen = Seen.of(item.source.path, image.source, of_source, self._wanted.source_view, source_key)
        empty = self.texts.of_empty(seen)
        caption_keys = tuple(key for key in self.texts.of_captions(item, seen) if key != empty)
        if self._wanted.class_of:
            self.classes |= self.texts.of_classes(item, seen, caption_keys, self._wanted.class_of)
        row = _row(image, geometry, latent_key, caption_keys)
        if not item.source or not image.source:
            return row
        return replace(
            row,
            source_path=item.source.path,
            source_hash=image.source.content_hash,
            source_num_bytes=item.source.num_bytes,
            source_mtime_ns=item.source.mtime_ns,
            source_inode=item.source.inode,
            source_width=image.source.width,
            source_height=image.source.height,
            source_key=seen.latent_key,
            empty_key=empty if self._wanted.empty_instruction else None,
        )

    def edit(self, wanted: ExaminedEdit) -> Edit:
        """A pair to draw: its source is brought to a bucket as if it were a target, and never mirrored."""
        picture = wanted.picture
        framing = replace(self._wanted.framing, flip=False)
        (geometry,) = framing.frame(picture.width, picture.height, picture.content_hash)
        source_key = self._latents(wanted.path, geometry, picture.content_hash, is_source=True)
        seen = Seen.of(wanted.path, picture, geometry, self._wanted.source_view, source_key)
        return Edit(
            source=wanted.source,
            source_hash=picture.content_hash,
            prompt=wanted.prompt,
            text_key=self.texts.of(wanted.prompt, seen),
            empty_key=self.texts.of_empty(seen) if self._wanted.empty_instruction else None,
            source_key=source_key,
            width=geometry.bucket.width,
            height=geometry.bucket.height,
        )

    def _latents(self, path: str, geometry: Geometry, content_hash: str, is_source: bool = False) -> str:
        key = latent_key_of(content_hash, geometry, self._recipe)
        if key not in self._stored and key not in self.latent_jobs:
            self.latent_jobs[key] = LatentJob(key, path, geometry, content_hash, is_source)
        return key


def _image_keys(rows: Sequence[IndexRow]) -> Iterator[str]:
    yield from (key for row in rows for key in row.latent_keys)
    yield from (row.mask_key for row in rows if row.mask_key)


def _skipped_again(item: SourceItem, rows: Sequence[IndexRow], failed: Mapping[str, str]) -> Skipped:
    """An image that could not be decoded, or its source or mask, when these very bytes were last tried."""
    for row in rows:
        if row.latent_key in failed:
            return Skipped(item.path, failed[row.latent_key])
        if row.source_key and row.source_key in failed:
            return Skipped(item.path, source_reason(row.source_path or "", failed[row.source_key]))
    return Skipped(item.path, mask_reason(item.mask.path if item.mask else "", next(iter(failed.values()))))


def _mask_jobs(images: Sequence[Image], rows: Sequence[IndexRow], stored: Set[str]) -> tuple[MaskJob, ...]:
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


def _row(image: Image, geometry: Geometry, latent_key: str, caption_keys: tuple[str, ...]) -> IndexRow:
    """The index row of one crop of one image, without its source."""
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
        latent_key=latent_key,
        caption_keys=caption_keys,
        mask_key=mask_key(image.mask_hash, geometry) if image.mask_hash else None,
        mask_hash=image.mask_hash,
        mask_num_bytes=mask_num_bytes,
        mask_mtime_ns=mask_mtime_ns,
        mask_inode=mask_inode,
        captions_hash=captions_hash(item),
    )

"""The plan: what is new, changed and gone since the last encode, and what is left to compute? Pure, no torch."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import pyarrow as pa

from k5cache.buckets import Geometry, is_turned, source_geometry
from k5cache.encode.examined import Image, examine_images, mask_reason, source_reason
from k5cache.encode.job import LatentJob, MaskJob, TextJob, no_sources
from k5cache.encode.keys import canonical, latent_key_of, mask_key
from k5cache.encode.planned_jobs import latent_jobs_of
from k5cache.encode.previous_index import PreviousIndex, captions_hash, mask_stat
from k5cache.encode.text_keys import Seen, TextKeys
from k5cache.encode.wanted import ExaminedEdit, Probes, Stored, Wanted
from k5cache.sources.items import Content, Flawed, Skipped, SourceItem
from k5cache.store.geometry import source_of_row
from k5cache.store.index import IndexRow, IndexRows
from k5cache.store.manifest import Edit


@dataclass(frozen=True)
class Plan:
    """What the cache will hold (``rows``), and what must be computed for it (the jobs, one per key)."""

    rows: IndexRows
    latent_jobs: Sequence[LatentJob]
    text_jobs: Sequence[TextJob]
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


def make_plan(
    wanted: Wanted, stored: Stored, probes: Probes, rehash: bool = False, previous: PreviousIndex | None = None
) -> Plan:
    """Compare a source with the cache that was made of it.

    Args:
        rehash: probe every item, also those whose size, time and inode are the ones in the index.
        previous: the index of ``stored``, if it was looked up before.
    """
    previous = previous or PreviousIndex(stored.rows, wanted.items, stored.texts)
    keys = _Keys(wanted, TextKeys(wanted.text_recipe, probes.clean, stored, previous))
    prompts = {prompt: keys.texts.of_prompt(prompt) for prompt in wanted.prompts}
    met = _Met(stored)
    images = examine_images(wanted, previous, probes, rehash)
    rows = IndexRows.of(met.rows(images, keys), 2 if any(item.source for item in wanted.items) else 1)
    edits = (*wanted.kept_edits, *(keys.edit(edit) for edit in wanted.edits))
    changes = previous.changes(rows)
    captions = {*rows.keys("caption_keys").to_pylist()} if keys.classes else set()
    classes = {key: of_class for key, of_class in keys.classes.items() if key in captions}
    others = [*prompts.values(), *(key for edit in edits for key in edit.text_keys), *classes.values()]
    needed_texts = pa.concat_arrays([rows.text_keys, pa.array(others, pa.string())])
    sources = [edit.source_key for edit in edits]
    latent_jobs, num_reused_latents = latent_jobs_of(rows, sources, keys.jobs_of_edits, stored.latents)
    text_jobs, num_reused_texts = keys.texts.texts.jobs(needed_texts, stored.texts)
    return Plan(
        rows=rows,
        latent_jobs=latent_jobs,
        text_jobs=text_jobs,
        mask_jobs=tuple(met.mask_jobs.values()),
        prompts=prompts,
        num_reused_latents=num_reused_latents,
        num_reused_texts=num_reused_texts,
        added=changes.added,
        removed=changes.removed,
        renamed=changes.renamed,
        changed=changes.changed,
        skipped=(*wanted.skipped, *met.unusable),
        upscaled=tuple(met.upscaled),
        failed=met.failed,
        edits=edits,
        classes=classes,
        stretched=tuple(met.stretched),
        turned=tuple(met.turned),
        same_as_target=tuple(met.same_as_target),
    )


class _Met:
    """What comes to light while images become rows. Of paths each is noted once: a flip is a row of its own."""

    def __init__(self, stored: Stored) -> None:
        self._stored = stored
        self.unusable: list[Skipped] = []
        self.failed: dict[str, str] = {}
        """As in ``Plan``."""
        self.mask_jobs: dict[str, MaskJob] = {}
        """One job per key that is not stored."""
        self.upscaled: dict[str, None] = {}
        self.stretched: dict[str, None] = {}
        self.turned: dict[str, None] = {}
        self.same_as_target: dict[str, None] = {}

    def rows(self, images: Iterable[Image | Skipped], keys: _Keys) -> Iterator[IndexRow]:
        """The rows of the images that can be used, one after another."""
        for image in images:
            if isinstance(image, Skipped):
                self.unusable.append(image)
                continue
            rows = [keys.row(image, geometry) for geometry in image.geometries]
            known = {key: self._stored.failed[key] for key in _image_keys(rows) if key in self._stored.failed}
            self.failed |= known
            if not rows[0].caption_keys:  # such as ``&nbsp;``: it would be trained on as if it were dropped
                self.unusable.append(Skipped(image.item.path, "empty caption"))
            elif known:
                self.unusable.append(_skipped_again(image.item, rows, known))
            else:
                for row, geometry in zip(rows, image.geometries, strict=True):
                    self._note(image, row, geometry)
                yield from rows

    def _note(self, image: Image, row: IndexRow, geometry: Geometry) -> None:
        if row.mask_key and image.item.mask and row.mask_key not in self._stored.masks:
            self.mask_jobs.setdefault(
                row.mask_key, MaskJob(row.mask_key, image.item.mask.path, geometry, row.mask_hash or "")
            )
        if geometry.upscaled:
            self.upscaled[row.path] = None
        if row.source_path:
            if source_of_row(row).stretched:
                self.stretched[row.path] = None
            if is_turned(geometry, row.source_width, row.source_height):
                self.turned[row.path] = None
            if row.source_hash == row.content_hash:
                self.same_as_target[row.path] = None


class _Keys:
    """The keys of rows and pairs to draw. The texts that their rows would be made of are collected."""

    def __init__(self, wanted: Wanted, texts: TextKeys) -> None:
        self._wanted, self.texts = wanted, texts
        self._recipe = canonical(wanted.latent_recipe)
        self.classes: dict[str, str] = {}
        """Key of a caption -> that of its class caption."""
        self.jobs_of_edits: dict[str, LatentJob] = {}
        """By the keys of their sources' latents."""

    def row(self, image: Image, geometry: Geometry) -> IndexRow:
        """The index row of one crop of one image."""
        item = image.item
        latent_key = latent_key_of(image.content_hash, geometry, self._recipe)
        seen = Seen()
        if item.source and image.source:
            of_source = source_geometry(geometry, image.source.width, image.source.height)
            source_key = latent_key_of(image.source.content_hash, of_source, self._recipe)
            seen = Seen.of(item.source.path, image.source, of_source, self._wanted.source_view, source_key)
        empty, captions = self.texts.of_empty(seen), captions_hash(item)
        caption_keys = tuple(key for key in self.texts.of_captions(item, seen, captions) if key != empty)
        if self._wanted.class_of:
            self.classes |= self.texts.of_classes(item, seen, caption_keys, self._wanted.class_of)
        row = _row(image, geometry, latent_key, caption_keys, captions)
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
        source_key = latent_key_of(picture.content_hash, geometry, self._recipe)
        self.jobs_of_edits[source_key] = LatentJob(
            source_key, wanted.path, geometry, picture.content_hash, is_source=True
        )
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


def _row(image: Image, geometry: Geometry, latent_key: str, caption_keys: tuple[str, ...], captions: str) -> IndexRow:
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
        captions_hash=captions,
    )

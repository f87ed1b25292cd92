"""Which images can be used, and which part of each? A file is read only if it may have changed. No torch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from k5cache.buckets import Framing, Geometry
from k5cache.encode.previous_index import PreviousIndex
from k5cache.encode.wanted import Picture, Probes, Wanted
from k5cache.sources.items import PictureFile, Skipped, SourceItem, UnreadableImage


@dataclass(frozen=True)
class Image:
    """An item that can be used, and what is known about its bytes."""

    item: SourceItem
    content_hash: str
    geometries: tuple[Geometry, ...]
    """One crop, or two with a flip."""
    mask_hash: str | None
    source: Picture | None = None
    """The picture before the edit, for image-to-image."""


def examine_images(wanted: Wanted, previous: PreviousIndex, probes: Probes, rehash: bool) -> Iterator[Image | Skipped]:
    """Look at each image; one that cannot be used is ``Skipped``. A file is read only if its stat is not that in the
    index."""
    crops, sources = _Crops(wanted.framing), _Sources(previous, probes.source, rehash)
    for item in wanted.items:
        known = None if rehash else previous.same_file(item)
        try:
            content_hash, width, height = known or probes.image(item)
            geometries = crops.of(width, height, content_hash)
            mask_hash = None if rehash else previous.mask_hash(item)
            if item.mask and mask_hash is None:
                mask_hash = probes.mask(item, width, height)
            source = sources.of(item.source) if item.source else None
        except UnreadableImage as error:
            yield Skipped(item.path, error.reason, error.is_lasting)
        else:
            yield Image(item, content_hash, geometries, mask_hash, source)


def num_unknown(items: Sequence[SourceItem], previous: PreviousIndex, rehash: bool = False) -> int:
    """How many pictures of ``items`` ``examine_images`` will probe, given the previous index."""
    sources = {item.source for item in items if item.source}
    return sum(rehash or previous.same_file(item) is None for item in items) + sum(
        rehash or previous.same_source(source) is None for source in sources
    )


def mask_reason(path: str, reason: str) -> str:
    """What is said of an image whose mask cannot be used."""
    return f"its mask {path} {reason}"


def source_reason(path: str, reason: str) -> str:
    """What is said of an image whose source cannot be used."""
    return f"its source {path} {reason}"


class _Sources:
    """What is known of sources. Several images may be edits of one; it is looked at once."""

    def __init__(self, previous: PreviousIndex, probe: Callable[[str], tuple[str, int, int]], rehash: bool) -> None:
        self._previous, self._probe, self._rehash = previous, probe, rehash
        self._known: dict[str, Picture | UnreadableImage] = {}

    def of(self, source: PictureFile) -> Picture:
        """Raises ``UnreadableImage``."""
        if source.path not in self._known:
            self._known[source.path] = self._look(source)
        known = self._known[source.path]
        if isinstance(known, UnreadableImage):
            raise UnreadableImage(source_reason(source.path, known.reason), known.has_changed) from known
        return known

    def _look(self, source: PictureFile) -> Picture | UnreadableImage:
        row = None if self._rehash else self._previous.same_source(source)
        if row is not None and row.source_hash:
            return Picture(row.source_hash, row.source_width, row.source_height)
        try:
            return Picture(*self._probe(source.path))
        except UnreadableImage as error:
            return error


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

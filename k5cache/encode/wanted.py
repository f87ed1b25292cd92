"""Of what is a plan made? What the cache is to hold, what it holds, and how files are looked at. Values only."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass, field
from typing import Any

from k5cache.buckets import Framing
from k5cache.sources.items import Skipped, SourceItem
from k5cache.store.index import IndexRow
from k5cache.store.manifest import Edit


@dataclass(frozen=True)
class Picture:
    """What is known of the bytes of a picture."""

    content_hash: str
    width: int
    """In pixels, after EXIF rotation."""
    height: int


@dataclass(frozen=True)
class ExaminedEdit:
    """A pair to draw whose source was looked at."""

    source: str
    """The path of the source, as its user wrote it."""
    path: str
    """The same as an absolute path, so that it is no path of an item."""
    prompt: str
    """Raw."""
    picture: Picture


@dataclass(frozen=True)
class Wanted:
    """What the cache is to hold."""

    items: Sequence[SourceItem]
    """The images of the source, in the order that the rows will have."""
    skipped: Sequence[Skipped]
    """What the source has and cannot be used; unreadable images are added to it."""
    prompts: Sequence[str]
    """Raw prompts that the cache must hold in addition to the captions. None for image-to-image."""
    framing: Framing
    """The buckets to choose from, and which part of an image is used."""
    latent_recipe: Mapping[str, Any]
    """Everything but image and crop that changes latents. Plain JSON values."""
    text_recipe: Mapping[str, Any]
    """Everything but the caption that changes embeddings. Plain JSON values."""
    source_view: str = "crop"
    """Which part of a source Qwen sees: ``CacheConfig.source_view``."""
    empty_instruction: bool = True
    """Whether each source also gets a row of the empty instruction. Only for image-to-image."""
    class_of: Callable[[str], str | None] | None = None
    """A caption -> its class caption, as ``class_captions.class_of``."""
    kept_edits: Sequence[Edit] = ()
    """Pairs to draw of which the cache has all rows already."""
    edits: Sequence[ExaminedEdit] = ()
    """Pairs to draw that are new, or must be encoded again."""


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
    classes: Mapping[str, str] = field(default_factory=dict)
    """Key of a caption -> that of its class caption. Given only if both are still made as they were."""
    prompts: Mapping[str, str] | None = None
    """Raw prompt to text key. Given only if text recipe and cleaning are still those that made ``rows``: captions and
    prompts that did not change then keep their keys and are not cleaned."""


def no_source(path: str) -> tuple[str, int, int]:
    """What looks at the sources where there are none."""
    raise LookupError(f"{path}: there are no sources")


@dataclass(frozen=True)
class Probes:
    """How images and captions are looked at. ``make_plan`` itself opens no file."""

    image: Callable[[SourceItem], tuple[str, int, int]]
    """An image's (content hash, width, height). Raises ``UnreadableImage``."""
    mask: Callable[[SourceItem, int, int], str]
    """The content hash of an item's mask, given the image's width and height. Raises ``UnreadableImage``."""
    clean: Callable[[str], str]
    """The pipeline's own prompt cleaning."""
    source: Callable[[str], tuple[str, int, int]] = no_source
    """A source's (content hash, width, height), by its path. Raises ``UnreadableImage``."""

"""What does a source hold: images, captions, pairs? Read as an encode reads it, without opening an image."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from k5cache.options import CacheConfig
from k5cache.shared.errors import DatasetError
from k5cache.shared.foreign import shown
from k5cache.shared.kind import Kind
from k5cache.shared.units import count_of
from k5cache.sources import find
from k5cache.sources.items import Skipped
from k5cache.sources.metadata import metadata_files

Strategy = Literal["textfile", "filename", "instanceprompt", "metadata"]
_MOST_NAMED = 5
_FEW = 10
"""Fewer images than this are said to be few: common practice is 15 to 30 for a person or a thing."""


@dataclass(frozen=True)
class Seen:
    """What a source holds."""

    num_images: int
    """That have a caption."""
    num_without_caption: int
    captions: tuple[str, ...]
    """The first of each image, without a trigger."""
    strategy: Strategy | None
    """Where these captions are; None if there are none."""
    num_several: int = 0
    """Images with several captions, of which each step draws one."""
    is_of_lines: bool = False
    """Whether these are the lines of a text file."""
    num_masks: int = 0
    skipped: Sequence[Skipped] = ()

    def captioned(self, strategy: Strategy) -> int:
        """How many images an encode with ``strategy`` uses."""
        return self.num_images + (self.num_without_caption if strategy in ("filename", "instanceprompt") else 0)


def look(source: Path, kind: Kind = "t2i", sources: Path | None = None) -> Seen | None:
    """Look at what ``k5cache encode`` would be given. None for a dataset of the hub, which is not fetched for this.

    Args:
        sources: for image-to-image, the folder with the pictures before the edit.

    Raises:
        DatasetError: nothing is there, or no image; for image-to-image, no pair.
    """
    if is_on_hub(source):
        return None
    config = CacheConfig(source_dir=None if sources is None else str(sources))
    if source.is_dir() and metadata_files(source, sources):
        config = replace(config, caption_strategy="metadata")
    try:
        images, lacks_all = find.find(source, config, kind), False
    except DatasetError:
        # Perhaps no image has a caption: names need none.
        if not source.is_dir():
            raise
        images, lacks_all = find.find(source, replace(config, caption_strategy="filename"), kind), True
    if lacks_all:
        return Seen(0, len(images.items), (), None, num_masks=_masks(images), skipped=images.skipped)
    everything = images
    if source.is_dir() and config.caption_strategy == "textfile" and images.skipped:
        everything = find.find(source, replace(config, caption_strategy="filename"), kind)
    used = {item.path for item in images.items}
    lacking = {item.path for item in everything.items} - used
    return Seen(
        len(images.items), len(lacking), tuple(item.captions[0] for item in images.items), config.caption_strategy,
        sum(len(item.captions) > 1 for item in images.items), bool(images.num_multiline), _masks(images),
        [skip for skip in images.skipped if skip.path not in lacking],
    )  # fmt: skip


def _masks(images: find.Source) -> int:
    return sum(item.mask is not None for item in images.items)


def is_on_hub(source: Path) -> bool:
    """Whether ``source`` is nothing on this machine, and may be the name of a dataset (``owner/name``)."""
    name = str(source)
    return not source.exists() and len(source.parts) == 2 and not source.parent.exists() and "*" not in name


def lines(source: Path, seen: Seen | None, kind: Kind) -> Iterator[str]:
    """What is said of a source, one line each."""
    if seen is None:
        yield f"{shown(str(source))} is a dataset on the hub, which is not fetched now: k5cache plan looks at it"
        return
    pairs = "pairs" if kind == "i2i" else "images"
    text = "instruction" if kind == "i2i" else "caption"
    masks = f", {_count(seen.num_masks, 'mask')}" if seen.num_masks else ""
    yield f"{shown(str(source))}: {seen.num_images} {pairs} with {text}s, {seen.num_without_caption} without{masks}"
    if seen.captions:
        yield f'  the first {text}: "{shown(seen.captions[0], 90)}"'
    if seen.num_several:
        whole = ' (if a file is one caption, set cache.caption_lines = "whole")' if seen.is_of_lines else ""
        yield f"  {_count(seen.num_several, 'image')} with several {text}s: each step draws one of them{whole}"
    yield from (f"  not used: {shown(skip.path)} {shown(skip.reason)}" for skip in seen.skipped[:_MOST_NAMED])
    if seen.num_images + seen.num_without_caption < _FEW:
        yield f"  that is few, and a LoRA learns few {pairs} by heart: {_FEW} or more are better"
    if len(seen.skipped) > _MOST_NAMED:
        yield f"  and {len(seen.skipped) - _MOST_NAMED} more that are not used: k5cache diff names all of them"


def _count(count: int, thing: str) -> str:
    return count_of(count, thing)

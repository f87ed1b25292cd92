"""Where do the images come from? One shape for a folder, a table, tars and a dataset: items, and how to read each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from k5cache import folder
from k5cache.config import CacheConfig
from k5cache.errors import DatasetError
from k5cache.images import IMAGE_SUFFIXES, Content, Skipped, SourceItem


@dataclass(frozen=True)
class Source:
    """The images that a user pointed at."""

    items: list[SourceItem]
    skipped: list[Skipped]
    read: Callable[[str], Content]
    """An image or mask by its ``path``: a file to open, or its bytes. Raises ``UnreadableImage``."""


def find(source: Path, config: CacheConfig) -> Source:
    """The images at ``source`` with their captions; none is opened.

    Raises:
        DatasetError: nothing is there, or nothing that can be used.
    """
    if not source.is_dir():
        raise DatasetError(f"There is no folder {source}", "Give a folder of images with .txt captions beside them")
    items, skipped = folder.find_items(source, config)
    if not items:
        seen = "; ".join(f"{s.path}: {s.reason}" for s in skipped[:3])
        found = f"no image with a caption ({len(skipped)} skipped: {seen})" if skipped else "no image"
        suffixes = " ".join(sorted(IMAGE_SUFFIXES))
        raise DatasetError(
            f"{source} holds {found}", f"Put images ({suffixes}) there, each with a .txt caption beside it"
        )
    return Source(items, skipped, lambda path: source / path)

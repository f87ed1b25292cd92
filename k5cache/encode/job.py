"""What is to be encoded, one crop or text a job, and what does an encoder's pass need to know apart from that?"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from rich.progress import Progress

from k5cache.buckets import Geometry
from k5cache.options import CacheConfig
from k5cache.shared import console
from k5cache.sources.items import Content


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


def no_sources(path: str) -> Content:
    """What reads the sources of a job that has none."""
    raise LookupError(f"{path}: this job has no sources")


@dataclass(frozen=True)
class Job:
    """What an encode needs to know all the way through."""

    read: Callable[[str], Content]
    """An image by its path in the source: a file, or its bytes."""
    root: Path
    """Of the cache; pooled vectors wait in a temporary file there."""
    folder: Path
    """Of the checkpoint."""
    config: CacheConfig
    device: str
    bars: Progress
    vram: int | None = None
    """Bytes of VRAM to plan for; None plans for what is free."""
    read_source: Callable[[str], Content] = no_sources
    """A source, the picture that is edited, by its path. Only for image-to-image."""
    note: Callable[[str], object] = console.note
    """Tells the user something that the passes find out."""

    @contextmanager
    def progress_bar(self, description: str, total: int, unit: str) -> Iterator[Callable[..., None]]:
        """Show a bar; yields ``advance(count, description=None)``."""
        task = self.bars.add_task(description, total=total, unit=unit, note="")

        def advance(count: int, description: str | None = None) -> None:
            self.bars.update(task, advance=count, description=description)

        try:
            yield advance
        finally:
            self.bars.remove_task(task)

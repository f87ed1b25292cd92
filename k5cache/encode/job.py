"""What does an encoder's pass need to know, apart from the captions or images that it encodes?"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from rich.progress import Progress

from k5cache.options import CacheConfig
from k5cache.sources.items import Content


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

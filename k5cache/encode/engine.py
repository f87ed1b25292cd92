"""Who runs the encoders' passes? This process; or an engine, which spreads them over other processes and machines."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Protocol

from rich.progress import Progress

from k5cache.encode.job import Job, LatentJob, TextJob
from k5cache.encode.sink import RowSink
from k5cache.sources.items import UnreadableImage
from k5cache.store.manifest import ShardInfo


class ShardSink(RowSink, Protocol):
    """What an engine gives its rows to: rows of this process, or shards that other processes have written."""

    def add(self, shards: Sequence[ShardInfo]) -> None:
        """Name shards that are whole on disk in the manifest."""
        ...


class Passes(Protocol):
    """The passes of one encode, as ``text_pass`` and ``image_pass`` have them."""

    @property
    def device(self) -> str:
        """On which they compute."""
        ...

    def announce(self, job: Job, text_jobs: Sequence[TextJob], latent_jobs: Sequence[LatentJob]) -> None:
        """Say how it will go, before any encoder is loaded. What does not fit is refused now, not hours later."""
        ...

    def encode_texts(
        self, job: Job, sink: ShardSink, text_jobs: Sequence[TextJob], failed: dict[str, UnreadableImage]
    ) -> tuple[tuple[str, int], ...]:
        """As ``text_pass.encode_texts``."""
        ...

    def encode_latents(self, job: Job, sink: ShardSink, latent_jobs: Sequence[LatentJob]) -> dict[str, UnreadableImage]:
        """As ``image_pass.encode_latents``."""
        ...


class Engine(Protocol):
    """Where passes come from."""

    def opened(
        self, source: Path, root: Path, folder: Path, device: str, bars: Progress
    ) -> AbstractContextManager[Passes]:
        """Start what the passes need, and end it. Not entered if there is nothing to encode.

        Args:
            source: as the user named it.
            root: the cache, whose lock the caller has.
            folder: of the checkpoint.
            device: as the user named it.
        """
        ...

"""What does Qwen see of the sources? Pictures of a chunk of instructions through the vision tower, each source once."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from k5cache.encode.job import Job, SourceView, TextJob
from k5cache.encode.precision import torch_dtype
from k5cache.shared.vram import release
from k5cache.sources import images
from k5cache.sources.items import Content, UnreadableImage

if TYPE_CHECKING:
    import torch

    from k5cache.buckets import Geometry
    from k5cache.encoders.qwen import Tokens
    from k5cache.encoders.vision import Tower
    from k5cache.encoders.with_picture import Grid, Processor, Seen

_MOST_TOKENS_KEPT = 4096  # instructions whose token ids are kept: many sources of one size share an instruction


@dataclass(frozen=True)
class Chunk:
    """Captions that are encoded and committed together."""

    text_jobs: Sequence[TextJob]
    tokens: Sequence[Tokens]
    """Of each."""
    pictures: Sequence[torch.Tensor] | None = None
    """Of each, what the vision tower makes of its source; None if there are none."""

    def part(self, places: Sequence[int]) -> Chunk:
        """Some of its captions. They have no pictures yet."""
        return Chunk([self.text_jobs[i] for i in places], [self.tokens[i] for i in places])


def with_pictures(sources: Sources, chunk: Chunk, failed: dict[str, UnreadableImage]) -> Chunk:
    """The chunk with its sources seen. Instructions whose source cannot be read go into ``failed`` instead."""
    found = sources.pictures(chunk.text_jobs, failed)
    readable = chunk.part([i for i, text_job in enumerate(chunk.text_jobs) if text_job.source in found])
    return replace(readable, pictures=[found[text_job.source] for text_job in readable.text_jobs if text_job.source])


def lost_instructions(chunk: Chunk) -> list[str]:
    """Instructions of which the pipeline's crop leaves Qwen's embeddings nothing."""
    from k5cache.encoders.with_picture import nothing_survives

    pairs = zip(chunk.text_jobs, chunk.tokens, strict=True)
    return [text_job.caption for text_job, tokens in pairs if text_job.caption and nothing_survives(tokens)]


@dataclass
class Sources:
    """The pictures of a job's instructions: their tokens in the text, and what the vision tower makes of them."""

    job: Job
    processor: Processor
    is_kept: bool
    """Whether the tower stays loaded from chunk to chunk, beside the text layers."""
    tower: Tower | None = None

    def tokens(self, text_job: TextJob) -> Tokens:
        """Token ids of one instruction with its source. Raises ``CannotEncode``."""
        return self._tokens(text_job.caption, self.grid(text_job))

    def grid(self, text_job: TextJob) -> Grid:
        """Patches of a source. Raises ``CannotEncode`` if the processor takes no such picture."""
        assert text_job.source is not None
        geometry = text_job.source.geometry
        if self.is_whole:
            return self.processor.grid_of(geometry.width, geometry.height)
        return self.processor.grid_of(geometry.bucket.width, geometry.bucket.height)

    @property
    def is_whole(self) -> bool:
        """Whether Qwen sees the whole source instead of the crop that the VAE sees."""
        return self.job.config.source_view == "whole"

    def reason(self, text_job: TextJob) -> str:
        """Why the pipeline cannot encode a pair; empty if it can. Most pairs are not tokenised for it."""
        from k5cache.encoders.with_picture import CannotEncode, surely_fits

        try:
            if not surely_fits(self.processor, text_job.caption, self.grid(text_job), self.limit):
                self.tokens(text_job)
        except CannotEncode as error:
            return error.reason
        return ""

    @property
    def limit(self) -> int:
        """``max_sequence_length``."""
        return self.job.config.text_limit("i2i")

    def pictures(
        self, text_jobs: Sequence[TextJob], failed: dict[str, UnreadableImage]
    ) -> dict[SourceView, torch.Tensor]:
        """The tokens of every source, on the CPU. The keys of jobs whose source cannot be read go into ``failed``."""
        from k5cache.encoders import vision

        views = list(dict.fromkeys(text_job.source for text_job in text_jobs if text_job.source))
        tower = self.tower or vision.load_tower(self.job.folder, self.job.device, self._dtype)
        unreadable: dict[SourceView, UnreadableImage] = {}
        found = dict(vision.look(tower, self._seen(views, unreadable), exact=self.job.config.text_batching == "exact"))
        if self.is_kept:
            self.tower = tower
        else:
            del tower
            if self.job.device.startswith("cuda"):
                release(self.job.device)
        failed.update({t.key: unreadable[t.source] for t in text_jobs if t.source in unreadable})
        return found

    @property
    def _dtype(self) -> torch.dtype:
        return torch_dtype(self.job.config.text_encoder_1_precision)

    def _seen(
        self, views: Sequence[SourceView], unreadable: dict[SourceView, UnreadableImage]
    ) -> Iterator[tuple[SourceView, Seen]]:
        """Every source as the tower takes it. Threads decode them and cut them into patches."""
        from k5cache.encoders.with_picture import as_picture, see

        def load(content: Content, geometry: Geometry) -> Seen:
            load_pixels = images.load_whole if self.is_whole else images.load_pixels
            return see(self.processor, as_picture(load_pixels(content, geometry)))

        wanted = ((view.path, view.geometry, view.content_hash) for view in views)
        for i, seen in images.load_ahead(wanted, self.job.read_source, load):
            if isinstance(seen, UnreadableImage):
                unreadable[views[i]] = seen
            else:
                yield views[i], seen

    @functools.cached_property
    def _tokens(self) -> Callable[[str, Grid], Tokens]:
        from k5cache.encoders.with_picture import tokenize_with_picture

        def tokens(instruction: str, grid: Grid) -> Any:
            return tokenize_with_picture(self.processor, instruction, grid, self.limit)

        return functools.lru_cache(_MOST_TOKENS_KEPT)(tokens)


def in_order_of_sources(text_jobs: Sequence[TextJob]) -> list[TextJob]:
    """The jobs, those of one source side by side: the tower then sees each source once."""
    by_source: dict[SourceView | None, list[TextJob]] = {}
    for text_job in text_jobs:
        by_source.setdefault(text_job.source, []).append(text_job)
    return [text_job for group in by_source.values() for text_job in group]

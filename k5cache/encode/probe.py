"""What does an encode's plan know of images and captions? Reads the files that changed, and makes the plan."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

from rich.progress import Progress, TaskID

from k5cache.encode.commit import Committer
from k5cache.encode.edits import reader, sort_edits
from k5cache.encode.examined import num_unknown
from k5cache.encode.plan import Plan, make_plan
from k5cache.encode.previous_index import PreviousIndex
from k5cache.encode.request import ListedRequest
from k5cache.encode.source_note import decoders
from k5cache.encode.wanted import Probes, Stored, Wanted
from k5cache.shared import console
from k5cache.sources import class_captions, images, items, masks
from k5cache.store.index import index_rows, read_index


def plan_request(request: ListedRequest, committer: Committer, rehash: bool, bars: Progress | None) -> Plan:
    """What is new, changed and gone. An image is read only if its stat is not the one in the index."""
    manifest, listing = request.manifest, request.listing
    texts_differ = any(difference.table == "text" for difference in request.differences)
    stored = Stored(
        rows=index_rows(read_index(request.root, manifest.index, manifest.format)) if manifest.index else (),
        latents=committer.keys("latents"),
        texts=committer.keys("text"),
        masks=committer.keys("masks"),
        failed={} if rehash or manifest.left_out.decoders != decoders() else manifest.left_out.failed,
        classes=manifest.classes if _has_same_classes(request) and not texts_differ else {},
        prompts=manifest.prompts if not texts_differ and request.is_cleaned_as_before else None,
    )
    is_as_before = not request.differences and request.is_cleaned_as_before
    edits = sort_edits(request.edits, manifest.edits, stored, is_as_before)
    wanted = Wanted(
        items=listing.items,
        skipped=(*listing.skipped, *edits.left_out),
        prompts=request.prompts,
        framing=request.config.framing,
        latent_recipe=request.recipe["latents"],
        text_recipe=request.recipe["text"],
        source_view=request.config.source_view,
        empty_instruction=request.config.empty_instruction,
        class_of=class_captions.class_of(request.config),
        kept_edits=edits.kept,
        edits=edits.examined,
    )
    previous = PreviousIndex(stored.rows, listing.items, stored.texts)
    progress = _ProbeProgress(bars, lambda: num_unknown(listing.items, previous, rehash))
    flawed: list[items.Flawed] = []

    def probe_image(item: items.SourceItem) -> tuple[str, int, int]:
        with progress.one_image():
            examined = images.examine(listing.read(item.path))
        if examined.flaw:
            flawed.append(items.Flawed(item.path, examined.flaw))
        return examined.content_hash, examined.width, examined.height

    def probe_source(path: str) -> tuple[str, int, int]:
        with progress.one_image():
            examined = images.examine(listing.read_source(path))
        if examined.flaw:
            flawed.append(items.Flawed(path, examined.flaw))
        return examined.content_hash, examined.width, examined.height

    def probe_mask(item: items.SourceItem, width: int, height: int) -> str:
        return masks.check(listing.read, item, width, height)

    probes = Probes(probe_image, probe_mask, progress.clean, probe_source)
    plan = make_plan(wanted, stored, probes, rehash, previous)
    progress.end()
    return replace(plan, flawed=tuple(flawed), read_source=reader(listing.read_source, edits.examined))


def _has_same_classes(request: ListedRequest) -> bool:
    """Whether class captions are made of captions as those of the cache were."""
    names = ("class_word", "class_replaces", "trigger")
    before, now = (recipe.get("selection", {}) for recipe in (request.manifest.recipe, request.recipe))
    return request.is_cleaned_as_before and all(before.get(name) == now.get(name) for name in names)


class _ProbeProgress:
    """Shows what planning is doing: importing diffusers, which takes seconds, and a bar while images are read."""

    def __init__(self, bars: Progress | None, count_images: Callable[[], int]) -> None:
        self._bars, self._count_images = bars, count_images
        self._task: TaskID | None = None

    def clean(self, caption: str) -> str:
        """The pipeline's own cleaning; the first caption of a process imports diffusers."""
        from k5cache.encoders.pipeline import clean

        if "diffusers" in sys.modules:
            return clean(caption)
        with console.doing(self._bars, "importing diffusers, which cleans captions"):
            return clean(caption)

    @contextmanager
    def one_image(self) -> Iterator[None]:
        """Advance the bar when the image is read; the first image shows the bar."""
        if self._bars and self._task is None:
            self._task = self._bars.add_task("hashing images", total=self._count_images(), unit="image", note="")
        try:
            yield
        finally:
            if self._bars and self._task is not None:
                self._bars.advance(self._task)

    def end(self) -> None:
        """Remove the bar."""
        if self._bars and self._task is not None:
            self._bars.remove_task(self._task)

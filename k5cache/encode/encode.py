"""Encode: is there anything to do? If not, this ends within a second and writes nothing; ``update`` does the work."""

from __future__ import annotations

import functools
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

from rich.progress import Progress

from k5cache.encode.request import (
    EncodeOptions,
    EncodeReport,
    Request,
    manifest_of,
    read_listed_request,
    read_request,
)
from k5cache.encode.source_note import decoders
from k5cache.options import CacheConfig
from k5cache.shared import console
from k5cache.shared.checkpoint import ENCODER_PARTS, folder_on_disk
from k5cache.shared.content import possible_hashes
from k5cache.shared.errors import ModelError
from k5cache.shared.model import Drawn, ModelConfig
from k5cache.shared.outputs import check_writable
from k5cache.sources import find
from k5cache.sources.items import Skipped
from k5cache.sources.unchanged import is_untouched, listing_digest
from k5cache.store.manifest import Manifest, lock, require_files
from k5cache.store.notes import Part
from k5cache.store.ours import check_root


def encode_source(
    source: Path,
    root: Path,
    model: ModelConfig,
    config: CacheConfig,
    drawn: Drawn | Sequence[str],
    bars: Progress,
    options: EncodeOptions = EncodeOptions(),  # noqa: B008 (frozen)
) -> EncodeReport:
    """Bring the cache at ``root`` up to date with the images and captions in ``source``.

    ``drawn`` is what stage 2 draws, or prompts alone.

    A model of the hub is looked for on this machine first. The hub is not asked while the cache agrees with what is
    here. It is asked as soon as anything is to be encoded, and a newer revision there is refused like any other
    weights.

    Raises:
        OutputError: ``root`` holds something other than a cache, or cannot be written. This is found before any work.
        DatasetError: ``source`` holds no usable image.
        ModelError: the checkpoint lacks an encoder.
        CacheStale: ``root`` was made by another recipe, and ``update`` is not set; or it holds another part.
        CacheCorrupt: a file of ``root`` is damaged, and ``repair`` is not set.
        CacheLocked: another process is writing ``root``.
        DoesNotFit: an encoder fits in no mode, or memory ran out while it was running.
    """
    started = time.monotonic()
    drawn = drawn if isinstance(drawn, Drawn) else Drawn(tuple(drawn))
    check_root(root, reads=[source])
    listing = None
    if not (options.rehash or options.repair):
        local_request = _request_on_this_machine(source, root, model, config, drawn, options.part)
        if local_request:
            manifest = local_request.manifest
            if not is_untouched(source, config, manifest.source):
                listing = find.find(source, config, manifest.kind)
            if listing is None or listing_digest(listing) == manifest.source.listing:
                require_files(root, manifest)
                return _unchanged(manifest, time.monotonic() - started)
    check_writable(root)
    with console.doing(
        bars, "looking at the images and the model"
    ):  # the first time on a machine, diffusers is imported
        request = read_listed_request(source, root, model, config, drawn, options, listing)
    from k5cache.encode.update import bring_up_to_date  # pyarrow, numpy and Pillow: not needed if nothing is to be done

    with lock(root, options.wait_seconds), ExitStack() as stack:
        # The manifest is read again: another process may have written it while we waited for the lock.
        request = replace(request, manifest=manifest_of(root, request.recipe, options.part))
        passes_of_engine = None
        if engine := options.engine:
            at = (source, root, request.folder, options.device, bars)
            passes_of_engine = functools.cache(lambda: stack.enter_context(engine.opened(*at)))
            if request.manifest.index is None:  # there is something to encode: refuse before all images are read
                passes_of_engine()
        report = bring_up_to_date(request, options, bars, passes_of_engine)
    return replace(report, seconds=time.monotonic() - started)


def _request_on_this_machine(
    source: Path, root: Path, model: ModelConfig, config: CacheConfig, drawn: Drawn, part: Part | None
) -> Request | None:
    """The request, if the model is on this machine and the cache already has what its recipe asks for.

    None if there may be something to encode. The source is not looked at.
    """
    if not (root / "manifest.json").exists():
        return None
    try:
        folder = folder_on_disk(model, ENCODER_PARTS)
        request = read_request(source, root, folder, model, config, drawn, part=part) if folder else None
    except ModelError:  # not complete on this machine: the hub is asked
        return None
    if request is None:
        return None
    manifest = request.manifest
    is_finished = manifest.index is not None and manifest.source.listing
    if not is_finished or request.differences or not request.is_cleaned_as_before:
        return None
    if manifest.left_out.decoders not in ("", decoders()):  # what could not be read may be readable now
        return None
    if model.revision and manifest.recipe.get("model") != request.recipe["model"]:  # pinned since: to be noted
        return None
    if not manifest.prompts.keys() >= set(request.prompts):
        return None
    return request if _has_edits(request) else None


def _has_edits(request: Request) -> bool:
    """Whether the cache has all pairs to draw that are asked for. False if a source cannot be read."""
    cached = {(edit.source_hash, edit.prompt) for edit in request.manifest.edits}
    for edit in request.edits:
        path = Path(edit.source).expanduser()
        try:
            hashes = possible_hashes(path) if path.is_file() else ()
        except OSError:
            return False
        if not any((content_hash, edit.prompt) in cached for content_hash in hashes):
            return False
    return True


def _unchanged(manifest: Manifest, seconds: float) -> EncodeReport:
    return EncodeReport(
        num_items=manifest.index.num_rows if manifest.index else 0,
        skipped=tuple(Skipped(path, reason) for path, reason in manifest.left_out.skipped),
        is_unchanged=True,
        num_buckets=len({shard.bucket for shard in manifest.shards if shard.bucket}),  # unused ones too, until `gc`
        num_bytes=sum(shard.num_bytes for shard in manifest.shards),
        seconds=seconds,
    )

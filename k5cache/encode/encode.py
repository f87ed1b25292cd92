"""Encode: is there anything to do? If not, it ends within a second and without a write; the work is in ``update``."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from rich.progress import Progress

from k5cache.encode.request import EncodeOptions, EncodeReport, Request, digest, look, manifest_of, request
from k5cache.options import CacheConfig
from k5cache.shared import console
from k5cache.shared.checkpoint import ENCODER_PARTS, folder_on_disk
from k5cache.shared.errors import ModelError
from k5cache.shared.model import ModelConfig
from k5cache.sources import find
from k5cache.sources.unchanged import glance
from k5cache.store.manifest import Manifest, lock, require_files


def encode_source(
    source: Path,
    root: Path,
    model: ModelConfig,
    config: CacheConfig,
    prompts: Sequence[str],
    bars: Progress,
    options: EncodeOptions = EncodeOptions(),  # noqa: B008 (frozen)
) -> EncodeReport:
    """Bring the cache at ``root`` up to date with the images and captions in ``source``.

    A model of the hub is looked for on this machine first. While the cache agrees with what is here, the hub is not
    asked; as soon as anything is to be encoded it is, and a newer revision there is refused as any other weights are.

    Raises:
        DatasetError: ``source`` holds no usable image.
        ModelError: the checkpoint lacks an encoder.
        CacheStale: ``root`` was made by another recipe, and ``update`` is not set.
        CacheCorrupt: a file of ``root`` is damaged, and ``repair`` is not set.
        CacheLocked: another process is writing ``root``.
        DoesNotFit: an encoder fits in no mode, or memory ended while it ran.
    """
    started = time.monotonic()
    found = None
    if not (options.rehash or options.repair):
        wanted = _on_this_machine(source, root, model, config, prompts)
        if wanted and not _is_untouched(wanted):
            found = find.find(source, config)
        if wanted and (found is None or _is_note_of(wanted.manifest, found)):
            require_files(root, wanted.manifest)
            return _unchanged(wanted.manifest, found, time.monotonic() - started)
    with console.doing(
        bars, "looking at the images and the model"
    ):  # the first time on a machine, diffusers is imported
        asked = look(source, root, model, config, prompts, options, found)
    from k5cache.encode.update import bring_up_to_date  # pyarrow, numpy and Pillow: not needed for nothing

    with lock(root, options.wait_seconds):
        report = bring_up_to_date(replace(asked, manifest=manifest_of(root, asked.recipe)), options, bars)  # we waited
    return replace(report, seconds=time.monotonic() - started)


def _on_this_machine(
    source: Path, root: Path, model: ModelConfig, config: CacheConfig, prompts: Sequence[str]
) -> Request | None:
    """What is asked for, where the cache has all of it as far as its recipe and prompts say; None where it may not."""
    if not (root / "manifest.json").exists():
        return None
    try:
        folder = folder_on_disk(model, ENCODER_PARTS)
        wanted = request(source, root, folder, model, config, prompts) if folder else None
    except ModelError:  # not whole on this machine: the hub is asked
        return None
    if wanted is None or wanted.manifest.index is None or not wanted.manifest.source or wanted.differences:
        return None
    if model.revision and wanted.manifest.recipe.get("model") != wanted.recipe["model"]:  # pinned since: to be noted
        return None
    return wanted if wanted.is_clean_as_before and wanted.manifest.prompts.keys() >= set(wanted.prompts) else None


def _is_untouched(wanted: Request) -> bool:
    """Whether no file of the source was touched since the cache was made of it: then none is opened."""
    noted = wanted.manifest.source[32:]
    seen = glance(wanted.source) if noted else None
    return seen is not None and seen.digest == noted


def _is_note_of(manifest: Manifest, found: find.Source) -> bool:
    return manifest.source[:32] == digest(found)


def _unchanged(manifest: Manifest, found: find.Source | None, seconds: float) -> EncodeReport:
    return EncodeReport(
        num_items=manifest.index.num_rows if manifest.index else 0,
        skipped=tuple(found.skipped) if found else (),
        is_unchanged=True,
        num_buckets=len({shard.bucket for shard in manifest.shards if shard.bucket}),  # dead ones too, until `gc`
        num_bytes=sum(shard.num_bytes for shard in manifest.shards),
        seconds=seconds,
    )

"""The work of one encode: plan, then CLIP, Qwen and the VAE one after another, each freed before the next.

Commit order: a shard is whole on disk before the manifest names it, and the index is written last, together with the
recipe that its rows were made by. A crash at any instant loses at most the shard in flight; the next run finds what
the manifest names and goes on from there.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

from rich.progress import Progress, TaskID

from k5cache.encode import estimate as estimate_
from k5cache.encode import plan
from k5cache.encode.commit import Committer, drop_damaged
from k5cache.encode.differences import refuse
from k5cache.encode.image_pass import encode_latents, encode_masks
from k5cache.encode.job import Job
from k5cache.encode.request import Asked, EncodeOptions, EncodeReport, note, versions
from k5cache.encode.text_pass import encode_texts
from k5cache.encoders.device import pick_device
from k5cache.shared import console
from k5cache.shared.errors import DatasetError
from k5cache.sources import images, items, masks
from k5cache.store.index import index_rows, read_index
from k5cache.store.manifest import require_files


def make_plan(asked: Asked, commit: Committer, rehash: bool, bars: Progress | None) -> plan.Plan:
    """What is new, changed and gone. Images are read where their stat is not the one in the index."""
    manifest = asked.manifest
    known = index_rows(read_index(asked.root, manifest.index)) if manifest.index else []
    shown = _Probing(bars, plan.num_unknown(asked.found.items, known, rehash))

    def probe(item: items.SourceItem) -> tuple[str, int, int]:
        with shown.one():
            content = asked.found.read(item.path)
            return (images.hash_content(content), *images.image_size(content))

    def probe_mask(item: items.SourceItem, width: int, height: int) -> str:
        return masks.check(asked.found.read, item, width, height)

    texts_differ = any(d.table == "text" for d in asked.differences)
    made = plan.make_plan(
        asked.found.items,
        asked.found.skipped,
        known,
        commit.keys("latents"),
        commit.keys("text"),
        asked.prompts,
        asked.config.framing,
        asked.recipe["latents"],
        asked.recipe["text"],
        shown.clean,
        probe,
        rehash=rehash,
        stored_masks=commit.keys("masks"),
        probe_mask=probe_mask,
        known_prompts=manifest.prompts if not texts_differ and asked.is_clean_as_before else None,
    )
    shown.end()
    return made


class _Probing:
    """What a plan is at, for a person: a bar from the first image that is read, and before it what takes seconds."""

    def __init__(self, bars: Progress | None, total: int) -> None:
        self._bars, self._total = bars, total
        self._task: TaskID | None = None

    def clean(self, caption: str) -> str:
        """The pipeline's own cleaning; the first caption of a process imports diffusers."""
        from k5cache.encoders.pipeline import clean

        if "diffusers" in sys.modules:
            return clean(caption)
        with console.doing(self._bars, "importing diffusers, which cleans captions"):
            return clean(caption)

    @contextmanager
    def one(self) -> Iterator[None]:
        """While one image is read."""
        if self._bars and self._task is None:
            self._task = self._bars.add_task("hashing images", total=self._total, unit="image", note="")
        try:
            yield
        finally:
            if self._bars and self._task is not None:
                self._bars.advance(self._task)

    def end(self) -> None:
        """Take the bar away."""
        if self._bars and self._task is not None:
            self._bars.remove_task(self._task)


def bring_up_to_date(asked: Asked, options: EncodeOptions, bars: Progress) -> EncodeReport:
    """Encode what is new or changed and commit it; the lock is held. Raises as ``encode``."""
    if asked.differences and not options.update:  # another process has changed it while we waited
        raise refuse(asked.root, asked.differences)
    manifest, repaired = drop_damaged(asked.root, asked.manifest) if options.repair else (asked.manifest, ())
    require_files(asked.root, manifest)
    asked = replace(asked, manifest=manifest)
    commit = Committer(asked.root, manifest, asked.config.shard_mb * 2**20)
    made = make_plan(asked, commit, options.rehash, bars)
    if not made.rows:
        raise _nothing_readable(asked, made.skipped)
    truncated: tuple[tuple[str, int], ...] = ()
    failed: dict[str, str] = {}
    if made.mask_jobs:
        failed |= encode_masks(asked.found.read, commit, made.mask_jobs)
    if made.text_jobs or made.latent_jobs:
        with console.doing(bars, "importing torch"):
            device = pick_device(options.device)
        job = Job(asked.found.read, asked.root, asked.folder, asked.recipe, asked.config, device, bars, options.vram)
        _announce(asked, device, options.vram, made, bars)
        truncated = encode_texts(job, commit, made.text_jobs)
        failed |= encode_latents(job, commit, made.latent_jobs)
    rows = [row for row in made.rows if not failed.keys() & {row.latent_key, row.mask_key}]
    lost = {
        row.path: failed.get(row.latent_key) or failed[row.mask_key or ""]
        for row in made.rows
        if failed.keys() & {row.latent_key, row.mask_key}
    }
    unreadable = tuple(items.Skipped(path, reason) for path, reason in lost.items())
    if not rows:
        raise _nothing_readable(asked, unreadable)
    # A source with images that cannot be used is looked at again next time: they are reported until they are mended.
    is_usable = not unreadable and len(made.skipped) == len(asked.found.skipped)
    source = note(asked) if is_usable else ""
    is_written = commit.index(rows, made.prompts, asked.recipe, versions(), source)
    num_latents = sum(job.key not in failed for job in made.latent_jobs)
    return EncodeReport(
        num_items=len(rows),
        num_latents=num_latents,
        num_texts=len(made.text_jobs),
        reused_latents=made.num_reused_latents,
        reused_texts=made.num_reused_texts,
        added=tuple(path for path in made.added if path not in lost),
        changed=tuple(path for path in made.changed if path not in lost),
        removed=made.removed,
        renamed=made.renamed,
        skipped=(*made.skipped, *unreadable),
        truncated=truncated,
        upscaled=made.upscaled,
        repaired=repaired,
        num_buckets=len({(r.bucket_width, r.bucket_height) for r in rows}),
        num_bytes=sum(s.num_bytes for s in commit.manifest.shards),
        is_unchanged=not (is_written or repaired or num_latents or made.text_jobs),
    )


def _announce(asked: Asked, device: str, vram: int | None, made: plan.Plan, bars: Progress) -> None:
    """How it will go, before anything is loaded: what does not fit is refused here, not after hours of captions."""
    jobs = made.text_jobs, made.latent_jobs
    if device == "cpu":
        with console.doing(bars, "measuring this machine"):
            how_long = estimate_.estimate(asked.folder, asked.config, device, None, *jobs)
        console.note(f"Encoding on this CPU takes {estimate_.duration(how_long)}, and loading the encoders besides")
    if device != "cpu" or vram:
        planned = estimate_.estimate(asked.folder, asked.config, device, vram, *jobs, is_timed=False)
        console.note(f"Planned: {estimate_.modes(planned)}")


@dataclass(frozen=True)
class Preview:
    """What an encode would do."""

    differences: tuple[str, ...]
    """Between the cache's recipe and the one asked for: an encode would need ``update``."""
    num_items: int
    num_latents: int
    num_texts: int
    reused_latents: int
    reused_texts: int
    added: tuple[str, ...] = ()
    changed: tuple[str, ...] = ()
    removed: tuple[str, ...] = ()
    renamed: tuple[tuple[str, str], ...] = ()
    skipped: tuple[items.Skipped, ...] = ()
    upscaled: tuple[str, ...] = ()


def preview_encode(asked: Asked, rehash: bool, bars: Progress | None) -> Preview:
    """The plan of an encode, without doing it: no lock is taken, no model loaded, nothing written."""
    require_files(asked.root, asked.manifest)
    made = make_plan(asked, Committer(asked.root, asked.manifest, 0), rehash, bars)
    return Preview(
        differences=tuple(map(str, asked.differences)),
        num_items=len(made.rows),
        num_latents=len(made.latent_jobs),
        num_texts=len(made.text_jobs),
        reused_latents=made.num_reused_latents,
        reused_texts=made.num_reused_texts,
        added=made.added,
        changed=made.changed,
        removed=made.removed,
        renamed=made.renamed,
        skipped=made.skipped,
        upscaled=made.upscaled,
    )


def estimate_encode(asked: Asked, options: EncodeOptions, bars: Progress | None) -> estimate_.Estimate:
    """What an encode would take here; no lock is taken, no model loaded, nothing written.

    Raises:
        DoesNotFit: an encoder fits in no mode.
    """
    require_files(asked.root, asked.manifest)
    made = make_plan(asked, Committer(asked.root, asked.manifest, 0), False, bars)
    device = pick_device(options.device)
    return estimate_.estimate(asked.folder, asked.config, device, options.vram, made.text_jobs, made.latent_jobs)


def _nothing_readable(asked: Asked, skipped: Sequence[items.Skipped]) -> DatasetError:
    reasons = "; ".join(f"{s.path}: {s.reason}" for s in skipped[:3])
    return DatasetError(f"No image in {asked.source} could be read ({reasons})", "Replace these files and encode again")

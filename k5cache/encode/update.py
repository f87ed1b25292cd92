"""The work of one encode: plan, then CLIP, Qwen and the VAE one after another, each freed before the next.

Commit order: a shard is whole on disk before the manifest names it, and the index is written last, together with the
recipe that its rows were made by. A crash at any instant loses at most the shard in flight; the next run finds what
the manifest names and goes on from there.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from rich.progress import Progress

from k5cache.encode.commit import Committer, drop_damaged
from k5cache.encode.differences import refuse
from k5cache.encode.engine import Passes
from k5cache.encode.estimate import duration, estimate, modes
from k5cache.encode.examined import mask_reason, source_reason
from k5cache.encode.image_pass import encode_latents, encode_masks
from k5cache.encode.job import Job, LatentJob, TextJob
from k5cache.encode.plan import Plan
from k5cache.encode.probe import plan_request
from k5cache.encode.request import EncodeOptions, EncodeReport, ListedRequest, versions
from k5cache.encode.shares import own_share
from k5cache.encode.sink import RowSink
from k5cache.encode.source_note import MOST_NAMED, note_left_out, note_truncated, take_note
from k5cache.encode.text_pass import PipelineFails, encode_texts
from k5cache.shared import console
from k5cache.shared.device import pick_device
from k5cache.shared.errors import DatasetError
from k5cache.sources.items import Skipped, UnreadableImage
from k5cache.store.index import IndexRow, IndexRows
from k5cache.store.manifest import Edit, require_files
from k5cache.store.notes import LeftOut, SourceNote
from k5cache.store.skipped import write_skipped


def bring_up_to_date(
    request: ListedRequest, options: EncodeOptions, bars: Progress, start: Callable[[], Passes] | None = None
) -> EncodeReport:
    """Encode what is new or changed and commit it. The caller holds the lock. Raises as ``encode_source``.

    Args:
        start: gives the passes of an engine. It is called when there is something to encode, and at most once. None:
            the passes run in this process.
    """
    if request.differences and not options.update:  # another process has changed the cache while we waited
        raise refuse(request.root, request.differences)
    manifest, repaired = drop_damaged(request.root, request.manifest) if options.repair else (request.manifest, ())
    require_files(request.root, manifest)
    if options.repair:
        manifest = replace(
            manifest, left_out=LeftOut(truncated=manifest.left_out.truncated)
        )  # images that could not be read are tried again
    request = replace(request, manifest=manifest)
    committer = Committer(request.root, manifest, request.config.shard_mb * 2**20)
    share, split = own_share(request, options.rehash, bars)
    plan = plan_request(share, committer, options.rehash, bars)
    if not plan.rows and split is None:  # a part may be empty: a merge takes it as it is
        raise _nothing_readable(request, plan.skipped)
    with committer:
        encoded = _run_passes(request, committer, plan, options, start, bars)
    edits = tuple(edit for edit in plan.edits if encoded.failure_of_edit(edit) is None)
    rows, unreadable = encoded.usable(plan.rows)
    not_drawn = [skip for edit in plan.edits if (skip := encoded.failure_of_edit(edit)) is not None]
    skipped = (*plan.skipped, *unreadable.values(), *not_drawn)
    if not rows and split is None:
        raise _nothing_readable(request, skipped[len(plan.skipped) :])
    of_images = {key: error.reason for key, error in encoded.failed.items() if error.is_lasting}
    failed = {**plan.failed, **of_images}
    # What the system could not read may be readable next time: the source is then looked at again.
    is_known = len(skipped) <= MOST_NAMED and all(s.is_lasting for s in {*skipped} - {*request.listing.skipped})
    note = take_note(request.source, request.config, request.listing) if is_known else SourceNote()
    captions = {*rows.keys("caption_keys").to_pylist()} if plan.classes else set()
    classes = {k: v for k, v in plan.classes.items() if k in captions and v not in encoded.failed_texts}
    others = {*plan.prompts.values(), *manifest.prompts.values(), *classes.values()}
    others |= {key for edit in edits for key in edit.text_keys}
    cut = note_truncated(
        manifest.left_out, encoded.truncated, plan.text_jobs, lambda keys: (keys & others) | rows.named_texts(keys)
    )
    left_out = note_left_out(skipped, failed, cut)
    write_skipped(request.root, ((skip.path, skip.reason) for skip in skipped))
    is_written = committer.index(rows, plan.prompts, request.recipe, versions(), note, left_out, edits, classes, split)
    num_latents = encoded.num_latents
    num_texts = _num_done(plan.text_jobs, encoded.failed_texts)
    return EncodeReport(
        num_items=len(rows),
        num_latents=num_latents,
        num_texts=num_texts,
        reused_latents=plan.num_reused_latents,
        reused_texts=plan.num_reused_texts,
        added=tuple(path for path in plan.added if path not in unreadable),
        changed=tuple(path for path in plan.changed if path not in unreadable),
        removed=plan.removed,
        renamed=plan.renamed,
        skipped=skipped,
        truncated=encoded.truncated,
        upscaled=plan.upscaled,
        stretched=plan.stretched,
        turned=plan.turned,
        same_as_target=plan.same_as_target,
        num_multiline=request.listing.num_multiline,
        notices=request.listing.notices,
        flawed=tuple(image for image in plan.flawed if image.path not in unreadable),
        repaired=repaired,
        num_buckets=rows.num_buckets,
        num_bytes=sum(shard.num_bytes for shard in committer.manifest.shards),
        is_unchanged=not (is_written or repaired or num_latents or num_texts),
    )


@dataclass(frozen=True)
class _Encoded:
    """How the passes over a plan's jobs went."""

    failed: dict[str, UnreadableImage]
    """Latent or mask key -> why its image or mask could not be read."""
    mask_paths: dict[str, str]
    """Mask key -> where the mask is."""
    truncated: tuple[tuple[str, int], ...] = ()
    """As in ``EncodeReport``."""
    failed_texts: dict[str, UnreadableImage] = field(default_factory=dict)
    """Text key -> why its source could not be read. Only for image-to-image."""
    num_latents: int = 0
    """Latents that were encoded."""

    def usable(self, rows: IndexRows) -> tuple[IndexRows, dict[str, Skipped]]:
        """The rows that have all they name, and of the others the paths, and why."""
        if not self.failed and not self.failed_texts:
            return rows, {}
        flags, unreadable = bytearray(), dict[str, Skipped]()
        for row in rows:
            failure = self.failure(row)
            flags.append(failure is None)
            if failure:
                unreadable[row.path] = failure
        return rows.where(flags), unreadable

    def failure(self, row: IndexRow) -> Skipped | None:
        """Why the latents, the texts or the mask of this row are missing; None if they are there."""
        if error := self.failed.get(row.latent_key):
            return Skipped(row.path, error.reason, error.is_lasting)
        if row.source_key and (error := self._of_source(row.source_key, row.empty_key, *row.caption_keys)):
            return Skipped(row.path, source_reason(row.source_path or "", error.reason), error.is_lasting)
        if row.mask_key and (error := self.failed.get(row.mask_key)):
            reason = mask_reason(self.mask_paths[row.mask_key], error.reason)
            return Skipped(row.path, reason, error.is_lasting)
        return None

    def failure_of_edit(self, edit: Edit) -> Skipped | None:
        """Why the rows of this pair to draw are missing; None if they are there."""
        error = self._of_source(edit.source_key, edit.empty_key, edit.text_key)
        if error is None:
            return None
        return Skipped(edit.source, f"was to be drawn from and {error.reason}", error.is_lasting)

    def _of_source(self, source_key: str, *text_keys: str | None) -> UnreadableImage | None:
        errors = (self.failed.get(source_key), *(self.failed_texts.get(key or "") for key in text_keys))
        return next((error for error in errors if error), None)


class _InThisProcess:
    """The passes, one encoder after another on one device."""

    def __init__(self, device: str) -> None:
        self._name = device

    @property
    def device(self) -> str:
        return pick_device(self._name)

    def announce(self, job: Job, text_jobs: Sequence[TextJob], latent_jobs: Sequence[LatentJob]) -> None:
        _announce(job, text_jobs, latent_jobs)

    def encode_texts(
        self, job: Job, sink: RowSink, text_jobs: Sequence[TextJob], failed: dict[str, UnreadableImage]
    ) -> tuple[tuple[str, int], ...]:
        return encode_texts(job, sink, text_jobs, failed)

    def encode_latents(self, job: Job, sink: RowSink, latent_jobs: Sequence[LatentJob]) -> dict[str, UnreadableImage]:
        return encode_latents(job, sink, latent_jobs)


def _run_passes(
    request: ListedRequest,
    committer: Committer,
    plan: Plan,
    options: EncodeOptions,
    start: Callable[[], Passes] | None,
    bars: Progress,
) -> _Encoded:
    """Masks, texts and latents into shards; torch is imported only if there is a text or an image to encode."""
    failed = encode_masks(request.listing.read, committer, plan.mask_jobs)
    mask_paths = {mask_job.key: mask_job.path for mask_job in plan.mask_jobs}
    if not plan.text_jobs and not plan.latent_jobs:
        return _Encoded(failed, mask_paths)
    passes = start() if start else _InThisProcess(options.device)
    with console.doing(bars, "importing torch"):
        device = passes.device
    job = Job(request.listing.read, request.root, request.folder, request.config, device, bars, options.vram)
    job = replace(job, read_source=plan.read_source)
    passes.announce(job, plan.text_jobs, plan.latent_jobs)
    failed_texts: dict[str, UnreadableImage] = {}
    truncated = passes.encode_texts(job, committer, plan.text_jobs, failed_texts)
    latent_jobs = _wanted_latents(plan, failed_texts)
    failed |= passes.encode_latents(job, committer, latent_jobs)
    return _Encoded(failed, mask_paths, truncated, failed_texts, _num_done(latent_jobs, failed))


def _num_done(jobs: Sequence[TextJob] | Sequence[LatentJob], failed: Mapping[str, UnreadableImage]) -> int:
    """How many jobs have not failed."""
    return len(jobs) - (sum(job.key in failed for job in jobs) if failed else 0)


def _wanted_latents(plan: Plan, failed_texts: Mapping[str, UnreadableImage]) -> Sequence[LatentJob]:
    """The latents to encode, without those of pairs that the pipeline cannot encode, which are skipped."""
    refused = {key for key, error in failed_texts.items() if isinstance(error, PipelineFails)}
    if not refused:
        return plan.latent_jobs
    keys = {key for row in plan.rows if refused.isdisjoint(row.text_keys) for key in row.latent_keys}
    keys |= {edit.source_key for edit in plan.edits if refused.isdisjoint((edit.text_key, edit.empty_key))}
    return [latent_job for latent_job in plan.latent_jobs if latent_job.key in keys]


def _announce(job: Job, text_jobs: Sequence[TextJob], latent_jobs: Sequence[LatentJob]) -> None:
    """Print how it will go, before anything is loaded. What does not fit is refused now, not hours later."""
    jobs = text_jobs, latent_jobs
    if job.device == "cpu":
        with console.doing(job.bars, "measuring this machine"):
            on_cpu = estimate(job.folder, job.config, job.device, None, *jobs)
        console.note(f"Encoding on this CPU takes {duration(on_cpu)}, plus the time to load the encoders")
    if job.device != "cpu" or job.vram:
        planned = estimate(job.folder, job.config, job.device, job.vram, *jobs, is_timed=False)
        console.note(f"Planned: {modes(planned)}")


def _nothing_readable(request: ListedRequest, skipped: Sequence[Skipped]) -> DatasetError:
    reasons = "; ".join(f"{item.path}: {item.reason}" for item in skipped[:3])
    return DatasetError(
        f"No image in {request.source} could be read ({reasons})", "Replace these files and encode again"
    )

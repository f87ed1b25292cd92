"""How does a finished cache for image-to-image get more pairs to draw? Encoders are loaded only for what it lacks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from rich.progress import Progress

from k5cache.encode.commit import Committer
from k5cache.encode.edits import reader, sort_edits
from k5cache.encode.image_pass import encode_latents
from k5cache.encode.job import no_sources
from k5cache.encode.plan import Plan, make_plan
from k5cache.encode.source_note import note_truncated
from k5cache.encode.text_pass import encode_texts
from k5cache.encode.wanted import ExaminedEdit, Probes, Stored, Wanted, no_source
from k5cache.options import config_of
from k5cache.shared.command_line import command
from k5cache.shared.errors import CacheError, DatasetError
from k5cache.shared.kind import LONG_NAMES
from k5cache.shared.model import ModelConfig, WantedEdit
from k5cache.sources.items import SourceItem, UnreadableImage
from k5cache.store.index import index_rows, read_index
from k5cache.store.manifest import Manifest, lock, read_manifest
from k5cache.upkeep.finished import finished_index
from k5cache.upkeep.prompts import Added, job_of

_SHARD_BYTES = 2**28


def add_edits(
    root: Path,
    source: str,
    prompts: Sequence[str],
    model: ModelConfig,
    device: str,
    bars: Progress,
    wait_seconds: float = 0,
) -> Added:
    """Add pairs to draw to the cache: a picture, and instructions for it. Its items stay as they are.

    Args:
        source: the path of the picture.
        prompts: as their user writes them.
        model: the encoders; their weights must be those of the cache.

    Raises:
        CacheError: the cache is not finished, or it is for text-to-image.
        DatasetError: the picture cannot be read, or the pipeline cannot encode it with one of the prompts.
        CacheStale: the encoders, or the template of the installed diffusers, are not those of the cache.
        CacheLocked: another process is writing the cache.
    """
    with lock(root, wait_seconds):
        manifest = read_manifest(root)
        rows = index_rows(read_index(root, finished_index(root, manifest), manifest.format))
        if manifest.kind != "i2i":
            raise CacheError(
                f"{root} is for {LONG_NAMES[manifest.kind]}, where prompts have no picture",
                f"Leave it out: {command('k5cache', 'prompts', 'add', root, *prompts)}",
            )
        committer = Committer(root, manifest, _SHARD_BYTES)
        stored = Stored(latents=committer.keys("latents"), texts=committer.keys("text"))
        asked = [WantedEdit(source, prompt) for prompt in dict.fromkeys(prompts)]
        edits = sort_edits(asked, (), stored, is_as_before=True)
        plan = _plan(manifest, edits.examined, stored)
        with committer:
            truncated = _encode(root, manifest, committer, plan, edits.examined, model, device, bars)
        known = {(edit.source_hash, edit.prompt): edit for edit in (*manifest.edits, *plan.edits)}
        cut = note_truncated(manifest.left_out, truncated, plan.text_jobs)
        left_out = replace(manifest.left_out, truncated=cut)
        committer.index(
            *(rows, {}, manifest.recipe, manifest.created_by, manifest.source, left_out), tuple(known.values())
        )
    new = {job.key for job in plan.text_jobs}
    encoded = tuple(edit.prompt for edit in plan.edits if edit.text_key in new)
    return Added(encoded, tuple(edit.prompt for edit in plan.edits if edit.text_key not in new), truncated)


def _plan(manifest: Manifest, edits: Sequence[ExaminedEdit], stored: Stored) -> Plan:
    """What is to be encoded for these pairs, as if they stood in a recipe."""
    from k5cache.encoders.pipeline import clean

    def no_image(item: SourceItem) -> tuple[str, int, int]:
        raise LookupError(f"{item.path}: there are no items")

    config = config_of(manifest.recipe)
    wanted = Wanted(
        items=(),
        skipped=(),
        prompts=(),
        framing=config.framing,
        latent_recipe=manifest.recipe["latents"],
        text_recipe=manifest.recipe["text"],
        source_view=config.source_view,
        empty_instruction=config.empty_instruction,
        edits=edits,
    )
    return make_plan(wanted, stored, Probes(no_image, lambda item, width, height: "", clean, no_source))


def _encode(
    root: Path,
    manifest: Manifest,
    committer: Committer,
    plan: Plan,
    edits: Sequence[ExaminedEdit],
    model: ModelConfig,
    device: str,
    bars: Progress,
) -> tuple[tuple[str, int], ...]:
    """Encode what the plan lacks. Returns the prompts that were cut.

    Raises:
        DatasetError: a source could not be read after all, or does not fit the pipeline with its instruction.
    """
    if not plan.text_jobs and not plan.latent_jobs:
        return ()
    job = replace(
        job_of(root, manifest, model, device, bars, ("text", "latents")), read_source=reader(no_sources, edits)
    )
    failed: dict[str, UnreadableImage] = {}
    truncated = encode_texts(job, committer, plan.text_jobs, failed)
    if not failed:
        failed = encode_latents(job, committer, plan.latent_jobs)
    if failed:
        raise DatasetError(
            f"The source {edits[0].source} {next(iter(failed.values())).reason}",
            "Give another picture or a shorter prompt; what is encoded stays until `k5cache gc`",
        )
    return truncated

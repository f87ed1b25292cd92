"""How does a finished cache get more prompts? The text encoders are loaded only for prompts that it does not have."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from rich.progress import Progress

from k5cache.encode.commit import Committer
from k5cache.encode.differences import differences, refuse_model, table_of
from k5cache.encode.job import Job, TextJob
from k5cache.encode.keys import text_key
from k5cache.encode.request import build_recipe
from k5cache.encode.source_note import note_truncated
from k5cache.encode.text_pass import encode_texts
from k5cache.options import config_of
from k5cache.shared.checkpoint import ENCODER_PARTS, model_folder
from k5cache.shared.command_line import command
from k5cache.shared.device import pick_device
from k5cache.shared.errors import CacheError
from k5cache.shared.kind import LONG_NAMES
from k5cache.shared.model import ModelConfig
from k5cache.store.index import index_rows, read_index
from k5cache.store.manifest import Manifest, lock, read_manifest
from k5cache.upkeep.finished import finished_index

_SHARD_BYTES = 2**28


@dataclass(frozen=True)
class Added:
    """What became of the prompts."""

    encoded: tuple[str, ...]
    already_there: tuple[str, ...]
    """Prompts of an earlier encode, or captions of an image: nothing was computed for them."""
    truncated: tuple[tuple[str, int], ...]
    """(cleaned prompt, how many of its last characters were cut off)."""


def add_prompts(
    root: Path,
    prompts: Sequence[str],
    model: ModelConfig,
    device: str,
    bars: Progress,
    wait_seconds: float = 0,
) -> Added:
    """Add prompts to the cache, for validation and `k5train sample`. Its items stay as they are.

    Args:
        prompts: as their user writes them.
        model: the encoders; their weights must be those of the cache.

    Raises:
        CacheError: the cache is not finished, or it is for image-to-image, where a prompt needs a source.
        CacheStale: the text encoders, or the template of the installed diffusers, are not those of the cache.
        CacheLocked: another process is writing the cache.
    """
    from k5cache.encoders.pipeline import clean

    with lock(root, wait_seconds):
        manifest = read_manifest(root)
        index = finished_index(root, manifest)
        if manifest.kind == "i2i":
            raise CacheError(
                f"{root} is for {LONG_NAMES['i2i']}, where every instruction has a picture",
                f"Name it: {command('k5cache', 'prompts', 'add', root, '--source', 'PICTURE', *_words(prompts))}",
            )
        text_recipe = dict(table_of(root, manifest.recipe, "text", "text_encoder"))
        keys = {raw: text_key(clean(raw), text_recipe) for raw in dict.fromkeys(prompts)}
        committer = Committer(root, manifest, _SHARD_BYTES)
        stored = committer.keys("text")
        text_jobs = {key: TextJob(key, clean(raw)) for raw, key in keys.items() if key not in stored}
        truncated: tuple[tuple[str, int], ...] = ()
        if text_jobs:
            job = job_of(root, manifest, model, device, bars, ("text",))
            with committer:
                truncated = encode_texts(job, committer, list(text_jobs.values()))
        rows = index_rows(read_index(root, index, manifest.format))
        cut = note_truncated(manifest.left_out, truncated, list(text_jobs.values()))
        left_out = replace(manifest.left_out, truncated=cut)
        committer.index(rows, keys, manifest.recipe, manifest.created_by, manifest.source, left_out, manifest.edits)
    encoded = tuple(raw for raw, key in keys.items() if key in text_jobs)
    return Added(encoded, tuple(raw for raw in keys if raw not in encoded), truncated)


def job_of(
    root: Path, manifest: Manifest, model: ModelConfig, device: str, bars: Progress, tables: Sequence[str]
) -> Job:
    """The job of encoding more rows for a cache with the model that made it.

    Args:
        tables: of the recipe, which must be those of the cache.

    Raises:
        CacheStale: they are not.
    """
    config = config_of(manifest.recipe)
    folder = model_folder(model, ENCODER_PARTS)
    if differing := differences(manifest.recipe, build_recipe(model, config, folder, manifest.recipe), tables):
        fix = "Name the model that made it with --model DIR, or encode its captions again with --update"
        raise refuse_model(root, model.source, differing, fix)
    return Job(Path, root, folder, config, pick_device(device), bars)


def _words(prompts: Sequence[str]) -> tuple[str, ...]:
    return ("--", *prompts) if any(prompt.startswith("-") for prompt in prompts) else tuple(prompts)

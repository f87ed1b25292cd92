"""More prompts for a finished cache: only the text encoders are loaded, and only for what is not there yet."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.progress import Progress

from k5cache.encode import differences, plan
from k5cache.encode.commit import Committer
from k5cache.encode.job import Job
from k5cache.encode.keys import text_key
from k5cache.encode.request import build_recipe, config_of
from k5cache.encode.text_pass import encode_texts
from k5cache.shared.checkpoint import ENCODER_PARTS, model_folder
from k5cache.shared.device import pick_device
from k5cache.shared.errors import CacheError, CacheStale
from k5cache.shared.model import ModelConfig
from k5cache.store.index import index_rows, read_index
from k5cache.store.manifest import lock, read_manifest


@dataclass(frozen=True)
class Added:
    """What became of the prompts."""

    encoded: tuple[str, ...]
    already_there: tuple[str, ...]
    """Named before, or the caption of an image: nothing was computed."""
    truncated: tuple[tuple[str, int], ...]
    """Cleaned prompt and how many of its characters no token stands for."""


def add_prompts(
    root: Path,
    prompts: Sequence[str],
    model: ModelConfig,
    device: str,
    bars: Progress,
    wait_seconds: float = 0,
) -> Added:
    """Give the cache these prompts, for validation and `k5train sample`; its items stay as they are.

    Args:
        prompts: as their user writes them.
        model: the encoders; their weights must be those of the cache.

    Raises:
        CacheError: the cache is not finished.
        CacheStale: the text encoders, or the template of the installed diffusers, are not those of the cache.
        CacheLocked: another process is writing the cache.
    """
    from k5cache.encoders.pipeline import clean

    with lock(root, wait_seconds):
        manifest = read_manifest(root)
        if manifest.index is None:
            raise CacheError(
                f"{root} holds no finished index: its encode was interrupted",
                f"Finish it first: k5cache encode SOURCE -o {root}",
            )
        recipe = dict(differences.table_of(root, manifest.recipe, "text", "text_encoder"))
        keys = {raw: text_key(clean(raw), recipe) for raw in dict.fromkeys(prompts)}
        commit = Committer(root, manifest, 2**28)
        stored = commit.keys("text")
        jobs = {key: plan.TextJob(key, clean(raw)) for raw, key in keys.items() if key not in stored}
        truncated: tuple[tuple[str, int], ...] = ()
        if jobs:
            config = config_of(manifest.recipe)
            folder = model_folder(model, ENCODER_PARTS)
            found = differences.differences(manifest.recipe, build_recipe(model, config, folder), ("text",))
            if found:
                raise CacheStale(
                    f"{root} was not encoded by {model.source}: {'; '.join(map(str, found))}",
                    "Name the model that made it with --model DIR, or encode its captions again with --update",
                )
            job = Job(Path, root, folder, config, pick_device(device), bars)
            truncated = encode_texts(job, commit, list(jobs.values()))
        rows = index_rows(read_index(root, manifest.index))
        commit.index(rows, keys, manifest.recipe, manifest.created_by, manifest.source)
    encoded = tuple(raw for raw, key in keys.items() if key in jobs)
    return Added(encoded, tuple(raw for raw in keys if raw not in encoded), truncated)

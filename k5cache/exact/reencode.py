"""Do the encoders still give what the cache holds? A few random rows, encoded again and compared bit for bit."""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.progress import Progress

from k5cache.encode.differences import differences, refuse_model
from k5cache.encode.image_pass import encode_latents
from k5cache.encode.job import Job, LatentJob, SourceView, TextJob, no_sources
from k5cache.encode.request import build_recipe
from k5cache.encode.sink import Collector
from k5cache.encode.text_pass import encode_texts
from k5cache.options import config_of, with_source_dir
from k5cache.shared.checkpoint import ENCODER_PARTS, model_folder
from k5cache.shared.device import pick_device
from k5cache.shared.model import ModelConfig
from k5cache.sources import find, images, items
from k5cache.store.geometry import geometry_of, source_of_row
from k5cache.store.index import IndexRow
from k5cache.store.reader import Cache

if TYPE_CHECKING:
    import torch

TOLERANCE = {"text": 0.02, "latents": 0.002}
"""Largest error, as a part of the row's norm, that another machine or library version may cause. Texts are bfloat16
through 28 layers (8 bits of mantissa: 0.4 % a rounding), latents float16 from a float32 VAE (11 bits: 0.05 %)."""


@dataclass(frozen=True)
class Compared:
    """One row that was encoded again."""

    kind: str
    name: str
    """Path of the image, or the caption."""
    is_exact: bool
    error: float
    """Norm of the difference over the norm of the stored row, the largest of the row's tensors."""

    @property
    def is_wrong(self) -> bool:
        """Whether the difference is larger than another machine explains."""
        return not self.error <= TOLERANCE[self.kind]


@dataclass(frozen=True)
class Reencoded:
    """The rows that were encoded again, and images that could not be."""

    compared: tuple[Compared, ...]
    not_compared: tuple[str, ...]
    """``path: why``: the image has changed since it was encoded, or is not there. Not a fault of the cache."""

    @property
    def problems(self) -> tuple[str, ...]:
        """The rows that are wrong, one sentence each."""
        wrong = [row for row in self.compared if row.is_wrong]
        return tuple(f"{row.kind} of {row.name[:80]!r}: encoded again it differs by {row.error:.2g}" for row in wrong)


def reencode(
    cache: Cache,
    count: int,
    source: Path | None,
    model: ModelConfig,
    device: str,
    bars: Progress,
    seed: int = 0,
    sources: Path | None = None,
) -> Reencoded:
    """Encode random rows again and compare them: ``count`` captions and, if ``source`` is given, ``count`` images.

    Args:
        source: where the images are.
        sources: for image-to-image, the folder with their sources if they are not in ``source``.
        model: the encoders; their weights must be those of the cache.

    Raises:
        CacheStale: the weights are not those of the cache.
    """
    folder = model_folder(model, ENCODER_PARTS)
    recipe = cache.manifest.recipe
    config = config_of(recipe)
    if differing := differences(recipe, build_recipe(model, config, folder, recipe), ("text", "latents")):
        raise refuse_model(cache.root, model.source, differing, "Name the model that made it with --model DIR")
    generator = random.Random(seed)
    texts = cache.texts().keys
    keys = [texts[i].as_py() for i in generator.sample(range(len(texts)), min(count, len(texts)))]
    numbers = generator.sample(range(len(cache)), min(count, len(cache))) if source else []
    listing = find.find(source, with_source_dir(config, sources), cache.kind) if source else None
    read = listing.read if listing else Path
    read_source = listing.read_source if listing else no_sources
    job = Job(read, cache.root, folder, config, pick_device(device), bars, read_source=read_source)
    rows = [cache.row(number) for number in numbers]
    text_jobs, without = _with_sources(cache, rows, count) if cache.kind == "i2i" else (_captions(cache, keys), [])
    compared, not_compared = _reencode_texts(cache, job, text_jobs)
    compared_latents, unread = _reencode_latents(cache, job, rows)
    return Reencoded((*compared, *compared_latents), tuple(dict.fromkeys([*without, *not_compared, *unread])))


def _captions(cache: Cache, keys: list[str]) -> list[TextJob]:
    return [TextJob(key, cache.text(key).caption) for key in keys]


def _with_sources(cache: Cache, rows: list[IndexRow], count: int) -> tuple[list[TextJob], list[str]]:
    """``count`` instructions of the rows, and why there are none: each is encoded with its source, which must be there.

    Instructions and empty ones are mixed.
    """
    if not rows:
        return [], ["instructions: each is encoded with its source; name the folder of the images with --source"]
    views = {row: SourceView(row.source_path or "", row.source_hash or "", source_of_row(row)) for row in rows}
    wanted = [(key, view) for row, view in views.items() for key in (*row.caption_keys, row.empty_key) if key]
    return [TextJob(key, cache.text(key).caption, view) for key, view in dict(wanted[: 2 * count]).items()], []


def _reencode_texts(cache: Cache, job: Job, text_jobs: list[TextJob]) -> tuple[list[Compared], list[str]]:
    """The rows that were encoded again, and ``path: why`` for the sources that could not be read."""
    encoded, failed = Collector(), dict[str, items.UnreadableImage]()
    encode_texts(job, encoded, text_jobs, failed)
    compared = []
    for text_job in text_jobs:
        if text_job.key not in failed:
            text = cache.text(text_job.key)
            name = text.caption if text_job.source is None else f"{text.caption} ({text_job.source.path})"
            stored = {"prompt_embeds": text.prompt_embeds, "pooled": text.pooled}
            compared.append(_compare("text", name, stored, encoded.rows[text_job.key]))
    sources = [(text_job.source, failed[text_job.key]) for text_job in text_jobs if text_job.key in failed]
    return compared, [f"source {source.path}: {error.reason}" for source, error in sources if source]


def _reencode_latents(cache: Cache, job: Job, index_rows: list[IndexRow]) -> tuple[list[Compared], list[str]]:
    """The rows that were encoded again, and ``path: why`` for the images that could not be."""
    jobs = {
        row.latent_key: LatentJob(row.latent_key, row.path, geometry_of(row), row.content_hash) for row in index_rows
    }
    for row in index_rows:
        if row.source_key and row.source_path:
            geometry, content_hash = source_of_row(row), row.source_hash or ""
            own = LatentJob(row.source_key, row.source_path, geometry, content_hash, is_source=True)
            jobs.setdefault(row.source_key, own)
    reasons = {key: reason for key, latent_job in jobs.items() if (reason := _why_not_comparable(job, latent_job))}
    encoded = Collector()
    wanted = [latent_job for key, latent_job in jobs.items() if key not in reasons]
    reasons |= {key: error.reason for key, error in encode_latents(job, encoded, wanted).items()}
    compared = [
        _compare("latents", _name(latent_job), cache.latents(key), encoded.rows[key])
        for key, latent_job in jobs.items()
        if key not in reasons
    ]
    return compared, [f"{_name(jobs[key])}: {reason}" for key, reason in reasons.items()]


def _name(latent_job: LatentJob) -> str:
    return f"source {latent_job.path}" if latent_job.is_source else latent_job.path


def _why_not_comparable(job: Job, latent_job: LatentJob) -> str:
    """Why an image cannot be compared; empty if it can."""
    read = job.read_source if latent_job.is_source else job.read
    try:
        is_same = images.hash_content(read(latent_job.path)) == latent_job.content_hash
    except items.UnreadableImage as error:
        return error.reason
    return "" if is_same else "has changed since it was encoded"


def _compare(kind: str, name: str, stored: Mapping[str, torch.Tensor], encoded: Mapping[str, Any]) -> Compared:
    """Compare the tensors of one row, by name."""
    import torch

    errors = []
    for tensor_name, tensor in stored.items():
        other = encoded[tensor_name]
        if other.shape != tensor.shape:
            errors.append(float("inf"))
        else:
            norm = tensor.float().norm().item() or 1.0
            errors.append((other.float() - tensor.float()).norm().item() / norm)
    is_exact = all(torch.equal(tensor, encoded[n]) and tensor.dtype == encoded[n].dtype for n, tensor in stored.items())
    return Compared(kind, name, is_exact, max(errors))

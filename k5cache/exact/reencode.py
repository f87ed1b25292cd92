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
from k5cache.encode.job import Job, LatentJob, TextJob, no_sources
from k5cache.encode.plan import geometry_of
from k5cache.encode.request import build_recipe, config_of
from k5cache.encode.sink import Collector
from k5cache.encode.text_pass import encode_texts
from k5cache.options import with_source_dir
from k5cache.shared.checkpoint import ENCODER_PARTS, model_folder
from k5cache.shared.device import pick_device
from k5cache.shared.model import ModelConfig
from k5cache.sources import find, images, items
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
    if differing := differences(recipe, build_recipe(model, config, folder), ("text", "latents")):
        raise refuse_model(cache.root, model.source, differing, "Name the model that made it with --model DIR")
    generator = random.Random(seed)
    keys = generator.sample(sorted(cache.text_lengths()), min(count, len(cache.text_lengths())))
    numbers = generator.sample(range(len(cache)), min(count, len(cache))) if source else []
    listing = find.find(source, with_source_dir(config, sources), cache.kind) if source else None
    read = listing.read if listing else Path
    read_source = listing.read_source if listing else no_sources
    job = Job(read, cache.root, folder, config, pick_device(device), bars, read_source=read_source)
    compared = _reencode_texts(cache, job, keys)
    compared_latents, not_compared = _reencode_latents(cache, job, [cache.row(number) for number in numbers])
    return Reencoded((*compared, *compared_latents), tuple(not_compared))


def _reencode_texts(cache: Cache, job: Job, keys: list[str]) -> list[Compared]:
    texts = {key: cache.text(key) for key in keys}
    encoded = Collector()
    encode_texts(job, encoded, [TextJob(key, text.caption) for key, text in texts.items()])
    return [
        _compare("text", text.caption, {"prompt_embeds": text.prompt_embeds, "pooled": text.pooled}, encoded.rows[key])
        for key, text in texts.items()
    ]


def _reencode_latents(cache: Cache, job: Job, index_rows: list[IndexRow]) -> tuple[list[Compared], list[str]]:
    """The rows that were encoded again, and ``path: why`` for the images that could not be."""
    rows = {row.latent_key: row for row in index_rows}
    reasons = {key: reason for key, row in rows.items() if (reason := _why_not_comparable(job, row))}
    latent_jobs = [
        LatentJob(key, row.path, geometry_of(row), row.content_hash) for key, row in rows.items() if key not in reasons
    ]
    encoded = Collector()
    reasons |= {key: error.reason for key, error in encode_latents(job, encoded, latent_jobs).items()}
    compared = [
        _compare("latents", row.path, cache.latents(key), encoded.rows[key])
        for key, row in rows.items()
        if key not in reasons
    ]
    return compared, [f"{rows[key].path}: {reason}" for key, reason in reasons.items()]


def _why_not_comparable(job: Job, row: IndexRow) -> str:
    """Why the image of ``row`` cannot be compared; empty if it can."""
    try:
        is_same = images.hash_content(job.read(row.path)) == row.content_hash
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

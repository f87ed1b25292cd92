"""Do the encoders still give what the cache holds? A few random rows, encoded again and compared bit for bit."""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.progress import Progress

from k5cache.encode import differences, plan
from k5cache.encode.image_pass import encode_latents
from k5cache.encode.job import Job
from k5cache.encode.request import build_recipe, config_of
from k5cache.encode.sink import Collector
from k5cache.encode.text_pass import encode_texts
from k5cache.options import CacheConfig
from k5cache.shared.checkpoint import ENCODER_PARTS, model_folder
from k5cache.shared.device import pick_device
from k5cache.shared.errors import CacheStale
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
    """``path: why``: the image has changed since, or is not there. Not a fault of the cache."""

    @property
    def problems(self) -> tuple[str, ...]:
        """The rows that are wrong, one sentence each."""
        wrong = [row for row in self.compared if row.is_wrong]
        return tuple(f"{row.kind} of {row.name[:80]!r}: encoded again it differs by {row.error:.2g}" for row in wrong)


def reencode(
    cache: Cache, count: int, source: Path | None, model: ModelConfig, device: str, bars: Progress, seed: int = 0
) -> Reencoded:
    """Encode ``count`` random captions and, where ``source`` is given, ``count`` random images again and compare.

    Args:
        source: where the images are.
        model: the encoders; their weights must be those of the cache.

    Raises:
        CacheStale: they are not.
    """
    folder = model_folder(model, ENCODER_PARTS)
    recipe = cache.manifest.recipe
    config = config_of(recipe)
    found = differences.differences(recipe, build_recipe(model, config, folder), ("text", "latents"))
    if found:
        raise CacheStale(
            f"{cache.root} was not encoded by {model.source}: {'; '.join(map(str, found))}",
            "Name the model that made it with --model DIR",
        )
    chance = random.Random(seed)
    keys = chance.sample(sorted(cache.text_lengths()), min(count, len(cache.text_lengths())))
    texts = {key: cache.text(key) for key in keys}
    numbers = chance.sample(range(len(cache)), min(count, len(cache))) if source else []
    rows = {row.latent_key: row for row in map(cache.row, numbers)}
    job, not_compared = _job(cache, config, folder, source, pick_device(device), bars), list[str]()
    again = Collector()
    encode_texts(job, again, [plan.TextJob(key, text.caption) for key, text in texts.items()])
    jobs = []
    for key, row in rows.items():
        reason = _changed(job, row)
        if reason:
            not_compared.append(f"{row.path}: {reason}")
        else:
            jobs.append(plan.LatentJob(key, row.path, plan.geometry_of(row), row.content_hash))
    failed = encode_latents(job, again, jobs)
    not_compared += [f"{rows[key].path}: {reason}" for key, reason in failed.items()]
    compared = [
        _compare("text", text.caption, {"prompt_embeds": text.prompt_embeds, "pooled": text.pooled}, again.rows[key])
        for key, text in texts.items()
    ]
    compared += [
        _compare("latents", rows[one.key].path, cache.latents(one.key), again.rows[one.key])
        for one in jobs
        if one.key not in failed
    ]
    return Reencoded(tuple(compared), tuple(not_compared))


def _job(
    cache: Cache, config: CacheConfig, folder: Path, source: Path | None, device: str,
    bars: Progress,
) -> Job:  # fmt: skip
    read = find.find(source, config).read if source else Path
    return Job(read, cache.root, folder, config, device, bars)


def _changed(job: Job, row: IndexRow) -> str:
    try:
        same = images.hash_content(job.read(row.path)) == row.content_hash
    except items.UnreadableImage as error:
        return error.reason
    return "" if same else "has changed since it was encoded"


def _compare(kind: str, name: str, stored: dict[str, torch.Tensor], again: dict[str, Any]) -> Compared:
    import torch

    errors = []
    for tensor_name, tensor in stored.items():
        other = again[tensor_name]
        if other.shape != tensor.shape:
            errors.append(float("inf"))
        else:
            norm = tensor.float().norm().item() or 1.0
            errors.append((other.float() - tensor.float()).norm().item() / norm)
    exact = all(torch.equal(tensor, again[n]) and tensor.dtype == again[n].dtype for n, tensor in stored.items())
    return Compared(kind, name, exact, max(errors))

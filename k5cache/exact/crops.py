"""Are latents those of diffusers' VAE? Crops of a cache's own images, or synthetic ones, through an encode's pass."""

from __future__ import annotations

import io
import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from k5cache.buckets import Geometry, bucket_table, choose_bucket, cover
from k5cache.encode.image_pass import encode_latents
from k5cache.encode.job import Job, LatentJob
from k5cache.encode.sink import Collector
from k5cache.exact.reencode import TOLERANCE
from k5cache.options import CacheConfig
from k5cache.shared.comparison import Comparison, check, compare, not_run
from k5cache.shared.errors import K5Error
from k5cache.shared.handed_over import handed_over
from k5cache.shared.units import count_of
from k5cache.sources import find, images
from k5cache.sources.items import Content, UnreadableImage
from k5cache.store.geometry import geometry_of, source_of_row
from k5cache.store.index import IndexRow
from k5cache.store.reader import Cache

if TYPE_CHECKING:
    import torch

PICTURE_SIDE = 256  # pixels of the side of synthetic pictures, so that a float32 VAE on a CPU takes seconds
VAE = "vae.encode(preprocess)"


@dataclass(frozen=True)
class Picture:
    """One crop to encode."""

    name: str
    content: Content
    geometry: Geometry


@dataclass
class Sample:
    """Crops to encode. If they are of a cache's own images, also the keys of what it stores of them."""

    pictures: list[Picture] = field(default_factory=list)
    latent_keys: dict[str, str] = field(default_factory=dict)
    """Name of a picture -> key of its latents."""
    instructions: dict[str, Picture] = field(default_factory=dict)
    """Key of a text -> the source it was encoded with. Only for image-to-image."""
    reason: str = ""
    """Why they are not of the cache's own images."""


def sample_pictures(cache: Cache | None, source: Path | None, config: CacheConfig, count: int) -> Sample:
    """Crops of ``count`` random rows of the cache, and for image-to-image of their sources; else synthetic ones."""
    reason = "there is no cache"
    if cache is not None:
        usual = Path("datasets") / cache.root.resolve().name
        if source is None and not usual.exists():  # the name is not looked up as a dataset on the hub
            reason = f"there is no {usual}: name the folder of the images with --source"
        else:
            sample = _images_of(cache, source or usual, config, count)
            if sample.pictures:
                return sample
            reason = sample.reason
    return Sample(_synthetic(min(config.resolution, PICTURE_SIDE)), reason=reason)


def _images_of(cache: Cache, source: Path, config: CacheConfig, count: int) -> Sample:
    """Some of the cache's images that have not changed; and why others are left out."""
    try:
        listing = find.find(source, config, cache.kind)
    except K5Error as error:
        return Sample(reason=f"{error.problem}; name the folder of the images with --source")
    sample = Sample()
    num_rows = 0
    for i in random.Random(0).sample(range(len(cache)), len(cache)):
        row = cache.row(i)
        try:
            own = [_unchanged(row.path, listing.read(row.path), row.content_hash, geometry_of(row), row.path)]
            if row.source_path and row.source_hash:
                geometry = source_of_row(row)
                content = listing.read_source(row.source_path)
                name = f"source {row.source_path} of {row.path}"
                own.append(_unchanged(name, content, row.source_hash, geometry, row.source_path))
        except UnreadableImage as error:
            sample.reason = error.reason
            continue
        _add(sample, row, own)
        num_rows += 1
        if num_rows == count:
            break
    return sample


def _unchanged(name: str, content: Content, content_hash: str, geometry: Geometry, path: str) -> Picture:
    """The crop of an image. Raises ``UnreadableImage`` if it is not the one that was encoded."""
    try:
        if images.hash_content(content) != content_hash:
            raise UnreadableImage("has changed since it was encoded")
    except UnreadableImage as error:
        raise UnreadableImage(f"{path} {error.reason}") from error
    return Picture(name, content, geometry)


def _add(sample: Sample, row: IndexRow, own: Sequence[Picture]) -> None:
    """Add the crops of a row: the image's, and that of its source."""
    sample.pictures += own
    sample.latent_keys |= {own[0].name: row.latent_key}
    if len(own) > 1 and row.source_key:
        sample.latent_keys |= {own[1].name: row.source_key}
        texts = [*row.caption_keys[:1], *([row.empty_key] if row.empty_key else [])]
        sample.instructions |= dict.fromkeys(texts, own[1])


def compare_latents(
    job: Job,
    pictures: Sequence[Picture],
    moments: Sequence[tuple[torch.Tensor, torch.Tensor]],
    recipe: dict[str, Any],
) -> list[Comparison]:
    """Crops through an encode's own pass, compared with the VAE in the float16 that is stored."""
    from diffusers import AutoencoderKL

    ours = Collector()
    failed = encode_latents(job, ours, [LatentJob(p.name, p.name, p.geometry) for p in pictures])
    names = ("mean", "std") if job.config.posterior == "sample" else ("mean",)
    comparisons = [
        compare(
            f"{name} of {count_of(len(pictures), 'crop')}",
            VAE,
            [
                (p.name, ours.rows[p.name][name], theirs[i].half())
                for p, theirs in zip(pictures, moments, strict=True)
                if p.name not in failed
            ],
        )
        for i, name in enumerate(names)
    ]
    with handed_over(job.folder, "vae") as only:
        factor = AutoencoderKL.load_config(only, local_files_only=True)["scaling_factor"]
    ours_factor = recipe["latents"]["scaling_factor"]
    problem = "" if ours_factor == factor else f"scaling_factor is {ours_factor} instead of {factor}"
    return [*comparisons, check("scaling_factor", "the VAE's config", problem)]


def compare_stored_latents(
    cache: Cache,
    latent_keys: dict[str, str],
    pictures: Sequence[Picture],
    moments: Sequence[tuple[torch.Tensor, torch.Tensor]],
    reason: str,
) -> Comparison:
    title = f"cached latents of {count_of(len(latent_keys), 'image')}"
    if not latent_keys:
        return not_run(title, VAE, reason)
    pairs = [
        (f"{p.name} {name}", tensor, theirs[("mean", "std").index(name)].half())
        for p, theirs in zip(pictures, moments, strict=True)
        for name, tensor in cache.latents(latent_keys[p.name]).items()
        if name in ("mean", "std")
    ]
    return compare(title, VAE, pairs, TOLERANCE["latents"])


def _synthetic(resolution: int) -> list[Picture]:
    """A square and a wide picture of soft shapes and noise, each a little larger than its bucket."""
    import numpy as np
    from PIL import Image

    resolution = max(64, resolution // 16 * 16)
    pictures = []
    for width, height in ((resolution + 21, resolution + 9), (2 * resolution + 5, resolution)):
        x, y = np.meshgrid(np.linspace(0, 9, width), np.linspace(0, 9, height))
        waves = np.stack([np.sin(x * y / 4), np.cos(x + y), np.sin(x - 2 * y)], axis=-1)
        noise = np.random.default_rng(0).normal(0, 0.2, waves.shape)
        buffer = io.BytesIO()
        Image.fromarray(((waves + noise) * 64 + 128).clip(0, 255).astype(np.uint8)).save(buffer, "PNG")
        table = bucket_table(resolution, "native")
        geometry = cover(width, height, choose_bucket(width, height, table))
        pictures.append(Picture(f"picture of {width}x{height}", buffer.getvalue(), geometry))
    return pictures

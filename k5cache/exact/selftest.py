"""Is what this machine would cache what diffusers computes? Checked with an encode's own code on a checkpoint.

Captions and crops go through the passes of an encode, and through ``Kandinsky5T2IPipeline.encode_prompt`` and
``vae.encode``. If there is a cache, its stored rows are compared too. One part of the checkpoint is loaded at a time.
"""

from __future__ import annotations

import io
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.progress import Progress

from k5cache.buckets import Geometry, bucket_table, choose_bucket, cover
from k5cache.encode.differences import differences, table_of
from k5cache.encode.image_pass import encode_latents
from k5cache.encode.job import Job, LatentJob, TextJob
from k5cache.encode.plan import geometry_of
from k5cache.encode.precision import torch_dtype
from k5cache.encode.request import build_recipe, config_of
from k5cache.encode.sink import Collector
from k5cache.encode.text_pass import encode_texts
from k5cache.exact.reencode import TOLERANCE
from k5cache.options import CacheConfig, with_source_dir
from k5cache.shared.checkpoint import ENCODER_PARTS, model_folder
from k5cache.shared.comparison import Comparison, check, compare, not_run
from k5cache.shared.errors import K5Error
from k5cache.shared.handed_over import handed_over
from k5cache.shared.model import ModelConfig
from k5cache.sources import find, images
from k5cache.sources.items import Content, UnreadableImage
from k5cache.store.reader import Cache

if TYPE_CHECKING:
    import torch

    from k5cache.encoders.reference import Encoded

CAPTIONS = (
    "fox",
    "a red fox asleep in the snow, watercolour, soft light, seen from above",
    "&lt;b&gt;bold&lt;/b&gt; &amp;amp; “curly” ‘quotes’ — naïve café",
    "🦊 in the snow 👩‍👩‍👧",
    "قطة تجلس على السجادة",
    "two\nlines  and   spaces ",
    "",
    "many words " * 400,
)
PICTURE_SIDE = 256  # pixels of the side of synthetic pictures, so that a float32 VAE on a CPU takes seconds
PIPELINE = "pipeline.encode_prompt"
VAE = "vae.encode(preprocess)"
_ALLOWED = {"int8": 0.1, "fast": 0.02}  # of the norm: 8 bits in 28 layers; bfloat16 products of another size


@dataclass(frozen=True)
class Picture:
    """One crop to encode."""

    name: str
    content: Content
    geometry: Geometry


def compare_with_diffusers(
    cache: Cache | None,
    model: ModelConfig,
    source: Path | None,
    count: int,
    device: str,
    bars: Progress,
    sources: Path | None = None,
) -> list[Comparison]:
    """Every comparison, in the order that data flows.

    Args:
        cache: its rows, recipe and options are used. None: default options, and captions and pictures of our own.
        sources: for image-to-image, the folder with their sources if they are not in ``source``.
        source: where the cache's images are, by default ``datasets/<name of the cache>``. If they cannot be used,
            crops are synthetic.
        count: rows of the cache that are compared.

    Raises:
        ModelError: the checkpoint lacks an encoder.
    """
    from k5cache.encoders.reference import encode_as_the_pipeline, moments_of_the_vae

    folder = model_folder(model, ENCODER_PARTS)
    config = with_source_dir(config_of(cache.manifest.recipe) if cache else CacheConfig(), sources)
    recipe = build_recipe(model, config, folder)
    comparisons = [] if cache is None else [_compare_recipe(cache, recipe)]
    stored = _stored_captions(cache, count) if cache else {}
    captions = [*CAPTIONS, *(caption for caption in stored.values() if caption not in CAPTIONS)]
    pictures, latent_keys, reason = _pictures(cache, source, config, count)

    qwen_dtype, clip_dtype, vae_dtype = _dtypes(config)
    task = bars.add_task("diffusers' text encoders", total=None, unit="caption", note="")
    encoded = encode_as_the_pipeline(folder, captions, config.text_limit("t2i"), device, (qwen_dtype, clip_dtype))
    bars.update(task, description="diffusers' VAE")
    crops = [images.load_pixels(picture.content, picture.geometry) for picture in pictures]
    moments = moments_of_the_vae(folder, crops, device, vae_dtype)
    bars.remove_task(task)
    reference = dict(zip(captions, encoded, strict=True))

    contents = {picture.name: picture.content for picture in pictures}
    job = Job(contents.__getitem__, Path(), folder, config, device, bars)
    comparisons.append(_compare_token_ids(folder, reference, config.text_limit("t2i")))
    comparisons += _compare_texts(job, reference)
    comparisons += _compare_latents(job, pictures, moments, recipe)
    if cache:
        comparisons += _compare_stored_texts(cache, stored, reference)
        comparisons.append(_compare_stored_latents(cache, latent_keys, pictures, moments, reason))
    return comparisons


def _compare_recipe(cache: Cache, recipe: dict[str, Any]) -> Comparison:
    differing = differences(cache.manifest.recipe, recipe, ("text", "latents"))
    return check(
        "recipe of the cache: template, crop, weights", "this diffusers, this model", "; ".join(map(str, differing))
    )


def _compare_token_ids(folder: Path, reference: dict[str, Encoded], limit: int) -> Comparison:
    import torch

    from k5cache.encoders.pipeline import clean
    from k5cache.encoders.qwen import load_tokenizer, tokenize

    tokenizer = load_tokenizer(folder)
    pairs = [
        (f"{caption[:32]!r}", torch.tensor(tokenize(tokenizer, clean(caption), limit).ids), torch.tensor(theirs.ids))
        for caption, theirs in reference.items()
    ]
    return compare(f"token ids of {len(pairs)} captions", PIPELINE, pairs)


def _compare_texts(job: Job, reference: dict[str, Encoded]) -> list[Comparison]:
    """Captions through an encode's own passes, compared with the pipeline."""
    from k5cache.encoders.pipeline import clean

    ours = Collector()
    encode_texts(job, ours, [TextJob(caption, clean(caption)) for caption in reference])
    precise = max(_ALLOWED.get(job.config.text_encoder_1_precision, 0.0), _ALLOWED.get(job.config.text_batching, 0.0))
    allowed = {"prompt_embeds": precise, "pooled": _ALLOWED.get(job.config.text_batching, 0.0)}
    return [
        compare(
            f"{name} of {len(reference)} captions",
            PIPELINE,
            [(f"{c[:32]!r}", ours.rows[c][name], getattr(theirs, name)) for c, theirs in reference.items()],
            allowed[name],
        )
        for name in ("prompt_embeds", "pooled")
    ]


def _compare_latents(
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
            f"{name} of {len(pictures)} crops",
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


def _stored_captions(cache: Cache, count: int) -> dict[str, str]:
    """Text key -> caption of ``count`` random rows, and of up to ``count`` prompts that samples are drawn from."""
    keys = sorted(cache.text_lengths())
    chosen = random.Random(0).sample(keys, min(count, len(keys)))
    chosen += sorted(set(cache.manifest.prompts.values()) - set(chosen))[:count]
    return {key: cache.text(key).caption for key in chosen}


def _compare_stored_texts(cache: Cache, stored: dict[str, str], reference: dict[str, Encoded]) -> list[Comparison]:
    rows = {key: cache.text(key) for key in stored}
    precision = table_of(cache.root, cache.manifest.recipe, "text").get("text_encoder_1_precision")
    return [
        compare(
            f"cached {name} of {len(rows)} captions",
            PIPELINE,
            [
                (f"{row.caption[:32]!r}", getattr(row, name), getattr(reference[row.caption], name))
                for row in rows.values()
            ],
            max(TOLERANCE["text"], _ALLOWED.get(precision or "", 0.0)),
        )
        for name in ("prompt_embeds", "pooled")
    ]


def _compare_stored_latents(
    cache: Cache,
    latent_keys: dict[str, str],
    pictures: Sequence[Picture],
    moments: Sequence[tuple[torch.Tensor, torch.Tensor]],
    reason: str,
) -> Comparison:
    title = f"cached latents of {len(latent_keys)} images"
    if not latent_keys:
        return not_run(title, VAE, reason)
    pairs = [
        (f"{p.name} {name}", tensor, theirs[("mean", "std").index(name)].half())
        for p, theirs in zip(pictures, moments, strict=True)
        for name, tensor in cache.latents(latent_keys[p.name]).items()
        if name in ("mean", "std")
    ]
    return compare(title, VAE, pairs, TOLERANCE["latents"])


def _pictures(
    cache: Cache | None, source: Path | None, config: CacheConfig, count: int
) -> tuple[list[Picture], dict[str, str], str]:
    """Crops to encode, and if they are of the cache's own images, name -> latent key; else why they are not."""
    reason = "there is no cache"
    if cache is not None:
        usual = Path("datasets") / cache.root.resolve().name
        if source is None and not usual.exists():  # the name is not looked up as a dataset on the hub
            reason = f"there is no {usual}: name the folder of the images with --source"
        else:
            keyed, reason = _images_of(cache, source or usual, config, count)
            if keyed:
                return [picture for picture, _ in keyed], {picture.name: key for picture, key in keyed}, ""
    return _synthetic(min(config.resolution, PICTURE_SIDE)), {}, reason


def _images_of(cache: Cache, source: Path, config: CacheConfig, count: int) -> tuple[list[tuple[Picture, str]], str]:
    """Some of the cache's images that have not changed, each with its latent key; and why others are left out."""
    try:
        read = find.find(source, config, cache.kind).read
    except K5Error as error:
        return [], f"{error.problem}; name the folder of the images with --source"
    pictures, reason = list[tuple[Picture, str]](), ""
    for i in random.Random(0).sample(range(len(cache)), len(cache)):
        row = cache.row(i)
        try:
            content = read(row.path)
            if images.hash_content(content) != row.content_hash:
                reason = f"{row.path} has changed since it was encoded"
                continue
        except UnreadableImage as error:
            reason = f"{row.path} {error.reason}"
            continue
        pictures.append((Picture(row.path, content, geometry_of(row)), row.latent_key))
        if len(pictures) == count:
            break
    return pictures, reason


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


def _dtypes(config: CacheConfig) -> tuple[torch.dtype, torch.dtype, torch.dtype]:
    """Of Qwen, CLIP and the VAE; the reference of int8 is bfloat16."""
    return (
        torch_dtype(config.text_encoder_1_precision),
        torch_dtype(config.text_encoder_2_precision),
        torch_dtype(config.vae_precision),
    )

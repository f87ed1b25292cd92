"""Is what this machine would cache what diffusers computes? Ours by an encode's own code, on the user's checkpoint.

Captions and crops go through ``passes`` as an encode sends them, and through ``Kandinsky5T2IPipeline.encode_prompt``
and ``vae.encode``. Of a cache, stored rows are compared too. One part of the checkpoint is loaded at a time.
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
from k5cache.encode import differences, plan
from k5cache.encode.image_pass import encode_latents
from k5cache.encode.job import Job
from k5cache.encode.precision import DTYPES
from k5cache.encode.request import build_recipe, config_of
from k5cache.encode.sink import Collector
from k5cache.encode.text_pass import encode_texts
from k5cache.exact.reencode import TOLERANCE
from k5cache.options import CacheConfig
from k5cache.shared.checkpoint import ENCODER_PARTS, model_folder
from k5cache.shared.comparison import Comparison, check, compare, not_run
from k5cache.shared.errors import K5Error
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
PICTURE_SIDE = 256  # pixels: of synthetic pictures, so that a float32 VAE on a CPU needs seconds
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
    cache: Cache | None, model: ModelConfig, source: Path | None, count: int, device: str, bars: Progress
) -> list[Comparison]:
    """Every comparison, in the order that data flows.

    Args:
        cache: whose rows, recipe and options are used; None: the defaults, and captions and pictures of our own.
        source: where the cache's images are; by default ``datasets/<name of the cache>``. Else crops are synthetic.
        count: rows of the cache that are compared.

    Raises:
        ModelError: the checkpoint lacks an encoder.
    """
    from k5cache.encoders.reference import encode_as_the_pipeline, moments_of_the_vae

    folder = model_folder(model, ENCODER_PARTS)
    config = config_of(cache.manifest.recipe) if cache else CacheConfig()
    recipe = build_recipe(model, config, folder)
    made = [] if cache is None else [_recipe(cache, recipe)]
    stored = _stored_captions(cache, count) if cache else {}
    captions = [*CAPTIONS, *(caption for caption in stored.values() if caption not in CAPTIONS)]
    pictures, rows, why = _pictures(cache, source, config, count)

    torch_dtypes = _dtypes(config)
    bars_task = bars.add_task("diffusers' text encoders", total=None, unit="caption", note="")
    reference = encode_as_the_pipeline(folder, captions, config.max_sequence_length, device, torch_dtypes[:2])
    bars.update(bars_task, description="diffusers' VAE")
    crops = [images.load_pixels(picture.content, picture.geometry) for picture in pictures]
    moments = moments_of_the_vae(folder, crops, device, torch_dtypes[2])
    bars.remove_task(bars_task)
    by_caption = dict(zip(captions, reference, strict=True))

    contents = {picture.name: picture.content for picture in pictures}
    job = Job(contents.__getitem__, Path(), folder, config, device, bars)
    ours = Collector()
    made.append(_token_ids(folder, by_caption, config.max_sequence_length))
    made += _texts(job, ours, by_caption)
    made += _latents(job, ours, pictures, moments, recipe)
    if cache:
        made += _stored_texts(cache, stored, by_caption)
        made.append(_stored_latents(cache, rows, pictures, moments, why))
    return made


def _recipe(cache: Cache, recipe: dict[str, Any]) -> Comparison:
    found = differences.differences(cache.manifest.recipe, recipe, ("text", "latents"))
    return check(
        "recipe of the cache: template, crop, weights", "this diffusers, this model", "; ".join(map(str, found))
    )


def _token_ids(folder: Path, reference: dict[str, Encoded], limit: int) -> Comparison:
    import torch

    from k5cache.encoders.pipeline import clean
    from k5cache.encoders.qwen import load_tokenizer, tokenize

    tokenizer = load_tokenizer(folder)
    pairs = [
        (f"{caption[:32]!r}", torch.tensor(tokenize(tokenizer, clean(caption), limit).ids), torch.tensor(theirs.ids))
        for caption, theirs in reference.items()
    ]
    return compare(f"token ids of {len(pairs)} captions", PIPELINE, pairs)


def _texts(job: Job, ours: Collector, reference: dict[str, Encoded]) -> list[Comparison]:
    """Captions through an encode's own passes against the pipeline."""
    from k5cache.encoders.pipeline import clean

    encode_texts(job, ours, [plan.TextJob(caption, clean(caption)) for caption in reference])
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


def _latents(
    job: Job,
    ours: Collector,
    pictures: Sequence[Picture],
    moments: Sequence[tuple[torch.Tensor, torch.Tensor]],
    recipe: dict[str, Any],
) -> list[Comparison]:
    """Crops through an encode's own pass against the VAE, in the float16 that is stored."""
    from diffusers import AutoencoderKL

    failed = encode_latents(job, ours, [plan.LatentJob(p.name, p.name, p.geometry) for p in pictures])
    names = ("mean", "std") if job.config.posterior == "sample" else ("mean",)
    made = [
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
    factor = AutoencoderKL.load_config(job.folder / "vae", local_files_only=True)["scaling_factor"]
    found = recipe["latents"]["scaling_factor"]
    problem = "" if found == factor else f"scaling_factor is {found} instead of {factor}"
    return [*made, check("scaling_factor", "the VAE's config", problem)]


def _stored_captions(cache: Cache, count: int) -> dict[str, str]:
    """Text key -> caption of some random rows, always with the prompts that samples are drawn from."""
    keys = sorted(cache.text_lengths())
    chosen = random.Random(0).sample(keys, min(count, len(keys)))
    chosen += sorted(set(cache.manifest.prompts.values()) - set(chosen))[:count]
    return {key: cache.text(key).caption for key in chosen}


def _stored_texts(cache: Cache, stored: dict[str, str], reference: dict[str, Encoded]) -> list[Comparison]:
    rows = {key: cache.text(key) for key in stored}
    precision = differences.table_of(cache.root, cache.manifest.recipe, "text").get("text_encoder_1_precision")
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


def _stored_latents(
    cache: Cache,
    rows: dict[str, str],
    pictures: Sequence[Picture],
    moments: Sequence[tuple[torch.Tensor, torch.Tensor]],
    why: str,
) -> Comparison:
    what, against = f"cached latents of {len(rows)} images", VAE
    if not rows:
        return not_run(what, against, why)
    pairs = [
        (f"{p.name} {name}", tensor, theirs[("mean", "std").index(name)].half())
        for p, theirs in zip(pictures, moments, strict=True)
        for name, tensor in cache.latents(rows[p.name]).items()
        if name in ("mean", "std")
    ]
    return compare(what, against, pairs, TOLERANCE["latents"])


def _pictures(
    cache: Cache | None, source: Path | None, config: CacheConfig, count: int
) -> tuple[list[Picture], dict[str, str], str]:
    """Crops to encode; of the cache's own images, their latent keys too, or why there are none."""
    why = "there is no cache"
    if cache is not None:
        usual = Path("datasets") / cache.root.resolve().name
        if source is None and not usual.exists():  # never a guess at a hub dataset's name
            why = f"there is no {usual}: name the folder of the images with --source"
            return _synthetic(min(config.resolution, PICTURE_SIDE)), {}, why
        found, why = _images_of(cache, source or usual, config, count)
        if found:
            return [picture for picture, _ in found], {picture.name: key for picture, key in found}, ""
    return _synthetic(min(config.resolution, PICTURE_SIDE)), {}, why


def _images_of(cache: Cache, source: Path, config: CacheConfig, count: int) -> tuple[list[tuple[Picture, str]], str]:
    """Some of the cache's images as they are now, each with its latent key; passed over where they have changed."""
    try:
        read = find.find(source, config).read
    except K5Error as error:
        return [], f"{error.problem}; name the folder of the images with --source"
    found, why = [], ""
    for i in random.Random(0).sample(range(len(cache)), len(cache)):
        row = cache.row(i)
        try:
            content = read(row.path)
            if images.hash_content(content) != row.content_hash:
                why = f"{row.path} has changed since it was encoded"
                continue
        except UnreadableImage as error:
            why = f"{row.path} {error.reason}"
            continue
        found.append((Picture(row.path, content, plan.geometry_of(row)), row.latent_key))
        if len(found) == count:
            break
    return found, why


def _synthetic(resolution: int) -> list[Picture]:
    """A square and a wide picture of soft shapes and noise, a little larger than their buckets."""
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
    import torch

    named = (config.text_encoder_1_precision, config.text_encoder_2_precision, config.vae_precision)
    first, second, third = (getattr(torch, DTYPES.get(name, "bfloat16")) for name in named)
    return first, second, third

"""Is what this machine would cache what diffusers computes? Checked with an encode's own code on a checkpoint.

Captions and crops go through the passes of an encode, and through ``Kandinsky5T2IPipeline.encode_prompt`` and
``vae.encode``. If there is a cache, its stored rows are compared too. One part of the checkpoint is loaded at a time.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.progress import Progress

from k5cache.encode.differences import differences, table_of
from k5cache.encode.job import Job, SourceView, TextJob
from k5cache.encode.precision import torch_dtype
from k5cache.encode.request import build_recipe
from k5cache.encode.sink import Collector
from k5cache.encode.text_pass import encode_texts, tokenizer_of
from k5cache.exact.crops import Picture, Sample, compare_latents, compare_stored_latents, sample_pictures
from k5cache.exact.reencode import TOLERANCE
from k5cache.options import CacheConfig, config_of, with_source_dir
from k5cache.shared.checkpoint import ENCODER_PARTS, model_folder
from k5cache.shared.comparison import Comparison, check, compare, not_run
from k5cache.shared.kind import Kind, kind_of_recipe
from k5cache.shared.model import ModelConfig
from k5cache.shared.units import count_of
from k5cache.sources import images
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
PIPELINE = "pipeline.encode_prompt"
_ALLOWED = {"int8": 0.1, "fast": 0.02}  # of the norm: 8 bits in 28 layers; bfloat16 products of another size


@dataclass(frozen=True)
class Text:
    """A caption, or for image-to-image an instruction with its source."""

    caption: str
    source: Picture | None = None

    @property
    def name(self) -> str:
        """For the table."""
        return f"{self.caption[:32]!r}" + (f" for {self.source.name}" if self.source else "")

    def job(self, key: str, kind: Kind) -> TextJob:
        """What an encode would have to do for it."""
        from k5cache.encoders.pipeline import clean

        view = SourceView(self.source.name, "", self.source.geometry) if self.source else None
        return TextJob(key, clean(self.caption, kind), view)


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
    kind = kind_of_recipe(recipe)
    comparisons = [] if cache is None else [_compare_recipe(cache, recipe)]
    sample = sample_pictures(cache, source, config, count)
    stored = _stored_texts(cache, count, sample) if cache else {}
    texts = list(dict.fromkeys([*_own_texts(kind, sample), *stored.values()]))

    qwen_dtype, clip_dtype, vae_dtype = _dtypes(config)
    task = bars.add_task("diffusers' text encoders", total=None, unit="caption", note="")
    captions, limit = [text.caption for text in texts], config.text_limit(kind)
    encoded = encode_as_the_pipeline(
        folder, captions, limit, device, (qwen_dtype, clip_dtype), _sources_of(texts, config)
    )
    bars.update(task, description="diffusers' VAE")
    crops = [images.load_pixels(picture.content, picture.geometry) for picture in sample.pictures]
    moments = moments_of_the_vae(folder, crops, device, vae_dtype)
    bars.remove_task(task)
    reference = dict(zip(texts, encoded, strict=True))

    contents = {picture.name: picture.content for picture in sample.pictures}
    job = Job(contents.__getitem__, Path(), folder, config, device, bars, read_source=contents.__getitem__)
    comparisons.append(_compare_token_ids(job, reference, kind))
    comparisons += _compare_texts(job, reference, kind)
    comparisons += compare_latents(job, sample.pictures, moments, recipe)
    if cache:
        comparisons += _compare_stored_texts(cache, stored, reference, sample.reason)
        comparisons.append(compare_stored_latents(cache, sample.latent_keys, sample.pictures, moments, sample.reason))
    return comparisons


def _own_texts(kind: Kind, sample: Sample) -> list[Text]:
    """Captions of our own. For image-to-image each is an instruction for one of the pictures, in turn."""
    if kind == "t2i":
        return [Text(caption) for caption in CAPTIONS]
    return [Text(caption, sample.pictures[i % len(sample.pictures)]) for i, caption in enumerate(CAPTIONS)]


def _sources_of(texts: Sequence[Text], config: CacheConfig) -> list[torch.Tensor] | None:
    """What Qwen sees of the source of each text, uint8 ``[3, H, W]``; None for text-to-image."""
    load = images.load_whole if config.source_view == "whole" else images.load_pixels
    seen = [load(text.source.content, text.source.geometry) for text in texts if text.source]
    return seen or None


def _compare_recipe(cache: Cache, recipe: dict[str, Any]) -> Comparison:
    differing = differences(cache.manifest.recipe, recipe, ("text", "latents"))
    return check(
        "recipe of the cache: template, crop, weights", "this diffusers, this model", "; ".join(map(str, differing))
    )


def _compare_token_ids(job: Job, reference: dict[Text, Encoded], kind: Kind) -> Comparison:
    import torch

    tokenize = tokenizer_of(job, is_with_sources=kind == "i2i")
    pairs = [
        (text.name, torch.tensor(tokenize(text.job("", kind)).ids), torch.tensor(theirs.ids))
        for text, theirs in reference.items()
    ]
    return compare(f"token ids of {count_of(len(pairs), 'caption')}", PIPELINE, pairs)


def _compare_texts(job: Job, reference: dict[Text, Encoded], kind: Kind) -> list[Comparison]:
    """Captions through an encode's own passes, compared with the pipeline."""
    ours, keys = Collector(), {text: str(i) for i, text in enumerate(reference)}
    encode_texts(job, ours, [text.job(key, kind) for text, key in keys.items()])
    precise = max(_ALLOWED.get(job.config.text_encoder_1_precision, 0.0), _ALLOWED.get(job.config.text_batching, 0.0))
    allowed = {"prompt_embeds": precise, "pooled": _ALLOWED.get(job.config.text_batching, 0.0)}
    return [
        compare(
            f"{name} of {count_of(len(reference), 'caption')}",
            PIPELINE,
            [(text.name, ours.rows[keys[text]][name], getattr(theirs, name)) for text, theirs in reference.items()],
            allowed[name],
        )
        for name in ("prompt_embeds", "pooled")
    ]


def _stored_texts(cache: Cache, count: int, sample: Sample) -> dict[str, Text]:
    """Text key -> text of ``count`` random rows, and of up to ``count`` prompts that samples are drawn from.

    For image-to-image those of the sample's own images, which have to be there: a text is of its source, too.
    """
    if cache.kind == "i2i":
        return {key: Text(cache.text(key).caption, source) for key, source in sample.instructions.items()}
    keys = cache.texts().keys
    chosen = [keys[i].as_py() for i in random.Random(0).sample(range(len(keys)), min(count, len(keys)))]
    chosen += sorted(set(cache.manifest.prompts.values()) - set(chosen))[:count]
    return {key: Text(cache.text(key).caption) for key in chosen}


def _compare_stored_texts(
    cache: Cache, stored: dict[str, Text], reference: dict[Text, Encoded], reason: str
) -> list[Comparison]:
    rows = {key: cache.text(key) for key in stored}
    precision = table_of(cache.root, cache.manifest.recipe, "text").get("text_encoder_1_precision")
    titles = {name: f"cached {name} of {count_of(len(rows), 'caption')}" for name in ("prompt_embeds", "pooled")}
    if not stored:
        return [not_run(title, PIPELINE, reason) for title in titles.values()]
    return [
        compare(
            title,
            PIPELINE,
            [
                (stored[key].name, getattr(row, name), getattr(reference[stored[key]], name))
                for key, row in rows.items()
            ],
            max(TOLERANCE["text"], _ALLOWED.get(precision or "", 0.0)),
        )
        for name, title in titles.items()
    ]


def _dtypes(config: CacheConfig) -> tuple[torch.dtype, torch.dtype, torch.dtype]:
    """Of Qwen, CLIP and the VAE; the reference of int8 is bfloat16."""
    return (
        torch_dtype(config.text_encoder_1_precision),
        torch_dtype(config.text_encoder_2_precision),
        torch_dtype(config.vae_precision),
    )

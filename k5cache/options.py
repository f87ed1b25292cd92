"""Which options has ``[cache]``? Each is written once, and the docstring under it is its help."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal

from k5cache.buckets import MAX_SIDE, MAX_TEXT_TOKENS, Framing, bucket_table, fine_table
from k5cache.shared.errors import CacheError
from k5cache.shared.kind import Kind
from k5cache.shared.model import path_problems

Precision = Literal["bf16", "fp16", "fp32"]
TextPrecision = Literal["bf16", "fp16", "fp32", "int8"]
CaptionLines = Literal["each", "whole", "first"]
_SELECTION = (
    *("resolution", "buckets", "crop", "flip", "minimum_image_size", "no_upscale"),
    *("caption_strategy", "instance_prompt", "trigger", "caption_column", "image_column", "split", "dataset_config"),
)

_SELECTION_IF_SET = (
    *("source_column", "caption_extension", "caption_lines", "caption_prefix", "caption_suffix"),
    *("shuffle_tags", "keep_tokens", "wildcards", "caption_variants", "class_word", "class_replaces"),
)
"""Options that came later: a recipe has them only if they are set, so that older caches are not stale."""
_SUFFIX = re.compile(r"\.?\w[\w-]{0,30}")
_MOST_VARIANTS = 100

_ONLY_I2I = ("source_dir", "source_column", "source_view", "empty_instruction")

DEFAULT_TEXT_TOKENS: Mapping[Kind, int] = {"t2i": 512, "i2i": 1024}
"""``max_sequence_length`` of the pipelines' own ``encode_prompt``."""


@dataclass(frozen=True)
class CacheConfig:
    """``[cache]``: how stage 1 encodes images and captions."""

    resolution: int = 1024
    """Pixels on the side of the square bucket; the other native buckets are scaled with it. A multiple of 16."""
    buckets: Literal["native", "square"] = "native"
    """``native``: the seven sizes the model was trained at, scaled to ``resolution``. ``square``: one size only."""
    crop: Literal["center", "random", "none"] = "center"
    """Which part of an image is trained on, after it is resized to cover its bucket. ``random`` depends on the image's
    bytes, so every encode crops the same part. ``none`` cuts nothing: the image is resized to the nearest of about 200
    buckets, which at 1024 have its aspect ratio to within 2 %, instead of the seven native ones."""
    flip: bool = False
    """Add a copy of each image, mirrored left to right, as an item of its own. Not for faces, hands or writing."""
    minimum_image_size: int = 0
    """Skip images with a side of fewer pixels, and report them."""
    no_upscale: bool = False
    """Skip images smaller than their bucket, and report them. Otherwise they are enlarged, and reported."""
    caption_strategy: Literal["textfile", "filename", "instanceprompt", "metadata"] = "textfile"
    """Where captions come from. ``textfile``: a file beside the image, ``name.txt`` for ``name.jpg``; see
    ``caption_extension`` and ``caption_lines``. ``filename``: the image's name, with ``_`` and ``-`` as spaces.
    ``instanceprompt``: ``instance_prompt`` for every image. ``metadata``: ``metadata.jsonl``, ``.csv`` or ``.parquet``
    with a column ``file_name``, as `datasets` defines it. In tables, tars and datasets, ``textfile`` and ``metadata``
    both mean ``caption_column``."""
    caption_extension: str | None = None
    """The suffix of the caption files beside the images: ``caption`` for ``name.caption``. Without it, that is
    ``.txt``, where there is none ``.caption``, and else a ``.json`` with a field ``caption``, ``text``, ``captions`` or
    ``prompt``, or the one that ``caption_column`` names. Of a tar, the files beside the images too."""
    caption_lines: CaptionLines = "each"
    """What the lines of a caption file are. ``each``: every line is a caption, and each step draws one. ``whole``: the
    file is one caption, line breaks count as spaces. ``first``: only the first line is used."""
    instance_prompt: str | None = None
    """The caption of every image, for ``caption_strategy = "instanceprompt"``."""
    trigger: str | None = None
    """Text before every caption, followed by ``, `` unless it ends in a space: ``sks`` gives ``sks, a cat``. For
    image-to-image it comes last, ``make it red, sks``: the pipeline cuts an instruction's first tokens off."""
    class_word: str | None = None
    """For differential output preservation (``train.objective.preservation_weight``): the class of what is trained,
    such as ``woman``. Each caption is encoded once more with this in the place of ``trigger``: ``woman, a portrait``
    beside ``sks, a portrait``. This doubles the text rows."""
    class_replaces: str | None = None
    """What ``class_word`` replaces, where that is not ``trigger``: a word that stands in the captions as written."""
    caption_prefix: str | None = None
    """Text before every caption and behind ``trigger``, followed by ``, `` unless it ends in a space or a mark such as
    ``:``. ``a photo of `` with a space at its end gives ``a photo of a cat``."""
    caption_suffix: str | None = None
    """Text behind every caption, after ``, `` unless it begins with a space or a mark, or the caption ends in a mark.
    ``trigger`` of image-to-image comes behind it."""
    shuffle_tags: bool = False
    """Encode each caption in several orders of its tags, the parts between commas: as written, and in other orders,
    ``caption_variants`` in all. Each step draws one. Trigger, prefix and suffix keep their places. Only for captions
    that are lists of tags."""
    keep_tokens: int = 0
    """For ``shuffle_tags``: this many tags at the beginning keep their places."""
    wildcards: bool = False
    """Replace ``{a|b|c}`` in captions by one of its parts, drawn at random ``caption_variants`` times for each caption.
    Groups may contain groups; braces without ``|`` are text, and so are ``\\{``, ``\\|`` and ``\\}``."""
    caption_variants: int = 4
    """The most rows that one caption becomes by ``shuffle_tags`` and ``wildcards``, 1 to 100. Stage 2 has no text
    encoder, so they are drawn when the cache is encoded; the same caption always gives the same ones."""
    caption_column: str | None = None
    """For a table, tar or dataset: the column with the caption or a list of captions; ``json.caption`` means a field of
    a column. The default is ``text``, ``caption``, ``captions``, ``prompt`` or ``txt``, whichever exists."""
    image_column: str | None = None
    """For a table, tar or dataset: the column with images, or with their paths relative to the table. The default is
    the column that contains images, or ``image``, ``file_name``, ``image_path``, ``path`` or ``filename``."""
    source_dir: str | None = None
    """For image-to-image: the folder with the sources, the pictures before the edit, under the same names as the edited
    ones; their suffixes may differ. ``--sources`` sets it. Without it, pairs are in one folder, named ``X_start.png``
    and ``X_end.png`` or ``X.source.png`` and ``X.png``, or ``source_column`` names the sources."""
    source_column: str | None = None
    """For image-to-image and a table, tar or dataset: the column with the sources, or with their paths relative to the
    table. Without it, that is ``source``, ``source_image``, ``source_file_name``, ``source_img``, ``input_image`` or
    ``original_image``, whichever exists, and in a tar ``X.source.png`` beside ``X.png``."""
    split: str = "train"
    """The split of a dataset, or a slice in the notation of `datasets`: ``train[:1000]``."""
    dataset_config: str | None = None
    """The configuration of a hub dataset that has several."""
    max_sequence_length: int | None = None
    """The maximum number of a caption's tokens, without the template. The rest is cut off. For image-to-image those of
    the source count too, and pairs with more are skipped, because the pipeline fails on them. At most 1024. Without it,
    as many as the pipeline takes: 512, and 1024 for image-to-image."""
    source_view: Literal["crop", "whole"] = "crop"
    """For image-to-image: which picture Qwen sees, at half size. ``crop``: the part of the source that the VAE sees, as
    if that part were the picture given to the pipeline. ``whole``: all of the source's file."""
    empty_instruction: bool = True
    """For image-to-image: also encode the empty instruction for each source, about 2.3 MB a row. Guidance and caption
    dropout need it."""
    posterior: Literal["sample", "mean"] = "sample"
    """``sample`` stores mean and std, and each step draws a fresh sample. ``mean`` stores the mean only: half the
    bytes, no sampling."""
    text_encoder_1_precision: TextPrecision = "bf16"
    """Of Qwen2.5-VL, which inference runs in bf16. ``int8`` stores its matrices in 8 bits (7 GB instead of 13). The
    embeddings then differ from the pipeline's, and the encode prints by how much. The vision tower of image-to-image
    stays in bf16."""
    text_encoder_2_precision: Precision = "bf16"
    """Of CLIP, which inference runs in bf16."""
    text_batching: Literal["exact", "fast"] = "exact"
    """``exact`` encodes captions one by one and gives the same bits as inference. ``fast`` encodes many captions side
    by side, without padding, and many sources of image-to-image; the larger matrix products round differently in the
    last bits."""
    vae_precision: Precision = "fp32"
    """Of the VAE. float32 costs little here and is closest to the true latents."""
    shard_mb: int = 256
    """A shard is committed after this many megabytes or after three minutes. A crash loses only what came after."""

    def refused_for(self, kind: Kind) -> list[str]:
        """The names of the options that are set and act only for the other kind of model."""
        others = () if kind == "i2i" else _ONLY_I2I
        return [f.name for f in fields(self) if f.name in others and getattr(self, f.name) != f.default]

    def text_limit(self, kind: Kind) -> int:
        """``max_sequence_length``, or the default of the pipeline."""
        return self.max_sequence_length or DEFAULT_TEXT_TOKENS[kind]

    @property
    def framing(self) -> Framing:
        """Which images are used, and which part of each."""
        table = fine_table(self.resolution) if self.crop == "none" else bucket_table(self.resolution, self.buckets)
        return Framing(table, self.crop, self.flip, self.minimum_image_size, self.no_upscale)

    @property
    def selection(self) -> dict[str, Any]:
        """The options that decide which rows a cache has, with which crops and captions, for the manifest's recipe."""
        later = {f.name: f.default for f in fields(self) if f.name in _SELECTION_IF_SET}
        set_now = {name: getattr(self, name) for name, default in later.items() if getattr(self, name) != default}
        if self.caption_suffixes is not None:
            set_now["caption_extension"] = self.caption_suffixes[0][1:]
        return {name: getattr(self, name) for name in _SELECTION} | set_now

    @property
    def caption_suffixes(self) -> tuple[str, ...] | None:
        """``caption_extension`` as the suffix of a file, in lower case with its dot; None if it is not set."""
        return None if self.caption_extension is None else (f".{self.caption_extension.lstrip('.').lower()}",)

    def check(self) -> list[str]:
        """What is out of range, one phrase per option."""
        problems = []
        if self.resolution < 64 or self.resolution > 2048 or self.resolution % 16:
            problems.append(f"resolution must be a multiple of 16 from 64 to 2048, found {self.resolution}")
        elif (side := max(max(b.width, b.height) for b in self.framing.table)) > MAX_SIDE:
            problems.append(f"resolution makes a bucket with a side of {side} pixels, the model takes {MAX_SIDE}")
        if self.crop == "none" and self.buckets == "square":
            problems.append('crop = "none" needs buckets = "native": it would press every image into a square')
        if self.minimum_image_size < 0:
            problems.append(f"minimum_image_size must be 0 or more, found {self.minimum_image_size}")
        if (self.caption_strategy == "instanceprompt") != bool((self.instance_prompt or "").strip()):
            problems.append('instance_prompt and caption_strategy = "instanceprompt" need each other')
        problems += self._caption_problems()
        if self.source_dir is not None and self.source_column is not None:
            problems.append("source_dir and source_column both say where the sources are: set one of them")
        if self.source_dir is not None:
            problems += path_problems("source_dir", self.source_dir)
        if self.max_sequence_length is not None and not 1 <= self.max_sequence_length <= MAX_TEXT_TOKENS:
            problems.append(f"max_sequence_length must be 1 to {MAX_TEXT_TOKENS}, found {self.max_sequence_length}")
        if self.shard_mb < 1:
            problems.append(f"shard_mb must be at least 1, found {self.shard_mb}")
        return problems

    def _caption_problems(self) -> list[str]:
        problems = []
        if self.caption_extension is not None and not _SUFFIX.fullmatch(self.caption_extension):
            problems.append(f"caption_extension must be one suffix such as caption, found {self.caption_extension!r}")
        if self.class_word is not None and not self.class_word.strip():
            problems.append("class_word is empty: give the class of what is trained, such as woman")
        if self.keep_tokens < 0:
            problems.append(f"keep_tokens must be 0 or more, found {self.keep_tokens}")
        if not 1 <= self.caption_variants <= _MOST_VARIANTS:
            problems.append(f"caption_variants must be 1 to {_MOST_VARIANTS}, found {self.caption_variants}")
        return problems


def with_source_dir(config: CacheConfig, sources: Path | None) -> CacheConfig:
    """The options of a cache, which keeps no folder of sources, with ``sources`` as that folder."""
    return replace(config, source_dir=str(sources) if sources else None)


def config_of(recipe: Mapping[str, Any]) -> CacheConfig:
    """The options that the recipe in a cache's manifest was built from.

    Raises:
        CacheError: the recipe is not one that this version writes.
    """
    tables = [recipe.get(name) for name in ("text", "latents", "selection")]
    names = {field.name for field in fields(CacheConfig)}
    try:
        values = {key: value for table in tables for key, value in dict(table or {}).items() if key in names}
        return CacheConfig(**values)
    except (TypeError, ValueError) as error:
        raise CacheError(f"The recipe in the manifest is not complete: {error}", "Encode again") from None

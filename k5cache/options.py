"""The options both stages share and those of stage 1, each written once. The docstring under an option is its help."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from k5cache.buckets import MAX_SIDE, Framing, bucket_table, fine_table

Precision = Literal["bf16", "fp16", "fp32"]
TextPrecision = Literal["bf16", "fp16", "fp32", "int8"]
_SELECTION = (
    *("resolution", "buckets", "crop", "flip", "minimum_image_size", "no_upscale"),
    *("caption_strategy", "instance_prompt", "trigger", "caption_column", "image_column", "split", "dataset_config"),
)


@dataclass(frozen=True)
class CacheConfig:
    """``[cache]``: stage 1, images and captions to shards."""

    resolution: int = 1024
    """Pixels on the side of the square bucket; the other native buckets are scaled with it. A multiple of 16."""
    buckets: Literal["native", "square"] = "native"
    """``native``: the seven sizes the model was trained at, scaled to ``resolution``. ``square``: one size only."""
    crop: Literal["center", "random", "none"] = "center"
    """Which part of an image is kept when it has covered its bucket. ``random``: drawn from the image's own bytes, so
    the same at every encode. ``none``: nothing is cut; the image is resized to the nearest of about 200 buckets of its
    own aspect (at 1024 to within 2 %) instead of the seven native ones."""
    flip: bool = False
    """Each image a second time, mirrored left to right, as an item of its own. Not for faces, hands or writing."""
    minimum_image_size: int = 0
    """Images with a side of fewer pixels are skipped and reported."""
    no_upscale: bool = False
    """Images smaller than their bucket are skipped and reported; otherwise they are enlarged and reported."""
    caption_strategy: Literal["textfile", "filename", "instanceprompt", "metadata"] = "textfile"
    """Where captions come from. ``textfile``: ``name.txt`` beside ``name.jpg``, one caption a line, a step draws one.
    ``filename``: the image's name, ``_`` and ``-`` as spaces. ``instanceprompt``: ``instance_prompt`` for every image.
    ``metadata``: ``metadata.jsonl``, ``.csv`` or ``.parquet`` with a column ``file_name``, as `datasets` defines it.
    Tables, tars and datasets have captions in a column: ``textfile`` and ``metadata`` both mean ``caption_column``."""
    instance_prompt: str | None = None
    """The caption of every image, for ``caption_strategy = "instanceprompt"``."""
    trigger: str | None = None
    """Put before every caption, with ``, `` between unless it ends in a space: ``sks`` makes ``sks, a cat``."""
    caption_column: str | None = None
    """Of a table, tar or dataset: the column with captions, a string or a list of them; ``json.caption`` for a field of
    a column. By default ``text``, ``caption``, ``captions``, ``prompt`` or ``txt``, whichever there is."""
    image_column: str | None = None
    """Of a table, tar or dataset: the column with images, or with their paths relative to the table. By default the one
    that holds images, or ``image``, ``file_name``, ``image_path``, ``path`` or ``filename``."""
    split: str = "train"
    """Of a dataset; slices as `datasets` writes them: ``train[:1000]``."""
    dataset_config: str | None = None
    """Of a hub dataset that has several."""
    max_sequence_length: int = 512
    """Tokens of a caption that are kept, after the template. The pipeline's own default is 512; at most 1024."""
    posterior: Literal["sample", "mean"] = "sample"
    """``sample``: store mean and std, each step draws a fresh sample. ``mean``: half the bytes, no sampling."""
    text_encoder_1_precision: TextPrecision = "bf16"
    """Qwen2.5-VL. Inference runs it in bf16. ``int8`` holds its matrices in 8 bits (7 GB instead of 13): embeddings are
    then no longer the pipeline's, and by how much is printed."""
    text_encoder_2_precision: Precision = "bf16"
    """CLIP. Inference runs it in bf16."""
    text_batching: Literal["exact", "fast"] = "exact"
    """``exact``: a caption a forward, the bits that inference computes for it. ``fast``: captions side by side, never
    padded; matrix products of another size round differently in the last bits."""
    vae_precision: Precision = "fp32"
    """The VAE. float32 costs little here and is nearest to the true latents."""
    shard_mb: int = 256
    """Megabytes after which a shard is committed, or three minutes: what a crash can lose."""

    @property
    def framing(self) -> Framing:
        """Which images are used and which part of each."""
        table = fine_table(self.resolution) if self.crop == "none" else bucket_table(self.resolution, self.buckets)
        return Framing(table, self.crop, self.flip, self.minimum_image_size, self.no_upscale)

    @property
    def selection(self) -> dict[str, Any]:
        """For the manifest's recipe: what decides which rows there are, with which crops and captions."""
        return {name: getattr(self, name) for name in _SELECTION}

    def check(self) -> list[str]:
        """What is out of range, one phrase an option."""
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
        if not 1 <= self.max_sequence_length <= 1024:
            problems.append(f"max_sequence_length must be 1 to 1024, found {self.max_sequence_length}")
        if self.shard_mb < 1:
            problems.append(f"shard_mb must be at least 1, found {self.shard_mb}")
        return problems

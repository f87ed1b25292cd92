"""The options both stages share and those of stage 1, each written once. The docstring under an option is its help."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from k5cache.errors import RecipeError

Flavour = Literal["t2i-lite-sft", "t2i-lite-pretrain", "i2i-lite-sft", "i2i-lite-pretrain"]
Precision = Literal["bf16", "fp16", "fp32"]

FLAVOURS: dict[str, str] = {
    "t2i-lite-sft": "kandinskylab/Kandinsky-5.0-T2I-Lite-sft-Diffusers",
    "t2i-lite-pretrain": "kandinskylab/Kandinsky-5.0-T2I-Lite-pretrain-Diffusers",
    "i2i-lite-sft": "kandinskylab/Kandinsky-5.0-I2I-Lite-sft-Diffusers",
    "i2i-lite-pretrain": "kandinskylab/Kandinsky-5.0-I2I-Lite-pretrain-Diffusers",
}


@dataclass(frozen=True)
class ModelConfig:
    """``[model]``: which Kandinsky 5 Image, for both stages."""

    flavour: Flavour = "t2i-lite-sft"
    """Which published checkpoint. T2I and its pretrain share their encoders, so one cache serves both."""
    path: str | None = None
    """A folder in the diffusers layout, or another hub repository, instead of the flavour's own."""
    revision: str | None = None
    """Branch, tag or commit of the hub repository."""

    @property
    def source(self) -> str:
        """The folder or hub repository to load from."""
        return self.path or FLAVOURS[self.flavour]


@dataclass(frozen=True)
class CacheConfig:
    """``[cache]``: stage 1, images and captions to shards."""

    resolution: int = 1024
    """Pixels on the side of the square bucket; the other native buckets are scaled with it. A multiple of 16."""
    buckets: Literal["native", "square"] = "native"
    """``native``: the seven sizes the model was trained at, scaled to ``resolution``. ``square``: one size only."""
    caption_strategy: Literal["textfile"] = "textfile"
    """Where captions come from. ``textfile``: ``name.txt`` beside ``name.jpg``."""
    max_sequence_length: int = 512
    """Tokens of a caption that are kept, after the template. The pipeline's own default is 512; at most 1024."""
    posterior: Literal["sample", "mean"] = "sample"
    """``sample``: store mean and std, each step draws a fresh sample. ``mean``: half the bytes, no sampling."""
    text_encoder_1_precision: Precision = "bf16"
    """Qwen2.5-VL. Inference runs it in bf16."""
    text_encoder_2_precision: Precision = "bf16"
    """CLIP. Inference runs it in bf16."""
    vae_precision: Precision = "fp32"
    """The VAE. float32 costs little here and is nearest to the true latents."""
    shard_mb: int = 256
    """Megabytes after which a shard is committed: what a crash can lose."""

    def check(self) -> list[str]:
        """What is out of range, one phrase an option."""
        problems = []
        if self.resolution < 64 or self.resolution > 2048 or self.resolution % 16:
            problems.append(f"resolution must be a multiple of 16 from 64 to 2048, found {self.resolution}")
        if not 1 <= self.max_sequence_length <= 1024:
            problems.append(f"max_sequence_length must be 1 to 1024, found {self.max_sequence_length}")
        if self.shard_mb < 1:
            problems.append(f"shard_mb must be at least 1, found {self.shard_mb}")
        return problems


def validation_prompts(document: dict[str, Any]) -> tuple[str, ...]:
    """Prompts that stage 2 will sample, read off ``[train.validation]`` so that stage 1 encodes them.

    Returns:
        ``prompts`` and ``negative_prompt`` in order, without repeats; the empty prompt always among them.

    Raises:
        RecipeError: they are not strings. The other keys of ``[train]`` are stage 2's to check.
    """
    train = document.get("train", {})
    validation = train.get("validation", {}) if isinstance(train, dict) else {}
    validation = validation if isinstance(validation, dict) else {}
    prompts = validation.get("prompts", [])
    negative = validation.get("negative_prompt", "")
    if not isinstance(prompts, list) or not all(isinstance(p, str) for p in [*prompts, negative]):
        raise RecipeError(
            "train.validation.prompts must be a list of strings and negative_prompt a string",
            'Write it like prompts = ["a red bicycle", "a lighthouse at dusk"]',
        )
    return tuple(dict.fromkeys(["", negative, *prompts]))

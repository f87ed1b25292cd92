"""What will an encode take on this machine? Mode, VRAM, RAM, disk and time, before any model is loaded."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from k5cache.encode.job import LatentJob, TextJob
from k5cache.encode.precision import ITEM_BYTES, torch_dtype
from k5cache.encoders import memory_plan, vision_plan
from k5cache.options import CacheConfig
from k5cache.shared.checkpoint import read_config
from k5cache.shared.console import human_bytes, human_seconds
from k5cache.shared.host_memory import free_ram
from k5cache.shared.units import count_of


@dataclass(frozen=True)
class Estimate:
    """How one encode will go on one machine."""

    device: str
    num_captions: int
    num_images: int
    num_tokens: int
    """Of all captions, templates included; approximate."""
    text: memory_plan.TextPlan | None
    """None if there is no caption to encode."""
    vae: memory_plan.VaePlan | None
    """None if there is no image to encode."""
    disk: int
    """Bytes that the shards will take; approximate."""
    text_seconds: float | None
    """None if the device is not here to be measured."""
    vae_seconds: float | None

    @property
    def vram(self) -> int:
        """Bytes; the encoders run one after another."""
        return max(self.text.vram if self.text else 0, self.vae.vram if self.vae else 0)

    @property
    def ram(self) -> int:
        """Bytes."""
        return max(self.text.ram if self.text else 0, self.vae.ram if self.vae else 0)

    @property
    def seconds(self) -> float | None:
        """Of both encoders; None if the device is not here to be measured."""
        if self.text_seconds is None or self.vae_seconds is None:
            return None
        return self.text_seconds + self.vae_seconds


def estimate(
    folder: Path,
    config: CacheConfig,
    device: str,
    vram: int | None,
    text_jobs: Sequence[TextJob],
    latent_jobs: Sequence[LatentJob],
    *,
    is_timed: bool = True,
) -> Estimate:
    """The plan of both encoders, and how long they will take.

    Args:
        folder: of the checkpoint.
        device: what ``pick_device`` returned.
        vram: bytes to plan for. Without a GPU too, but then times are not known.
        is_timed: measure the device for a moment, to know the times.

    Raises:
        DoesNotFit: an encoder fits in no mode.
    """
    lengths = token_counts(config, text_jobs)
    pixels = [job.geometry.bucket.width * job.geometry.bucket.height for job in latent_jobs]
    is_here = device != "cpu" or vram is None
    text = plan_text(folder, config, device, vram, lengths, has_sources(text_jobs)) if text_jobs else None
    vae = plan_vae(folder, config, device, vram, latent_jobs) if latent_jobs else None
    text_seconds = vae_seconds = None
    if is_here and is_timed:
        architecture = memory_plan.TextArchitecture.of(read_config(folder, "text_encoder"))
        speed = measured(folder, device, config)
        text_seconds = memory_plan.text_seconds(text, architecture, lengths, speed) if text else 0.0
        if text and has_sources(text_jobs):
            vision = vision_plan.VisionArchitecture.of(read_config(folder, "text_encoder"))
            num_patches = vision.merged * _tokens_of_sources(config, text_jobs)
            text_seconds += memory_plan.vision_seconds(text, vision, num_patches, sum(lengths), speed)
        flops = sum(memory_plan.vae_flops(read_config(folder, "vae"), n) for n in pixels)
        vae_seconds = flops / speed.vae_flops
    return Estimate(
        device if is_here else f"a card of {human_bytes(vram or 0)}",
        len(text_jobs),
        len(latent_jobs),
        sum(lengths),
        text,
        vae,
        _disk(folder, config, lengths, pixels),
        text_seconds,
        vae_seconds,
    )


def token_counts(config: CacheConfig, text_jobs: Sequence[TextJob]) -> list[int]:
    """Tokens of each text, template included, estimated; those of its source are counted."""
    from k5cache.encoders.speed import text_lengths

    limit = config.text_limit("i2i" if has_sources(text_jobs) else "t2i")
    lengths = text_lengths((text_job.caption for text_job in text_jobs), limit)
    return [length + picture_tokens(config, job) for length, job in zip(lengths, text_jobs, strict=True)]


def has_sources(text_jobs: Sequence[TextJob]) -> bool:
    """Whether these are instructions for sources: image-to-image."""
    return any(text_job.source for text_job in text_jobs)


def _tokens_of_sources(config: CacheConfig, text_jobs: Sequence[TextJob]) -> int:
    """Tokens of all sources, each counted once."""
    return sum({text_job.source: picture_tokens(config, text_job) for text_job in text_jobs}.values())


def picture_tokens(config: CacheConfig, text_job: TextJob) -> int:
    """Tokens of a text's source, estimated; 0 for text-to-image."""
    if text_job.source is None:
        return 0
    geometry = text_job.source.geometry
    if config.source_view == "whole":
        return vision_plan.picture_tokens(geometry.width, geometry.height)
    return vision_plan.picture_tokens(geometry.bucket.width, geometry.bucket.height)


def plan_text(
    folder: Path,
    config: CacheConfig,
    device: str,
    vram: int | None,
    lengths: Sequence[int],
    has_pictures: bool = False,
) -> memory_plan.TextPlan:
    """How captions of these token counts will be encoded. Raises ``DoesNotFit``."""
    from k5cache.shared.vram import free_card

    encoder = read_config(folder, "text_encoder")
    architecture = memory_plan.TextArchitecture.of(encoder)
    on_cpu = device == "cpu" and vram is None
    per_token = architecture.flops_per_token
    return memory_plan.plan_text(
        architecture,
        config.text_encoder_1_precision,
        config.text_batching,
        config.text_limit("i2i" if has_pictures else "t2i"),
        vram=vram or free_card(device),
        ram=free_ram(),
        num_tokens=sum(lengths),
        tokens_per_second=measured(folder, device, config).text_flops / per_token if on_cpu else None,
        vision=vision_plan.VisionArchitecture.of(encoder) if has_pictures else None,
    )


def plan_vae(
    folder: Path, config: CacheConfig, device: str, vram: int | None, latent_jobs: Sequence[LatentJob]
) -> memory_plan.VaePlan:
    """How these images will be encoded. Raises ``DoesNotFit``."""
    from k5cache.shared.vram import free_card
    from k5cache.sources.images import num_workers

    largest = max(job.geometry.bucket.width * job.geometry.bucket.height for job in latent_jobs)
    decoded = max(job.geometry.width * job.geometry.height for job in latent_jobs)
    return memory_plan.plan_vae(
        read_config(folder, "vae"),
        config.vae_precision,
        largest,
        vram=vram or free_card(device),
        ram=free_ram(),
        decoded_bytes=2 * num_workers() * 3 * decoded,
    )


@functools.cache
def measured(folder: Path, device: str, config: CacheConfig) -> memory_plan.Speed:
    """``measure_speed``, once per process: it takes a second."""
    from k5cache.encoders.speed import measure_speed

    text, vae = torch_dtype(config.text_encoder_1_precision), torch_dtype(config.vae_precision)
    return measure_speed(folder, device, text, vae, config.text_batching)


def rows(estimated: Estimate) -> list[tuple[str, str]]:
    """(what, value) rows of a table for a person."""
    text, vae = estimated.text, estimated.vae
    table = [("device", estimated.device)]
    if text:
        table.append(("text encoder", f"{text.mode}: {_text_mode(text, estimated.num_tokens)}"))
        tokens = f"about {count_of(estimated.num_tokens, 'token')} with their templates"
        table.append(("captions", f"{estimated.num_captions}, {tokens}"))
    if vae:
        mode = "an image at once" if vae.mode == "whole" else "an image in strips, exact but for rounding"
        table.append(("VAE", f"{vae.mode}: {mode}; {count_of(estimated.num_images, 'image')}"))
    if text and vae and estimated.vram:
        table.append(("VRAM", f"{human_bytes(text.vram)} for text, then {human_bytes(vae.vram)} for images"))
    elif estimated.vram:
        table.append(("VRAM", human_bytes(estimated.vram)))
    table.append(("RAM", human_bytes(estimated.ram)))
    table.append(("disk", human_bytes(estimated.disk)))
    table.append(("time", duration(estimated)))
    return table


def modes(estimated: Estimate) -> str:
    """Each encoder's mode and VRAM, in a line."""
    plans = [("text encoder", estimated.text), ("VAE", estimated.vae)]
    return ", then ".join(
        f"{name} {plan.mode}" + (f" ({human_bytes(plan.vram)} of VRAM)" if plan.vram else "")
        for name, plan in plans
        if plan
    )


def duration(estimated: Estimate) -> str:
    """How long an encode will take, in words."""
    if estimated.seconds is None or estimated.text_seconds is None or estimated.vae_seconds is None:
        return "not known: there is no GPU here to measure"
    parts = f"{human_seconds(estimated.text_seconds)} for {count_of(estimated.num_captions, 'caption')}, "
    parts += f"{human_seconds(estimated.vae_seconds)} for {count_of(estimated.num_images, 'image')}"
    return f"about {human_seconds(estimated.seconds)} ({parts})"


def _text_mode(plan: memory_plan.TextPlan, num_tokens: int) -> str:
    if plan.mode == "resident":
        return "all layers on the device"
    place = "on the device" if plan.parking == "device" else "in host memory"
    num_chunks = plan.num_chunks(num_tokens)
    reads = "once" if num_chunks == 1 else f"{num_chunks} times"
    return f"a layer at a time, states parked {place}, weights read {reads}"


def _disk(folder: Path, config: CacheConfig, lengths: Sequence[int], pixels: Sequence[int]) -> int:
    """Bytes of the rows as they are stored: embeddings without the template, mean and std in float16."""
    hidden = memory_plan.TextArchitecture.of(read_config(folder, "text_encoder")).hidden_size
    text = sum(max(1, n - 40) for n in lengths) * hidden * ITEM_BYTES[config.text_encoder_1_precision]
    moments = 2 if config.posterior == "sample" else 1
    return text + sum(pixels) // 64 * read_config(folder, "vae")["latent_channels"] * 2 * moments

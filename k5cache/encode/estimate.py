"""What will an encode take on this machine? Mode, VRAM, RAM, disk and time, before any model is loaded."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from k5cache.encode.plan import LatentJob, TextJob
from k5cache.encode.precision import ITEM_BYTES, torch_dtype
from k5cache.encoders import memory_plan
from k5cache.options import CacheConfig
from k5cache.shared.checkpoint import read_config
from k5cache.shared.console import human_bytes, human_seconds
from k5cache.shared.host_memory import free_ram


@dataclass(frozen=True)
class Estimate:
    """One encode on one machine, as it will go."""

    device: str
    num_captions: int
    num_images: int
    num_tokens: int
    """Of all captions, templates included; about."""
    text: memory_plan.TextPlan | None
    """None where there is no caption to encode."""
    vae: memory_plan.VaePlan | None
    """None where there is no image to encode."""
    disk: int
    """Bytes that the shards will take; about."""
    text_seconds: float | None
    """None where the device is not here to be measured."""
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
        """Of both encoders."""
        if self.text_seconds is None or self.vae_seconds is None:
            return None
        return self.text_seconds + self.vae_seconds


def estimate(
    folder: Path,
    config: CacheConfig,
    device: str,
    vram: int | None,
    texts: Sequence[TextJob],
    latents: Sequence[LatentJob],
    *,
    is_timed: bool = True,
) -> Estimate:
    """The plan of both encoders, and how long they will take.

    Args:
        folder: of the checkpoint.
        device: as ``pick_device`` gives it.
        vram: bytes to plan for, also where there is no GPU: then times are not known.
        is_timed: measure the device for a moment, to know the times.

    Raises:
        DoesNotFit: an encoder fits in no mode.
    """
    from k5cache.encoders.speed import text_lengths

    lengths = text_lengths((one.caption for one in texts), config.max_sequence_length)
    pixels = [one.geometry.bucket.width * one.geometry.bucket.height for one in latents]
    is_here = device != "cpu" or vram is None
    text = plan_text(folder, config, device, vram, lengths) if texts else None
    vae = plan_vae(folder, config, device, vram, latents) if latents else None
    text_seconds = vae_seconds = None
    if is_here and is_timed:
        architecture = memory_plan.TextArchitecture.of(read_config(folder, "text_encoder"))
        speed = measured(folder, device, config)
        text_seconds = memory_plan.text_seconds(text, architecture, lengths, speed) if text else 0.0
        flops = sum(memory_plan.vae_flops(read_config(folder, "vae"), n) for n in pixels)
        vae_seconds = flops / speed.vae_flops
    return Estimate(
        device if is_here else f"a card of {human_bytes(vram or 0)}",
        len(texts),
        len(latents),
        sum(lengths),
        text,
        vae,
        _disk(folder, config, lengths, pixels),
        text_seconds,
        vae_seconds,
    )


def plan_text(
    folder: Path, config: CacheConfig, device: str, vram: int | None, lengths: Sequence[int]
) -> memory_plan.TextPlan:
    """How captions of about these token counts will be encoded. Raises ``DoesNotFit``."""
    from k5cache.shared.vram import free_card

    architecture = memory_plan.TextArchitecture.of(read_config(folder, "text_encoder"))
    on_cpu = device == "cpu" and vram is None
    per_token = architecture.flops_per_token
    return memory_plan.plan_text(
        architecture,
        config.text_encoder_1_precision,
        config.text_batching,
        config.max_sequence_length,
        vram=vram or free_card(device),
        ram=free_ram(),
        num_tokens=sum(lengths),
        tokens_per_second=measured(folder, device, config).text_flops / per_token if on_cpu else None,
    )


def plan_vae(
    folder: Path, config: CacheConfig, device: str, vram: int | None, latents: Sequence[LatentJob]
) -> memory_plan.VaePlan:
    """How these images will be encoded. Raises ``DoesNotFit``."""
    from k5cache.shared.vram import free_card
    from k5cache.sources.images import num_workers

    largest = max(one.geometry.bucket.width * one.geometry.bucket.height for one in latents)
    decoded = max(one.geometry.width * one.geometry.height for one in latents)
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
    """``machine.measure_speed``, once: a second."""
    from k5cache.encoders.speed import measure_speed

    text, vae = torch_dtype(config.text_encoder_1_precision), torch_dtype(config.vae_precision)
    return measure_speed(folder, device, text, vae, config.text_batching)


def rows(made: Estimate) -> list[tuple[str, str]]:
    """(what, value) lines for a person."""
    lines = [("device", made.device)]
    if made.text:
        chunks = made.text.num_chunks(made.num_tokens)
        how = "all layers on the device"
        if made.text.mode == "streamed":
            where = "on the device" if made.text.parking == "device" else "in host memory"
            how = f"a layer at a time, states parked {where}, weights read {_times(chunks)}"
        lines.append(("text encoder", f"{made.text.mode}: {how}"))
        lines.append(("captions", f"{made.num_captions}, about {made.num_tokens} tokens with their templates"))
    if made.vae:
        how = "an image at once" if made.vae.mode == "whole" else "an image in strips, exact but for rounding"
        lines.append(("VAE", f"{made.vae.mode}: {how}; {made.num_images} images"))
    if made.text and made.vae and made.vram:
        lines.append(("VRAM", f"{human_bytes(made.text.vram)} for text, then {human_bytes(made.vae.vram)} for images"))
    elif made.vram:
        lines.append(("VRAM", human_bytes(made.vram)))
    lines.append(("RAM", human_bytes(made.ram)))
    lines.append(("disk", human_bytes(made.disk)))
    lines.append(("time", duration(made)))
    return lines


def modes(made: Estimate) -> str:
    """Each encoder's mode and VRAM, in a line."""
    parts = [("text encoder", made.text), ("VAE", made.vae)]
    return ", then ".join(
        f"{name} {one.mode}" + (f" ({human_bytes(one.vram)} of VRAM)" if one.vram else "") for name, one in parts if one
    )


def duration(made: Estimate) -> str:
    """How long, in words."""
    if made.seconds is None or made.text_seconds is None or made.vae_seconds is None:
        return "not known: there is no GPU here to measure"
    parts = f"{human_seconds(made.text_seconds)} for {made.num_captions} captions, "
    parts += f"{human_seconds(made.vae_seconds)} for {made.num_images} images"
    return f"about {human_seconds(made.seconds)} ({parts})"


def _disk(folder: Path, config: CacheConfig, lengths: Sequence[int], pixels: Sequence[int]) -> int:
    """Rows as they are stored: embeddings without the template, mean and std in float16."""
    hidden = memory_plan.TextArchitecture.of(read_config(folder, "text_encoder")).hidden_size
    text = sum(max(1, n - 40) for n in lengths) * hidden * ITEM_BYTES[config.text_encoder_1_precision]
    moments = 2 if config.posterior == "sample" else 1
    return text + sum(pixels) // 64 * read_config(folder, "vae")["latent_channels"] * 2 * moments


def _times(count: int) -> str:
    return "once" if count == 1 else f"{count} times"

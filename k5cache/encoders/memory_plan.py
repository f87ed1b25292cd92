"""What fits in stage 1? From configs, VRAM, RAM and captions to a mode, a chunk, and seconds. Arithmetic only."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from k5cache.shared.console import human_bytes
from k5cache.shared.errors import DoesNotFit
from k5cache.shared.vram import CONTEXT_BYTES

TextMode = Literal["resident", "streamed"]


VaeMode = Literal["whole", "strips"]


Parking = Literal["device", "host"]


PROCESS_BYTES = {"cuda": 3 * 2**30, "cpu": 2**30}


"""Host memory of Python, torch and its libraries."""


FAST_TOKENS = 8192  # in one forward: matrix products are at full speed from about 4,000


SECONDS_AT_RISK = 180.0  # what a kill may cost: a chunk and a shard are committed at least this often


_SLACK_BYTES = 192 * 2**20  # cuBLAS and cuDNN workspaces, what rounding leaves unused


_HOST_PARKING = 2 * 2**30


_WORTH_READING = 65_536  # tokens that take longer to compute than 13 GB take to read, on any card


_IN_FLIGHT = 512 * 2**20  # rows on their way to a shard, staging, token ids


@dataclass(frozen=True)
class TextArchitecture:
    """The numbers of Qwen2.5-VL's config.json that decide memory and time."""

    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    vocab_size: int

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> TextArchitecture:
        """From ``text_encoder/config.json``, as published (flat) or as newer libraries save it (nested)."""
        text = {**config, **config.get("text_config", {})}
        names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
        return cls(*(int(text[name]) for name in (*names, "vocab_size")))

    @property
    def layer_parameters(self) -> int:
        """Weights and biases of one layer."""
        kv = self.hidden_size // self.num_heads * self.num_kv_heads
        attention = 2 * self.hidden_size**2 + 2 * self.hidden_size * kv + self.hidden_size + 2 * kv
        return attention + 3 * self.hidden_size * self.intermediate_size + 2 * self.hidden_size

    @property
    def flops_per_token(self) -> int:
        """Of all layers, attention scores left out: under 1 % at 300 tokens."""
        return 2 * self.num_layers * self.layer_parameters

    def working_bytes(self, num_tokens: int, itemsize: int) -> int:
        """Peak of one layer's intermediate results: three of the feed-forward's width, six of the model's."""
        return num_tokens * itemsize * (3 * self.intermediate_size + 6 * self.hidden_size)


@dataclass(frozen=True)
class TextPlan:
    """How captions are encoded."""

    mode: TextMode
    parking: Parking
    """Where hidden states wait between layers; of ``streamed`` only."""
    chunk_tokens: int
    """Tokens, template included, after which rows are committed; streamed, the weights are read once for these."""
    batch_tokens: int
    """Most tokens in one forward of ``text_batching = "fast"``."""
    vram: int
    """Bytes, predicted peak, the CUDA context included; 0 on a CPU."""
    ram: int
    """Bytes of host memory, predicted."""
    weight_bytes: int
    """That the layers take in their file."""

    def num_chunks(self, num_tokens: int) -> int:
        """How often the weights are read, where they are streamed."""
        return max(1, -(-num_tokens // self.chunk_tokens))


@dataclass(frozen=True)
class VaePlan:
    """How images are encoded."""

    mode: VaeMode
    vram: int
    """Bytes, predicted peak, the CUDA context included; 0 on a CPU."""
    ram: int
    """Bytes of host memory, predicted."""


@dataclass(frozen=True)
class Speed:
    """What a device does, measured for a moment before it is asked for hours."""

    text_flops: float
    """A second, in the feed-forward's shape at 200 tokens (exact) or 2,048 (fast)."""
    vae_flops: float
    """A second, of a 3x3 convolution of 128 channels."""
    read_bytes: float
    """A second, from the text encoder's file."""
    caption_seconds: float = 0.0
    """Least for one caption: launching 28 layers from Python, on a GPU that is faster than that."""


def plan_text(
    architecture: TextArchitecture,
    precision: str,
    batching: str,
    max_sequence_length: int,
    *,
    vram: int | None,
    ram: int,
    num_tokens: int | None = None,
    tokens_per_second: float | None = None,
) -> TextPlan:
    """Resident where it fits, else streamed.

    Args:
        precision: ``text_encoder_1_precision``.
        batching: ``text_batching``.
        max_sequence_length: tokens of the longest caption, without the template.
        vram: bytes of the card; None on a CPU.
        ram: bytes of host memory that are free.
        num_tokens: of all captions, templates included.
        tokens_per_second: what the device does; it bounds a chunk's time.

    Raises:
        DoesNotFit: not even one caption and two layers fit.
    """
    itemsize = 4 if precision == "fp32" else 2
    layer = architecture.layer_parameters * itemsize
    held = layer // 2 if precision == "int8" else layer  # scales and norms are 0.1 % of it
    token_bytes = architecture.hidden_size * itemsize
    longest = max_sequence_length + 64  # the template has 40
    at_risk = int(tokens_per_second * SECONDS_AT_RISK) if tokens_per_second else 2**31
    # Two buffers as the file has them, one more layer where it is cast or rounded.
    as_stored = 2 * architecture.layer_parameters * 2
    two_layers = as_stored + (0 if precision == "bf16" else held + layer)
    loading = {"bf16": 0, "int8": two_layers}.get(precision, as_stored)
    all_layers = architecture.num_layers * held + loading
    room = ram - PROCESS_BYTES["cpu" if vram is None else "cuda"] - _IN_FLIGHT if vram is None else vram - CONTEXT_BYTES
    room -= _SLACK_BYTES

    def batch(left: int) -> int:
        sizes = [FAST_TOKENS >> k for k in range(4)] if batching == "fast" else []
        return next((n for n in sizes if n > longest and architecture.working_bytes(n, itemsize) <= left), longest)

    def peak(weights: int, size: int, parked: int) -> int:
        return weights + architecture.working_bytes(size, itemsize) + parked + _SLACK_BYTES

    def made(mode: TextMode, parking: Parking, chunk: int, size: int, weights: int) -> TextPlan:
        parked = 0 if mode == "resident" else token_bytes * min(chunk, num_tokens or chunk)
        on_device = peak(weights, size, parked if parking == "device" else 0)
        host = PROCESS_BYTES["cpu"] + on_device if vram is None else PROCESS_BYTES["cuda"]
        host += _IN_FLIGHT + (parked if parking == "host" else 0)
        return TextPlan(
            mode, parking, max(longest, min(chunk, at_risk)), size, 0 if vram is None else on_device + CONTEXT_BYTES,
            host, architecture.num_layers * architecture.layer_parameters * 2,
        )  # fmt: skip

    left = room - all_layers
    if left >= architecture.working_bytes(longest, itemsize):
        return made("resident", "device", 2**18, batch(left), all_layers)
    left = room - two_layers
    least = architecture.working_bytes(longest, itemsize) + token_bytes * longest
    if left < least:
        have, what = (ram, "RAM") if vram is None else (vram, "VRAM")
        raise DoesNotFit(
            f"The text encoder needs {human_bytes(have - left + least)} of {what} with one layer at a time, there are "
            f"{human_bytes(have)}",
            "Lower cache.max_sequence_length, or use --device cpu" if vram is not None else "Free some memory",
        )
    size = batch(left // 2)
    fits = (left - architecture.working_bytes(size, itemsize)) // token_bytes
    wanted = min(num_tokens or _WORTH_READING, _WORTH_READING)
    if fits >= wanted or vram is None:
        return made("streamed", "device", max(min(fits, 2**19), longest), size, two_layers)
    # In flight between device and host: the pack that comes, the one that is computed, three that leave.
    while size > longest and left < peak(0, size, 5 * size * token_bytes):
        size = max(longest, size // 2)
    host = min(_HOST_PARKING, max(ram // 4, 2**28))
    host = 1 << (host.bit_length() - 1)  # torch takes pinned memory in powers of two
    return made("streamed", "host", host // token_bytes, size, two_layers + 5 * size * token_bytes)


VAE_BYTES = {"whole": 25, "strips": 11}


"""Peak of one image's activations, in values a pixel times a quarter of the first width (32 of 128 channels). Measured
on an H200 at 1024x1024: 22.9 and 9.5 in bf16, 23.3 and 10.1 in float32, 24.2 in the pass with the next image there."""


def plan_vae(
    config: Mapping[str, Any], precision: str, num_pixels: int, *, vram: int | None, ram: int, decoded_bytes: int = 0
) -> VaePlan:
    """The whole image at once where it fits, else layer by layer in strips.

    Args:
        config: ``vae/config.json``.
        num_pixels: of the largest bucket.
        vram: bytes of the card; None on a CPU.
        ram: bytes of host memory that are free.
        decoded_bytes: of the images that are decoded ahead.

    Raises:
        DoesNotFit: strips do not fit either.
    """
    itemsize = 4 if precision == "fp32" else 2
    widths = config["block_out_channels"]
    weights = itemsize * sum(2 * 9 * w * w * (config.get("layers_per_block", 2) + 1) for w in widths)
    need: dict[VaeMode, int] = {
        "whole": weights + num_pixels * widths[0] // 4 * itemsize * VAE_BYTES["whole"] + CONTEXT_BYTES + _SLACK_BYTES,
        "strips": weights + num_pixels * widths[0] // 4 * itemsize * VAE_BYTES["strips"] + CONTEXT_BYTES + _SLACK_BYTES,
    }
    beside = PROCESS_BYTES["cpu" if vram is None else "cuda"] + _IN_FLIGHT + decoded_bytes
    for mode, size in need.items():
        if vram is None and (on_host := beside + size - CONTEXT_BYTES) <= ram:
            return VaePlan(mode, 0, on_host)
        if vram is not None and size <= vram:
            return VaePlan(mode, size, beside)
    least, have, what = need["strips"], vram, "VRAM"
    if have is None:
        least, have, what = beside + least - CONTEXT_BYTES, ram, "RAM"
    raise DoesNotFit(
        f"The VAE needs {human_bytes(least)} of {what} for its largest bucket, there are {human_bytes(have)}",
        'Lower cache.resolution, or set cache.vae_precision = "bf16"' + (", or use --device cpu" if vram else ""),
    )


def text_seconds(plan: TextPlan, architecture: TextArchitecture, lengths: Sequence[int], speed: Speed) -> float:
    """Time for captions of these token counts: computing, or reading the weights where that is slower."""
    flops = architecture.flops_per_token
    compute = sum(max(n * flops / speed.text_flops, speed.caption_seconds) for n in lengths)
    read = plan.weight_bytes / speed.read_bytes
    if plan.mode == "resident":
        return read + compute
    return max(compute, read * plan.num_chunks(sum(lengths))) + read / max(1, architecture.num_layers)


def vae_flops(config: Mapping[str, Any], num_pixels: int) -> float:
    """Of encoding one image: the 3x3 convolutions of its residual blocks, and attention in the middle."""
    widths: Sequence[int] = config["block_out_channels"]
    layers = int(config.get("layers_per_block", 2))
    total, before = 2.0 * 9 * 3 * widths[0] * num_pixels, widths[0]
    for i, width in enumerate(widths):
        pixels = num_pixels / 4**i
        total += 2 * 9 * pixels * (before * width + (2 * layers - 1) * width * width)
        if i + 1 < len(widths):
            total += 2 * 9 * pixels / 4 * width * width
        before = width
    pixels = num_pixels / 4 ** (len(widths) - 1)
    return total + 2 * 9 * pixels * 4 * before * before + 4 * pixels**2 * before + 8 * pixels * before**2

"""What fits in stage 1? From configs, VRAM, RAM and captions to a mode, a chunk, and seconds. Arithmetic only."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from k5cache.encoders.vision_plan import BATCH_PATCHES, MOST_TOKENS, VisionArchitecture
from k5cache.shared.console import human_bytes
from k5cache.shared.errors import DoesNotFit
from k5cache.shared.vram import CONTEXT_BYTES

TextMode = Literal["resident", "streamed"]
VaeMode = Literal["whole", "strips"]
Parking = Literal["device", "host"]
PROCESS_BYTES = {"cuda": 3 * 2**30, "cpu": 2**30}
"""Host memory of Python, torch and its libraries."""
FAST_TOKENS = 8192  # in one forward pass; matrix products reach full speed at about 4,000
SECONDS_AT_RISK = 180.0  # the work a crash may lose: a chunk and a shard are committed at least this often
_SLACK_BYTES = 192 * 2**20  # cuBLAS and cuDNN workspaces, and what rounding leaves unused
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
        """Operations of all layers, without the attention scores, which are under 1 % at 300 tokens."""
        return 2 * self.num_layers * self.layer_parameters

    def working_bytes(self, num_tokens: int, itemsize: int) -> int:
        """Peak of one layer's intermediate results: three of the feed-forward's width, six of the model's."""
        return num_tokens * itemsize * (3 * self.intermediate_size + 6 * self.hidden_size)


@dataclass(frozen=True)
class TextPlan:
    """How captions are encoded."""

    mode: TextMode
    parking: Parking
    """Where hidden states wait between layers when they are streamed."""
    chunk_tokens: int
    """Rows are committed after so many tokens, template included. Streaming reads the weights once a chunk."""
    batch_tokens: int
    """Most tokens in one forward pass of ``text_batching = "fast"``."""
    vram: int
    """Bytes, predicted peak, the CUDA context included; 0 on a CPU."""
    ram: int
    """Bytes of host memory, predicted."""
    weight_bytes: int
    """Size of the layers in their file."""

    def num_chunks(self, num_tokens: int) -> int:
        """How often streaming reads the weights."""
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
    """Per second, in the feed-forward's shape at 200 tokens (exact) or 2,048 (fast)."""
    vae_flops: float
    """Per second, in a 3x3 convolution of 128 channels."""
    read_bytes: float
    """Per second, from the text encoder's file."""
    caption_seconds: float = 0.0
    """The least time for one caption: a fast GPU waits until Python has launched 28 layers."""


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
    vision: VisionArchitecture | None = None,
) -> TextPlan:
    """Resident if all layers fit, else streamed.

    Args:
        precision: ``text_encoder_1_precision``.
        batching: ``text_batching``.
        max_sequence_length: tokens of the longest caption, without the template.
        vram: bytes of the card; None on a CPU.
        ram: bytes of host memory that are free.
        num_tokens: tokens of all captions, templates included.
        tokens_per_second: the device's speed, which limits a chunk to ``SECONDS_AT_RISK``.
        vision: the tower that sees the pictures of image-to-image; it goes first. None for text-to-image.

    Raises:
        DoesNotFit: not even one caption and two layers fit, or not the vision tower.
    """
    return _TextPlanner(
        architecture, precision, batching, max_sequence_length + 64, vram, ram, num_tokens,
        int(tokens_per_second * SECONDS_AT_RISK) if tokens_per_second else 2**31, vision,
    ).plan()  # fmt: skip


@dataclass(frozen=True)
class _TextPlanner:
    """The arguments of ``plan_text`` and the sizes that follow from them, in bytes."""

    architecture: TextArchitecture
    precision: str
    batching: str
    longest: int
    """Tokens of the longest caption, and 64 for the template, which has 40."""
    vram: int | None
    ram: int
    num_tokens: int | None
    tokens_at_risk: int
    """Tokens that are encoded in ``SECONDS_AT_RISK``."""
    vision: VisionArchitecture | None

    def plan(self) -> TextPlan:
        """The fastest way that fits."""
        all_weights = self.all_layers + self.tower  # beside the layers the tower stays loaded, else it goes first
        room = self.room - all_weights
        if room >= max(self.working(self.longest), self.tower_working):
            return self.plan_of("resident", "device", 2**18, self.batch_within(room), all_weights)
        room = self.room - self.two_layers
        self.require(room)
        batch = self.batch_within(room // 2)
        fits = (room - self.working(batch)) // self.token_bytes
        wanted = min(self.num_tokens or _WORTH_READING, _WORTH_READING)
        if fits >= wanted or self.vram is None:
            return self.plan_of("streamed", "device", max(min(fits, 2**19), self.longest), batch, self.two_layers)
        return self.parked_on_host(room, batch)

    def parked_on_host(self, room: int, batch: int) -> TextPlan:
        """Streamed, with hidden states that wait in host memory and are computed in packs of ``batch`` tokens."""

        def packs(num_tokens: int) -> int:
            """The packs on the device: one that arrives, one that is computed, three that leave."""
            return 5 * num_tokens * self.token_bytes

        while batch > self.longest and room < self.working(batch) + packs(batch) + _SLACK_BYTES:
            batch = max(self.longest, batch // 2)
        parking = min(_HOST_PARKING, max(self.ram // 4, 2**28), self.token_bytes * self.most_tokens)
        parking = 1 << (parking.bit_length() - 1)  # torch takes pinned memory in powers of two
        return self.plan_of("streamed", "host", parking // self.token_bytes, batch, self.two_layers + packs(batch))

    def plan_of(self, mode: TextMode, parking: Parking, chunk_tokens: int, batch_tokens: int, weights: int) -> TextPlan:
        """A plan, with the memory that it takes."""
        chunk_tokens = min(chunk_tokens, self.most_tokens)
        of_chunk = self.token_bytes * min(chunk_tokens, self.num_tokens or chunk_tokens)
        parked = 0 if mode == "resident" else of_chunk
        seen = 2 * of_chunk if self.vision else 0  # the tower's tokens, in pinned memory, which is rounded up
        working = self.working(batch_tokens)
        on_device = weights + working + _SLACK_BYTES + (parked if parking == "device" else 0)
        if self.vision:
            beside = weights if mode == "resident" else self.tower
            on_device = max(on_device, beside + self.tower_working + _SLACK_BYTES)
        on_host = PROCESS_BYTES["cuda"] if self.vram is not None else PROCESS_BYTES["cpu"] + on_device
        return TextPlan(
            mode=mode,
            parking=parking,
            chunk_tokens=max(self.longest, min(chunk_tokens, self.tokens_at_risk)),
            batch_tokens=batch_tokens,
            vram=0 if self.vram is None else on_device + CONTEXT_BYTES,
            ram=on_host + _IN_FLIGHT + seen + (parked if parking == "host" else 0),
            weight_bytes=self.architecture.num_layers * self.architecture.layer_parameters * 2,
        )

    def batch_within(self, room: int) -> int:
        """Tokens of one forward pass: one caption, or for ``fast`` as many as fit, up to ``FAST_TOKENS``."""
        sizes = [FAST_TOKENS >> k for k in range(4)] if self.batching == "fast" else []
        return next((n for n in sizes if n > self.longest and self.working(n) <= room), self.longest)

    def require(self, room: int) -> None:
        """Refuse a device without room for the longest caption, or for the vision tower and a picture.

        Args:
            room: what two layers leave.

        Raises:
            DoesNotFit: the message says how much the device must have.
        """
        least = self.working(self.longest) + self.token_bytes * self.longest
        least = max(least, self.tower + self.tower_working - self.two_layers)
        if room >= least:
            return
        available, kind = (self.ram, "RAM") if self.vram is None else (self.vram, "VRAM")
        raise DoesNotFit(
            f"The text encoder needs {human_bytes(available - room + least)} of {kind} with one layer at a time, "
            f"{human_bytes(available)} are available",
            "Lower cache.max_sequence_length, or use --device cpu" if self.vram is not None else "Free some memory",
        )

    @property
    def room(self) -> int:
        """What weights and activations may take where they are computed."""
        if self.vram is not None:
            return self.vram - CONTEXT_BYTES - _SLACK_BYTES
        return self.ram - PROCESS_BYTES["cpu"] - _IN_FLIGHT - _SLACK_BYTES

    @property
    def tower(self) -> int:
        """The vision tower's weights; 0 if there is none. Others than the file's 16 bits are cast from it."""
        num_parameters = self.vision.num_parameters if self.vision else 0
        return num_parameters * (self.itemsize + (2 if self.precision in ("fp16", "fp32") else 0))

    @property
    def tower_working(self) -> int:
        """Activations of a forward pass of the tower: one picture of as many tokens as there may be, or a batch."""
        if self.vision is None:
            return 0
        longest = self.longest * self.vision.merged
        return self.vision.working_bytes(max(longest, BATCH_PATCHES if self.batching == "fast" else 0), self.itemsize)

    @property
    def most_tokens(self) -> int:
        """Of a chunk."""
        return MOST_TOKENS if self.vision else 2**31

    @property
    def itemsize(self) -> int:
        return 4 if self.precision == "fp32" else 2

    @property
    def token_bytes(self) -> int:
        """The hidden state of one token."""
        return self.architecture.hidden_size * self.itemsize

    def working(self, num_tokens: int) -> int:
        """Activations of a forward pass."""
        return self.architecture.working_bytes(num_tokens, self.itemsize)

    @property
    def layer(self) -> int:
        """One layer as it is computed."""
        return self.architecture.layer_parameters * self.itemsize

    @property
    def resident_layer(self) -> int:
        """One layer as it stays on the device. The scales and norms of int8 add 0.1 %, which is left out."""
        return self.layer // 2 if self.precision == "int8" else self.layer

    @property
    def file_buffers(self) -> int:
        """Two layers in the file's 16 bits."""
        return 2 * self.architecture.layer_parameters * 2

    @property
    def two_layers(self) -> int:
        """What streaming takes: the buffers, and one more layer if it is cast or rounded."""
        return self.file_buffers + (0 if self.precision == "bf16" else self.resident_layer + self.layer)

    @property
    def all_layers(self) -> int:
        """All layers resident, and what loading takes besides."""
        loading = {"bf16": 0, "int8": self.two_layers}.get(self.precision, self.file_buffers)
        return self.architecture.num_layers * self.resident_layer + loading


VAE_VALUES = {"whole": 25, "strips": 11}
"""Peak of one image's activations: values a pixel, for every 4 channels of the first layer (the VAE has 128). Measured
on an H200 at 1024x1024: 22.9 and 9.5 in bf16, 23.3 and 10.1 in float32, and 24.2 in the image pass, where the next
image is on the device too."""


def plan_vae(
    config: Mapping[str, Any], precision: str, num_pixels: int, *, vram: int | None, ram: int, decoded_bytes: int = 0
) -> VaePlan:
    """The whole image at once where it fits, else layer by layer in strips.

    Args:
        config: ``vae/config.json``.
        num_pixels: of the largest bucket.
        vram: bytes of the card; None on a CPU.
        ram: bytes of host memory that are free.
        decoded_bytes: size of the images that are decoded ahead.

    Raises:
        DoesNotFit: strips do not fit either.
    """
    itemsize = 4 if precision == "fp32" else 2
    widths = config["block_out_channels"]
    weights = itemsize * sum(2 * 9 * w * w * (config.get("layers_per_block", 2) + 1) for w in widths)
    fixed = weights + CONTEXT_BYTES + _SLACK_BYTES
    vram_of: dict[VaeMode, int] = {
        "whole": fixed + num_pixels * widths[0] // 4 * itemsize * VAE_VALUES["whole"],
        "strips": fixed + num_pixels * widths[0] // 4 * itemsize * VAE_VALUES["strips"],
    }
    beside = PROCESS_BYTES["cpu" if vram is None else "cuda"] + _IN_FLIGHT + decoded_bytes
    for mode, size in vram_of.items():
        if vram is None and (on_host := beside + size - CONTEXT_BYTES) <= ram:
            return VaePlan(mode, 0, on_host)
        if vram is not None and size <= vram:
            return VaePlan(mode, size, beside)
    least, available, kind = vram_of["strips"], vram, "VRAM"
    if available is None:
        least, available, kind = beside + least - CONTEXT_BYTES, ram, "RAM"
    raise DoesNotFit(
        f"The VAE needs {human_bytes(least)} of {kind} for the largest bucket, {human_bytes(available)} are available",
        'Lower cache.resolution, or set cache.vae_precision = "bf16"' + (", or use --device cpu" if vram else ""),
    )


def vision_seconds(
    plan: TextPlan, vision: VisionArchitecture, num_patches: int, num_tokens: int, speed: Speed
) -> float:
    """Time for the vision tower over so many patches: reading it, for every chunk if it does not stay, and computing.

    Args:
        num_tokens: of all texts, which decide the number of chunks.
    """
    num_reads = 1 if plan.mode == "resident" else plan.num_chunks(num_tokens)
    return vision.flops(num_patches) / speed.text_flops + num_reads * 2 * vision.num_parameters / speed.read_bytes


def text_seconds(plan: TextPlan, architecture: TextArchitecture, lengths: Sequence[int], speed: Speed) -> float:
    """Time for captions of these token counts: computing, or reading the weights where that is slower."""
    flops = architecture.flops_per_token
    compute = sum(max(n * flops / speed.text_flops, speed.caption_seconds) for n in lengths)
    read = plan.weight_bytes / speed.read_bytes
    if plan.mode == "resident":
        return read + compute
    return max(compute, read * plan.num_chunks(sum(lengths))) + read / max(1, architecture.num_layers)


def vae_flops(config: Mapping[str, Any], num_pixels: int) -> float:
    """Operations that encode one image: the 3x3 convolutions of the residual blocks, and attention in the middle."""
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

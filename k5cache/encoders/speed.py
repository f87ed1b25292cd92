"""How fast is this machine? A short measurement, before a model is loaded."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from k5cache.encoders.memory_plan import Speed, TextArchitecture
from k5cache.shared.checkpoint import read_config
from k5cache.shared.errors import ModelError
from k5cache.shared.part_files import weight_files

if TYPE_CHECKING:
    import torch

_READ_BYTES = 2**28
_SSD = 1e9  # bytes per second that are assumed where there are no weights to read


def measure_speed(folder: Path, device: str, text_dtype: torch.dtype, vae_dtype: torch.dtype, batching: str) -> Speed:
    """Time a matrix product, a convolution and a read, in the shapes of the encoders."""
    import torch

    text = TextArchitecture.of(read_config(folder, "text_encoder"))
    width = read_config(folder, "vae")["block_out_channels"][0]
    tokens = 2048 if batching == "fast" and device != "cpu" else 208
    side = 1024 if device != "cpu" else 128
    with torch.no_grad():
        x = torch.randn(tokens, text.hidden_size, device=device).to(text_dtype)
        weight = torch.randn(text.intermediate_size, text.hidden_size, device=device).to(text_dtype)
        image = torch.randn(1, width, side, side, device=device).to(vae_dtype)
        kernel = torch.randn(width, width, 3, 3, device=device).to(vae_dtype)
        product = _seconds(lambda: torch.nn.functional.linear(x, weight), device)
        convolution = _seconds(lambda: torch.nn.functional.conv2d(image, kernel, padding=1), device)
    return Speed(
        # The rest of a layer (norms, activations, attention) takes a fifth of its time on a GPU, less on a CPU.
        text_flops=0.8 * 2 * x.numel() * text.intermediate_size / product,
        vae_flops=0.5 * 2 * 9 * width * width * side**2 / convolution,  # norms and activations take as long again
        read_bytes=_read_speed(folder),
        # Beside an H200, the processor took 0.7 ms to launch a layer.
        caption_seconds=0.0 if batching == "fast" or device == "cpu" else 7e-4 * text.num_layers,
    )


def text_lengths(captions: Iterable[str], max_sequence_length: int) -> list[int]:
    """Estimate tokens: one for four bytes of UTF-8, as many as are kept, and 45 of template and tags.

    Bytes, because a token holds four letters of English, two of Russian and one Chinese character.
    """
    return [45 + min(len(caption.encode(errors="replace")) // 4, max_sequence_length) for caption in captions]


def _seconds(run: Callable[[], Any], device: str) -> float:
    """Seconds of one run: the best of three after a warm-up."""
    import torch

    def timed() -> float:
        start = time.perf_counter()
        run()
        if device.startswith("cuda"):
            torch.cuda.synchronize(device)
        return time.perf_counter() - start

    timed()
    return max(1e-9, min(timed() for _ in range(3)))


def _read_speed(folder: Path) -> float:
    """Bytes per second at which weights are read."""
    try:
        path = weight_files(folder, "text_encoder")[0]
    except ModelError:  # not downloaded yet
        return _SSD
    start, size = time.perf_counter(), 0
    with path.open("rb", buffering=0) as file:
        while size < _READ_BYTES and (block := file.read(2**24)):
            size += len(block)
    return size / max(1e-9, time.perf_counter() - start)

"""How fast is stage 1 on this card? Encoders of full size with random weights, compared with what trainers do today.

The baseline in the same run is diffusers' own ``encode_prompt``, one caption at a time, and ``vae.encode``, one image
at a time, with everything on the GPU. Nothing is downloaded: 14 GB of random text encoder are written to a temporary
folder.
"""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from k5cache.bench.measurements import Measurements, Sizes
from k5cache.bench.pictures import compare_precisions, compare_speed
from k5cache.bench.text import make_captions, measure_resident, measure_streamed
from k5cache.bench.tools import in_use, timed
from k5cache.encoders import memory_plan
from k5cache.encoders.random_model import write_model, write_pictures
from k5cache.shared import console
from k5cache.shared.console import human_bytes
from k5cache.shared.errors import K5Error
from k5cache.shared.vram import free_card, release


def bench(device: str, vram: int | None = None, folder: Path | None = None, sizes: Sizes | None = None) -> Measurements:
    """Measure everything that fits on the device.

    Args:
        vram: bytes; the cap of the streamed run.
        folder: where the random model is written, by default the temporary folder; 20 GB must be free.
        sizes: of another model; by default full size, which needs a GPU.

    Raises:
        K5Error: there is no GPU for the full size.
    """
    import torch

    if sizes is None and device == "cpu":
        raise K5Error("The encoders of full size are measured on a GPU", "Run this on a machine with one")
    sizes = sizes or Sizes()
    sizes = replace(sizes, vram=vram or sizes.vram)

    measurements = Measurements()
    with TemporaryDirectory(prefix="k5-bench-", dir=folder) as name, torch.no_grad():
        root = Path(name)
        torch.manual_seed(0)
        measure_ceiling(measurements, device)
        seconds, _ = timed(device, lambda: write_model(root, sizes, device))
        measurements.add("writing a random model", f"{seconds:.1f} s")
        captions = make_captions(sizes.tokens, sizes.num_captions)
        measurements.values["vram_at_start"] = in_use(device)
        fits_whole = has_room(measurements, "the whole text encoder", whole_text_bytes(sizes), device)
        if fits_whole:
            measure_resident(measurements, root, sizes, captions, device)
            add_freed(measurements, "resident text", device)
        measure_streamed(measurements, root, sizes, captions, device, fits_whole)
        add_freed(measurements, "streamed text", device)
        if has_room(measurements, "the VAE, whole images in float32", whole_vae_bytes(sizes), device):
            measure_pictures(measurements, root, sizes, device)
            add_freed(measurements, "VAE", device)
    return measurements


def whole_text_bytes(sizes: Sizes) -> int:
    """VRAM of ``diffusers``' text encoder in bfloat16, as the baseline loads it: with embeddings and head."""
    architecture = memory_plan.TextArchitecture.of(sizes.text)
    layers = architecture.num_layers * architecture.layer_parameters
    return 2 * (layers + 2 * architecture.vocab_size * architecture.hidden_size) + 2**31


def whole_vae_bytes(sizes: Sizes) -> int:
    """VRAM of the VAE and one image."""
    return memory_plan.plan_vae(sizes.vae, "fp32", sizes.side**2, vram=2**62, ram=0).vram


def has_room(measurements: Measurements, name: str, num_bytes: int, device: str) -> bool:
    """Whether the device has so much free memory. If it has not, a line of the table says so."""
    free = free_card(device)
    if free is None or num_bytes <= free:
        return True
    measurements.add(name, "not measured", f"it takes {human_bytes(num_bytes)} of VRAM, {human_bytes(free)} are free")
    return False


def measure_ceiling(measurements: Measurements, device: str) -> None:
    """Measure a large matrix product: the speed that the encoders are compared with."""
    import torch

    n = 8192 if device != "cpu" else 256
    a, b = (torch.randn(n, n, device=device, dtype=torch.bfloat16) for _ in range(2))
    a @ b
    seconds = sorted(timed(device, lambda: a @ b)[0] for _ in range(9))[4]
    name = torch.cuda.get_device_name(device) if device != "cpu" else "CPU"
    rate = 2 * n**3 / seconds
    measurements.add(
        "bf16 matmul ceiling",
        f"{rate / 1e12:.0f} TFLOP/s",
        f"{name}, torch {torch.__version__}",
        device=name,
        ceiling=rate,
    )


def measure_pictures(measurements: Measurements, root: Path, sizes: Sizes, device: str) -> None:
    """Measure the VAE with images decoded ahead by workers, beside one image at a time."""
    source = root / "pictures"
    write_pictures(source, sizes)
    compare_speed(measurements, root, source, sizes, device)
    compare_precisions(measurements, root, source, sizes, device)


def add_freed(measurements: Measurements, name: str, device: str) -> None:
    """Add a line: has all VRAM of an encoder been freed?"""
    release(device)
    now, start = in_use(device), measurements.values["vram_at_start"]
    measurements.add(
        f"freed after {name}",
        f"{human_bytes(now)} allocated by torch, {human_bytes(start)} at the start",
        **{f"freed_{name}": now - start},
    )


def print_bench(measurements: Measurements, title: str = "Encoders, random weights of full size") -> None:
    """Print the table."""
    table = console.table(title, "what", "value", "remark")
    for row in measurements.rows:
        table.add_row(*row)
    console.out.print(table)


def as_json(measurements: Measurements) -> dict[str, Any]:
    """The measurements as JSON takes them."""
    return asdict(measurements)

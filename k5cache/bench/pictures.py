"""How fast does the VAE go when images are decoded ahead of it, and what do precision and strips cost?"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from rich.progress import Progress

from k5cache.bench.measurements import Measurements, Sizes
from k5cache.bench.tools import peak_vram, reset_peak, timed
from k5cache.buckets import Bucket, Geometry, cover
from k5cache.encode import image_pass
from k5cache.encode.commit import Committer
from k5cache.encode.job import Job, LatentJob
from k5cache.options import CacheConfig
from k5cache.shared.console import human_bytes
from k5cache.sources import images
from k5cache.store.manifest import Manifest


def job_for(root: Path, cache: Path, device: str, options: dict[str, Any], vram: int | None = None) -> Job:
    """A job as ``k5cache encode`` makes it, without a recipe. An image is found by its path."""
    return Job(Path, cache, root, CacheConfig(**options), device, Progress(disable=True), vram)


def compare_speed(measurements: Measurements, root: Path, source: Path, sizes: Sizes, device: str) -> None:
    """Measure the VAE's pass as ``encode`` runs it, beside loading, resizing and encoding one image after another."""
    files = sorted(source.iterdir())
    geometry = cover(*sizes.source, Bucket(sizes.side, sizes.side))
    baseline, busy = one_at_a_time(root, files, geometry, device)
    measurements.add(
        "baseline: load and vae.encode, one at a time",
        f"{baseline:.2f} images/s",
        f"{sizes.side}x{sizes.side}, float32, from JPEG of {sizes.source[0]}x{sizes.source[1]}",
        baseline_images=baseline,
    )
    seconds, vram = through_the_pass(root, files, geometry, device)
    rate = len(files) / seconds
    measurements.add(
        "VAE pass: load, encode, write",
        f"{rate:.2f} images/s",
        f"{rate / baseline:.1f}x the baseline; VRAM {human_bytes(vram)} with the context",
        images=rate,
        vae_vram=vram,
    )
    waiting = 1 - busy * len(files) / seconds
    measurements.add(
        "GPU waiting in the VAE pass",
        f"{waiting:.1%}",
        f"{1e3 * busy:.1f} ms an image on the GPU alone, {1e3 * seconds / len(files):.1f} ms in the pass",
        waiting=waiting,
    )


def one_at_a_time(root: Path, files: Sequence[Path], geometry: Geometry, device: str) -> tuple[float, float]:
    """(images a second as trainers encode them, seconds an image whose pixels are already on the device)."""
    import torch
    from diffusers.image_processor import VaeImageProcessor
    from PIL import Image

    from k5cache.encoders import vae

    autoencoder = vae.load_vae(root, device, torch.float32)
    processor = VaeImageProcessor(vae_scale_factor=8)
    bucket, resized = geometry.bucket, (geometry.resized_width, geometry.resized_height)
    box = (geometry.left, geometry.top, geometry.left + bucket.width, geometry.top + bucket.height)

    def alone(paths: Sequence[Path]) -> None:
        for path in paths:
            with Image.open(path) as image:
                cropped = image.convert("RGB").resize(resized, Image.Resampling.BICUBIC).crop(box)
            posterior = autoencoder.encode(processor.preprocess(cropped).to(device)).latent_dist
            posterior.mean.cpu(), posterior.std.cpu()

    alone(files[:2])
    seconds, _ = timed(device, lambda: alone(files))
    pixels = images.load_pixels(files[0], geometry)[None].to(device)

    def encode(count: int) -> None:
        for _ in range(count):
            vae.encode_on_device(autoencoder, vae.to_model_range(pixels))

    encode(2)
    return len(files) / seconds, min(timed(device, lambda: encode(8))[0] / 8 for _ in range(2))


def through_the_pass(root: Path, files: Sequence[Path], geometry: Geometry, device: str) -> tuple[float, int]:
    """(seconds of the pass over all files, with a loaded and warm VAE, VRAM)."""
    import torch

    cache, bucket = root / "pictures_cache", geometry.bucket
    cache.mkdir()
    job = job_for(root, cache, device, {"resolution": bucket.width})
    jobs = [LatentJob(f"{i:032x}", str(path), geometry) for i, path in enumerate(files)]
    reset_peak(device)
    encoder = image_pass.Vae(job, jobs)
    encoder.moments(torch.zeros(3, bucket.height, bucket.width, dtype=torch.uint8), ["mean"])
    commit = Committer(cache, Manifest(recipe={}), 2**28)
    seconds, _ = timed(
        device, lambda: image_pass.encode_bucket(job, commit, bucket, jobs, encoder, {}, lambda *_: None)
    )
    return seconds, peak_vram(device)


def compare_precisions(measurements: Measurements, root: Path, source: Path, sizes: Sizes, device: str) -> None:
    """Measure bfloat16, strips and diffusers' tiling: error against float32 of the whole image, time and memory."""
    import torch

    from k5cache.encoders import vae

    geometry = cover(*sizes.source, Bucket(sizes.side, sizes.side))
    pixels = vae.to_model_range(images.load_pixels(min(source.iterdir()), geometry)[None].to(device))
    expected: torch.Tensor | None = None
    for name, dtype, in_strips in (
        ("float32", torch.float32, False),
        ("float32, strips", torch.float32, True),
        ("float32, diffusers' tiling", torch.float32, False),
        ("bfloat16", torch.bfloat16, False),
        ("bfloat16, strips", torch.bfloat16, True),
    ):
        autoencoder = vae.keep_encoder_only(vae.load_vae(root, device, torch.float32))
        autoencoder.encoder.to(dtype)
        if "tiling" in name:
            autoencoder.enable_tiling()
            autoencoder.tile_sample_min_size, autoencoder.tile_latent_min_size = sizes.side // 2, sizes.side // 16
        vae.encode_on_device(autoencoder, pixels, in_strips=in_strips)
        reset_peak(device)
        seconds, (mean, _) = timed(device, partial(vae.encode_on_device, autoencoder, pixels, in_strips=in_strips))
        mean = mean.double()
        expected = mean if expected is None else expected
        error = float((mean - expected).norm() / expected.norm())
        worst = float((mean - expected).abs().max() / expected.std())
        peak = peak_vram(device)
        measurements.add(
            f"VAE, {name}",
            f"{1e3 * seconds:.1f} ms",
            f"{human_bytes(peak)} of VRAM with the context; error {error:.1e} of the norm, at most {worst:.1e} "
            "of the latents' std",
            **{f"vae {name}": (seconds, peak, error, worst)},
        )
        del autoencoder

"""How fast are pairs of image-to-image encoded? Beside diffusers' own pipeline, which takes one pair at a time.

A pair is its instruction and the empty one, both with the source, and the latents of source and target.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from rich.progress import Progress

from k5cache.bench.measurements import Measurements, Sizes
from k5cache.bench.tools import collect, peak_vram, reset_peak, timed
from k5cache.buckets import Bucket, Geometry, cover
from k5cache.encode import image_pass
from k5cache.encode.commit import Committer
from k5cache.encode.job import Job, LatentJob, SourceView, TextJob
from k5cache.encode.source_pass import Chunk, Sources, with_pictures
from k5cache.encoders import clip, qwen, vae, vision, with_picture
from k5cache.encoders.random_model import FULL_VISION, as_pipeline, write_model, write_pictures
from k5cache.options import CacheConfig
from k5cache.shared.console import human_bytes
from k5cache.shared.errors import K5Error
from k5cache.shared.units import count_of
from k5cache.sources import images
from k5cache.store.manifest import Manifest

Embeds = list[tuple[Any, Any]]


@dataclass(frozen=True)
class Encoders:
    """All encoders of image-to-image, loaded."""

    qwen: qwen.Qwen
    tower: vision.Tower
    clip: clip.Clip
    vae: Any
    processor: with_picture.Processor


@dataclass(frozen=True)
class Pair:
    """A picture before and after, and the instruction between."""

    source: Path
    target: Path
    instruction: str


def bench_pairs(device: str, folder: Path | None = None, sizes: Sizes | None = None) -> Measurements:
    """Measure pairs a second: the pipeline one at a time, then ours, exact and fast.

    Args:
        folder: where the random model is written, by default the temporary folder; 20 GB must be free.
        sizes: of another model; by default full size, which needs a GPU with about 24 GB.

    Raises:
        K5Error: there is no GPU for the full size.
    """
    import torch

    if sizes is None and device == "cpu":
        raise K5Error("The encoders of full size are measured on a GPU", "Run this on a machine with one")
    sizes = sizes or Sizes(vision=FULL_VISION, num_images=48, tokens=(10, 60))
    measurements = Measurements()
    with TemporaryDirectory(prefix="k5-bench-", dir=folder) as name, torch.no_grad():
        root = Path(name)
        torch.manual_seed(0)
        write_model(root, sizes, device)
        write_pictures(root / "pictures", sizes)
        pairs = make_pairs(root / "pictures", sizes)
        seconds, encoders = timed(device, lambda: load(root, device))
        measurements.add(
            "loading all encoders", f"{seconds:.1f} s", f"{count_of(len(pairs), 'pair follows', 'pairs follow')}"
        )
        geometry = cover(*sizes.source, Bucket(sizes.side, sizes.side))
        theirs = one_at_a_time(measurements, root, encoders, pairs, geometry, device)
        for batching in ("exact", "fast"):
            ours = through_the_passes(measurements, root, encoders, pairs, geometry, batching, device)
            compare(measurements, batching, ours, theirs)
    return measurements


def make_pairs(folder: Path, sizes: Sizes) -> list[Pair]:
    """Pairs of neighbouring pictures, with instructions of random words."""
    rng = random.Random(0)
    files = sorted(folder.iterdir())
    words = [" ".join(f"w{rng.randrange(200)}" for _ in range(rng.randint(*sizes.tokens))) for _ in files]
    return [Pair(files[i], files[i + 1], words[i]) for i in range(0, len(files) - 1, 2)]


def load(root: Path, device: str) -> Encoders:
    """Everything on the device at once, as the pipeline has it."""
    import torch

    dtype = torch.bfloat16
    return Encoders(
        qwen.load_qwen(root, device, dtype, kind="i2i"),
        vision.load_tower(root, device, dtype),
        clip.load_clip(root, device, dtype),
        vae.keep_encoder_only(vae.load_vae(root, device, torch.float32)),
        with_picture.load_processor(root),
    )


def one_at_a_time(
    measurements: Measurements, root: Path, encoders: Encoders, pairs: Sequence[Pair], geometry: Geometry, device: str
) -> Embeds:
    """Measure the pipeline: load both pictures, ``encode_prompt`` twice, ``vae.encode`` twice."""
    import torch
    from diffusers.image_processor import VaeImageProcessor

    pipeline = as_pipeline(root, encoders.qwen, encoders.clip, device, encoders.tower)
    processor, at = VaeImageProcessor(vae_scale_factor=8), torch.device(device)

    def alone(some: Sequence[Pair]) -> Embeds:
        results = []
        for pair in some:
            source, target = (
                with_picture.as_picture(images.load_pixels(p, geometry)) for p in (pair.source, pair.target)
            )
            own, empty = (pipeline.encode_prompt(text, image=source, device=at) for text in (pair.instruction, ""))
            for picture in (source, target):
                posterior = encoders.vae.encode(processor.preprocess(picture).to(at)).latent_dist
                posterior.mean.cpu(), posterior.std.cpu()
            results.append((own[0][0].cpu(), empty[0][0].cpu()))
        return results

    alone(pairs[:2])
    seconds, theirs = timed(device, lambda: alone(pairs))
    rate = len(pairs) / seconds
    measurements.add(
        "baseline: Kandinsky5I2IPipeline, one pair at a time",
        f"{rate:.2f} pairs/s",
        f"{count_of(len(pairs), 'pair')} of {geometry.bucket.name}, bf16 text, float32 VAE",
        baseline_pairs=rate,
    )
    return list(theirs)


def through_the_passes(
    measurements: Measurements,
    root: Path,
    encoders: Encoders,
    pairs: Sequence[Pair],
    geometry: Geometry,
    batching: str,
    device: str,
) -> Embeds:
    """Measure the parts of an encode: vision tower, text layers, CLIP, and the VAE over sources and targets."""
    config = CacheConfig(resolution=geometry.bucket.width, text_batching=batching)  # type: ignore[arg-type]
    job = Job(Path, root, root, config, device, Progress(disable=True), read_source=Path)
    views = [SourceView(str(pair.source), images.hash_content(pair.source), geometry) for pair in pairs]
    text_jobs = [
        TextJob(f"{i} {text}", text, view)
        for i, (pair, view) in enumerate(zip(pairs, views, strict=True))
        for text in (pair.instruction, "")
    ]
    exact = batching == "exact"
    sources = Sources(job, encoders.processor, is_kept=True, tower=encoders.tower)

    def texts(jobs: Sequence[TextJob]) -> tuple[float, float, list[Any]]:
        seeing, chunk = timed(
            device, lambda: with_pictures(sources, Chunk(jobs, [sources.tokens(t) for t in jobs]), {})
        )
        encoding, rows = timed(
            device, lambda: collect(qwen.iter_prompt_embeds(encoders.qwen, chunk.tokens, chunk.pictures, exact=exact))
        )
        return seeing, encoding, rows

    texts(text_jobs[:8])
    reset_peak(device)
    seeing, encoding, rows = texts(text_jobs)
    captions = list(dict.fromkeys(text_job.caption for text_job in text_jobs))
    pooling, _ = timed(device, lambda: clip.encode_pooled(encoders.clip, captions, exact=exact))
    latents = latent_seconds(job, root / f"cache_{batching}", encoders, pairs, geometry)
    seconds = seeing + encoding + pooling + latents
    rate, baseline = len(pairs) / seconds, measurements.values["baseline_pairs"]
    measurements.add(
        f"ours, {batching}",
        f"{rate:.2f} pairs/s",
        f"{rate / baseline:.2f}x the baseline; sources {seeing:.2f} s, text layers {encoding:.2f} s, "
        f"CLIP {pooling:.2f} s, VAE {latents:.2f} s; VRAM {human_bytes(peak_vram(device))} with the context",
        **{f"pairs_{batching}": rate, f"over_baseline_{batching}": rate / baseline},
    )
    return list(zip(rows[::2], rows[1::2], strict=True))


def latent_seconds(job: Job, cache: Path, encoders: Encoders, pairs: Sequence[Pair], geometry: Geometry) -> float:
    """Seconds of one VAE pass over the sources and targets of all pairs, rows written."""
    import torch

    cache.mkdir()
    bucket = geometry.bucket
    files = [(path, is_source) for pair in pairs for path, is_source in ((pair.source, True), (pair.target, False))]
    jobs = [LatentJob(f"{i:032x}", str(path), geometry, is_source=source) for i, (path, source) in enumerate(files)]
    model = image_pass.Vae(job, jobs, encoders.vae)
    model.moments(torch.zeros(3, bucket.height, bucket.width, dtype=torch.uint8), ["mean"])
    commit = Committer(cache, Manifest(recipe={}), 2**28)
    run = lambda: image_pass.encode_bucket(job, commit, bucket, jobs, model, {}, lambda *_: None)  # noqa: E731
    return timed(job.device, run)[0]


def compare(measurements: Measurements, batching: str, ours: Embeds, theirs: Embeds) -> None:
    """Add a line: how many embeddings have the pipeline's bits, and how far the others are."""
    import torch

    pairs = [(a, b) for own, expected in zip(ours, theirs, strict=True) for a, b in zip(own, expected, strict=True)]
    same = sum(torch.equal(a, b) for a, b in pairs)
    error = max(float((a.double() - b.double()).norm() / b.double().norm()) for a, b in pairs)
    measurements.add(
        f"ours, {batching}: bits",
        f"{same} of {count_of(len(pairs), 'text')} as encode_prompt",
        f"largest error {error:.1e} of the norm",
        **{f"same_{batching}": same, f"error_{batching}": error},
    )

"""The VAE over every new image, and masks at latent size beside them."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from k5cache.buckets import Bucket
from k5cache.encode import estimate
from k5cache.encode.job import Job, LatentJob, MaskJob
from k5cache.encode.one_encoder import one_encoder
from k5cache.encode.planned_jobs import at
from k5cache.encode.precision import torch_dtype
from k5cache.encode.sink import RowSink
from k5cache.encode.write_rows import row_writer
from k5cache.shared import console
from k5cache.shared.checkpoint import read_config
from k5cache.shared.plain import read_plain
from k5cache.sources import images, masks
from k5cache.sources.decode import MOST_BYTES
from k5cache.sources.items import Content, UnreadableImage
from k5cache.store.tensors import TensorSpec

if TYPE_CHECKING:
    import torch


def encode_latents(job: Job, sink: RowSink, latent_jobs: Sequence[LatentJob]) -> dict[str, UnreadableImage]:
    """The VAE over every new image, one bucket after another.

    Returns:
        latent key -> why its image could not be read, for those that could not.

    Raises:
        DoesNotFit: the card cannot hold the VAE and an image, even in strips.
    """
    if not latent_jobs:
        return {}
    by_bucket: dict[Bucket, array[int]] = {}
    for place, latent_job in enumerate(latent_jobs):
        by_bucket.setdefault(latent_job.geometry.bucket, array("q")).append(place)
    failed: dict[str, UnreadableImage] = {}
    planned = estimate.plan_vae(job.folder, job.config, job.device, job.vram, latent_jobs).vram
    with (
        one_encoder(job.device, job.vram, "The VAE", planned),
        job.progress_bar("VAE", len(latent_jobs), "image") as advance,
    ):
        vae = Vae(job, latent_jobs)
        for bucket, places in sorted(by_bucket.items()):
            advance(0, f"VAE: {bucket.name}")
            encode_bucket(job, sink, bucket, at(latent_jobs, places), vae, failed, advance)
    return failed


class Vae:
    """The VAE, loaded for the first image that can be read: broken images alone are no reason to load it."""

    def __init__(self, job: Job, latent_jobs: Sequence[LatentJob], model: Any = None) -> None:
        """``model``: the VAE, if it is loaded already."""
        self._job, self._latent_jobs = job, latent_jobs
        self._model = model
        self._in_strips = False

    def moments(self, pixels: torch.Tensor, names: Sequence[str]) -> torch.Tensor:
        """Encode one image.

        Args:
            pixels: uint8 ``[3, H, W]``; copied to the device without waiting for it.
            names: ``mean``, or ``mean`` and ``std``.

        Returns:
            float16 ``[names, H/8, W/8, 16]`` on the device.
        """
        import torch

        from k5cache.encoders import vae

        if self._model is None:
            with console.doing(self._job.bars, "loading the VAE"):
                self._load()
        if self._job.device != "cpu":
            pixels = pixels.pin_memory().to(self._job.device, non_blocking=True)
        mean, std = vae.encode_on_device(
            self._model, vae.to_model_range(pixels.unsqueeze(0)), in_strips=self._in_strips
        )
        moments = {"mean": mean, "std": std}
        return torch.cat([moments[name] for name in names]).half()

    def _load(self) -> None:
        from k5cache.encoders import vae

        job = self._job
        plan = estimate.plan_vae(job.folder, job.config, job.device, job.vram, self._latent_jobs)
        self._in_strips = plan.mode == "strips"
        model = vae.load_vae(job.folder, job.device, torch_dtype(job.config.vae_precision))
        self._model = vae.keep_encoder_only(model)


def encode_bucket(
    job: Job,
    sink: RowSink,
    bucket: Bucket,
    latent_jobs: Sequence[LatentJob],
    vae: Vae,
    failed: dict[str, UnreadableImage],
    advance: Callable[..., None],
    loaded: Iterable[torch.Tensor | UnreadableImage] | None = None,
) -> None:
    """The images of one bucket into shards, targets and sources. The reasons of those that cannot be read are added to
    ``failed``.

    Args:
        loaded: the pixels of each, as ``load_pixels`` gives them. None: threads of this process load them.
    """
    from k5cache.encoders.hostio import fetched

    height, width = bucket.latent_shape
    names = ("mean", "std") if job.config.posterior == "sample" else ("mean",)
    channels = read_config(job.folder, "vae")["latent_channels"]
    specs = {name: TensorSpec("float16", (height, width, channels)) for name in names}

    def encoded() -> Iterator[tuple[str, torch.Tensor]]:
        for latent_job, pixels in zip(latent_jobs, loaded or load_pixels(job, latent_jobs), strict=True):
            if isinstance(pixels, UnreadableImage):
                failed[latent_job.key] = pixels
                advance(1)
            else:
                yield latent_job.key, vae.moments(pixels, names)

    with row_writer(sink, job.config, "latents", specs, bucket) as put:
        for key, moments in fetched(encoded()):
            put({"key": key} | dict(zip(names, moments, strict=True)))
            advance(1)


def load_pixels(
    job: Job, latent_jobs: Sequence[LatentJob], workers: int | None = None
) -> Iterator[torch.Tensor | UnreadableImage]:
    """The crop of each image, uint8 ``[3, H, W]``, or why there is none. Threads load ahead; ``images.load_ahead``."""

    def read(latent_job: LatentJob) -> Content:
        return (job.read_source if latent_job.is_source else job.read)(latent_job.path)

    # With its hash: an image that changed since the plan must not be stored under the old content's key.
    wanted = ((latent_job, latent_job.geometry, latent_job.content_hash) for latent_job in latent_jobs)
    for _, pixels in images.load_many(wanted, read, workers):
        yield pixels


def encode_masks(
    read: Callable[[str], Content], sink: RowSink, mask_jobs: Sequence[MaskJob]
) -> dict[str, UnreadableImage]:
    """Every new mask into shards, one bucket after another.

    Returns:
        mask key -> why its mask could not be used, for those that could not.
    """
    failed: dict[str, UnreadableImage] = {}
    by_bucket: dict[Bucket, list[MaskJob]] = {}
    for mask_job in mask_jobs:
        by_bucket.setdefault(mask_job.geometry.bucket, []).append(mask_job)
    for bucket, jobs_of_bucket in sorted(by_bucket.items()):
        with sink.shards("masks", {"mask": TensorSpec("uint8", bucket.latent_shape)}, bucket) as append:
            for mask_job in jobs_of_bucket:
                try:
                    mask = _load_mask(read, mask_job)
                except UnreadableImage as error:
                    failed[mask_job.key] = error
                else:
                    append({"key": mask_job.key, "mask": mask})
    return failed


def _load_mask(read: Callable[[str], Content], mask_job: MaskJob) -> torch.Tensor:
    content = read(mask_job.path)
    try:
        content = (
            content if isinstance(content, bytes) else read_plain(content, MOST_BYTES)
        )  # the bytes hashed are used
    except OSError as error:
        raise UnreadableImage(f"cannot be read ({error.strerror})") from error
    if mask_job.content_hash and images.hash_content(content) != mask_job.content_hash:
        raise UnreadableImage("has changed since the encode began; encode again", has_changed=True)
    return masks.load_mask(content, mask_job.geometry)

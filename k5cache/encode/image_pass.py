"""The VAE over every new image, and masks beside them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from k5cache.buckets import Bucket
from k5cache.encode import estimate, plan
from k5cache.encode.commit import Committer
from k5cache.encode.job import Job, _bar, _dtype, _in_background, _numbers
from k5cache.encode.one_encoder import alone
from k5cache.shared import console
from k5cache.shared.checkpoint import read_config
from k5cache.sources import images, masks
from k5cache.sources.items import Content, UnreadableImage
from k5cache.store.tensors import TensorSpec

if TYPE_CHECKING:
    import torch


def encode_latents(job: Job, commit: Committer, jobs: Sequence[plan.LatentJob]) -> dict[str, str]:
    """The VAE over every new image, one bucket after another. Returns latent key -> reason for unreadable images.

    Raises:
        DoesNotFit: the card cannot hold the VAE and an image, in strips either.
    """
    if not jobs:
        return {}
    by_bucket: dict[Bucket, list[plan.LatentJob]] = {}
    for one in jobs:
        by_bucket.setdefault(one.geometry.bucket, []).append(one)
    failed: dict[str, str] = {}
    planned = estimate.plan_vae(job.folder, job.config, job.device, job.vram, jobs).vram
    with alone(job.device, job.vram, "The VAE", planned), _bar(job.bars, "VAE", len(jobs), "image") as advance:
        encoder = Vae(job, jobs)
        for bucket, members in sorted(by_bucket.items()):
            advance(0, f"VAE: {bucket.name}")
            encode_bucket(job, commit, bucket, members, encoder, failed, advance)
    return failed


class Vae:
    """The VAE, loaded for the first image that can be read: a broken one alone is no reason to."""

    def __init__(self, job: Job, jobs: Sequence[plan.LatentJob]) -> None:
        self._job, self._jobs = job, jobs
        self._loaded: Any = None
        self._in_strips = False

    def moments(self, pixels: torch.Tensor, names: Sequence[str]) -> torch.Tensor:
        """uint8 ``[3, H, W]`` to float16 ``[names, H/8, W/8, 16]`` on the device; the copy there is queued."""
        import torch

        from k5cache.encoders import vae

        if self._loaded is None:
            with console.doing(self._job.bars, "loading the VAE"):
                self._load()
        if self._job.device != "cpu":
            pixels = pixels.pin_memory().to(self._job.device, non_blocking=True)
        mean, std = vae.encode_on_device(
            self._loaded, vae.to_model_range(pixels.unsqueeze(0)), in_strips=self._in_strips
        )
        moments = {"mean": mean, "std": std}
        return torch.cat([moments[name] for name in names]).half()

    def _load(self) -> None:
        from k5cache.encoders import vae

        job = self._job
        made = estimate.plan_vae(job.folder, job.config, job.device, job.vram, self._jobs)
        self._in_strips = made.mode == "strips"
        self._loaded = vae.keep_encoder_only(vae.load_vae(job.folder, job.device, _dtype(job.config.vae_precision)))


def encode_bucket(
    job: Job,
    commit: Committer,
    bucket: Bucket,
    members: Sequence[plan.LatentJob],
    encoder: Vae,
    failed: dict[str, str],
    advance: Callable[..., None],
) -> None:
    """The images of one bucket into shards; reasons for unreadable ones go to ``failed``."""
    from k5cache.encoders.hostio import fetched

    height, width = bucket.latent_shape
    names = ("mean", "std") if job.config.posterior == "sample" else ("mean",)
    channels = read_config(job.folder, "vae")["latent_channels"]
    specs = {name: TensorSpec("float16", (height, width, channels)) for name in names}

    def encoded() -> Iterator[tuple[str, torch.Tensor]]:
        # With its hash: an image that changed since the plan must not be stored under the old content's key.
        wanted = ((one.path, one.geometry, one.content_hash) for one in members)
        for i, pixels in images.load_many(wanted, job.read):
            if isinstance(pixels, UnreadableImage):
                failed[members[i].key] = pixels.reason
                advance(1)
            else:
                yield members[i].key, encoder.moments(pixels, names)

    with commit.shards("latents", specs, bucket) as append, _in_background(_numbers(append, job.config)) as put:
        for key, moments in fetched(encoded()):
            put({"key": key} | dict(zip(names, moments, strict=True)))
            advance(1)


def encode_masks(read: Callable[[str], Content], commit: Committer, jobs: Sequence[plan.MaskJob]) -> dict[str, str]:
    """Every new mask into shards, one bucket after another. Returns mask key -> reason for unreadable ones."""
    failed: dict[str, str] = {}
    by_bucket: dict[Bucket, list[plan.MaskJob]] = {}
    for job in jobs:
        by_bucket.setdefault(job.geometry.bucket, []).append(job)
    for bucket, members in sorted(by_bucket.items()):
        with commit.shards("masks", {"mask": TensorSpec("uint8", bucket.latent_shape)}, bucket) as append:
            for job in members:
                try:
                    content = read(job.path)
                    content = content if isinstance(content, bytes) else content.read_bytes()  # what is hashed is used
                    if job.content_hash and images.hash_content(content) != job.content_hash:
                        raise UnreadableImage("has changed since the encode began; encode again")
                    mask = masks.load_mask(content, job.geometry)
                except OSError as error:
                    failed[job.key] = f"its mask {job.path} cannot be read ({error.strerror})"
                except UnreadableImage as error:
                    failed[job.key] = f"its mask {job.path} {error.reason}"
                else:
                    append({"key": job.key, "mask": mask})
    return failed

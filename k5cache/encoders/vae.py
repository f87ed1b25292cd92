"""The VAE: pixels to the posterior that latents are drawn from, as diffusers encodes them."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from k5cache.encoders.pipeline import silent
from k5cache.shared.checkpoint import read_config
from k5cache.shared.errors import ModelError
from k5cache.shared.handed_over import handed_over

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Posterior:
    """The VAE's result for a batch of images: ``latents = (mean + std * noise) * scaling_factor``."""

    mean: torch.Tensor
    """``[B, H/8, W/8, 16]`` float32, on the CPU."""
    std: torch.Tensor
    """``[B, H/8, W/8, 16]`` float32, on the CPU."""


def load_vae(folder: Path, device: str | torch.device, dtype: torch.dtype) -> Any:
    """``diffusers.AutoencoderKL`` from ``folder/vae``, in evaluation mode, without gradients.

    Raises:
        ModelError: the folder holds another model or lacks a tensor.
    """
    from diffusers import AutoencoderKL

    where = folder / "vae"
    if (name := read_config(folder, where.name).get("_class_name")) != "AutoencoderKL":
        raise ModelError(f"{where} is a {name}, not AutoencoderKL", "Download the model again")
    with handed_over(folder, where.name) as only:
        vae, info = AutoencoderKL.from_pretrained(
            only, use_safetensors=True, local_files_only=True, output_loading_info=True
        )
    if info["missing_keys"]:
        raise ModelError(f"{where} lacks {', '.join(sorted(info['missing_keys'])[:3])}", "Download the model again")
    with silent("diffusers.models.modeling_utils"):  # it warns at every cast that no module stays in float32
        vae = vae.to(device=device, dtype=dtype)
    return vae.eval().requires_grad_(False)


def to_model_range(pixels: torch.Tensor) -> torch.Tensor:
    """uint8 pixels as the pipeline's ``image_processor`` gives them to the VAE: float32 in [-1, 1], any shape.

    A table, because a GPU divides by a constant through its reciprocal and so misses the CPU's bits.
    """
    import torch

    table = _range_table().to(pixels.device, non_blocking=True)  # waiting here would leave the GPU idle
    values = table[pixels.int()]
    # The strides that image_processor gives: with others, convolutions round differently (1 ulp of float16 at 512x512
    # on a CPU) and take 1.5 times as long.
    return values.contiguous(memory_format=torch.channels_last) if values.ndim == 4 else values


@functools.cache
def _range_table() -> torch.Tensor:
    import numpy as np
    import torch

    # VaeImageProcessor.pil_to_numpy, then .normalize
    return 2.0 * torch.from_numpy(np.arange(256, dtype=np.uint8).astype(np.float32) / 255.0) - 1.0


def encode_pixels(vae: Any, pixels: torch.Tensor, *, exact: bool = True) -> Posterior:
    """Encode images to the posterior the transformer trains on.

    Args:
        pixels: ``[B, 3, H, W]`` in [-1, 1], any float dtype and device; H and W are multiples of 16 (VAE 8 x patch 2).
        exact: encode each image alone. False encodes the batch at once; a convolution over a batch rounds differently
            (measured on a CPU: 2e-6 in float32, 4e-3 in bfloat16, std of latents 0.2).

    Returns:
        mean and std, not yet times ``scaling_factor``. Kandinsky 5 ignores ``shift_factor``:
        ``Kandinsky5T2IPipeline`` decodes ``latents / scaling_factor``.
    """
    import torch

    moments = [encode_on_device(vae, part) for part in (torch.split(pixels, 1) if exact else [pixels])]
    return Posterior(
        mean=torch.cat([mean.float().cpu() for mean, _ in moments]),
        std=torch.cat([std.float().cpu() for _, std in moments]),
    )


def encode_on_device(vae: Any, pixels: torch.Tensor, *, in_strips: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    """One forward pass of ``encode_pixels``. The result stays on the VAE's device, in its dtype.

    Args:
        in_strips: take less memory and round differently (``strips.py``); one image at a time.

    Returns:
        mean and std, each ``[B, H/8, W/8, 16]``, contiguous.
    """
    import torch

    with torch.no_grad():
        pixels = pixels.to(device=vae.device, dtype=vae.dtype)
        if in_strips:
            from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution

            from k5cache.encoders.strips import moments_in_strips

            posterior: Any = DiagonalGaussianDistribution(moments_in_strips(vae, pixels))
        else:
            posterior = vae.encode(pixels).latent_dist
        mean, std = (moment.permute(0, 2, 3, 1).contiguous() for moment in (posterior.mean, posterior.std))
    return mean, std


def keep_encoder_only(vae: Any) -> Any:
    """``vae`` without its decoder, which stage 1 does not need: 200 of 335 MB."""
    vae.decoder = vae.post_quant_conv = None
    return vae

"""How is a picture drawn from a cached prompt, or from a cached source and instruction? By Euler flow steps.

No text encoder is loaded. The VAE is loaded to decode, and then freed.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from PIL import Image
from rich.progress import Progress
from torch import Tensor

from k5cache.shared import console
from k5cache.shared.handed_over import handed_over
from k5cache.shared.vram import left
from k5train.forward.condition import condition_of
from k5train.forward.predict_velocity import predict_velocity
from k5train.parallel.ranks import ALONE, Ranks, united
from k5train.pictures.drawing import Drawing, Posterior, SampleSettings

if TYPE_CHECKING:
    from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, Kandinsky5Transformer3DModel

    from k5cache.store.reader import TextRow

DECODED_BYTES = 4096  # for each pixel: four float32 maps of 256 channels, in the last and largest part of the decoder


def draw(
    transformer: Kandinsky5Transformer3DModel,
    folder: Path,
    drawings: Sequence[Drawing],
    bars: Progress,
    description: str,
    ranks: Ranks = ALONE,
) -> list[Image.Image]:
    """All pictures, from the same noise where they have one size: draw all latents, then load the VAE and decode.

    Args:
        ranks: the processes that share the drawings. The first one decodes them; the others return nothing.
    """
    task = bars.add_task(description, total=sum(d.settings.num_inference_steps for d in drawings), unit="step", note="")
    scheduler = load_scheduler(folder)

    def on_step() -> None:
        ranks.check()
        bars.advance(task, ranks.size)

    latents = [
        sample_latents(transformer, scheduler, d.prompt, d.negative, d.settings, on_step, d.source)
        for d in ranks.share(drawings)
    ]
    if ranks.size > 1:
        latents = _collected(latents, ranks)
    pictures = decode(folder, latents, transformer.device) if ranks.is_first else []
    bars.remove_task(task)
    return pictures


def _collected(latents: Sequence[Tensor], ranks: Ranks) -> list[Tensor]:
    """The latents of all drawings on the first process, with every bit."""
    from safetensors.torch import load, save

    own = {f"{place:06d}": tensor.cpu().contiguous() for place, tensor in enumerate(latents)}
    shares = [load(data) for data in ranks.collect(save(own))]
    return list(united([[share[name] for name in sorted(share)] for share in shares]))


def load_scheduler(folder: Path) -> FlowMatchEulerDiscreteScheduler:
    """The checkpoint's own scheduler: its shift decides which sigmas inference visits."""
    from diffusers import FlowMatchEulerDiscreteScheduler

    with handed_over(folder, "scheduler") as only:
        return FlowMatchEulerDiscreteScheduler.from_pretrained(only, local_files_only=True)


def inference_sigmas(folder: Path, num_inference_steps: int) -> Tensor:
    """``[steps + 1]``: the sigmas that the checkpoint's own scheduler visits, from 1 down to 0."""
    scheduler = load_scheduler(folder)
    scheduler.set_timesteps(num_inference_steps)
    sigmas: Tensor = scheduler.sigmas
    return sigmas


@torch.no_grad()
def sample_latents(
    transformer: Kandinsky5Transformer3DModel,
    scheduler: FlowMatchEulerDiscreteScheduler,
    prompt: TextRow,
    negative: TextRow | None,
    settings: SampleSettings,
    on_step: Callable[[], object] = lambda: None,
    source: Posterior | None = None,
) -> Tensor:
    """The latents that ``Kandinsky5T2IPipeline`` computes from the same noise, scheduler and guidance.

    Noise comes from a CPU generator seeded with ``settings.seed``, in the transformer's dtype, as the pipeline draws it
    for ``generator=torch.Generator("cpu").manual_seed(seed)``. With a source they are those of
    ``Kandinsky5I2IPipeline``, which then draws a sample of the source from the same generator.

    Returns:
        ``[1, 1, H/8, W/8, 16]``, scaled by ``scaling_factor``.
    """
    device, dtype = transformer.device, transformer.dtype
    generator = torch.Generator().manual_seed(settings.seed)
    shape = (1, 1, settings.height // 8, settings.width // 8, transformer.config.out_visual_dim)
    latents = torch.randn(shape, generator=generator, dtype=dtype).to(device)
    condition = None if source is None else condition_of(sample_source(source, generator, dtype)).to(device)
    scheduler.set_timesteps(settings.num_inference_steps, device=device)

    def predict(text: TextRow, sigma: Tensor) -> Tensor:
        embeds, pooled = text.prompt_embeds[None].to(device), text.pooled[None].to(device)
        return predict_velocity(transformer, latents, sigma, embeds, pooled, condition=condition)

    for sigma, timestep in zip(scheduler.sigmas, scheduler.timesteps, strict=False):  # sigmas ends with an extra 0
        velocity = predict(prompt, sigma.reshape(1))
        if settings.guidance_scale > 1.0:
            assert negative is not None, "guidance leads away from something"
            unguided = predict(negative, sigma.reshape(1))
            velocity = unguided + settings.guidance_scale * (velocity - unguided)
        latents = scheduler.step(velocity, timestep, latents, return_dict=False)[0]
        on_step()
    return latents


def sample_source(source: Posterior, generator: torch.Generator, dtype: torch.dtype) -> Tensor:
    """``[1, 1, H/8, W/8, 16]``: a sample, scaled, in the order and number format of the pipeline's VAE."""
    mean = source.mean.to(dtype).permute(2, 0, 1)[None]
    noise = torch.randn(mean.shape, generator=generator, dtype=dtype)
    sample = mean if source.std is None else mean + source.std.to(dtype).permute(2, 0, 1)[None] * noise
    return (sample * source.scaling_factor).permute(0, 2, 3, 1)[:, None]


@torch.no_grad()
def decode(folder: Path, latents: Sequence[Tensor], device: torch.device) -> list[Image.Image]:
    """Decode latents ``[1, 1, H/8, W/8, 16]`` to pictures. The float32 VAE is loaded for this alone and then freed.

    Kandinsky 5 ignores ``shift_factor``: ``Kandinsky5T2IPipeline`` decodes ``latents / scaling_factor``.
    """
    from diffusers import AutoencoderKL
    from diffusers.image_processor import VaeImageProcessor

    with handed_over(folder, "vae") as only:
        vae = AutoencoderKL.from_pretrained(only, local_files_only=True)
    vae = vae.to(device)
    height, width = (8 * max(latent.shape[dim] for latent in latents) for dim in (2, 3))
    fit_decoding(vae, height, width, left(device))
    processor = VaeImageProcessor(vae_scale_factor=8)
    pictures: list[Image.Image] = []
    num_spoilt = 0
    for latent in latents:
        # These are the strides of the pipeline's own view: with others a convolution changes 1 pixel in 20,000 by 1.
        channels_first = latent[0, 0].permute(2, 0, 1).unsqueeze(0).to(device, torch.float32)
        pixels = vae.decode(channels_first / vae.config.scaling_factor).sample
        if pixels.isnan().any():
            num_spoilt += 1
            pixels = pixels.nan_to_num(-1.0)  # black
        pictures += processor.postprocess(pixels, output_type="pil")
    if num_spoilt:
        console.warn(
            f"{num_spoilt} of {len(latents)} pictures have pixels that are no numbers, which are drawn black: the LoRA"
            " has diverged, or its strength is far too high"
        )
    del vae
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return pictures


def fit_decoding(vae: AutoencoderKL, height: int, width: int, num_bytes: int | None) -> None:
    """Have the VAE decode in overlapping tiles if a whole picture does not fit beside the transformer.

    Tiles are blended, so the picture then differs slightly from the pipeline's.

    Args:
        num_bytes: free VRAM. None: no limit.
    """
    if num_bytes is None or height * width * DECODED_BYTES <= num_bytes:
        return
    side = next((side for side in (768, 512, 384) if side * side * DECODED_BYTES <= num_bytes), 256)
    console.note(f"Decoding in tiles of {side} pixels: {console.human_bytes(num_bytes)} of VRAM are free")
    vae.enable_tiling()
    # The default tile is the size that the VAE was trained at, 1024 pixels, which would not tile most pictures.
    vae.tile_sample_min_size, vae.tile_latent_min_size = side, side // 8

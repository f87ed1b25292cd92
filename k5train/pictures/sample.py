"""Pictures from cached prompts: Euler flow steps without a text encoder; the VAE is loaded to decode, then freed."""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from PIL import Image
from rich.progress import Progress
from torch import Tensor

from k5cache.shared import console
from k5cache.shared.errors import RecipeError
from k5cache.shared.vram import left
from k5train.forward.predict_velocity import predict_velocity

if TYPE_CHECKING:
    from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, Kandinsky5Transformer3DModel

    from k5cache.store.reader import Cache, TextRow
    from k5train.options.validation import ValidationConfig


def inference_sigmas(folder: Path, num_inference_steps: int) -> Tensor:
    """``[steps + 1]``: where the checkpoint's own scheduler steps, from 1 down to 0."""
    from k5train.pictures.sample import load_scheduler

    scheduler = load_scheduler(folder)
    scheduler.set_timesteps(num_inference_steps)
    sigmas: Tensor = scheduler.sigmas
    return sigmas


@dataclass(frozen=True)
class SampleSettings:
    """How pictures are drawn; the same settings give the same noise, whatever the adapter."""

    width: int
    height: int
    num_inference_steps: int
    guidance_scale: float
    seed: int


def settings_for(cache: Cache, chosen: ValidationConfig) -> SampleSettings:
    """The recipe's settings; a size it leaves open is the cache's resolution, square."""
    side = cache.manifest.recipe["selection"]["resolution"]
    return SampleSettings(
        chosen.width or side, chosen.height or side, chosen.num_inference_steps, chosen.guidance_scale, chosen.seed
    )


def draw_prompts(
    transformer: Kandinsky5Transformer3DModel,
    folder: Path,
    rows: Sequence[TextRow],
    negative: TextRow,
    settings: SampleSettings,
    bars: Progress,
    description: str,
) -> list[Image.Image]:
    """One picture a prompt, all from the same noise: sample every prompt, then load the VAE, decode, free it."""
    task = bars.add_task(description, total=len(rows) * settings.num_inference_steps, unit="step", note="")
    scheduler = load_scheduler(folder)
    on_step = partial(bars.advance, task)
    latents = [sample_latents(transformer, scheduler, row, negative, settings, on_step) for row in rows]
    pictures = decode(folder, latents, transformer.device)
    bars.remove_task(task)
    return pictures


def load_scheduler(folder: Path) -> FlowMatchEulerDiscreteScheduler:
    """The checkpoint's own scheduler: its shift decides which sigmas inference visits."""
    from diffusers import FlowMatchEulerDiscreteScheduler

    return FlowMatchEulerDiscreteScheduler.from_pretrained(folder, subfolder="scheduler", local_files_only=True)


@torch.no_grad()
def sample_latents(
    transformer: Kandinsky5Transformer3DModel,
    scheduler: FlowMatchEulerDiscreteScheduler,
    prompt: TextRow,
    negative: TextRow,
    settings: SampleSettings,
    on_step: Callable[[], object] = lambda: None,
) -> Tensor:
    """The latents that ``Kandinsky5T2IPipeline`` ends with for the same noise, scheduler and guidance.

    Noise comes from a CPU generator seeded with ``settings.seed``, in the transformer's dtype, as the pipeline draws it
    for ``generator=torch.Generator("cpu").manual_seed(seed)``.

    Returns:
        ``[1, 1, H/8, W/8, 16]``, scaled by ``scaling_factor``.
    """
    device, dtype = transformer.device, transformer.dtype
    generator = torch.Generator().manual_seed(settings.seed)
    shape = (1, 1, settings.height // 8, settings.width // 8, transformer.config.out_visual_dim)
    latents = torch.randn(shape, generator=generator, dtype=dtype).to(device)
    scheduler.set_timesteps(settings.num_inference_steps, device=device)

    def predict(text: TextRow, sigma: Tensor) -> Tensor:
        embeds, pooled = text.prompt_embeds[None].to(device), text.pooled[None].to(device)
        return predict_velocity(transformer, latents, sigma, embeds, pooled, gradient_checkpointing=False)

    for sigma, timestep in zip(scheduler.sigmas, scheduler.timesteps, strict=False):  # sigmas ends with an extra 0
        velocity = predict(prompt, sigma.reshape(1))
        if settings.guidance_scale > 1.0:
            unguided = predict(negative, sigma.reshape(1))
            velocity = unguided + settings.guidance_scale * (velocity - unguided)
        latents = scheduler.step(velocity, timestep, latents, return_dict=False)[0]
        on_step()
    return latents


@torch.no_grad()
def decode(folder: Path, latents: Sequence[Tensor], device: torch.device) -> list[Image.Image]:
    """Latents ``[1, 1, H/8, W/8, 16]`` to pictures. The float32 VAE is loaded for this alone and freed again.

    Kandinsky 5 ignores ``shift_factor``: ``Kandinsky5T2IPipeline`` decodes ``latents / scaling_factor``.
    """
    from diffusers import AutoencoderKL
    from diffusers.image_processor import VaeImageProcessor

    vae = AutoencoderKL.from_pretrained(folder, subfolder="vae", local_files_only=True).to(device)
    fit_decoding(vae, max(8 * one.shape[2] for one in latents), max(8 * one.shape[3] for one in latents), left(device))
    processor = VaeImageProcessor(vae_scale_factor=8)
    pictures: list[Image.Image] = []
    for one in latents:
        # The strides of the pipeline's own view: with others a convolution rounds 1 pixel in 20,000 off by 1/255.
        channels_first = one[0, 0].permute(2, 0, 1).unsqueeze(0).to(device, torch.float32)
        pixels = vae.decode(channels_first / vae.config.scaling_factor).sample
        pictures += processor.postprocess(pixels, output_type="pil")
    del vae
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return pictures


DECODED_BYTES = 4096  # a pixel: four float32 maps of 256 channels, in the last and largest part of the decoder


def fit_decoding(vae: AutoencoderKL, height: int, width: int, num_bytes: int | None) -> None:
    """Have the VAE decode in overlapping tiles where a whole picture does not fit beside the transformer.

    Tiles are blended: the picture then differs from the pipeline's by what their edges see less of.

    Args:
        num_bytes: VRAM that is left. None: no limit.
    """
    if num_bytes is None or height * width * DECODED_BYTES <= num_bytes:
        return
    side = next((side for side in (768, 512, 384) if side * side * DECODED_BYTES <= num_bytes), 256)
    console.note(f"Decoding in tiles of {side} pixels: {console.human_bytes(num_bytes)} of VRAM are left")
    vae.enable_tiling()
    # By default a tile is the size the VAE was trained at, 1024 pixels: no tiling at all of most pictures.
    vae.tile_sample_min_size, vae.tile_latent_min_size = side, side // 8


def prompt_rows(cache: Cache, prompts: Sequence[str], negative_prompt: str) -> tuple[list[TextRow], TextRow]:
    """The cached embeddings of the validation prompts and of the negative prompt.

    Raises:
        RecipeError: there are no prompts to draw.
        CacheError: a prompt is not in the cache.
    """
    if not prompts:
        raise RecipeError(
            "There is no prompt to draw", 'Add prompts = ["..."] under [train.validation] and encode again'
        )
    return [cache.prompt(p) for p in prompts], cache.prompt(negative_prompt)

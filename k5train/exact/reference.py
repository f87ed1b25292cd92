"""What does diffusers compute? Its transformer called as its pipelines do, T2I and I2I; with int8, quanto's."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, Kandinsky5Transformer3DModel
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from k5cache.shared.handed_over import handed_over
from k5train.base.quantize import INT8_MODULES
from k5train.exact.case import Case
from k5train.pictures.drawing import Posterior


def as_the_pipeline_calls_it(
    model: Any, latents: Tensor, timestep: Tensor, prompt_embeds: Tensor, pooled_projections: Tensor
) -> Tensor:
    """``Kandinsky5T2IPipeline.__call__``, sections 6 to 9, for one step; ``Kandinsky5I2IPipeline``'s are the same.

    Args:
        latents: for image-to-image with the source's latents and the mask channel behind them.
        timestep: ``[B]`` float32, 1000 sigma.
    """
    dtype, device = model.text_embeddings.in_layer.weight.dtype, latents.device
    height, width = latents.shape[2:4]
    velocity: Tensor = model(
        hidden_states=latents.to(dtype),
        encoder_hidden_states=prompt_embeds.to(dtype),
        pooled_projections=pooled_projections.to(dtype),
        timestep=timestep.to(dtype),
        visual_rope_pos=[torch.arange(n, device=device) for n in (1, height // 2, width // 2)],
        text_rope_pos=torch.arange(prompt_embeds.shape[1], device=device),
        scale_factor=[1.0, 1.0, 1.0],
        sparse_params=None,
        return_dict=True,
    ).sample
    return velocity


def reference_predict(model: Any) -> Callable[..., Tensor]:
    """``as_the_pipeline_calls_it``, with the arguments of ``predict_velocity``."""

    def predict(
        latents: Tensor, sigma: Tensor, embeds: Tensor, pooled: Tensor, condition: Tensor | None = None
    ) -> Tensor:
        whole = latents if condition is None else torch.cat([latents, condition], dim=-1)
        return as_the_pipeline_calls_it(model, whole, 1000 * sigma, embeds, pooled)

    return predict


@torch.no_grad()
def pipeline_latents(model: Any, scheduler: FlowMatchEulerDiscreteScheduler, case: Case) -> Tensor:
    """``Kandinsky5T2IPipeline.__call__``, section 9, on cached embeddings; or ``Kandinsky5I2IPipeline``'s, 5 and 9.

    The pipeline itself would load the encoders' modelling; a test compares the two.
    """
    device, settings = case.group.latents.device, case.settings
    dtype, channels = model.text_embeddings.in_layer.weight.dtype, model.config.out_visual_dim
    scheduler.set_timesteps(settings.num_inference_steps, device=device)
    generator = torch.Generator().manual_seed(settings.seed)
    shape = (1, 1, settings.height // 8, settings.width // 8, channels)
    latents = randn_tensor(shape, generator=generator, device=device, dtype=dtype)
    if case.source is not None:
        latents = torch.cat([latents, prepared_source(case.source, generator, latents)], -1)
    for timestep in scheduler.timesteps:
        velocities = [
            as_the_pipeline_calls_it(model, latents, timestep.reshape(1), row.prompt_embeds[None], row.pooled[None])
            for row in (case.prompt, case.negative)
        ]
        velocity = velocities[1] + settings.guidance_scale * (velocities[0] - velocities[1])
        latents[..., :channels] = scheduler.step(velocity, timestep, latents[..., :channels], return_dict=False)[0]
    return latents[..., :channels]


def prepared_source(source: Posterior, generator: torch.Generator, like: Tensor) -> Tensor:
    """The end of ``Kandinsky5I2IPipeline.prepare_latents``, from what the VAE gave."""
    mean = source.mean.to(like.device, like.dtype).permute(2, 0, 1)[None]
    std = (
        torch.zeros_like(mean) if source.std is None else source.std.to(like.device, like.dtype).permute(2, 0, 1)[None]
    )
    # DiagonalGaussianDistribution.sample
    sample = mean + std * randn_tensor(mean.shape, generator=generator, device=like.device, dtype=like.dtype)
    image_latents = sample.unsqueeze(2) * source.scaling_factor
    image_latents = image_latents.permute(0, 2, 3, 4, 1).to(device=like.device, dtype=like.dtype)
    return torch.cat([image_latents, torch.ones_like(image_latents[..., :1])], -1)


def reference_transformer(folder: Path, dtype: torch.dtype) -> Any:
    """diffusers' transformer as a user loads it, frozen, on the CPU."""
    with handed_over(folder, "transformer") as only:
        model = Kandinsky5Transformer3DModel.from_pretrained(only, torch_dtype=dtype, local_files_only=True)
    model.enable_gradient_checkpointing()
    return model.requires_grad_(False).eval()


def quanto_transformer(folder: Path, dtype: torch.dtype) -> Any:
    """``reference_transformer`` with quanto's int8 linears, for the same layers as ours."""
    from optimum.quanto import freeze, qint8, quantize

    model = reference_transformer(folder, dtype)
    quantize(model, weights=qint8, include=[n for n, _ in model.named_modules() if INT8_MODULES.fullmatch(n)])
    freeze(model)
    return model

"""What does diffusers compute? Its transformer called as ``Kandinsky5T2IPipeline`` does; with int8, quanto's."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, Kandinsky5Transformer3DModel
from torch import Tensor

from k5cache.shared.handed_over import handed_over
from k5train.base.quantize import INT8_MODULES
from k5train.exact.case import Case


def as_the_pipeline_calls_it(
    model: Any, latents: Tensor, timestep: Tensor, prompt_embeds: Tensor, pooled_projections: Tensor
) -> Tensor:
    """``Kandinsky5T2IPipeline.__call__``, sections 6 to 9, for one step.

    Args:
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
    return lambda latents, sigma, embeds, pooled: as_the_pipeline_calls_it(model, latents, 1000 * sigma, embeds, pooled)


@torch.no_grad()
def pipeline_latents(model: Any, scheduler: FlowMatchEulerDiscreteScheduler, case: Case) -> Tensor:
    """``Kandinsky5T2IPipeline.__call__``, section 9, on cached embeddings.

    The pipeline itself would load the encoders' modelling; a test compares the two.
    """
    device, settings = case.group.latents.device, case.settings
    dtype = model.text_embeddings.in_layer.weight.dtype
    scheduler.set_timesteps(settings.num_inference_steps, device=device)
    shape = (1, 1, settings.height // 8, settings.width // 8, model.config.out_visual_dim)
    latents = torch.randn(shape, generator=torch.Generator().manual_seed(settings.seed), dtype=dtype).to(device)
    for timestep in scheduler.timesteps:
        velocities = [
            as_the_pipeline_calls_it(model, latents, timestep.reshape(1), row.prompt_embeds[None], row.pooled[None])
            for row in (case.prompt, case.negative)
        ]
        velocity = velocities[1] + settings.guidance_scale * (velocities[0] - velocities[1])
        latents = scheduler.step(velocity, timestep, latents, return_dict=False)[0]
    return latents


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

"""How long does a step take with diffusers, peft and quanto's int8? `k5train bench` is compared with it: eager, as most
run them, and with diffusers' own `compile_repeated_blocks`."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from optimum.quanto import freeze, qint8, quantize
from torch import nn

from k5train.adapter import attach
from k5train.base import random_weights
from k5train.base.architecture import FULL_SIZE
from k5train.bench.case import I2I, MUST_REACH, Baseline, Case, Measured, condition_for, inputs_for
from k5train.bench.timing import flops, time_steps, watch_step
from k5train.forward.compile import set_up_compiler
from k5train.objective import flow
from k5train.options.adapter import LoraConfig
from k5train.options.train import TrainConfig
from k5train.planning.memory import architecture
from k5train.planning.plan import work_for


def time_baseline(
    config: dict[str, Any], device: torch.device, num_steps: int, num_warm_up: int, case: Case = MUST_REACH[0],
    how: Baseline = "eager", is_watched: bool = True,
) -> Measured:  # fmt: skip
    """Time a case of the bench, with gradient checkpointing.

    Args:
        config: the transformer's config.json. Any other than the full size is timed on a small picture.
        how: whether the blocks run eagerly or compiled.
        is_watched: whether to profile one more step.
    """
    config = case.config(config)
    if config["model_dim"] != FULL_SIZE["model_dim"]:
        case = replace(case, side=64, num_text_tokens=8)
    transformer = random_weights.random_transformer(config, "no_change", device)
    _use_plain_linears(transformer)
    # The input of image-to-image has 132 numbers a patch, and quanto's int8 kernel for CPUs reads beyond such a row.
    quantize(transformer, weights=qint8, exclude=["visual_embeddings.*"] if case.is_i2i else None)
    freeze(transformer)
    attach.add_lora(transformer, LoraConfig(rank=case.rank, alpha=case.rank, targets=case.targets), seed=0)
    transformer.enable_gradient_checkpointing()
    if how == "compiled":
        set_up_compiler()
        transformer.compile_repeated_blocks()
    latents, sigma, text, pooled = inputs_for(case, config, device)
    noisy = torch.cat([latents, *condition_for(case, config, device).values()], dim=-1)
    grid = case.side // 16
    positions = [torch.arange(n, device=device) for n in (1, grid, grid)]
    parameters, target = attach.lora_parameters(transformer), torch.randn_like(latents)
    optimizer = torch.optim.AdamW(parameters, lr=1e-5)
    transformer.train()

    def step() -> None:
        velocity = transformer(
            hidden_states=noisy.bfloat16(), encoder_hidden_states=text, timestep=(1000 * sigma).bfloat16(),
            pooled_projections=pooled, visual_rope_pos=positions,
            text_rope_pos=torch.arange(text.shape[1], device=device), return_dict=False,
        )  # fmt: skip
        torch.autograd.backward(flow.flow_loss(velocity, target))
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    timing = time_steps(step, None, device, num_steps, num_warm_up)
    seen = watch_step(step) if is_watched and device.type == "cuda" else None
    train = TrainConfig(lora=LoraConfig(rank=case.rank, targets=case.targets))
    operations = flops(architecture(config), work_for(config, train, (grid**2, case.num_text_tokens), compiled=False))
    kind = I2I if case.is_i2i else ""
    return Measured(
        f"baseline: {kind}diffusers + peft + quanto, {how}, checkpointing", timing.median, timing.fastest, None,
        timing.reserved_gib, operations / timing.median / 1e9, "all recomputed", timing.first, how,
    ).on_gpu(seen)  # fmt: skip


def _use_plain_linears(transformer: nn.Module) -> None:
    """Give the transformer the linears that ``from_pretrained`` gives it: float32 where diffusers keeps float32."""
    for name, module in list(transformer.named_modules()):
        if isinstance(module, nn.Linear):
            linear = nn.Linear(module.in_features, module.out_features, device="meta")
            is_float32 = any(part in name for part in ("modulation", "time_embeddings"))
            weight = module.weight.float() if is_float32 else module.weight
            linear.weight = nn.Parameter(weight, requires_grad=False)
            linear.bias = None if module.bias is None else nn.Parameter(module.bias.to(weight.dtype), False)
            parent, _, leaf = name.rpartition(".")
            setattr(transformer.get_submodule(parent), leaf, linear)

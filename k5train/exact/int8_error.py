"""What do int8 weights and int8 tensor cores cost? LoRA gradients and losses of each precision beside bf16's."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from rich.table import Table
from torch import Tensor

from k5cache.shared import console
from k5train.adapter import attach
from k5train.base.linear import Int8Linear
from k5train.base.quantize import INT8_MODULES, Precision, quantize_int8, replace_linear
from k5train.base.random_weights import random_transformer
from k5train.bench.case import Case, inputs_for
from k5train.forward.load import execute
from k5train.forward.predict_velocity import predict_velocity
from k5train.objective import flow
from k5train.options.adapter import LoraConfig
from k5train.options.memory import MemoryConfig
from k5train.options.train import TrainConfig
from k5train.planning.memory import LevelName, Plan

PRECISIONS: tuple[Precision, ...] = ("no_change", "int8-quanto", "int8-dynamic")


def gradients_by_layer(
    config: dict[str, Any], device: torch.device, case: Case, execution: str = "auto"
) -> dict[Precision, dict[str, Tensor]]:
    """LoRA gradients of one step in each precision, from the same bf16 weights: kind of layer -> one long vector."""
    transformer = random_transformer(config, "no_change", device)
    attach.add_lora(transformer, LoraConfig(rank=case.rank, alpha=case.rank, targets=("official",)), seed=0)
    generator = torch.Generator(device).manual_seed(2)
    for parameter in attach.lora_parameters(transformer)[1::2]:  # lora_B: at zero, lora_A would have no gradient
        parameter.data = torch.randn(parameter.shape, generator=generator, device=device) * 0.01
    inputs = inputs_for(case, config, device)
    target = torch.randn(inputs[0].shape, generator=generator, device=device)
    found: dict[Precision, dict[str, Tensor]] = {}
    for precision in PRECISIONS:
        if precision == "int8-quanto":
            to_int8(transformer)
        run_as(transformer, precision, device, execution)
        transformer.zero_grad()
        torch.autograd.backward(flow.flow_loss(predict_velocity(transformer, *inputs), target))
        kinds: dict[str, list[Tensor]] = {}
        for name, parameter in transformer.named_parameters():
            if parameter.grad is not None:
                kinds.setdefault(_kind(name), []).append(parameter.grad.flatten().float())
        found[precision] = {kind: torch.cat(parts) for kind, parts in kinds.items()}
    return found


def losses(
    config: dict[str, Any], device: torch.device, case: Case, num_steps: int = 200, execution: str = "auto"
) -> dict[Precision, list[float]]:
    """Losses of a toy run in each precision: the same random weights, data, noise and start."""
    found = {}
    for precision in PRECISIONS:
        transformer = random_transformer(config, "no_change", device)
        if precision != "no_change":
            to_int8(transformer)
        attach.add_lora(transformer, LoraConfig(rank=case.rank, alpha=case.rank, targets=("official",)), seed=0)
        run_as(transformer, precision, device, execution)
        transformer.train()
        parameters = attach.lora_parameters(transformer)
        optimizer = torch.optim.AdamW(parameters, lr=1e-3, weight_decay=0.0)
        latents, _, text, pooled = inputs_for(case, config, device)
        generator = torch.Generator(device).manual_seed(5)
        run = []
        for _ in range(num_steps):
            sigma = torch.rand(len(latents), generator=generator, device=device)
            noise = torch.randn(latents.shape, generator=generator, device=device)
            velocity = predict_velocity(transformer, flow.add_noise(latents, noise, sigma), sigma, text, pooled)
            loss = flow.flow_loss(velocity, flow.velocity_target(latents, noise))
            torch.autograd.backward(loss)
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            run.append(loss.item())
        found[precision] = run
    return found


def compare_gradients(config: dict[str, Any], device: torch.device, case: Case | None = None) -> Table:
    """``gradients_by_layer`` as a table: cosine and norm beside bf16's, for each kind of layer and all of them."""
    found = gradients_by_layer(config, device, case or Case("no_change", None))
    table = console.table(
        "LoRA gradients beside bf16: cosine, norm", "layer", *PRECISIONS[1:], numbers=tuple(PRECISIONS[1:])
    )
    plain = found["no_change"]
    for kind in [*plain, "all"]:
        cells = []
        for precision in PRECISIONS[1:]:
            ours, theirs = (
                torch.cat(list(g.values())) if kind == "all" else g[kind] for g in (found[precision], plain)
            )
            cosine = F.cosine_similarity(ours, theirs, dim=0).item()
            cells.append(f"{cosine:.5f}  {(ours.norm() / theirs.norm()).item():.4f}")
        table.add_row(kind, *cells)
    return table


# What of a transformer could be int8, by the names of its linears.
PARTS = {
    "self attention": re.compile(r"visual_transformer_blocks\.\d+\.self_attention\..*"),
    "cross attention": re.compile(r"visual_transformer_blocks\.\d+\.cross_attention\..*"),
    "feed-forward": re.compile(r"visual_transformer_blocks\.\d+\.feed_forward\..*"),
    "text blocks": re.compile(r"text_transformer_blocks\.\d+\.(self_attention|feed_forward)\..*"),
    "modulations": re.compile(r".*modulation.*"),
    "embeddings": re.compile(r"(time|text|pooled_text|visual)_embeddings\..*"),
    "output head": re.compile(r"out_layer\.out_layer"),
}


@dataclass(frozen=True)
class PartError:
    """What it costs and saves to hold one part of the transformer in int8, and everything else as it is."""

    part: str
    num_parameters: int
    error: float
    """Of the velocity: norm of the difference over the norm, mean over the inputs."""


@torch.no_grad()
def error_by_part(transformer: Any, inputs: Sequence[tuple[Tensor, ...]]) -> list[PartError]:
    """Which layers may be int8, by measured error. The weights are put back, bit for bit.

    Args:
        transformer: unquantised, without an adapter.
        inputs: arguments of ``predict_velocity``, several sigmas for choice.
    """
    plain = [predict_velocity(transformer, *given) for given in inputs]
    found = []
    for part, pattern in PARTS.items():
        linears = [m for n, m in transformer.named_modules() if pattern.fullmatch(n) and isinstance(m, torch.nn.Linear)]
        held = [m.weight.data for m in linears]
        for module in linears:
            weight, scale = quantize_int8(module.weight.data)
            module.weight.data = scale * weight
        error = 0.0
        for given, expected in zip(inputs, plain, strict=True):
            difference = predict_velocity(transformer, *given).float() - expected.float()
            error += (difference.norm() / expected.float().norm()).item() / len(inputs)
        for module, weight in zip(linears, held, strict=True):
            module.weight.data = weight
        found.append(PartError(part, sum(w.numel() for w in held), error))
    return found


def parts_table(found: Sequence[PartError]) -> Table:
    """``error_by_part`` as a table: the error, and what a gigabyte saved costs of it."""
    columns = ("part", "parameters", "16-bit", "error in int8", "error a GB saved")
    table = console.table("Error of the velocity when one part is int8", *columns, numbers=columns[1:])
    for row in found:
        saved = row.num_parameters / 1e9  # one byte each
        cells = (f"{row.num_parameters / 1e6:,.1f} M", console.human_bytes(2 * row.num_parameters))
        table.add_row(row.part, *cells, f"{100 * row.error:.3f} %", f"{100 * row.error / saved:.2f} %" if saved else "")
    return table


def to_int8(transformer: Any) -> None:
    """Quantise a 16-bit transformer where it is, as loading would have."""
    for name, module in list(transformer.named_modules()):
        plain = name.replace(".base_layer", "")
        if INT8_MODULES.fullmatch(plain) and type(module) is torch.nn.Linear:
            replace_linear(transformer, name, Int8Linear(*quantize_int8(module.weight.detach())), bias=module.bias)


def run_as(transformer: Any, precision: Precision, device: torch.device, execution: str) -> None:
    """Have the blocks run lean in one precision, everything recomputed."""
    memory = MemoryConfig(execution=execution)  # type: ignore[arg-type]
    lean: LevelName = "nothing"
    plan = Plan((lean,) * len(transformer.visual_transformer_blocks), None, {}, None, 0)
    execute(transformer, TrainConfig(base_model_precision=precision, memory=memory), device, plan)


def _kind(name: str) -> str:
    """``visual self_attention.to_query`` of a parameter's whole name."""
    blocks, _, rest = name.partition("_transformer_blocks.")
    return f"{blocks} {rest.split('.', 1)[1].split('.lora_')[0]}"

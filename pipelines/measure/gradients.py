"""What do int8 weights and int8 tensor cores cost? LoRA gradients, losses and velocities compared with bf16's."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Annotated, Any

import torch
import torch.nn.functional as F
import typer
from torch import Tensor

from k5cache.shared.console import human_bytes
from k5train.adapter import attach
from k5train.base.architecture import FULL_SIZE
from k5train.base.linear import Int8Linear
from k5train.base.quantize import INT8_MODULES, Precision, quantize_int8, replace_linear
from k5train.base.random_weights import random_transformer
from k5train.bench.case import QUICK, Case, inputs_for
from k5train.commands.bench import gpu_to_measure
from k5train.forward.load import execute
from k5train.forward.predict_velocity import predict_velocity
from k5train.objective import flow
from k5train.options.adapter import LoraConfig
from k5train.options.memory import MemoryConfig
from k5train.options.train import TrainConfig
from k5train.planning.memory import LevelName, Plan
from pipelines.measure import command_line

PRECISIONS: tuple[Precision, ...] = ("no_change", "int8-quanto", "int8-dynamic")
PART_COLUMNS = ("part", "parameters", "16-bit", "error in int8", "error a GB saved")
PARTS = {
    "self attention": re.compile(r"visual_transformer_blocks\.\d+\.self_attention\..*"),
    "cross attention": re.compile(r"visual_transformer_blocks\.\d+\.cross_attention\..*"),
    "feed-forward": re.compile(r"visual_transformer_blocks\.\d+\.feed_forward\..*"),
    "text blocks": re.compile(r"text_transformer_blocks\.\d+\.(self_attention|feed_forward)\..*"),
    "modulations": re.compile(r".*modulation.*"),
    "embeddings": re.compile(r"(time|text|pooled_text|visual)_embeddings\..*"),
    "output head": re.compile(r"out_layer\.out_layer"),
}
"""The parts of a transformer that could be int8, by the names of their linears."""


@dataclass(frozen=True)
class GradientError:
    """How the gradients of one kind of layer in one precision compare with bf16's."""

    layer: str
    precision: Precision
    cosine: float
    norm: float
    """Over the norm of bf16's."""


@dataclass(frozen=True)
class PartError:
    """The error when one part of the transformer is int8 and everything else stays as it is."""

    part: str
    num_parameters: int
    error: float
    """Norm of the velocity's difference over the velocity's norm, mean over the inputs."""


def main(
    toy_run: Annotated[
        bool, typer.Option("--toy-run", help="Also train 6 blocks for 200 steps in each precision.")
    ] = False,
    out: command_line.Out = None,
) -> None:
    """Measure what int8 costs: LoRA gradients by kind of layer, and the velocity part by part. Needs a GPU."""
    device = gpu_to_measure(out)
    gradients = compare(gradients_by_layer(FULL_SIZE, device, Case("no_change", None)))
    setting = "LoRA gradients compared with bf16's: cosine, norm"
    command_line.print_table(setting, ("layer", *PRECISIONS[1:]), gradient_rows(gradients), numbers=PRECISIONS[1:])
    transformer = random_transformer(FULL_SIZE, "no_change", device)
    parts = error_by_part(transformer, [inputs_for(QUICK[0], FULL_SIZE, device)])
    setting = "error of the velocity when one part is int8"
    command_line.print_table(setting, PART_COLUMNS, part_rows(parts), numbers=PART_COLUMNS[1:])
    document: dict[str, Any] = {"gradients": [asdict(e) for e in gradients], "parts": [asdict(p) for p in parts]}
    if toy_run:
        del transformer
        document["losses"] = losses = toy_losses({**FULL_SIZE, "num_visual_blocks": 6}, device, Case("no_change", None))
        rows = [[precision, f"{sum(losses[precision][-20:]) / 20:.4f}"] for precision in PRECISIONS]
        command_line.print_table("a toy run", ("precision", "loss of the last 20 steps"), rows, numbers=())
    command_line.write_json(out, document)


def gradients_by_layer(
    config: dict[str, Any], device: torch.device, case: Case, execution: str = "auto"
) -> dict[Precision, dict[str, Tensor]]:
    """LoRA gradients of one step in each precision, from the same bf16 weights.

    Returns:
        precision -> kind of layer -> the gradients of all such layers as one vector.
    """
    transformer = random_transformer(config, "no_change", device)
    attach.add_lora(transformer, LoraConfig(rank=case.rank, alpha=case.rank, targets=("official",)), seed=0)
    generator = torch.Generator(device).manual_seed(2)
    for parameter in attach.lora_parameters(transformer)[1::2]:  # lora_B: at zero, lora_A would have no gradient
        parameter.data = torch.randn(parameter.shape, generator=generator, device=device) * 0.01
    inputs = inputs_for(case, config, device)
    target = torch.randn(inputs[0].shape, generator=generator, device=device)
    gradients: dict[Precision, dict[str, Tensor]] = {}
    for precision in PRECISIONS:
        if precision == "int8-quanto":
            quantize_in_place(transformer)
        run_as(transformer, precision, device, execution)
        transformer.zero_grad()
        torch.autograd.backward(flow.flow_loss(predict_velocity(transformer, *inputs), target))
        kinds: dict[str, list[Tensor]] = {}
        for name, parameter in transformer.named_parameters():
            if parameter.grad is not None:
                kinds.setdefault(_kind_of_layer(name), []).append(parameter.grad.flatten().float())
        gradients[precision] = {kind: torch.cat(parts) for kind, parts in kinds.items()}
    return gradients


def compare(gradients: dict[Precision, dict[str, Tensor]]) -> list[GradientError]:
    """Compare what ``gradients_by_layer`` returns with bf16, for each kind of layer and for all of them."""
    vectors = {precision: {**kinds, "all": torch.cat([*kinds.values()])} for precision, kinds in gradients.items()}
    errors = []
    for layer, expected in vectors["no_change"].items():
        for precision in PRECISIONS[1:]:
            vector = vectors[precision][layer]
            cosine = F.cosine_similarity(vector, expected, dim=0).item()
            errors.append(GradientError(layer, precision, cosine, (vector.norm() / expected.norm()).item()))
    return errors


def gradient_rows(errors: Sequence[GradientError]) -> list[list[str]]:
    """One row of text a kind of layer: cosine and norm in each int8 precision."""
    rows: dict[str, list[str]] = {}
    for error in errors:
        rows.setdefault(error.layer, [error.layer]).append(f"{error.cosine:.5f}  {error.norm:.4f}")
    return list(rows.values())


@torch.no_grad()
def error_by_part(transformer: Any, inputs: Sequence[tuple[Tensor, ...]]) -> list[PartError]:
    """Measure the error of every part of ``PARTS``. The weights are put back, bit for bit.

    Args:
        transformer: unquantised, without an adapter.
        inputs: arguments of ``predict_velocity``, best at several sigmas.
    """
    velocities = [predict_velocity(transformer, *arguments) for arguments in inputs]
    errors = []
    for part, pattern in PARTS.items():
        linears = [m for n, m in transformer.named_modules() if pattern.fullmatch(n) and isinstance(m, torch.nn.Linear)]
        weights = [m.weight.data for m in linears]
        for module in linears:
            weight, scale = quantize_int8(module.weight.data)
            module.weight.data = scale * weight
        error = 0.0
        for arguments, expected in zip(inputs, velocities, strict=True):
            difference = predict_velocity(transformer, *arguments).float() - expected.float()
            error += (difference.norm() / expected.float().norm()).item() / len(inputs)
        for module, weight in zip(linears, weights, strict=True):
            module.weight.data = weight
        errors.append(PartError(part, sum(w.numel() for w in weights), error))
    return errors


def part_rows(parts: Sequence[PartError]) -> list[list[str]]:
    """One row of text a part: its size, its error, and the error for each gigabyte that int8 saves."""
    rows = []
    for part in parts:
        gigabytes = part.num_parameters / 1e9  # int8 saves one byte of two
        rows.append([
            part.part, f"{part.num_parameters / 1e6:,.1f} M", human_bytes(2 * part.num_parameters),
            f"{100 * part.error:.3f} %", f"{100 * part.error / gigabytes:.2f} %" if gigabytes else "",
        ])  # fmt: skip
    return rows


def toy_losses(
    config: dict[str, Any], device: torch.device, case: Case, num_steps: int = 200, execution: str = "auto"
) -> dict[Precision, list[float]]:
    """Losses of a toy run in each precision, with the same random weights, data, noise and first adapter."""
    losses: dict[Precision, list[float]] = {}
    for precision in PRECISIONS:
        transformer = random_transformer(config, "no_change", device)
        if precision != "no_change":
            quantize_in_place(transformer)
        attach.add_lora(transformer, LoraConfig(rank=case.rank, alpha=case.rank, targets=("official",)), seed=0)
        run_as(transformer, precision, device, execution)
        transformer.train()
        parameters = attach.lora_parameters(transformer)
        optimizer = torch.optim.AdamW(parameters, lr=1e-3, weight_decay=0.0)
        latents, _, text, pooled = inputs_for(case, config, device)
        generator = torch.Generator(device).manual_seed(5)
        losses[precision] = []
        for _ in range(num_steps):
            sigma = torch.rand(len(latents), generator=generator, device=device)
            noise = torch.randn(latents.shape, generator=generator, device=device)
            velocity = predict_velocity(transformer, flow.add_noise(latents, noise, sigma), sigma, text, pooled)
            loss = flow.flow_loss(velocity, flow.velocity_target(latents, noise))
            torch.autograd.backward(loss)
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            losses[precision].append(loss.item())
    return losses


def quantize_in_place(transformer: Any) -> None:
    """Quantise a 16-bit transformer, as loading it would have."""
    for name, module in list(transformer.named_modules()):
        if INT8_MODULES.fullmatch(name.replace(".base_layer", "")) and type(module) is torch.nn.Linear:
            replace_linear(transformer, name, Int8Linear(*quantize_int8(module.weight.detach())), bias=module.bias)


def run_as(transformer: Any, precision: Precision, device: torch.device, execution: str) -> None:
    """Run the blocks in one precision from now on, with everything recomputed."""
    memory = MemoryConfig(execution=execution)  # type: ignore[arg-type]
    level: LevelName = "nothing"
    plan = Plan((level,) * len(transformer.visual_transformer_blocks), None, {}, None, 0)
    execute(transformer, TrainConfig(base_model_precision=precision, memory=memory), device, plan)


def _kind_of_layer(name: str) -> str:
    """``visual self_attention.to_query`` from a parameter's full name."""
    blocks, _, rest = name.partition("_transformer_blocks.")
    return f"{blocks} {rest.split('.', 1)[1].split('.lora_')[0]}"


if __name__ == "__main__":
    command_line.run(main)

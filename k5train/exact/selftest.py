"""Are a training step and a drawn picture what diffusers computes, on the user's checkpoint and card?

One transformer is loaded at a time. If it is too large for the card, its weights come to the card module by module.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate import cpu_offload
from diffusers import FlowMatchEulerDiscreteScheduler
from torch import Tensor

from k5cache.shared import console, vram
from k5cache.shared.comparison import Comparison, check, compare, not_run
from k5cache.shared.console import human_bytes
from k5cache.shared.errors import CacheStale
from k5cache.shared.host_memory import free_ram
from k5cache.shared.part_files import weight_files
from k5cache.store.reader import Cache
from k5train.adapter import attach
from k5train.base.architecture import DTYPES
from k5train.base.quantize import load_transformer
from k5train.data.compatible import check_fit
from k5train.exact.case import STEPS, Case, case_of
from k5train.exact.reference import pipeline_latents, quanto_transformer, reference_predict, reference_transformer
from k5train.forward.load import execute, load
from k5train.forward.precision import decided
from k5train.forward.predict_velocity import predict_velocity
from k5train.objective import flow
from k5train.options.adapter import LoraConfig
from k5train.options.train import TrainConfig
from k5train.pictures.sample import load_scheduler, sample_latents
from k5train.planning.plan import how_to_run, plan_training
from k5train.training.step import train_step

if TYPE_CHECKING:
    from k5train.planning.memory import Plan


ROOM = 0.7  # share of the free memory that weights may take; a step at 1024x1024 (3 GiB) needs the rest
DIFFUSERS = "diffusers"

# What a difference may be, relative to the norm. Our int8 runs on other kernels than quanto's: on a CPU quanto scales
# the product, on a GPU ours are compiled.
INT8 = {torch.float32: 1e-4, torch.bfloat16: 2e-2}
INT8_DYNAMIC = 8e-2  # also rounds activations to 8 bits, which the reference does not do
GRADIENTS_ON_GPU = 1e-2  # attention's backward adds in no fixed order there


@dataclass(frozen=True)
class Computed:
    """What one transformer computes for a case; gradients and latents if there is room for them."""

    velocity: Tensor
    loss: Tensor | None = None
    gradients: tuple[tuple[str, Tensor], ...] = ()
    latents: Tensor | None = None


def selftest(cache: Cache | None, folder: Path, config: TrainConfig, device: torch.device) -> list[Comparison]:
    """Every comparison, in the order in which a run does these things.

    Args:
        cache: its first row is used. None: a random row of the right widths.
        folder: the checkpoint: ``transformer``, ``scheduler`` and the VAE's config.
        config: precision and memory options, as a run would have them.
    """
    comparisons = []
    if cache is not None:
        problem = _problem(partial(check_fit, cache, folder))
        comparisons.append(check("template and encoders", "cache", problem))
        if problem:
            return comparisons
    config = decided(config)
    case = case_of(cache, folder, config, device)
    dtype, scheduler = DTYPES[config.mixed_precision], load_scheduler(folder)
    comparisons.append(noisy_latents(case, scheduler))
    comparisons += unquantised(folder, case, dtype, device, scheduler)
    if config.base_model_precision != "no_change":
        with_latents = comparisons[-1].result == "not run"
        comparisons += quantised(folder, case, config, device, scheduler, with_latents)
    return comparisons


def noisy_latents(case: Case, scheduler: FlowMatchEulerDiscreteScheduler) -> Comparison:
    """Whether training adds noise as inference does."""
    timesteps = scheduler.timesteps[[1, 500, 998]].to(case.group.latents.device)
    pairs = []
    for timestep in timesteps:
        sigma = (timestep / 1000).reshape(1)
        theirs = scheduler.scale_noise(case.group.latents, timestep.reshape(1), case.group.noise)
        pairs.append((f"sigma {sigma.item():.3f}", flow.add_noise(case.group.latents, case.group.noise, sigma), theirs))
    # The scheduler keeps sigma * 1000 in float32, so a sigma comes back rounded once more.
    return compare("noisy latents at 3 sigmas", "scheduler.scale_noise", pairs, 1e-6)


def unquantised(
    folder: Path, case: Case, dtype: torch.dtype, device: torch.device, scheduler: FlowMatchEulerDiscreteScheduler
) -> list[Comparison]:
    """Velocity, one training step and a drawing with the checkpoint's own weights."""
    names = [f"velocity, {_name(dtype)}", "loss and LoRA gradients of a step", f"{STEPS} drawing steps, guided"]
    against = [DIFFUSERS, f"{DIFFUSERS} + peft", f"{DIFFUSERS} + scheduler"]
    num_bytes = weight_bytes(folder)
    fits_whole = fits(num_bytes, device)
    if why := short_of_memory(num_bytes * (0.5 if fits_whole and device.type == "cuda" else 1.1)):
        return [not_run(name, other, why) for name, other in zip(names, against, strict=True)]
    console.note("diffusers' transformer")
    with placed(reference_transformer(folder, dtype), num_bytes, device) as (model, is_resident):
        theirs = compute(model, reference_predict(model), case, scheduler, pipeline_latents, is_resident)
    del model
    vram.release(device)
    console.note("our transformer")
    loaded = load_transformer(folder, "no_change", dtype, device if fits_whole else "cpu")
    with placed(loaded, num_bytes, device) as (model, is_resident):
        predict = partial(predict_velocity, model, gradient_checkpointing=True)
        ours = compute(model, predict, case, scheduler, our_latents, is_resident)
    del loaded, model, predict
    vram.release(device)
    comparisons = [compare(names[0], against[0], [("velocity", ours.velocity, theirs.velocity)])]
    if ours.loss is None or theirs.loss is None or ours.latents is None or theirs.latents is None:
        why = f"{human_bytes(num_bytes)} of weights do not fit on {device} at once"
        return comparisons + [not_run(name, other, why) for name, other in zip(names[1:], against[1:], strict=True)]
    pairs = [("loss", ours.loss, theirs.loss)]
    pairs += [(name, a, b) for (name, a), (_, b) in zip(ours.gradients, theirs.gradients, strict=True)]
    comparisons.append(compare(names[1], against[1], pairs, GRADIENTS_ON_GPU if device.type == "cuda" else 0.0))
    comparisons.append(compare(names[2], against[2], [("latents", ours.latents, theirs.latents)]))
    return comparisons


def quantised(
    folder: Path,
    case: Case,
    config: TrainConfig,
    device: torch.device,
    scheduler: FlowMatchEulerDiscreteScheduler,
    with_latents: bool,
) -> list[Comparison]:
    """Velocity with int8 weights, executed as in a run, and a drawing if the unquantised weights had no room."""
    dtype = DTYPES[config.mixed_precision]
    name = f"velocity, {config.base_model_precision}, {how_to_run(config, device)}"
    if why := short_of_memory(1.2 * weight_bytes(folder)):
        return [not_run(name, "quanto's QLinear", why)]
    console.note("diffusers' transformer, quantised by quanto")
    model = quanto_transformer(folder, dtype).to(device)
    theirs = compute(model, reference_predict(model), case, scheduler, pipeline_latents, False)
    drawn = pipeline_latents(model, scheduler, case) if with_latents else None
    del model
    vram.release(device)
    console.note("our transformer, as a run has it")
    plan: Plan = plan_training(folder, config, device, case.sizes)
    model = load(folder, config, device, plan).eval()
    execution = execute(model, config, device, plan)
    if execution is not None:
        execution.warm_up(partial(_forward_and_backward, model, case))
    with torch.no_grad():
        velocity = _our_predict(model)(*case.inputs, **case.condition)
    allowed = INT8_DYNAMIC if config.base_model_precision == "int8-dynamic" else INT8[dtype]
    comparisons = [compare(name, "quanto's QLinear", [("velocity", velocity, theirs.velocity)], allowed)]
    if drawn is not None:
        pairs = [("latents", our_latents(model, scheduler, case), drawn)]
        comparisons.append(
            compare(f"{STEPS} drawing steps, guided, int8", "quanto's QLinear + scheduler", pairs, 2 * allowed)
        )
    del model, execution
    vram.release(device)
    return comparisons


def compute(
    model: Any,
    predict: Callable[..., Tensor],
    case: Case,
    scheduler: FlowMatchEulerDiscreteScheduler,
    draw: Callable[[Any, FlowMatchEulerDiscreteScheduler, Case], Tensor],
    is_resident: bool,
) -> Computed:
    """A velocity. If the whole model is on the device, also drawn latents and one training step of a LoRA."""
    with torch.no_grad():
        velocity = predict(*case.inputs, **case.condition)
    if not is_resident:
        return Computed(velocity)
    latents = draw(model, scheduler, case)
    attach.add_lora(model, LoraConfig(rank=4, targets=("qkv",)), seed=0)
    generator = torch.Generator().manual_seed(0)
    parameters = attach.lora_parameters(model)
    for parameter in parameters[1::2]:  # lora_B: at zero, lora_A would get no gradient
        parameter.data = (0.02 * torch.randn(parameter.shape, generator=generator)).to(parameter)
    model.train()
    loss = train_step(predict, case.group)
    gradients = torch.autograd.grad(loss, parameters)
    names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    return Computed(velocity, loss.detach(), tuple(zip(names, gradients, strict=True)), latents)


def our_latents(model: Any, scheduler: FlowMatchEulerDiscreteScheduler, case: Case) -> Tensor:
    """What ``k5train`` draws."""
    return sample_latents(model, scheduler, case.prompt, case.negative, case.settings, source=case.source)


@contextmanager
def placed(model: Any, num_bytes: int, device: torch.device) -> Iterator[tuple[Any, bool]]:
    """``model`` on ``device``: all of it if it fits, otherwise each module's weights while that module runs."""
    is_resident = fits(num_bytes, device)
    yield (model.to(device) if is_resident else cpu_offload(model, device, offload_buffers=True)), is_resident


def fits(num_bytes: int, device: torch.device) -> bool:
    """Whether weights of this size leave enough room on the device."""
    return device.type != "cuda" or num_bytes <= ROOM * torch.cuda.mem_get_info(device)[0]


def weight_bytes(folder: Path) -> int:
    """Size of the transformer's files."""
    return sum(file.stat().st_size for file in weight_files(folder, "transformer"))


def short_of_memory(num_bytes: float) -> str:
    """Why ``num_bytes`` do not fit the host's free memory, or "".

    What was measured with 0.6 GiB of weights, relative to their size: diffusers' model takes 0.3 (the rest is mapped),
    quantised by quanto 1.13 at its peak, and our model on the host 1.03.
    """
    free = free_ram()
    return "" if num_bytes <= free else f"needs {human_bytes(num_bytes)} of memory, {human_bytes(free)} are free"


def _our_predict(model: Any) -> Callable[..., Tensor]:
    return partial(predict_velocity, model)


def _forward_and_backward(model: Any, case: Case) -> None:
    latents, *rest = case.inputs
    velocity = _our_predict(model)(latents.clone().requires_grad_(), *rest, **case.condition)
    torch.autograd.backward(velocity.float().sum())


def _problem(run: Callable[[], object]) -> str:
    try:
        run()
    except CacheStale as error:
        return error.problem
    return ""


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")

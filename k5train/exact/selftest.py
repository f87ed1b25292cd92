"""Is a step of training, and a picture drawn on the way, what diffusers computes? On the user's checkpoint and card.

The reference is ``Kandinsky5Transformer3DModel`` called as ``Kandinsky5T2IPipeline`` calls it; of int8 weights,
quanto's own execution. One transformer is loaded at a time; one too large comes to the card module by module.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate import cpu_offload
from diffusers import FlowMatchEulerDiscreteScheduler, Kandinsky5Transformer3DModel
from torch import Tensor

from k5cache.shared import console
from k5cache.shared.checkpoint import read_config, weight_files
from k5cache.shared.comparison import Comparison, check, compare, not_run
from k5cache.shared.console import human_bytes
from k5cache.shared.errors import CacheStale
from k5cache.store.reader import Cache, TextRow
from k5train.adapter import attach
from k5train.base.architecture import DTYPES
from k5train.base.quantize import INT8_MODULES, load_transformer
from k5train.data.batch import Group
from k5train.data.compatible import check_fit
from k5train.data.loader import Loader
from k5train.forward.load import execute, load
from k5train.forward.predict_velocity import predict_velocity
from k5train.objective import flow
from k5train.options.adapter import LoraConfig
from k5train.options.train import TrainConfig
from k5train.pictures.sample import SampleSettings, load_scheduler, sample_latents
from k5train.planning.plan import how_to_run, plan_training
from k5train.training.step import train_step

if TYPE_CHECKING:
    from k5train.planning.memory import Plan


ROOM = 0.7  # of free memory: what weights may take, so that a step at 1024x1024 (3 GiB) has the rest


STEPS, GUIDANCE = 2, 5.0


DIFFUSERS = "diffusers"


# Of the norm. Int8 runs on other kernels than quanto's: on a CPU those scale the product, on a GPU ours are compiled.
INT8 = {torch.float32: 1e-4, torch.bfloat16: 2e-2}


INT8_DYNAMIC = 8e-2  # activations too are rounded to 8 bits, which quanto's reference does not do


GRADIENTS_ON_GPU = 1e-2  # attention's backward adds in no fixed order there


@dataclass(frozen=True)
class Case:
    """One row at one sigma, and two captions to draw from."""

    group: Group
    prompt: TextRow
    negative: TextRow
    settings: SampleSettings


@dataclass(frozen=True)
class Computed:
    """What one transformer made of a case; gradients and latents where there was room."""

    velocity: Tensor
    loss: Tensor | None = None
    gradients: tuple[tuple[str, Tensor], ...] = ()
    latents: Tensor | None = None


def selftest(cache: Cache | None, folder: Path, config: TrainConfig, device: torch.device) -> list[Comparison]:
    """Every comparison, in the order that a run goes.

    Args:
        cache: whose rows are used; None: random ones of the right widths.
        folder: the checkpoint: ``transformer``, ``scheduler`` and the VAE's config.
        config: precision and memory options, as a run would have them.
    """
    made = []
    if cache is not None:
        problem = _problem(partial(check_fit, cache, folder))
        made.append(check("template and encoders", "cache", problem))
        if problem:
            return made
    case = case_of(cache, folder, config, device)
    dtype, scheduler = DTYPES[config.mixed_precision], load_scheduler(folder)
    made.append(noisy_latents(case, scheduler))
    made += unquantised(folder, case, dtype, device, scheduler)
    if config.base_model_precision != "no_change":
        made += quantised(folder, case, config, device, scheduler, with_latents=made[-1].result == "not run")
    return made


def noisy_latents(case: Case, scheduler: FlowMatchEulerDiscreteScheduler) -> Comparison:
    """What is trained on is what inference starts a step from."""
    timesteps = scheduler.timesteps[[1, 500, 998]].to(case.group.latents.device)
    pairs = []
    for timestep in timesteps:
        sigma = (timestep / 1000).reshape(1)
        theirs = scheduler.scale_noise(case.group.latents, timestep.reshape(1), case.group.noise)
        pairs.append((f"sigma {sigma.item():.3f}", flow.add_noise(case.group.latents, case.group.noise, sigma), theirs))
    # The scheduler keeps sigma * 1000 in float32, so a sigma comes back with a rounding of its own.
    return compare("noisy latents at 3 sigmas", "scheduler.scale_noise", pairs, 1e-6)


def unquantised(
    folder: Path, case: Case, dtype: torch.dtype, device: torch.device, scheduler: FlowMatchEulerDiscreteScheduler
) -> list[Comparison]:
    """Velocity, one training step and a drawing with the weights as they came."""
    names = [f"velocity, {_name(dtype)}", "loss and LoRA gradients of a step", f"{STEPS} drawing steps, guided"]
    against = [DIFFUSERS, f"{DIFFUSERS} + peft", f"{DIFFUSERS} + scheduler"]
    num_bytes, whole = weight_bytes(folder), fits(weight_bytes(folder), device)
    if why := short_of_memory(num_bytes * (0.5 if whole and device.type == "cuda" else 1.1)):
        return [not_run(name, other, why) for name, other in zip(names, against, strict=True)]
    console.note("diffusers' transformer")
    with placed(reference_transformer(folder, dtype), num_bytes, device) as (model, is_resident):
        theirs = compute(model, reference_predict(model), case, scheduler, pipeline_latents, is_resident)
    del model
    free_memory()
    console.note("our transformer")
    loaded = load_transformer(folder, "no_change", dtype, device if whole else "cpu")
    with placed(loaded, num_bytes, device) as (model, is_resident):
        predict = partial(predict_velocity, model, gradient_checkpointing=True)
        ours = compute(model, predict, case, scheduler, our_latents, is_resident)
    del loaded, model, predict
    free_memory()
    made = [compare(names[0], against[0], [("velocity", ours.velocity, theirs.velocity)])]
    if ours.loss is None or theirs.loss is None or ours.latents is None or theirs.latents is None:
        why = f"{human_bytes(num_bytes)} of weights do not fit on {device} at once"
        return [*made, *(not_run(name, other, why) for name, other in zip(names[1:], against[1:], strict=True))]
    pairs = [("loss", ours.loss, theirs.loss)]
    pairs += [(name, a, b) for (name, a), (_, b) in zip(ours.gradients, theirs.gradients, strict=True)]
    made.append(compare(names[1], against[1], pairs, GRADIENTS_ON_GPU if device.type == "cuda" else 0.0))
    made.append(compare(names[2], against[2], [("latents", ours.latents, theirs.latents)]))
    return made


def quantised(
    folder: Path,
    case: Case,
    config: TrainConfig,
    device: torch.device,
    scheduler: FlowMatchEulerDiscreteScheduler,
    with_latents: bool,
) -> list[Comparison]:
    """Velocity, and where the unquantised weights left no room a drawing, with int8 weights run as a run runs them."""
    dtype = DTYPES[config.mixed_precision]
    how = f"velocity, {config.base_model_precision}, {how_to_run(config, device)}"
    if why := short_of_memory(1.2 * weight_bytes(folder)):
        return [not_run(how, "quanto's QLinear", why)]
    console.note("diffusers' transformer, quantised by quanto")
    model = quanto_transformer(folder, dtype).to(device)
    theirs = compute(model, reference_predict(model), case, scheduler, pipeline_latents, False)
    drawn = pipeline_latents(model, scheduler, case) if with_latents else None
    del model
    free_memory()
    console.note("our transformer, as a run has it")
    plan: Plan = plan_training(folder, config, device, _sizes(case))
    model = load(folder, config, device, plan).eval()
    execution = execute(model, config, device, plan)
    if execution is not None:
        execution.warm_up(partial(_forward_and_backward, model, case))
    with torch.no_grad():
        velocity = predict_velocity(model, *_inputs(case.group))
    allowed = INT8_DYNAMIC if config.base_model_precision == "int8-dynamic" else INT8[dtype]
    made = [compare(how, "quanto's QLinear", [("velocity", velocity, theirs.velocity)], allowed)]
    if drawn is not None:
        pairs = [("latents", our_latents(model, scheduler, case), drawn)]
        made.append(compare(f"{STEPS} drawing steps, guided, int8", "quanto's QLinear + scheduler", pairs, 2 * allowed))
    del model, execution
    free_memory()
    return made


def compute(
    model: Any,
    predict: Callable[..., Tensor],
    case: Case,
    scheduler: FlowMatchEulerDiscreteScheduler,
    draw: Callable[[Any, FlowMatchEulerDiscreteScheduler, Case], Tensor],
    is_resident: bool,
) -> Computed:
    """A velocity; and, of a model that is on the device whole, latents drawn and one training step of a LoRA."""
    with torch.no_grad():
        velocity = predict(*_inputs(case.group))
    if not is_resident:
        return Computed(velocity)
    latents = draw(model, scheduler, case)
    attach.add_lora(model, LoraConfig(rank=4, targets=("qkv",)), seed=0)
    generator = torch.Generator().manual_seed(0)
    parameters = attach.lora_parameters(model)
    for parameter in parameters[1::2]:  # lora_B: at zero it would give lora_A no gradient
        parameter.data = (0.02 * torch.randn(parameter.shape, generator=generator)).to(parameter)
    model.train()
    loss = train_step(predict, case.group)
    gradients = torch.autograd.grad(loss, parameters)
    names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    return Computed(velocity, loss.detach(), tuple(zip(names, gradients, strict=True)), latents)


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
    """The same with the arguments of ``predict_velocity``."""
    return lambda latents, sigma, embeds, pooled: as_the_pipeline_calls_it(model, latents, 1000 * sigma, embeds, pooled)


@torch.no_grad()
def pipeline_latents(model: Any, scheduler: FlowMatchEulerDiscreteScheduler, case: Case) -> Tensor:
    """``Kandinsky5T2IPipeline.__call__``, section 9, on cached embeddings; a test holds it to the pipeline, which
    would load encoder modelling."""
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


def our_latents(model: Any, scheduler: FlowMatchEulerDiscreteScheduler, case: Case) -> Tensor:
    """What ``k5train`` draws."""
    return sample_latents(model, scheduler, case.prompt, case.negative, case.settings)


def case_of(cache: Cache | None, folder: Path, config: TrainConfig, device: torch.device) -> Case:
    """The first row that a run would see, or a random one: 64 latents a side, 8 of a toy."""
    widths = read_config(folder, "transformer")
    if cache is not None:
        plain = TrainConfig(seed=config.seed, caption_dropout_probability=0.0)
        group = Loader(cache, plain, read_config(folder, "vae")["scaling_factor"]).batch(0).groups[0]
        prompt = TextRow("", group.prompt_embeds[0], group.pooled_projections[0], group.prompt_embeds.shape[1], "")
        negative = cache.prompt("")
    else:
        side = 64 if widths["model_dim"] >= 1024 else 8
        draw = partial(torch.randn, generator=torch.Generator().manual_seed(config.seed))
        rows = [
            TextRow("", draw(n, widths["in_text_dim"]).bfloat16(), draw(widths["in_text_dim2"]).bfloat16(), n, "")
            for n in (37, 5)
        ]
        prompt, negative = rows
        shape = (1, 1, side, side, widths["in_visual_dim"])
        group = Group(draw(shape), draw(shape), torch.tensor([0.7]), prompt.prompt_embeds[None], prompt.pooled[None])
    height, width = (8 * n for n in group.latents.shape[2:4])
    settings = SampleSettings(width, height, STEPS, GUIDANCE, seed=0)
    prompt, negative = (
        replace(row, prompt_embeds=row.prompt_embeds.to(device), pooled=row.pooled.to(device))
        for row in (prompt, negative)
    )
    return Case(group.to(device), prompt, negative, settings)


def reference_transformer(folder: Path, dtype: torch.dtype) -> Any:
    """diffusers' transformer as a user loads it, frozen, on the CPU."""
    model = Kandinsky5Transformer3DModel.from_pretrained(
        folder, subfolder="transformer", torch_dtype=dtype, local_files_only=True
    )
    model.enable_gradient_checkpointing()
    return model.requires_grad_(False).eval()


def quanto_transformer(folder: Path, dtype: torch.dtype) -> Any:
    """The same with quanto's own int8 linears where ours are."""
    from optimum.quanto import freeze, qint8, quantize

    model = reference_transformer(folder, dtype)
    quantize(model, weights=qint8, include=[n for n, _ in model.named_modules() if INT8_MODULES.fullmatch(n)])
    freeze(model)
    return model


@contextmanager
def placed(model: Any, num_bytes: int, device: torch.device) -> Iterator[tuple[Any, bool]]:
    """``model`` on ``device``, whole if it fits, else each module's weights for as long as it runs."""
    is_resident = fits(num_bytes, device)
    yield (model.to(device) if is_resident else cpu_offload(model, device, offload_buffers=True)), is_resident


def fits(num_bytes: int, device: torch.device) -> bool:
    """Whether weights of this size leave room on the device."""
    return device.type != "cuda" or num_bytes <= ROOM * torch.cuda.mem_get_info(device)[0]


def weight_bytes(folder: Path) -> int:
    """Size of the transformer's files."""
    return sum(file.stat().st_size for file in weight_files(folder, "transformer"))


def short_of_memory(num_bytes: float) -> str:
    """Why this does not fit the host's free memory, or ""; what is not Linux is taken to have plenty.

    Measured on 0.6 GiB of weights, as a part of their size: diffusers' model 0.3 (the rest is mapped), the same
    quantised by quanto 1.13 at its peak, ours kept on the host 1.03.
    """
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        free = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):
        return ""
    return "" if num_bytes <= free else f"needs {human_bytes(num_bytes)} of memory, {human_bytes(free)} are free"


def free_memory() -> None:
    """Give back what nothing refers to any more."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _forward_and_backward(model: Any, case: Case) -> None:
    latents, *rest = _inputs(case.group)
    velocity = predict_velocity(model, latents.clone().requires_grad_(), *rest)
    torch.autograd.backward(velocity.float().sum())


def _inputs(group: Group) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    noisy = flow.add_noise(group.latents, group.noise, group.sigma)
    return noisy, group.sigma, group.prompt_embeds, group.pooled_projections


def _sizes(case: Case) -> tuple[int, int]:
    height, width = case.group.latents.shape[2:4]
    return height // 2 * (width // 2), max(case.prompt.n_tokens, case.negative.n_tokens)


def _problem(run: Callable[[], object]) -> str:
    try:
        run()
    except CacheStale as error:
        return error.problem
    return ""


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")

"""From a recipe to a transformer that fits: what will it take, and how is it loaded and run?"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from threading import Thread
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch
from accelerate import init_empty_weights
from diffusers import Kandinsky5Transformer3DModel

from k5cache import console
from k5cache.errors import DoesNotFit
from k5cache.hub import read_config
from k5train import lora
from k5train.base import memory, vram
from k5train.base.execute import Execution, check_bfloat16, choose_modes, import_compiler
from k5train.base.forward import keep, recompute, use_policies
from k5train.base.memory import Architecture, Plan, Streaming, Work
from k5train.base.prepared import load_prepared
from k5train.base.quantize import load_transformer
from k5train.base.stream import Streamer, check_host_memory, spread
from k5train.config import LoraConfig, MemoryConfig, TrainConfig
from k5train.setup import DTYPES
from k5train.tread import walking

if TYPE_CHECKING:
    from k5cache.store.reader import Cache
    from k5train.kept import Kept

# What each optimizer holds for a parameter: AdamW two averages, Lion and Muon one, 8-bit AdamW two bytes, Adafactor
# rows and columns, Prodigy two averages, its start and its sum, schedule-free AdamW an average and its fast iterate.
_STATE_BYTES = {
    "adamw": 8, "adamw8bit": 2, "lion": 4, "muon": 4, "adafactor": 1, "prodigy": 16, "schedulefree": 8,
}  # fmt: skip


def plan_training(
    folder: Path, config: TrainConfig, device: torch.device, sizes: tuple[int, int], kept: Kept | None = None
) -> Plan:
    """What a run will keep, recompute and stream on ``device``. Reads the checkpoint's config.json, no weights.

    Args:
        sizes: the most tokens of a picture and of a caption, as ``largest`` finds them.
        kept: the plan that it has to be.

    Raises:
        DoesNotFit: no plan fits, or not the one that is kept or that the recipe asks for.
        RecipeError: a LoRA target matches nothing.
        RunError: the GPU has no bfloat16.
    """
    check_bfloat16(device, config.mixed_precision)
    budget = vram.budget(device, config.memory.vram)
    if kept:
        return kept.within(budget)
    return plan_for(read_config(folder, "transformer"), config, device, sizes, budget)


def plan_for(
    transformer_config: Mapping[str, Any],
    config: TrainConfig,
    device: torch.device,
    sizes: tuple[int, int],
    budget: int | None,
) -> Plan:
    """The same for a transformer's config as values, within ``budget`` bytes."""
    how = how_to_run(config, device)
    arch = memory.architecture(transformer_config)
    work = work_for(transformer_config, config, sizes, compiled=how == "compiled")
    level: Any = None if config.memory.activations == "auto" else config.memory.activations
    if level is None and (budget is None or how == "diffusers"):
        level = "nothing"  # on a CPU, and where only all or nothing can be kept
    fixed_by = "execution" if how == "diffusers" and config.memory.activations == "auto" else "activations"
    streaming = streaming_of(config.memory, arch)
    return memory.make_plan(arch, work, budget, level=level, streaming=streaming, fixed_by=fixed_by)


def work_for(
    transformer_config: Mapping[str, Any], config: TrainConfig, sizes: tuple[int, int], compiled: bool
) -> Work:
    """The largest forward and backward pass of a run."""
    parameters, width = adapter_size(transformer_config, config.lora)
    always = config.tread.routes and not config.tread.ramp_down and not config.tread.keep_masked
    return Work(
        batch_size=config.batch_size,
        num_tokens=sizes[0],
        num_text_tokens=sizes[1],
        lora_parameters=parameters,
        adapters_width=width,
        precision=config.base_model_precision,
        bytes_per_element=DTYPES[config.mixed_precision].itemsize,
        compiled=compiled,
        bytes_per_lora_parameter=8 + _STATE_BYTES[config.optim.optimizer] + (4 if config.optim.ema_decay else 0),
        walking=walking(config.tread.routes, transformer_config["num_visual_blocks"]) if always else (),
    )


def adapter_size(transformer_config: Mapping[str, Any], config: LoraConfig) -> tuple[int, int]:
    """Trained parameters, and the sum of ranks over one picture block: from shapes alone.

    Raises:
        RecipeError: a target matches nothing.
    """
    with init_empty_weights():
        transformer = Kandinsky5Transformer3DModel.from_config(dict(transformer_config))
    ranks = lora.module_ranks(transformer, config, lora.match_targets(transformer, config.targets))
    linears: list[tuple[Any, int]] = [(transformer.get_submodule(name), rank) for name, rank in ranks.items()]
    parameters = sum(rank * (m.in_features + m.out_features) for m, rank in linears)
    blocks = max(1, len(transformer.visual_transformer_blocks))
    in_blocks = sum(rank for name, rank in ranks.items() if name.startswith("visual_transformer_blocks."))
    return parameters, -(-in_blocks // blocks)


def streaming_of(config: MemoryConfig, arch: Architecture) -> Streaming | None:
    """The group-offload words as what they mean here. None: stream only what must be."""
    if not config.enable_group_offload:
        return None
    groups = 2 if config.group_offload_use_stream else 1
    slots = groups * config.group_offload_blocks_per_group
    return Streaming(arch.num_visual_blocks, slots, config.group_offload_use_stream)


def how_to_run(config: TrainConfig, device: torch.device) -> str:
    """``compiled``, ``eager`` or ``diffusers``."""
    if config.memory.execution != "auto":
        return config.memory.execution
    if device.type == "cuda":
        # DoRA's and LoKr's blocks run as peft's modules, which the compiled block does not know: plan for that.
        return "eager" if config.lora.algo in ("dora", "lokr") else "compiled"
    lean = config.base_model_precision == "int8-dynamic" or config.memory.enable_group_offload
    return "eager" if lean or config.memory.activations not in ("auto", "nothing", "all") else "diffusers"


def largest(*caches: Cache) -> tuple[int, int]:
    """The most tokens of a picture and of a caption in some caches: what the plan must hold."""
    buckets = [shard.bucket for cache in caches for shard in cache.manifest.shards if shard.bucket]
    pictures = max(((w // 16) * (h // 16) for w, h in buckets), default=0)
    return pictures, max((n for cache in caches for n in cache.text_lengths().values()), default=1)


def load(folder: Path, config: TrainConfig, device: torch.device, plan: Plan) -> Kandinsky5Transformer3DModel:
    """The frozen transformer where the plan wants it: on the GPU, the streamed blocks' weights in host memory.

    On the GPU int8 weights come from the prepared file under ``K5_HOME``, which is made on first use.

    Raises:
        DoesNotFit: there is not enough host memory for what is streamed, found before anything is loaded.
    """
    if plan.streaming:
        check_host_memory(plan.host_bytes)
    vram.limit(device, plan.budget if config.memory.vram else None)
    if how_to_run(config, device) == "compiled":
        Thread(target=import_compiler, daemon=True).start()
    dtype, precision = DTYPES[config.mixed_precision], config.base_model_precision
    if device.type != "cuda" or precision == "no_change":
        transformer = load_transformer(folder, precision, dtype, device)
    else:
        prefixes = tuple(f"visual_transformer_blocks.{i}." for i in streamed_blocks(plan))
        transformer = load_prepared(folder, dtype, device, lambda name, is_int8: is_int8 and name.startswith(prefixes))
    stream_weights(transformer, plan, device)
    return transformer


def streamed_blocks(plan: Plan) -> list[int]:
    """Which picture blocks' weights are streamed."""
    return spread(len(plan.levels), plan.streaming.num_blocks) if plan.streaming else []


def stream_weights(transformer: Kandinsky5Transformer3DModel, plan: Plan, device: torch.device) -> None:
    """Give the streamed blocks' weights their place, before an adapter is made: it goes where its weight is.

    Raises:
        DoesNotFit: there is not enough host memory.
        RunError: the host memory cannot be page-locked, or the weights are not int8.
    """
    if plan.streaming:
        blocks = [transformer.visual_transformer_blocks[i] for i in streamed_blocks(plan)]
        _streamers[transformer] = Streamer(blocks, plan.streaming, device)


def execute(
    transformer: Kandinsky5Transformer3DModel,
    config: TrainConfig,
    device: torch.device,
    plan: Plan,
    any_rank: bool = False,
) -> Execution | None:
    """Have ``predict_velocity`` run a transformer, with its adapter if it is to have one, by the plan.

    Args:
        any_rank: adapters of other ranks will follow it.

    Returns:
        None where blocks run as diffusers' own modules.
    """
    how = how_to_run(config, device)
    if how == "diffusers":
        policy = keep if set(plan.levels) == {"all"} else recompute
        num_blocks = len(transformer.text_transformer_blocks) + len(transformer.visual_transformer_blocks)
        use_policies(transformer, [policy] * num_blocks)
        return None
    modes = choose_modes(device, config.base_model_precision)
    if config.deterministic:
        modes = modes._replace(cudnn=False)  # its backward adds up in any order; flash attention obeys torch's switch
    streamer = _streamers.get(transformer)
    execution = Execution(
        transformer, plan, modes, compiled=how == "compiled", device=device, streamer=streamer,
        any_rank=any_rank and not config.deterministic,  # the kernels of a run alone
    )  # fmt: skip
    use_policies(transformer, execution.policies)
    return execution


_streamers: WeakKeyDictionary[Any, Streamer] = WeakKeyDictionary()


@contextmanager
def when_memory_ends(
    planned: Callable[[], Plan],
    save: Callable[[], Path | None],
    go_on: Callable[..., str],
    must_keep: Callable[[], Kept | None] = lambda: None,
) -> Iterator[None]:
    """Turn running out of VRAM into an error that names the setting to change, with what was trained on disk.

    Args:
        planned: the plan that the run follows by then.
        save: writes the adapter as it is, with what is needed to go on from it, and says where; None: there is nothing
            to save yet.
        go_on: the command to do it again, given what ``--set`` is to change.
        must_keep: the plan that the run can only go on with, where there is one: advice to plan for less is none.

    Raises:
        DoesNotFit: VRAM ended inside.
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        words = str(error).splitlines()[0][:160]
        torch.cuda.empty_cache()
        plan, saved, fixed = planned(), save(), must_keep()
        kept = f"; the LoRA so far is in {saved}" if saved else ""
        raise DoesNotFit(
            f"The GPU ran out of memory, {console.human_bytes(plan.peak)} were planned: {words}{kept}",
            fixed.advice if fixed else _plan_for_less(plan, go_on),
        ) from error


def _plan_for_less(plan: Plan, go_on: Callable[..., str]) -> str:
    """What to do where a plan was too much for the card."""
    whole = min(plan.budget, plan.peak) if plan.budget is not None else plan.peak
    card = (whole * 11 // 12 + memory.CONTEXT_BYTES) / 2**30
    if plan.streaming and plan.streaming.num_blocks == len(plan.levels):
        return "Free VRAM, or use a lower resolution, batch size or rank: nothing leaner can be planned"
    return f"Free VRAM, or plan for less: {go_on(set=f'train.memory.vram={card:.1f}GB')}"


def less(plan: Plan) -> int | None:
    """The budget for the plan after one whose first step ran out of VRAM; None: there is none, weights would move."""
    return None if plan.budget is None or plan.streaming else min(plan.budget, plan.peak) * 11 // 12


def announce(plan: Plan, print_line: Callable[[str], None] = console.note) -> None:
    """The plan in a few lines, before anything is loaded."""
    for what, how in memory.describe(plan):
        print_line(f"  {what:<32} {how}")

"""Which memory plan does a run get? From its recipe, its sizes and the VRAM to the numbers of ``memory.make_plan``."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import lru_cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate import init_empty_weights
from diffusers import Kandinsky5Transformer3DModel

from k5cache.shared import console
from k5cache.shared.checkpoint import read_config
from k5cache.shared.errors import DoesNotFit
from k5cache.shared.host_memory import free_ram
from k5train.adapter import targets
from k5train.base.architecture import DTYPES
from k5train.options.adapter import LoraConfig
from k5train.options.memory import MemoryConfig
from k5train.options.objective import RouteConfig
from k5train.options.precision import precision_of
from k5train.options.train import TrainConfig
from k5train.planning import memory, vram
from k5train.planning.described import describe
from k5train.planning.graph import text_width, why_no_graph
from k5train.planning.memory import Architecture, AsModules, Plan, Streaming, Work
from k5train.planning.vram import check_bfloat16

if TYPE_CHECKING:
    from k5cache.store.reader import Cache
    from k5train.planning.saved_plan import SavedPlan


# Bytes of optimizer state for each parameter: AdamW has two averages, Lion and Muon one, 8-bit AdamW two bytes,
# Adafactor rows and columns, Prodigy two averages, its start and its sum, schedule-free AdamW an average and its fast
# iterate.
_STATE_BYTES = {
    "adamw": 8, "adamw8bit": 2, "lion": 4, "muon": 4, "adafactor": 1, "prodigy": 16, "schedulefree": 8,
}  # fmt: skip
# Bytes for each parameter that an update needs for a moment: schedule-free AdamW makes all of its denominators at once.
# Where steps are not captured, what they kept is free by then.
_PASSING_BYTES = {"schedulefree": 4}


def plan_training(
    folder: Path, config: TrainConfig, device: torch.device, sizes: tuple[int, int],
    saved_plan: SavedPlan | None = None, agreed: Callable[[int | None], int | None] = lambda budget: budget,
) -> Plan:  # fmt: skip
    """What a run will keep, recompute and stream on ``device``. Reads the checkpoint's config.json, but no weights.

    Args:
        sizes: the most tokens of a picture and of a caption, from ``largest_sizes``.
        saved_plan: the plan that the run must go on with.
        agreed: what the processes of a run plan with, given the bytes of VRAM that this one has.

    Raises:
        DoesNotFit: no plan fits, or not the saved one, or not the one that the recipe asks for.
        RecipeError: a LoRA target matches nothing, or a rank is too high.
        RunError: the GPU has no bfloat16.
    """
    check_bfloat16(device, config.mixed_precision)
    budget = agreed(vram.budget(device, config.memory.vram))
    transformer_config = read_config(folder, "transformer")
    plan = saved_plan.within(budget) if saved_plan else plan_for(transformer_config, config, device, sizes, budget)
    if device.type == "cpu":
        check_ram(plan, transformer_config, config, free_ram())
    return plan


def check_ram(plan: Plan, transformer_config: Mapping[str, Any], config: TrainConfig, num_bytes: int) -> None:
    """Refuse what a CPU has no room for, as a GPU's plan is refused.

    Args:
        num_bytes: free host memory.

    Raises:
        DoesNotFit: the plan needs more.
    """
    assert plan.sizes is not None
    work = work_for(transformer_config, config, plan.sizes, compiled=False)
    memory.check_fits_ram(plan, memory.architecture(transformer_config), work, num_bytes)


def plan_for(
    transformer_config: Mapping[str, Any],
    config: TrainConfig,
    device: torch.device,
    sizes: tuple[int, int],
    budget: int | None,
) -> Plan:
    """A new plan for a transformer's config.json, given as values, within ``budget`` bytes of VRAM.

    Steps are captured where they can be and there is room for it, also if a few blocks are streamed to make it: their
    copies hide behind the computing, the launches of a step do not.
    """
    execution = how_to_run(config, device)
    arch = memory.architecture(transformer_config)
    work = work_for(transformer_config, config, sizes, compiled=execution == "compiled")
    level: Any = None if config.memory.activations == "auto" else config.memory.activations
    if level is None and (budget is None or execution == "diffusers"):
        level = "nothing"  # on a CPU, and for diffusers' modules, which keep all or nothing
    fixed_by = "execution" if execution == "diffusers" and config.memory.activations == "auto" else "activations"
    streaming = streaming_of(config.memory, arch)
    make = partial(memory.make_plan, arch, budget=budget, level=level, streaming=streaming, fixed_by=fixed_by)
    if why_no_graph(config, device.type, execution):
        return make(work)
    per_parameter = work.bytes_per_lora_parameter + _PASSING_BYTES.get(config.optim.optimizer, 0)
    captured = replace(
        work, is_captured=True, num_text_tokens=text_width(sizes[1]), bytes_per_lora_parameter=per_parameter
    )
    try:
        return make(captured)
    except DoesNotFit:
        return make(work)


def work_for(
    transformer_config: Mapping[str, Any], config: TrainConfig, sizes: tuple[int, int], compiled: bool
) -> Work:
    """The largest forward and backward pass of a run."""
    parameters, width = adapter_size(transformer_config, config.lora)
    element = DTYPES[config.mixed_precision].itemsize
    gelu_again = compiled and precision_of(config) == "int8-dynamic"
    # A ramp or masks let all tokens through at times: the largest pass is then one without a route.
    is_routed = config.tread.routes and not config.tread.ramp_down and not config.tread.keep_masked
    return Work(
        batch_size=config.batch_size,
        num_tokens=sizes[0],
        num_text_tokens=sizes[1],
        lora_parameters=parameters,
        adapters_width=width,
        precision=precision_of(config),
        adapter_inputs=adapter_inputs(transformer_config, config.lora, element, gelu_again),
        bytes_per_element=element,
        compiled=compiled,
        bytes_per_lora_parameter=8 + _STATE_BYTES[config.optim.optimizer] + (4 if config.optim.ema_decay else 0),
        condition_channels=transformer_config["in_visual_dim"] + 1 if transformer_config.get("visual_cond") else 0,
        as_modules=as_modules(transformer_config, config.lora, element),
        token_shares=token_shares(config.tread.routes, transformer_config["num_visual_blocks"]) if is_routed else (),
    )


def adapter_size(transformer_config: Mapping[str, Any], config: LoraConfig) -> tuple[int, int]:
    """The number of trained parameters, and the sum of ranks over one visual block. Needs shapes, no weights.

    Raises:
        RecipeError: a target matches nothing, or a rank is above a side of its module's matrix.
    """
    transformer = _without_weights(transformer_config)
    ranks = targets.module_ranks(transformer, config, targets.match_targets(transformer, config.targets))
    sizes = targets.linear_sizes(transformer)
    parameters = sum(targets.num_parameters(sizes[name], rank, config) for name, rank in ranks.items())
    blocks = max(1, len(transformer.visual_transformer_blocks))
    in_blocks = sum(rank for name, rank in ranks.items() if name.startswith("visual_transformer_blocks."))
    return parameters, -(-in_blocks // blocks)


def adapter_inputs(
    transformer_config: Mapping[str, Any], config: LoraConfig, element: int, gelu_again: bool
) -> tuple[int, int]:
    """What the adapters of a visual block keep of their inputs at level "all", as a mean over the blocks.

    Linears of one input keep it once; an attention's output and the caption are kept anyway. With dropout, each adapter
    has an input of its own, and a mask of one byte an element.

    Args:
        element: bytes of an activation.
        gelu_again: the feed-forward is one function, which computes gelu again for the backward pass.

    Returns:
        Bytes for each token of the picture, and for each of the caption.
    """
    if config.algo in ("dora", "lokr"):
        return 0, 0  # ``as_modules`` counts these
    transformer = _without_weights(transformer_config)
    sizes = targets.linear_sizes(transformer)
    kept: dict[str, dict[str, int]] = {"token": {}, "text token": {}}
    for name in targets.match_targets(transformer, config.targets).modules:
        if not name.startswith("visual_transformer_blocks."):
            continue
        is_text = re.search(r"cross_attention\.to_(?:key|value)$", name)
        of = kept["text token" if is_text else "token"]
        if config.dropout:
            of[name] = (element + 1) * sizes[name][1]
        elif name.endswith("feed_forward.out_layer") and gelu_again:
            continue
        elif not is_text and not name.endswith("attention.out_layer"):
            of[re.sub(r"to_(?:query|key|value)$", "to_qkv", name)] = element * sizes[name][1]
    blocks = max(1, len(transformer.visual_transformer_blocks))
    token, text_token = (-(-sum(inputs.values()) // blocks) for inputs in kept.values())
    return token, text_token


def as_modules(transformer_config: Mapping[str, Any], config: LoraConfig, element: int) -> AsModules | None:
    """What peft's modules of a DoRA or a LoKr keep in a visual block; ``tests/test_memory.py`` counts it.

    Both multiply in float32 and keep their input as that. A LoKr also keeps the change of each weight, a whole matrix.
    A DoRA keeps its output and the base's, and makes the change from an identity matrix, to take the norms of its rows.
    """
    if config.algo not in ("dora", "lokr"):
        return None
    transformer, is_dora = _without_weights(transformer_config), config.algo == "dora"
    sizes, passing = targets.linear_sizes(transformer), [0]
    kept = {"token": 0, "text token": 0, "weights": 0}
    for name in targets.match_targets(transformer, config.targets).modules:
        if not name.startswith("visual_transformer_blocks."):
            continue
        outputs, inputs = sizes[name]
        of = "text token" if re.search(r"cross_attention\.to_(?:key|value)$", name) else "token"
        kept[of] += (4 if element < 4 else 0) * inputs + is_dora * (element + 4) * outputs
        kept["weights"] += 0 if is_dora else 4 * outputs * inputs
        passing.append(4 * (inputs**2 + 3 * outputs * inputs if is_dora else 2 * outputs * inputs))
    blocks = max(1, len(transformer.visual_transformer_blocks))
    token, text_token, weights = (-(-count // blocks) for count in kept.values())
    return AsModules(token, text_token, weights, max(passing))


def _without_weights(transformer_config: Mapping[str, Any]) -> Kandinsky5Transformer3DModel:
    """The transformer on the meta device, to be looked at: a plan asks four times for the same one."""
    return _made_without_weights(json.dumps(dict(transformer_config), sort_keys=True))


@lru_cache(2)
def _made_without_weights(transformer_config: str) -> Kandinsky5Transformer3DModel:
    with init_empty_weights():
        return Kandinsky5Transformer3DModel.from_config(json.loads(transformer_config))


def streaming_of(config: MemoryConfig, arch: Architecture) -> Streaming | None:
    """What the group-offload options mean here. None: stream only what must be."""
    if not config.enable_group_offload:
        return None
    groups = 2 if config.group_offload_use_stream else 1
    slots = groups * config.group_offload_blocks_per_group
    return Streaming(arch.num_visual_blocks, slots, config.group_offload_use_stream)


def how_to_run(config: TrainConfig, device: torch.device) -> str:
    """How blocks run: ``compiled``, ``eager`` or as ``diffusers``' own modules."""
    if config.memory.execution != "auto":
        return config.memory.execution
    if device.type == "cuda":
        # The lean block does not know DoRA and LoKr: blocks with these run as modules.
        return "eager" if config.lora.algo in ("dora", "lokr") else "compiled"
    lean = config.base_model_precision == "int8-dynamic" or config.memory.enable_group_offload
    return "eager" if lean or config.memory.activations not in ("auto", "nothing", "all") else "diffusers"


def largest_sizes(*caches: Cache) -> tuple[int, int]:
    """The most tokens of a picture and of a caption in some caches."""
    buckets = [shard.bucket for cache in caches for shard in cache.manifest.shards if shard.bucket]
    pictures = max(((w // 16) * (h // 16) for w, h in buckets), default=0)
    lengths = [cache.texts().n_tokens for cache in caches]
    return pictures, max((int(n.max()) for n in lengths if len(n)), default=1)


def leaner_budget(plan: Plan) -> int | None:
    """The budget for the plan after one whose first step ran out of VRAM.

    None if no leaner plan can be applied without moving weights.
    """
    return None if plan.budget is None or plan.streaming else min(plan.budget, plan.peak) * 11 // 12


def announce(plan: Plan, print_line: Callable[[str], None] = console.note) -> None:
    """Print the plan in a few lines, before anything is loaded."""
    for label, value in describe(plan):
        print_line(f"  {label:<32} {value}")


def token_shares(routes: Sequence[RouteConfig], num_blocks: int) -> tuple[float, ...]:
    """The share of the picture's tokens that goes through each visual block."""
    shares = [1.0] * num_blocks
    for route in routes:
        first, last = route.start_layer_idx % num_blocks, route.end_layer_idx % num_blocks
        shares[first : last + 1] = [1 - route.selection_ratio] * (last + 1 - first)
    return tuple(shares)

"""How is the transformer loaded and run by a plan? Weights go to the GPU or to host memory, blocks get policies."""

from __future__ import annotations

from pathlib import Path
from threading import Thread
from typing import Any
from weakref import WeakKeyDictionary

import torch
from diffusers import Kandinsky5Transformer3DModel

from k5cache.shared import vram
from k5train.base.architecture import DTYPES
from k5train.base.prepared import load_prepared
from k5train.base.quantize import load_transformer
from k5train.forward.block import gather
from k5train.forward.compile import import_compiler
from k5train.forward.execute import Execution, choose_modes
from k5train.forward.predict_velocity import keep, recompute, use_policies
from k5train.forward.stream import Streamer, check_host_memory, spread
from k5train.options.precision import precision_of
from k5train.options.train import TrainConfig
from k5train.planning.memory import Plan
from k5train.planning.plan import how_to_run


def load(folder: Path, config: TrainConfig, device: torch.device, plan: Plan) -> Kandinsky5Transformer3DModel:
    """Load the frozen transformer to the GPU, with the weights of streamed blocks in host memory.

    On a GPU, int8 weights come from the prepared file under ``K5_HOME``, which is written on first use.

    Raises:
        DoesNotFit: there is not enough host memory for the streamed weights. Raised before anything is loaded.
    """
    if plan.streaming:
        check_host_memory(plan.host_bytes)
    if config.memory.vram:
        vram.limit(device, plan.budget)
    if how_to_run(config, device) == "compiled":
        Thread(target=import_compiler, daemon=True).start()
    dtype, precision = DTYPES[config.mixed_precision], precision_of(config)
    if device.type != "cuda" or precision == "no_change":
        transformer = load_transformer(folder, precision, dtype, device)
    else:
        prefixes = tuple(f"visual_transformer_blocks.{i}." for i in streamed_blocks(plan))
        transformer = load_prepared(folder, dtype, device, lambda name, is_int8: is_int8 and name.startswith(prefixes))
    stream_weights(transformer, plan, device)
    return transformer


def streamed_blocks(plan: Plan) -> list[int]:
    """The visual blocks whose weights are streamed."""
    return spread(len(plan.levels), plan.streaming.num_blocks) if plan.streaming else []


def stream_weights(transformer: Kandinsky5Transformer3DModel, plan: Plan, device: torch.device) -> None:
    """Move the weights of streamed blocks to their slots. To be done before an adapter is attached beside them.

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
    """Have ``predict_velocity`` run a transformer by the plan. Its adapter, if any, must be attached already.

    Args:
        any_rank: adapters of other ranks will follow this one.

    Returns:
        None if blocks run as diffusers' own modules.
    """
    how = how_to_run(config, device)
    if how == "diffusers":
        policy = keep if set(plan.levels) == {"all"} else recompute
        num_blocks = len(transformer.text_transformer_blocks) + len(transformer.visual_transformer_blocks)
        use_policies(transformer, [policy] * num_blocks)
        return None
    fuse(transformer)
    modes = choose_modes(device, precision_of(config))
    if config.deterministic:
        modes = modes._replace(
            cudnn=False
        )  # its backward pass adds in no fixed order; flash attention obeys torch's switch
    streamer = _streamers.get(transformer)
    execution = Execution(
        transformer, plan, modes, compiled=how == "compiled", device=device, streamer=streamer,
        any_rank=any_rank and not config.deterministic,  # the same kernels as in a run alone
    )  # fmt: skip
    use_policies(transformer, execution.policies)
    return execution


def fuse(transformer: Kandinsky5Transformer3DModel) -> None:
    """Fuse the weights that blocks use together, before the first pass.

    In a pass they would come to lie between activations, in memory that a captured step could then not have.
    """
    for block in (*transformer.text_transformer_blocks, *transformer.visual_transformer_blocks):
        gather(block, dropout=True)


_streamers: WeakKeyDictionary[Any, Streamer] = WeakKeyDictionary()

"""How long will a run's steps take on this GPU? A few blocks with random weights are timed, and counted up."""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from statistics import median
from typing import Any

import torch
from torch import Tensor

from k5cache.shared.errors import K5Error
from k5cache.shared.loading import begin_to_collect
from k5train.adapter import attach
from k5train.base.random_weights import random_transformer
from k5train.bench.one_step import OneStep, group_of, make_session
from k5train.forward.condition import condition_of
from k5train.options.precision import precision_of
from k5train.options.train import TrainConfig
from k5train.planning.memory import LevelName, Plan
from k5train.planning.plan import token_shares
from k5train.planning.time import Block, Probed, Seconds, Size, StepTime, blocks_of, count_up

FEW, MANY = 2, 6
"""A transformer with so many blocks is timed at each level, and one with so many: four blocks are the difference."""
_NUM_STEPS, _NUM_WARM_UP = 6, 2
_COPIED_BYTES = 2**27  # about a block's int8 weights


def estimate(
    transformer_config: Mapping[str, Any], config: TrainConfig, plan: Plan, sizes: Sequence[Size], device: torch.device
) -> StepTime | None:
    """The time of a step by a plan. Takes seconds, and up to a minute where the blocks are not compiled yet: the run
    then finds them compiled.

    Args:
        transformer_config: the transformer's config.json. No weights are read.
        sizes: of the run's pictures, from ``sizes_of``.

    Returns:
        None if no time can be known: without a GPU, or if the probe fails there.
    """
    if device.type != "cuda" or not torch.cuda.is_available() or config.mixed_precision != "bf16":
        return None
    begin_to_collect()
    try:
        return probe(transformer_config, config, plan, sizes, device)
    except (K5Error, RuntimeError):  # out of memory among them: another program has the GPU
        return None
    finally:
        gc.collect()
        torch.cuda.empty_cache()


def probe(
    transformer_config: Mapping[str, Any], config: TrainConfig, plan: Plan, sizes: Sequence[Size], device: torch.device
) -> StepTime:
    """``estimate`` on any device, without its answers to errors."""
    num_blocks = len(plan.levels)
    routes = config.tread.routes if not (config.tread.ramp_down or config.tread.keep_masked) else ()
    shares = token_shares(routes, num_blocks) if routes else ()
    blocks = dict.fromkeys(block for size in sizes for block in blocks_of(plan, size, shares))
    times: dict[Block, Seconds] = {}
    around: dict[Size, Seconds] = {}
    for level in dict.fromkeys(plan.levels):
        of_level = [block for block in blocks if block.level == level]
        few, many = (_time_blocks(transformer_config, config, plan, level, n, of_level, device) for n in (FEW, MANY))
        for block, a, b in zip(of_level, few, many, strict=True):
            times[block] = _each(lambda x, y: max(0.0, (y - x) / (MANY - FEW)), a, b)
            whole = next((s for s in sizes if (s.num_tokens, s.num_text_tokens) == block[1:]), None)
            if whole and whole not in around:
                around[whole] = _each(lambda x, y: max(0.0, x - FEW * y), a, times[block])
    for size in sizes:  # all of its blocks are routed
        around.setdefault(size, next(iter(around.values()), Seconds(0.0, 0.0)))
    rate = _seconds_per_byte(device) if plan.streaming else 0.0
    return count_up(Probed(times, around, rate), plan, sizes, shares, config.gradient_accumulation_steps)


def _each(of: Callable[[float, float], float], a: Seconds, b: Seconds) -> Seconds:
    return Seconds(of(a.median, b.median), of(a.fastest, b.fastest))


def _time_blocks(
    transformer_config: Mapping[str, Any], config: TrainConfig, plan: Plan, level: LevelName, num_blocks: int,
    blocks: Sequence[Block], device: torch.device,
) -> list[Seconds]:  # fmt: skip
    """A step of a transformer with so many blocks at a level, for each of some sizes."""
    small = {**transformer_config, "num_visual_blocks": num_blocks}
    transformer = random_transformer(small, precision_of(config), device)
    attach.add_lora(transformer, replace(config.lora, init_lora=None), seed=0)
    session = make_session(transformer, config, device, replace(plan, levels=(level,) * num_blocks, streaming=None))
    seconds = []
    for i, block in enumerate(blocks):
        inputs, condition = _inputs(small, config.batch_size, block, device)
        step = OneStep(session, config, group_of(inputs, condition=condition.get("condition")))
        if not i:
            step.warm_up()
        seconds.append(_time(step, device))
    session.make_room()
    return seconds


def _inputs(
    config: Mapping[str, Any], batch_size: int, block: Block, device: torch.device
) -> tuple[tuple[Tensor, ...], dict[str, Tensor]]:
    """Random inputs with so many tokens: about a square, since only their number decides the time."""
    height = math.isqrt(block.num_tokens)
    while block.num_tokens % height and height > block.num_tokens / 160:
        height -= 1
    width = math.ceil(block.num_tokens / height)
    generator = torch.Generator(device).manual_seed(1)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device)

    latents = normal(batch_size, 1, 2 * height, 2 * width, config["in_visual_dim"])
    condition = {"condition": condition_of(normal(*latents.shape))} if config.get("visual_cond") else {}
    text = normal(batch_size, block.num_text_tokens, config["in_text_dim"]).bfloat16()
    sigma = torch.rand(batch_size, generator=generator, device=device)
    return (latents, sigma, text, normal(batch_size, config["in_text_dim2"]).bfloat16()), condition


def _time(step: Callable[[], Any], device: torch.device) -> Seconds:
    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize()

    for _ in range(_NUM_WARM_UP):
        step()
    wait()
    times = []
    for _ in range(_NUM_STEPS):
        started = time.perf_counter()
        step()
        wait()
        times.append(time.perf_counter() - started)
    return Seconds(median(times), min(times))


def _seconds_per_byte(device: torch.device) -> float:
    host = torch.empty(_COPIED_BYTES, dtype=torch.uint8, pin_memory=device.type == "cuda")
    there = torch.empty_like(host, device=device, pin_memory=False)
    return _time(lambda: there.copy_(host, non_blocking=True), device).median / _COPIED_BYTES

"""How is a training step timed? Wall time, the time in which the GPU computes, and the arithmetic it needs."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from k5train.bench.kernels import Launch, busy_milliseconds, copying_alone, launches_of
from k5train.planning.memory import Architecture, Work


@dataclass(frozen=True)
class Timing:
    """What one kind of step took, in milliseconds."""

    median: float
    fastest: float
    first: float
    """Seconds until the first timed step: compilation and warm-up."""
    reserved_gib: float | None


@dataclass(frozen=True)
class Seen:
    """What the GPU does in one step."""

    launches: tuple[Launch, ...]
    busy: float
    """Milliseconds in which it computes."""
    waiting: float
    """Milliseconds in which it computes nothing, as weights are still being copied."""


def time_steps(
    step: Callable[[], Any],
    warm_up: Callable[[], Any] | None,
    device: torch.device,
    num_steps: int,
    num_warm_up: int,
) -> Timing:
    """Time whole steps, waiting for the GPU after each.

    Args:
        warm_up: compiles, and changes nothing.
    """
    started = time.perf_counter()
    if warm_up:
        warm_up()
    for _ in range(num_warm_up):
        step()
    on_gpu = device.type == "cuda"
    if on_gpu:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    first, times = time.perf_counter() - started, []
    for _ in range(num_steps):
        tick = time.perf_counter()
        step()
        if on_gpu:
            torch.cuda.synchronize()
        times.append(1000 * (time.perf_counter() - tick))
    reserved = torch.cuda.max_memory_reserved() / 2**30 if on_gpu else None
    return Timing(sorted(times)[len(times) // 2], min(times), first, reserved)


def watch_step(step: Callable[[], Any], launched: Callable[[], Any] | None = None) -> Seen:
    """Profile one step on a GPU. The profiler stays attached to the process: steps captured later take a little longer.

    Args:
        launched: the same step, launched kernel by kernel: in a replayed graph nothing says which call a kernel is of.
    """
    as_timed = launches_of(step)
    launches = launches_of(launched) if launched else as_timed
    return Seen(tuple(launches), busy_milliseconds(as_timed), copying_alone(as_timed))


def flops(arch: Architecture, work: Work) -> float:
    """Operations that one forward and backward pass needs, without recompute or gradients of frozen weights."""
    d, text = arch.model_dim, work.num_text_tokens

    def block(tokens: float) -> float:
        linears = 2 * tokens * (6 * d * d + 2 * d * arch.ff_dim) + 2 * text * 2 * d * d
        attention = 4 * d * (tokens * tokens + tokens * text)
        return 2 * linears + 3.5 * attention  # backward: one matmul a linear, five for attention's two

    blocks = sum(block(work.in_block(i).num_tokens) for i in range(arch.num_visual_blocks))
    captions = arch.num_text_blocks * (2 * 2 * text * arch.text_block_parameters + 3.5 * 4 * d * text * text)
    return work.batch_size * (blocks + captions)


def matmul_ceiling(device: torch.device) -> float:
    """TFLOP/s of one large bf16 matrix product on random data."""
    a, b = (torch.randn(8192, 8192, device=device, dtype=torch.bfloat16) for _ in range(2))
    for _ in range(3):
        a @ b
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    start.record()
    for _ in range(10):
        a @ b
    end.record()
    torch.cuda.synchronize()
    return 10 * 2 * 8192**3 / start.elapsed_time(end) / 1e9

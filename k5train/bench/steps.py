"""What will this card do? Times training steps of a full-size transformer with random weights, case by case."""

from __future__ import annotations

import gc
import json
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import partial
from typing import Any

import torch

from k5cache.shared import console
from k5cache.shared.errors import K5Error
from k5cache.shared.vram import limit
from k5train.adapter import attach
from k5train.base.architecture import FULL_SIZE
from k5train.base.random_weights import random_transformer
from k5train.bench.baseline import time_baseline
from k5train.bench.case import (
    I2I,
    MUST_REACH,
    Baseline,
    Case,
    Measured,
    condition_for,
    inputs_for,
    routes_for,
    tread_of,
)
from k5train.bench.kernels import GROUPS
from k5train.bench.one_step import OneStep, group_of, make_session
from k5train.bench.timing import flops, time_steps, watch_step
from k5train.forward.load import stream_weights, streamed_blocks
from k5train.options.adapter import LoraConfig
from k5train.options.memory import MemoryConfig
from k5train.options.train import TrainConfig
from k5train.planning import vram
from k5train.planning.memory import Plan, architecture
from k5train.planning.plan import leaner_budget, plan_for, work_for

COLUMNS = ("case", "ms/step", "GPU busy (wall over it)", "beside eager", "beside compiled", "reserved GiB", "predicted",
           "TFLOP/s (of ceiling)", "blocks")  # fmt: skip
_MOST_OF_A_NAME = 100  # characters: names of C++ templates go on for lines
KERNEL_COLUMNS = ("group", "ms", "launches", "what it covers, or the kernel")


def within(budget: int | None, cases: tuple[Case, ...]) -> tuple[Case, ...]:
    """The cases as this card can run them: a cap above what the card has becomes all that it has, in one case."""
    limit = None if budget is None else budget / 2**30
    capped = (
        replace(case, cap_gib=None) if limit and case.cap_gib and case.cap_gib > limit else case for case in cases
    )
    return tuple(dict.fromkeys(capped))


def time_cases(
    cases: tuple[Case, ...],
    device: torch.device,
    *,
    config: dict[str, Any] = FULL_SIZE,
    baseline: Case | None = None,
    num_steps: int = 8,
    num_warm_up: int = 2,
) -> list[Measured]:
    """Time every case, one after the other, then profile a step of each on the GPU. A case that does not fit or fails
    is named and left out.

    torch's profiler stays attached to the process, and steps that are captured later take some milliseconds longer. So
    all cases are timed before one is profiled.

    Args:
        baseline: the case that diffusers, peft and quanto are timed with first, eager and compiled. None: they are
            not.
    """
    measurements: list[tuple[str, Callable[..., Measured]]] = []
    hows: tuple[Baseline, ...] = ("eager", "compiled") if baseline else ()
    for how in hows:
        time = partial(time_baseline, config, device, case=baseline or MUST_REACH[0], how=how)
        measurements.append((f"baseline, {how}", time))
    measurements += [(case.name, partial(time_case, case, device, config)) for case in cases]
    results = []
    for name, measure in measurements:
        timed = partial(measure, num_steps=num_steps, num_warm_up=num_warm_up, is_watched=False)
        if result := measure_or_warn(name, timed):
            results.append((name, measure, result))
    if device.type != "cuda":
        return [result for _, _, result in results]
    return [_look(name, partial(measure, num_steps=1, num_warm_up=1), result) for name, measure, result in results]


def _look(name: str, measure: Callable[[], Measured], timed: Measured) -> Measured:
    """A timed case with what its step does on the GPU, which needs the case once more; as it is, where that fails."""
    seen = measure_or_warn(name, measure, f"{name}: profiled a step")
    return timed if seen is None else timed.seen_in(seen)


def measure_or_warn(name: str, measure: Callable[[], Measured], said: str = "") -> Measured | None:
    """What ``measure`` returns; None if it fails, with a warning that names the reason.

    Args:
        said: the line that reports it. By default it has the numbers.
    """
    try:
        result = measure()
        memory = f", {result.reserved_gib:.2f} GiB reserved" if result.reserved_gib else ""
        predicted = f", {result.predicted_gib:.2f} predicted" if result.predicted_gib else ""
        busy = f", GPU busy {result.busy:.0f}" if result.busy else ""
        console.note(
            said
            or f"{name}: {result.milliseconds:.0f} ms a step (fastest {result.fastest:.0f}{busy}){memory}{predicted}; "
            f"{result.plan}; first step after {result.first_step_seconds:.0f} s"
        )
        return result
    except (K5Error, RuntimeError) as error:  # out of memory, or a kernel or the compiler failed: go on with the rest
        console.warn(f"{name}: {(str(error).strip() or type(error).__name__).splitlines()[0][:200]}")
        return None
    finally:
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
            limit("cuda", None)


def time_case(
    case: Case, device: torch.device, config: dict[str, Any] = FULL_SIZE, num_steps: int = 8, num_warm_up: int = 2,
    is_watched: bool = True,
) -> Measured:  # fmt: skip
    """Plan a case, put random weights where the plan wants them, and time the steps."""
    train = TrainConfig(
        batch_size=case.batch_size,
        base_model_precision=case.precision,
        mixed_precision="bf16",
        lora=LoraConfig(rank=case.rank, alpha=case.rank, targets=case.targets),
        memory=MemoryConfig(execution=case.execution, graph=case.graph),  # type: ignore[arg-type]
        tread=tread_of(case),
    )
    return time_recipe(train, case, device, config, num_steps, num_warm_up, is_watched)


def time_recipe(
    train: TrainConfig, case: Case, device: torch.device, config: dict[str, Any], num_steps: int, num_warm_up: int,
    is_watched: bool = True,
) -> Measured:  # fmt: skip
    """Time the steps of any recipe that adapts, quantises and routes as ``train`` says, on the inputs of a case.

    Args:
        is_watched: whether to profile one more step.
    """
    config = case.config(config)
    sizes = ((case.side // 16) ** 2, case.num_text_tokens)
    budget = int(case.cap_gib * 2**30) if case.cap_gib else vram.budget(device, None)
    if case.cap_gib:
        limit(device, budget)
    plan = plan_for(config, train, device, sizes, budget)
    try:
        return _time_plan(plan, case, train, device, config, num_steps, num_warm_up, is_watched)
    except torch.OutOfMemoryError:
        leaner = leaner_budget(plan)
        if leaner is None:
            raise
    # Plan again, as a run does. Not inside the handler, because the error keeps the step's memory alive.
    gc.collect()
    torch.cuda.empty_cache()
    console.warn(f"{case.name}: the first step needed more VRAM than the {plan.peak / 2**30:.2f} GiB planned")
    plan = plan_for(config, train, device, sizes, leaner)
    return _time_plan(plan, case, train, device, config, num_steps, num_warm_up, is_watched)


def _time_plan(
    plan: Plan, case: Case, train: TrainConfig, device: torch.device, config: dict[str, Any], num_steps: int,
    num_warm_up: int, is_watched: bool,
) -> Measured:  # fmt: skip
    """Time the steps of a case by one plan."""
    sizes = plan.sizes
    assert sizes is not None
    transformer = random_transformer(config, case.precision, device, frozenset(streamed_blocks(plan)))
    stream_weights(transformer, plan, device)
    attach.add_lora(transformer, train.lora, seed=0)
    session = make_session(transformer, train, device, plan)
    execution, condition = session.execution, condition_for(case, config, device).get("condition")
    group = group_of(inputs_for(case, config, device), routes_for(case, device, train.tread), condition)
    step = OneStep(session, train, group)
    timing = time_steps(step, step.warm_up, device, num_steps, num_warm_up)
    is_captured = session.graphs is not None and not session.graphs.is_off
    seen = watch_step(step, step.uncaptured) if is_watched and device.type == "cuda" else None
    session.make_room()
    operations = flops(architecture(config), work_for(config, train, sizes, compiled=True))
    blocks = [f"{plan.levels.count(level)} {level}" for level in dict.fromkeys(plan.levels)]
    blocks += [f"{plan.streaming.num_blocks} streamed"] if plan.streaming else []
    blocks += [] if execution is None or execution.is_compiled else ["eager"]
    blocks += ["captured"] if is_captured else []
    on_gpu = device.type == "cuda"
    return Measured(
        case.name, timing.median, timing.fastest, plan.peak / 2**30 if on_gpu else None, timing.reserved_gib,
        operations / timing.median / 1e9, ", ".join(blocks), timing.first,
    ).on_gpu(seen)  # fmt: skip


def table_rows(results: list[Measured], ceiling: float | None) -> list[list[str]]:
    """Results as rows of text, each beside the baselines among them."""
    baselines = {r.baseline: r for r in results if r.baseline}
    rows = []
    for r in results:
        error = (
            f" ({100 * (r.predicted_gib / r.reserved_gib - 1):+.0f} %)" if r.predicted_gib and r.reserved_gib else ""
        )
        predicted = f"{r.predicted_gib:.2f}{error}" if r.predicted_gib else ""
        rows.append([
            r.name, f"{r.milliseconds:.0f}", f"{r.busy:.0f} ({r.milliseconds / r.busy:.2f}x)" if r.busy else "",
            _beside(r, baselines.get("eager")), _beside(r, baselines.get("compiled")),
            f"{r.reserved_gib:.2f}" if r.reserved_gib else "", predicted,
            f"{r.tflops:.0f}" + (f" ({100 * r.tflops / ceiling:.0f} %)" if ceiling else ""), r.plan,
        ])  # fmt: skip
    return rows


def _beside(result: Measured, baseline: Measured | None) -> str:
    """How many times as fast as a baseline a step is, by the clock and by what the GPU computes."""
    if baseline is None:
        return ""
    gpu = f", GPU {baseline.busy / result.busy:.2f}x" if baseline.busy and result.busy else ""
    return f"{baseline.milliseconds / result.milliseconds:.2f}x{gpu}"


def limits(results: list[Measured]) -> list[str]:
    """For each result whose kernels were seen, a line that says what limits it."""
    return [f"{result.name}: limited by {result.limit}" for result in results if result.limit]


def kernel_rows(result: Measured) -> list[list[str]]:
    """A step's kernels as rows of text: the groups, then the kernels that took longest."""
    groups = [
        [name, f"{share.milliseconds:.1f}", str(share.launches), GROUPS[name]]
        for name, share in (result.groups or {}).items()
    ]
    kernels = [
        [name, f"{share.milliseconds:.1f}", str(share.launches), kernel[:_MOST_OF_A_NAME]]
        for name, kernel, share in result.longest
    ]
    return groups + kernels


def beside_t2i(results: list[Measured]) -> list[str]:
    """For each case of image-to-image that has its like of text-to-image: how much longer its step takes."""
    by_name = {result.name: result for result in results}
    pairs = [(by_name[name.removeprefix(I2I)], r) for name, r in by_name.items()
             if name.startswith(I2I) and name.removeprefix(I2I) in by_name]  # fmt: skip
    return [
        f"{plain.name}: a step of I2I takes {edit.milliseconds / plain.milliseconds:.2f}x of T2I's"
        + (f", its kernels {edit.busy / plain.busy:.2f}x" if edit.busy and plain.busy else "")
        for plain, edit in pairs
    ]


def as_json(results: list[Measured]) -> str:
    """Results for a file."""
    return json.dumps([asdict(r) | {"limit": r.limit} for r in results], indent=2) + "\n"

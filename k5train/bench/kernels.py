"""Which kernels does a step launch, and what is each for? Groups of kernels, the longest, and what limits the step."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

GROUPS = {
    "matmul": "of frozen weights",
    "LoRA": "the adapters' own matmuls",
    "attention": "forward and backward",
    "dequantise": "int8 weights made ready for a matmul",
    "elementwise": "norms, RoPE, gelu, quantising of activations, residuals",
    "optimizer": "clipping and the update",
    "copies": "moved without arithmetic; also weights that are streamed",
    "other": "",
}
"""What a kernel is for, and what that covers."""

# Parts of kernels' names. The first group that one of them is found in has the kernel.
_BY_KERNEL = (
    # inductor's, named after all that they fuse ("unk" with steps of our choice), and ours for rows
    (
        "elementwise",
        ("triton_poi_", "triton_red_", "triton_per_", "triton_unk_", "_gelu_quantize", "_gelu_backward", "_rotate"),
    ),
    ("attention", ("flash", "fmha", "sdpa", "attention", "attend", "_few_keys", "cudnn")),
    ("dequantise", ("_scale_rows", "_transpose")),
    ("optimizer", ("fusedadam", "multi_tensor_apply", "fused_adam")),
    (
        "matmul",
        (
            "gemm",
            "gemv",
            "nvjet",
            "cutlass",
            "splitk",
            "cijk_",
            "s16816",
            "_int8_matmul",
            "triton_tem_",
            "_float32_linear",
        ),
    ),
    ("copies", ("memcpy", "memset", "direct_copy", "catarray")),
    ("elementwise", ("elementwise", "reduce", "norm", "softmax", "scatter", "gather", "index")),
)
_COMPILED = ("CompiledFunction", "Torch-Compiled", "## Call CompiledFxGraph", "_Linear", "_FeedForward")
"""How names of calls begin in which the only matmuls outside of our ops are those of adapters."""
_LIMITS = {
    "matmuls": ("matmul", "LoRA"),
    "attention": ("attention",),
    "memory": ("dequantise", "elementwise", "optimizer", "copies", "other"),
}
_NEAR = 0.9  # share of the step from which on one thing is said to limit it


@dataclass(frozen=True)
class Launch:
    """One kernel or copy on the GPU."""

    kernel: str
    milliseconds: float
    ops: tuple[str, ...] = ()
    """torch's ops and functions that launched it, innermost first."""
    begin: float = 0.0
    """Milliseconds, by the GPU's clock."""

    @property
    def is_from_host(self) -> bool:
        """Whether it brings something from host memory, as weights that are streamed."""
        return "HtoD" in self.kernel

    @property
    def is_copy(self) -> bool:
        """Whether it is a copy or a fill by the driver, which can run beside kernels."""
        return self.kernel.startswith(("Memcpy", "Memset"))


@dataclass(frozen=True)
class Share:
    """What several launches took together."""

    milliseconds: float
    launches: int


def group_of(launch: Launch) -> str:
    """The group of ``GROUPS`` that a launch belongs to."""
    name = launch.kernel.lower()
    group = next((group for group, parts in _BY_KERNEL if any(part in name for part in parts)), "other")
    if group == "matmul":
        return "LoRA" if _is_of_adapter(launch.ops) else group
    if group == "elementwise" and any(op.startswith(("aten::_foreach", "Optimizer.step")) for op in launch.ops):
        return "optimizer"
    if group == "elementwise" and any(op.startswith("k5::matmul") for op in launch.ops):
        return "dequantise"  # by torch, where our kernel does not run
    return group


def _is_of_adapter(ops: Sequence[str]) -> bool:
    if any(op.startswith("k5::") for op in ops):
        return "aten::addmm_" in ops  # added in place to the frozen weight's product
    return any(op.startswith(_COMPILED) for op in ops)


def by_group(launches: Iterable[Launch]) -> dict[str, Share]:
    """What each group took, in the order of ``GROUPS``; groups without a launch are left out."""
    times: dict[str, list[float]] = {}
    for launch in launches:
        times.setdefault(group_of(launch), []).append(launch.milliseconds)
    return {group: Share(sum(times[group]), len(times[group])) for group in GROUPS if group in times}


def longest(launches: Iterable[Launch], count: int) -> list[tuple[str, str, Share]]:
    """The kernels that took longest together: group, name and what they took."""
    times: dict[tuple[str, str], list[float]] = {}
    for launch in launches:
        times.setdefault((group_of(launch), launch.kernel), []).append(launch.milliseconds)
    ranked = sorted(times.items(), key=lambda item: -sum(item[1]))
    return [(group, kernel, Share(sum(ms), len(ms))) for (group, kernel), ms in ranked[:count]]


def busy_milliseconds(launches: Iterable[Launch]) -> float:
    """Milliseconds that kernels take on the GPU, without copies by the driver."""
    return sum(launch.milliseconds for launch in launches if not launch.is_copy)


def copying_alone(launches: Sequence[Launch]) -> float:
    """Milliseconds in which something comes from host memory while the GPU computes nothing."""
    kernels = [launch for launch in launches if not launch.is_copy]
    return _covered([*kernels, *(launch for launch in launches if launch.is_from_host)]) - _covered(kernels)


def _covered(launches: Iterable[Launch]) -> float:
    """Milliseconds in which at least one of them runs."""
    total, until = 0.0, float("-inf")
    for begin, end in sorted((launch.begin, launch.begin + launch.milliseconds) for launch in launches):
        total += max(0.0, end - max(begin, until))
        until = max(until, end)
    return total


def spent_on(launches: Sequence[Launch]) -> dict[str, float]:
    """Milliseconds that the GPU computes for each thing that can limit a step, without copies by the driver."""
    groups = by_group(launches)
    spent = {
        limit: sum(groups[group].milliseconds for group in members if group in groups)
        for limit, members in _LIMITS.items()
    }
    spent["memory"] -= sum(launch.milliseconds for launch in launches if launch.is_copy)
    return spent


def limit_of(milliseconds: float, spent: Mapping[str, float], busy: float, waiting: float) -> str:
    """What limits a step of so many milliseconds, in words: launches, copies over PCIe, or what most of the GPU's time
    goes to.

    Args:
        spent: from ``spent_on``.
        busy: milliseconds in which the GPU computes.
        waiting: milliseconds in which it computes nothing, as weights are still being copied.
    """
    parts = ", ".join(f"{limit} {ms:.0f}" for limit, ms in spent.items())
    if busy >= _NEAR * milliseconds:
        return f"{max(spent, key=lambda limit: spent[limit])}, of {busy:.0f} ms on the GPU ({parts})"
    if waiting > (milliseconds - busy) / 2:
        return f"copies of streamed weights: the GPU waits for {waiting:.0f} of {milliseconds:.0f} ms ({parts})"
    return f"launches: the GPU computes for {busy:.0f} of {milliseconds:.0f} ms ({parts})"


def without_adapters_apart(launches: Iterable[Launch]) -> tuple[Launch, ...]:
    """The same with no matmul told as an adapter's. In blocks that others compiled, all have the same callers."""
    return tuple(replace(launch, ops=()) if group_of(launch) == "LoRA" else launch for launch in launches)


def launches_of(step: Callable[[], Any]) -> list[Launch]:
    """What one step launches on the GPU."""
    import torch
    from torch.profiler import ProfilerActivity, profile

    # Without acc_events torch warns at the second profile of a process.
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA], acc_events=True) as profiled:
        step()
        torch.cuda.synchronize()
    profiler: Any = profiled.profiler
    calls: Mapping[int, Any] = {e.id: e for e in profiled.events() if e.device_type.name == "CPU"}
    return [
        Launch(e.name(), e.duration_ns() / 1e6, _callers(calls.get(e.linked_correlation_id())), e.start_ns() / 1e6)
        for e in profiler.kineto_results.events()
        if e.device_type().name == "CUDA" and not e.is_user_annotation()  # these span the kernels of a call
    ]


def _callers(call: Any) -> tuple[str, ...]:
    names: list[str] = []
    while call is not None:
        names.append(call.name)
        call = call.cpu_parent
    return tuple(names)

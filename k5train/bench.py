"""What will this card do? Steps of a full-size transformer with random weights, timed beside today's usual way."""

from __future__ import annotations

import gc
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn

from k5cache import console
from k5cache.errors import K5Error
from k5train import flow, lora, tread
from k5train.base import vram
from k5train.base.execute import Execution
from k5train.base.forward import predict_velocity
from k5train.base.memory import Architecture, Plan, Work, architecture
from k5train.base.quantize import INT8_MODULES, Precision, empty_transformer, finish, place
from k5train.config import LoraConfig, MemoryConfig, TrainConfig
from k5train.objective import RouteConfig, TreadConfig
from k5train.ready import execute, less, plan_for, stream_weights, streamed_blocks, work_for

# Kandinsky 5.0 Image Lite, transformer/config.json of the published T2I checkpoints (DESIGN section 2).
FULL_SIZE: dict[str, Any] = {
    "_class_name": "Kandinsky5Transformer3DModel",
    "in_visual_dim": 16,
    "out_visual_dim": 16,
    "in_text_dim": 3584,
    "in_text_dim2": 768,
    "time_dim": 512,
    "patch_size": [1, 2, 2],
    "model_dim": 2560,
    "ff_dim": 10240,
    "num_text_blocks": 2,
    "num_visual_blocks": 50,
    "axes_dims": [32, 48, 48],
}


@dataclass(frozen=True)
class Case:
    """One line of the bench."""

    precision: Precision
    cap_gib: float | None
    """What torch may reserve. None: what the card has."""
    side: int = 1024
    batch_size: int = 1
    num_text_tokens: int = 256
    rank: int = 16
    targets: tuple[str, ...] = ("qkv",)
    execution: str = "auto"
    tread: float = 0.0
    """Share of the picture's tokens that skip the blocks of ``TREAD_BLOCKS``."""

    @property
    def name(self) -> str:
        """What differs from the first case, in words."""
        cap = f"{self.cap_gib:g} GiB" if self.cap_gib else "all VRAM"
        tread = f", TREAD {self.tread:g}" if self.tread else ""
        adapter = f"r{self.rank} {'+'.join(self.targets)}"
        return f"{self.precision}, {cap}, {self.side} px, batch {self.batch_size}, {adapter}{tread}"


@dataclass(frozen=True)
class Measured:
    """What a case took."""

    name: str
    milliseconds: float
    """Median of a step: forward, backward, clip, AdamW."""
    fastest: float
    predicted_gib: float | None
    reserved_gib: float | None
    busy: float | None
    """Milliseconds of a step in which the GPU computes: near the median it is the limit, else launching is."""
    tflops: float
    """Of the arithmetic that the step needs, recompute not counted."""
    plan: str
    first_step_seconds: float
    """Compilation included."""


MUST_REACH = (Case("int8-quanto", 16), Case("int8-dynamic", 16), Case("int8-quanto", 8.5), Case("int8-quanto", 4.5))
SIZES = tuple(
    Case(precision, 16, side, batch, rank=rank, targets=targets, tread=tread)
    for precision in ("int8-quanto", "int8-dynamic")
    for side, batch, rank, targets, tread in (
        (512, 1, 16, ("qkv",), 0.0),
        (768, 1, 16, ("qkv",), 0.0),
        (512, 4, 16, ("qkv",), 0.0),
        (1024, 2, 16, ("qkv",), 0.0),
        (1024, 4, 16, ("qkv",), 0.0),
        (1024, 1, 64, ("official",), 0.0),
        (1024, 1, 16, ("qkv",), 0.5),
    )
)
TREAD_BLOCKS = (2, -3)
"""First and last visual block that dropped tokens skip."""


def within(budget: int | None, cases: tuple[Case, ...]) -> tuple[Case, ...]:
    """The cases as this card can run them: one that may take more than there is takes what there is, once."""
    limit = None if budget is None else budget / 2**30
    capped = (replace(c, cap_gib=None) if limit and c.cap_gib and c.cap_gib > limit else c for c in cases)
    return tuple(dict.fromkeys(capped))


def bench(
    cases: tuple[Case, ...],
    device: torch.device,
    *,
    config: dict[str, Any] = FULL_SIZE,
    baseline: bool = False,
    num_steps: int = 8,
    num_warm_up: int = 2,
) -> list[Measured]:
    """Time every case, one after the other; one that does not fit or fails is said so and left out."""
    from k5train.bench_baseline import time_baseline

    todo: list[tuple[str, Callable[[], Measured]]] = []
    if baseline:
        todo.append(("baseline", partial(time_baseline, config, device, num_steps, num_warm_up)))
    todo += [(case.name, partial(time_case, case, device, config, num_steps, num_warm_up)) for case in cases]
    results = [_guarded(name, measure) for name, measure in todo]
    return [r for r in results if r is not None]


def _guarded(name: str, measure: Callable[[], Measured]) -> Measured | None:
    try:
        found = measure()
        memory = f", {found.reserved_gib:.2f} GiB reserved" if found.reserved_gib else ""
        predicted = f", {found.predicted_gib:.2f} predicted" if found.predicted_gib else ""
        busy = f", GPU busy {found.busy:.0f}" if found.busy else ""
        console.note(
            f"{name}: {found.milliseconds:.0f} ms a step (fastest {found.fastest:.0f}{busy}){memory}{predicted}; "
            f"{found.plan}; first step after {found.first_step_seconds:.0f} s"
        )
        return found
    except (K5Error, RuntimeError) as error:  # out of memory, or what a kernel or the compiler says: the others go on
        console.warn(f"{name}: {(str(error).strip() or type(error).__name__).splitlines()[0][:200]}")
        return None
    finally:
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
            torch.cuda.set_per_process_memory_fraction(1.0)


def time_case(
    case: Case, device: torch.device, config: dict[str, Any] = FULL_SIZE, num_steps: int = 8, num_warm_up: int = 2
) -> Measured:
    """Plan a case, build its transformer with random weights where the plan wants them, and time its steps."""
    train = TrainConfig(
        batch_size=case.batch_size,
        base_model_precision=case.precision,
        mixed_precision="bf16",
        lora=LoraConfig(rank=case.rank, alpha=case.rank, targets=case.targets),
        memory=MemoryConfig(execution=case.execution),  # type: ignore[arg-type]
        tread=tread_of(case),
    )
    sizes = ((case.side // 16) ** 2, case.num_text_tokens)
    budget = int(case.cap_gib * 2**30) if case.cap_gib else vram.budget(device, None)
    if case.cap_gib:
        vram.limit(device, budget)
    plan = plan_for(config, train, device, sizes, budget)
    try:
        return _time_plan(plan, case, train, device, config, num_steps, num_warm_up)
    except torch.OutOfMemoryError:
        leaner = less(plan)
        if leaner is None:
            raise
    # As a run does. Out of the handler: the error held the step's memory.
    gc.collect()
    torch.cuda.empty_cache()
    console.warn(f"{case.name}: the first step needed more VRAM than the {plan.peak / 2**30:.2f} GiB planned")
    plan = plan_for(config, train, device, sizes, leaner)
    return _time_plan(plan, case, train, device, config, num_steps, num_warm_up)


def _time_plan(
    plan: Plan, case: Case, train: TrainConfig, device: torch.device, config: dict[str, Any], num_steps: int,
    num_warm_up: int,
) -> Measured:  # fmt: skip
    sizes = plan.sizes
    assert sizes is not None
    transformer = random_transformer(config, case.precision, device, frozenset(streamed_blocks(plan)))
    stream_weights(transformer, plan, device)
    lora.add_lora(transformer, train.lora, seed=0)
    execution = execute(transformer, train, device, plan)
    step = stepper(transformer, inputs_for(case, config, device), routes_for(case, device))
    timing = time_steps(step, execution, device, num_steps, num_warm_up)
    needed = flops(architecture(config), work_for(config, train, sizes, compiled=True))
    words = [f"{plan.levels.count(level)} {level}" for level in dict.fromkeys(plan.levels)]
    words += [f"{plan.streaming.num_blocks} streamed"] if plan.streaming else []
    words += [] if execution is None or execution.is_compiled else ["eager"]
    on_gpu = device.type == "cuda"
    return Measured(
        case.name, timing.median, timing.fastest, plan.peak / 2**30 if on_gpu else None, timing.reserved_gib,
        timing.busy, needed / timing.median / 1e9, ", ".join(words), timing.first,
    )  # fmt: skip


@dataclass(frozen=True)
class Timing:
    """Of one kind of step, in milliseconds; ``first`` in seconds."""

    median: float
    fastest: float
    first: float
    reserved_gib: float | None
    busy: float | None


def time_steps(
    step: Callable[[], Any], execution: Execution | None, device: torch.device, num_steps: int, num_warm_up: int
) -> Timing:
    """Time whole steps, the GPU waited for after each."""
    started = time.perf_counter()
    if execution:
        execution.warm_up(step)
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
    return Timing(sorted(times)[len(times) // 2], min(times), first, reserved, busy_of(step) if on_gpu else None)


def busy_of(step: Callable[[], Any]) -> float:
    """Milliseconds that kernels of one step take on the GPU, copies left out."""
    from torch.profiler import ProfilerActivity, profile

    # Without acc_events a second profile of a process warns.
    with profile(activities=[ProfilerActivity.CUDA], acc_events=True) as seen:
        step()
        torch.cuda.synchronize()
    events: list[Any] = list(seen.key_averages())
    kernels = [e for e in events if e.device_type.name == "CUDA" and not e.key.startswith("Mem")]
    return float(sum(e.self_device_time_total for e in kernels)) / 1000


def tread_of(case: Case) -> TreadConfig:
    """The case's TREAD route, if it has one."""
    return TreadConfig(routes=(RouteConfig(case.tread, *TREAD_BLOCKS),) if case.tread else ())


def routes_for(case: Case, device: torch.device) -> tuple[tread.Route, ...]:
    """The case's TREAD route, other tokens for each row."""
    if not case.tread:
        return ()
    generator = torch.Generator().manual_seed(4)
    rows = [tread.token_scores((case.side // 16) ** 2, generator) for _ in range(case.batch_size)]
    routes = tread.choose(torch.stack(rows)[:, None], tread_of(case), 0, 1)
    return tuple(replace(route, kept=route.kept.to(device)) for route in routes)


def stepper(transformer: Any, inputs: tuple[Tensor, ...], routes: tuple[tread.Route, ...] = ()) -> Callable[[], Tensor]:
    """One step on fixed inputs: forward, loss, backward, clip, AdamW. Returns the gradients' norm, unread."""
    parameters = lora.lora_parameters(transformer)
    optimizer = torch.optim.AdamW(parameters, lr=1e-5, fused=inputs[0].is_cuda)
    target = torch.randn_like(inputs[0])
    transformer.train()

    def step() -> Tensor:
        loss = flow.flow_loss(predict_velocity(transformer, *inputs, routes=routes), target)
        torch.autograd.backward(loss)
        norm = torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return norm

    return step


def inputs_for(case: Case, config: dict[str, Any], device: torch.device) -> tuple[Tensor, ...]:
    """Random latents, sigma, prompt_embeds and pooled_projections."""
    generator = torch.Generator(device).manual_seed(1)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device)

    latents = normal(case.batch_size, 1, case.side // 8, case.side // 8, config["in_visual_dim"])
    text = normal(case.batch_size, case.num_text_tokens, config["in_text_dim"])
    sigma = torch.rand(case.batch_size, generator=generator, device=device)
    return latents, sigma, text.bfloat16(), normal(case.batch_size, config["in_text_dim2"]).bfloat16()


def random_transformer(
    config: dict[str, Any], precision: Precision, device: torch.device, streamed: frozenset[int] = frozenset()
) -> Any:
    """A transformer as ``load_transformer`` makes it, of random weights, without a checkpoint.

    Args:
        streamed: picture blocks whose int8 weights are made in host memory.
    """
    with TemporaryDirectory() as folder:
        (Path(folder) / "transformer").mkdir()
        (Path(folder) / "transformer" / "config.json").write_text(json.dumps(config), encoding="utf-8")
        transformer = empty_transformer(Path(folder))
    prefixes = tuple(f"visual_transformer_blocks.{i}." for i in streamed)
    for name, tensor in _random_tensors(transformer, precision, device):
        parent = name.rpartition(".")[0]
        on_host = bool(prefixes) and name.startswith(prefixes) and INT8_MODULES.fullmatch(parent)
        place(transformer, name, tensor.cpu() if on_host else tensor)
    return finish(transformer, device)


def _random_tensors(transformer: nn.Module, precision: Precision, device: torch.device) -> Iterator[tuple[str, Tensor]]:
    """Weights of a size that keeps activations near 1; modulations too, or blocks would be identities."""
    generator = torch.Generator(device).manual_seed(0)
    for name, meta in transformer.state_dict().items():
        parent, _, leaf = name.rpartition(".")
        shape = tuple(meta.shape)
        if leaf == "weight" and precision != "no_change" and INT8_MODULES.fullmatch(parent):
            yield name, torch.randint(-127, 128, shape, dtype=torch.int8, device=device, generator=generator)
            yield f"{parent}.scale", torch.full((shape[0], 1), 1 / (73 * shape[1] ** 0.5), device=device).bfloat16()
        elif len(shape) == 1 and leaf == "weight":
            yield name, torch.ones(shape, device=device, dtype=torch.bfloat16)
        else:
            std = 0.02 if "modulation" in name or len(shape) == 1 else shape[1] ** -0.5
            yield name, (torch.randn(shape, device=device, generator=generator) * std).bfloat16()


def flops(arch: Architecture, work: Work) -> float:
    """Operations that one forward and backward pass cannot do without: no recompute, no gradient of frozen weights."""
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


def table(results: list[Measured], ceiling: float | None) -> list[list[str]]:
    """Results as rows of text, the first as the baseline of speed where it is one."""
    base = results[0].milliseconds if results and results[0].name.startswith("baseline") else None
    rows = []
    for r in results:
        error = (
            f" ({100 * (r.predicted_gib / r.reserved_gib - 1):+.0f} %)" if r.predicted_gib and r.reserved_gib else ""
        )
        predicted = f"{r.predicted_gib:.2f}{error}" if r.predicted_gib else ""
        rows.append([
            r.name, f"{r.milliseconds:.0f}", f"{base / r.milliseconds:.2f}x" if base else "",
            f"{r.busy:.0f}" if r.busy else "", f"{r.reserved_gib:.2f}" if r.reserved_gib else "", predicted,
            f"{r.tflops:.0f}" + (f" ({100 * r.tflops / ceiling:.0f} %)" if ceiling else ""), r.plan,
        ])  # fmt: skip
    return rows


COLUMNS = ("case", "ms/step", "speed", "GPU busy", "reserved GiB", "predicted", "TFLOP/s (of ceiling)", "blocks")


def as_json(results: list[Measured]) -> str:
    """Results for a file."""
    return json.dumps([asdict(r) for r in results], indent=2) + "\n"

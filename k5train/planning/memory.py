"""Which plan fits? From architecture, sizes, adapter and VRAM to what each block keeps and which weights are streamed.

Arithmetic only. ``forward/execute.py`` carries a plan out, ``tests/test_memory.py`` counts what it really keeps.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

from k5cache.shared import vram
from k5cache.shared.console import human_bytes
from k5cache.shared.errors import DoesNotFit

LevelName = Literal["nothing", "attention", "selective", "matmuls", "all"]


class Level(NamedTuple):
    """What a block keeps for the backward pass besides its input. The rest is computed again."""

    attention: bool
    """Whether self attention's output is kept: for its size, it takes longest to compute again."""
    matmuls: frozenset[str]
    """Tags of the linears whose outputs are kept. If there are any, cross attention's output is kept too."""
    help: str


_NO_TAGS = frozenset[str]()
_SELECTIVE = frozenset({"self_qkv", "self_out", "cross_q", "cross_kv", "cross_out"})

# From leanest to fastest. ff_out is never computed again: nothing in the backward pass needs it.
LEVELS: dict[LevelName, Level] = {
    "nothing": Level(False, _NO_TAGS, "recompute all of it"),
    "attention": Level(True, _NO_TAGS, "keep self attention, recompute every linear"),
    "selective": Level(True, _SELECTIVE, "keep attentions and their linears, recompute ff_in and elementwise work"),
    "matmuls": Level(True, _SELECTIVE | {"ff_in"}, "keep every matmul, recompute elementwise work"),
    "all": Level(True, _SELECTIVE | {"ff_in"}, "recompute nothing"),
}

_ALLOCATOR_BYTES = 128 * 2**20  # cuBLAS and cuDNN workspaces, and what rounding leaves unused
# Workspaces and buffers of captured steps. What a step keeps and works in is counted with the blocks.
_GRAPH_BYTES = 128 * 2**20
_MARGIN = 0.03  # share of the budget that is left free: predictions are at best this good
_FEW = 0.1  # share of the blocks that is too small for a level of its own: 1 % of a step, and a compilation
# Rows that a block keeps at "all" beyond its matmuls and its adapters' inputs: elementwise results, as the compiler's
# partitioner, eager execution and peft's modules keep them.
_EXTRA_ROWS = {"compiled": 3.5, "eager": 13.0, "modules": 15.0}


@dataclass(frozen=True)
class Architecture:
    """The numbers of a transformer's config.json that decide memory."""

    model_dim: int
    ff_dim: int
    time_dim: int
    num_text_blocks: int
    num_visual_blocks: int
    head_dim: int
    num_other_parameters: int
    """Embeddings and head."""

    @property
    def block_parameters(self) -> int:
        """Weights of a visual block that become int8: two attentions and the feed-forward."""
        return 8 * self.model_dim**2 + 2 * self.model_dim * self.ff_dim

    @property
    def text_block_parameters(self) -> int:
        """Weights of a text block that become int8: one attention and the feed-forward."""
        return 4 * self.model_dim**2 + 2 * self.model_dim * self.ff_dim

    @property
    def modulation_parameters(self) -> int:
        """Weights of all modulations: stored in 16 bits, computed in float32."""
        per_row = self.time_dim + 1
        return (9 * self.num_visual_blocks + 6 * self.num_text_blocks) * self.model_dim * per_row


class AsModules(NamedTuple):
    """What a visual block's adapters keep where blocks run as peft's modules: all of it, or nothing of the block."""

    per_token: int
    """Bytes for each token of the picture."""
    per_text_token: int
    weights: int
    """Bytes of whole matrices, whatever the number of tokens."""
    passing: int
    """Bytes that the largest of its linears needs for a moment, whatever the number of tokens."""


@dataclass(frozen=True)
class Work:
    """One forward and backward pass, the largest of a run."""

    batch_size: int
    num_tokens: int
    """Tokens of the picture: width / 16 * height / 16."""
    num_text_tokens: int
    lora_parameters: int
    adapters_width: int
    """Sum of the ranks over a visual block's adapted linears: what their down-projections keep."""
    precision: Literal["int8-quanto", "int8-dynamic", "no_change"]
    adapter_inputs: tuple[int, int] = (0, 0)
    """Bytes for each token of the picture and of the caption that a visual block's adapters keep of their inputs at
    level "all", beyond what the block keeps anyway."""
    bytes_per_element: int = 2
    """Of activations: 2 in bf16, 4 in fp32."""
    compiled: bool = True
    bytes_per_lora_parameter: int = 16
    """The parameter and its gradient in float32, and the optimizer's state, which is 8 bytes in AdamW."""
    condition_channels: int = 0
    """Channels of the source's latents and mask, for image-to-image."""
    as_modules: AsModules | None = None
    """Of DoRA and LoKr, whose blocks keep everything at level "all" and nothing at the others."""
    is_captured: bool = False
    """Whether steps are captured as CUDA graphs."""
    token_shares: tuple[float, ...] = ()
    """Share of the picture's tokens that goes through each visual block. Empty without TREAD: all of them."""

    def in_block(self, i: int) -> Work:
        """The part of the work that visual block ``i`` does."""
        if not self.token_shares or self.token_shares[i] == 1:
            return self
        return replace(self, num_tokens=math.ceil(self.token_shares[i] * self.num_tokens))


@dataclass(frozen=True)
class Streaming:
    """How many visual blocks' weights live in host memory, and how they come to the GPU."""

    num_blocks: int
    slots: int = 2
    """Blocks that have room on the GPU at a time."""
    prefetch: bool = True
    """Copy on a CUDA stream of its own, while the previous block is computed."""


@dataclass(frozen=True)
class Plan:
    """What each visual block keeps, what is streamed, and how much memory that takes."""

    levels: tuple[LevelName, ...]
    streaming: Streaming | None
    parts: Mapping[str, int]
    """Bytes on the GPU at the peak, by their use."""
    budget: int | None
    """Bytes of VRAM that it was planned for. None: no limit."""
    host_bytes: int
    """Page-locked host memory of the streamed weights."""
    sizes: tuple[int, int] | None = None
    """The most tokens of a picture and of a caption that the plan is for."""
    is_captured: bool = False
    """Whether steps are captured as CUDA graphs, with captions in a buffer of the most tokens."""

    @property
    def peak(self) -> int:
        """Predicted bytes of VRAM that torch reserves at the peak."""
        return sum(self.parts.values())


def architecture(config: Mapping[str, Any]) -> Architecture:
    """The numbers of a diffusers ``config.json``."""
    d, time, patch = config["model_dim"], config["time_dim"], config["patch_size"]
    patch_size = patch[0] * patch[1] * patch[2]
    channels = 2 * config["in_visual_dim"] + 1 if config.get("visual_cond") else config["in_visual_dim"]
    other = (config["in_text_dim"] * d + config["in_text_dim2"] * time + d * time + time * time
             + patch_size * channels * d + 2 * d * time + d * patch_size * config["out_visual_dim"])  # fmt: skip
    return Architecture(
        d, config["ff_dim"], time, config["num_text_blocks"], config["num_visual_blocks"],
        sum(config["axes_dims"]), other,
    )  # fmt: skip


def kept_bytes(level: LevelName, arch: Architecture, work: Work) -> int:
    """Bytes that one visual block keeps from the forward to the backward pass, with its input."""
    size, tokens = work.bytes_per_element, work.batch_size * work.num_tokens
    row = tokens * arch.model_dim * size
    logsumexp = tokens * (arch.model_dim // arch.head_dim) * 4
    kept = row  # the block's input
    if level == "nothing" or (work.as_modules and level != "all"):
        return kept
    kept += row + logsumexp
    if level == "attention":
        return kept
    # q, k, v, out; cross q, attention, out; and what the captions became
    kept += 3 * row + row + 3 * row + logsumexp
    kept += work.batch_size * work.num_text_tokens * 2 * arch.model_dim * size
    kept += tokens * work.adapters_width * size
    if level in ("matmuls", "all"):
        kept += tokens * arch.ff_dim * size
    if work.as_modules:
        kept += tokens * work.as_modules.per_token + work.as_modules.weights
        kept += work.batch_size * work.num_text_tokens * work.as_modules.per_text_token
    if level == "all":
        how = "modules" if work.as_modules else "compiled" if work.compiled else "eager"
        kept += int(_EXTRA_ROWS[how] * row) + tokens * work.adapter_inputs[0]
        kept += work.batch_size * work.num_text_tokens * work.adapter_inputs[1]
    return kept


def estimate(
    arch: Architecture, work: Work, levels: tuple[LevelName, ...], streaming: Streaming | None
) -> dict[str, int]:
    """Bytes on the GPU at the peak of a step, by their use."""
    weight_bytes = work.bytes_per_element if work.precision == "no_change" else 1
    small_bytes = work.bytes_per_element  # scales, biases, embeddings
    per_block = arch.block_parameters * weight_bytes + (17 * arch.model_dim + arch.ff_dim) * small_bytes
    resident = arch.num_visual_blocks - (streaming.num_blocks if streaming else 0)
    slots = min(streaming.slots, streaming.num_blocks) if streaming else 0
    weights = per_block * resident + arch.num_text_blocks * (arch.text_block_parameters * weight_bytes)
    weights += (arch.modulation_parameters + arch.num_other_parameters) * small_bytes
    # The source's channels in float32, and the whole input in 16 bits: 2 x 2 latents a token.
    of_condition = work.condition_channels * 4 + (2 * work.condition_channels - 1) * work.bytes_per_element
    latents = 4 * work.batch_size * work.num_tokens
    return {
        "weights": weights,
        "streamed weights' room": per_block * slots,
        # Each block also keeps its adapters in the compute dtype.
        "LoRA, gradients, optimizer": (work.bytes_per_lora_parameter + small_bytes) * work.lora_parameters,
        "kept activations": sum(kept_bytes(level, arch, work.in_block(i)) for i, level in enumerate(levels)),
        "one block's work": max(_work_bytes(level, arch, work) for level in set(levels)),
        "allocator": _ALLOCATOR_BYTES,
        **({"source": latents * of_condition} if work.condition_channels else {}),
        **({"CUDA graph": _GRAPH_BYTES} if work.is_captured else {}),
    }


def _work_bytes(level: LevelName, arch: Architecture, work: Work) -> int:
    """Bytes that the backward pass of one block needs at its peak, besides what was kept."""
    size, tokens = work.bytes_per_element, work.batch_size * work.num_tokens
    row, hidden = tokens * arch.model_dim * size, tokens * arch.ff_dim * size
    whole = kept_bytes("all" if work.as_modules else "matmuls", arch, work)
    again = max(0, whole - kept_bytes(level, arch, work))
    # The peak is in the feed-forward: the hidden layer's gradient, the residuals, and the weight as it is multiplied.
    weight = arch.model_dim * arch.ff_dim * (1 if work.precision == "int8-dynamic" else size)
    weight = 0 if work.precision == "no_change" else weight
    quantized = hidden // size if work.precision == "int8-dynamic" else 0
    unfused = 0 if work.compiled else 2 * hidden + 12 * row  # float32 copies, which a compiled block never writes
    passing = work.as_modules.passing if work.as_modules else 0
    return again + hidden + 5 * row + unfused + weight + quantized + passing


def make_plan(
    arch: Architecture,
    work: Work,
    budget: int | None,
    *,
    level: LevelName | None = None,
    streaming: Streaming | None = None,
    fixed_by: str = "activations",
) -> Plan:
    """The fastest plan that fits ``budget`` bytes of VRAM.

    Blocks climb the ladder of ``LEVELS`` together, because each step up saves less time per byte than the previous
    one. So a plan mixes at most two neighbouring levels. A level for only a few blocks is not worth its compilation.
    Weights are streamed only if the run does not fit with everything recomputed.

    Args:
        budget: bytes of VRAM. None: no limit.
        level: the level of every block, instead of the ladder.
        streaming: what the user asks for. None: stream only what must be.
        fixed_by: the option of ``[train.memory]`` that asks for ``level``.

    Raises:
        DoesNotFit: no plan fits, or not the one asked for. The error names the nearest change that fits.
    """
    planner = _Planner(arch, work, budget)
    if level is not None:
        plan = planner.plan((level,) * arch.num_visual_blocks, streaming)
        if not planner.fits(plan):
            asked = f'activations = "{level}"' if fixed_by == "activations" else "with everything recomputed, this run"
            raise _too_small(plan, arch, work, asked, f"train.memory.{fixed_by}=auto")
        return plan
    if fastest := planner.fastest(streaming):
        return fastest
    if work.precision == "no_change":
        raise _too_small(planner.leanest(None), arch, work, "with everything recomputed, this run")
    if streaming is None and (least_streamed := planner.least_streamed()):
        return least_streamed
    fixed = "train.memory.group_offload_blocks_per_group=1" if streaming and streaming.slots > 2 else ""
    leanest = planner.leanest(streaming or Streaming(arch.num_visual_blocks))
    raise _too_small(leanest, arch, work, "even with all weights streamed, this run", fixed)


@dataclass(frozen=True)
class _Planner:
    """The plans that there are for some work, and which of them fit."""

    arch: Architecture
    work: Work
    budget: int | None

    def plan(self, levels: tuple[LevelName, ...], streaming: Streaming | None) -> Plan:
        """A plan with its estimate."""
        per_block = estimate(self.arch, self.work, levels, Streaming(1, 1))["streamed weights' room"]
        host_bytes = per_block * streaming.num_blocks if streaming else 0
        parts = estimate(self.arch, self.work, levels, streaming)
        sizes = (self.work.num_tokens, self.work.num_text_tokens)
        return Plan(levels, streaming, parts, self.budget, host_bytes, sizes, self.work.is_captured)

    def fits(self, plan: Plan) -> bool:
        """Whether a plan stays within the budget, less the margin."""
        return self.budget is None or plan.peak <= self.budget * (1 - _MARGIN)

    def leanest(self, streaming: Streaming | None) -> Plan:
        """The plan that recomputes everything."""
        count = self.arch.num_visual_blocks
        return self.plan(_mixed("nothing", "nothing", 0, count), streaming)

    def fastest(self, streaming: Streaming | None) -> Plan | None:
        """The plan that climbs the ladder as far as it fits. None: the lowest rung does not fit."""
        best: Plan | None = None
        count = self.arch.num_visual_blocks
        ladder: tuple[LevelName, ...] = ("nothing", "all") if self.work.as_modules else tuple(LEVELS)
        for lower, upper in itertools.pairwise(ladder):
            for raised in range(count + 1):
                candidate = self.plan(_mixed(lower, upper, raised, count), streaming)
                if not self.fits(candidate):
                    break
                if best is None or raised == 0 or raised >= _FEW * count:
                    best = candidate
        return best

    def least_streamed(self) -> Plan | None:
        """The plan that recomputes everything and streams as few blocks as it can. None: none fits."""
        plans = (self.leanest(Streaming(n)) for n in range(3, self.arch.num_visual_blocks + 1))
        return next((plan for plan in plans if self.fits(plan)), None)


def _mixed(lower: LevelName, upper: LevelName, raised: int, count: int) -> tuple[LevelName, ...]:
    """``raised`` of ``count`` blocks at ``upper``, evenly spread, the others at ``lower``."""
    return tuple(upper if (i + 1) * raised // count > i * raised // count else lower for i in range(count))


def check_fits_ram(plan: Plan, arch: Architecture, work: Work, num_bytes: int) -> None:
    """Refuse a plan for a CPU that needs more than ``num_bytes`` of host memory.

    Raises:
        DoesNotFit: names the nearest change that fits.
    """
    if plan.peak > num_bytes:
        raise _too_small(replace(plan, budget=num_bytes), arch, work, "on the CPU, this run", on_gpu=False)


def _too_small(
    plan: Plan, arch: Architecture, work: Work, subject: str, fixed: str = "", on_gpu: bool = True
) -> DoesNotFit:
    """The error for a plan over its budget, with the nearest change that fits.

    Args:
        fixed: the setting that would allow a leaner plan, as ``--set`` takes it. Empty: there is none.
        on_gpu: False: the budget is host memory, and no weights can be streamed from elsewhere.
    """
    assert plan.budget is not None
    room = plan.budget * (1 - _MARGIN)
    there_is = f"{human_bytes(plan.budget)} for torch" if on_gpu else f"{human_bytes(plan.budget)} free"
    problem = f"{subject} needs {human_bytes(plan.peak)} of {'VRAM' if on_gpu else 'RAM'}, there is {there_is}"
    lean = _mixed("nothing", "nothing", 0, arch.num_visual_blocks)
    streaming = Streaming(arch.num_visual_blocks) if on_gpu else None

    def peak(changed: Work) -> int:
        return sum(estimate(arch, changed, lean, streaming).values())

    if work.precision == "no_change" and peak(replace(work, precision="int8-quanto")) <= room:
        return DoesNotFit(problem, "Use --set train.base_model_precision=int8-quanto")
    if fixed and peak(work) <= room:
        return DoesNotFit(problem, f"Use --set {fixed}, which allows a plan that fits")
    single = replace(work, batch_size=1)
    sides = [side for side in (768, 512, 256) if (side // 16) ** 2 < work.num_tokens]
    smaller = [("", single)]
    for side in sides:
        change = f"a cache encoded with cache.resolution={side}"
        smaller.append((change, replace(single, num_tokens=(side // 16) ** 2)))
    shares = [1, 4] if work.lora_parameters else [1]
    if work.lora_parameters > arch.num_visual_blocks * arch.block_parameters / 10:
        shares += [16, 64]  # a rank above about 200, of which even a 64th is of use
    for share, (change, changed) in ((share, size) for share in shares for size in smaller):
        less = replace(changed, lora_parameters=changed.lora_parameters // share,
                       adapters_width=changed.adapters_width // share)  # fmt: skip
        if peak(less) <= room:
            changes = ["--set train.batch_size=1"] if work.batch_size > 1 else []
            part = "a quarter" if share == 4 else f"1/{share}"
            changes += [f"{part} of train.lora.rank"] if share > 1 else []
            changes += [change] if change else []
            return DoesNotFit(problem, f"Nearest that fits, with {human_bytes(peak(less))}: {', '.join(changes)}")
    needed = int(peak(work) / (1 - _MARGIN))
    if not on_gpu:
        return DoesNotFit(problem, f"Close other programs, or use a machine with {human_bytes(needed)} of free RAM")
    needed += vram.CONTEXT_BYTES
    return DoesNotFit(problem, f"Use a GPU with at least {human_bytes(needed)} of memory")

"""What fits: from architecture, size, adapter and VRAM to what each block keeps and which weights are streamed.

Arithmetic only. ``execute.py`` carries a plan out, ``tests/test_memory.py`` counts what it really keeps.
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
    """What a block keeps besides its input; the rest is computed again in backward."""

    attention: bool
    """Self attention's output: its recompute is the dearest for its size."""
    matmuls: frozenset[str]
    """Tags of the linears whose outputs are kept, and then cross attention's output too."""
    help: str


_NO_TAGS = frozenset[str]()


_SELECTIVE = frozenset({"self_qkv", "self_out", "cross_q", "cross_kv", "cross_out"})


# From leanest to fastest. ff_out is never computed again: nothing in backward needs it.
LEVELS: dict[LevelName, Level] = {
    "nothing": Level(False, _NO_TAGS, "recompute all of it"),
    "attention": Level(True, _NO_TAGS, "keep self attention, recompute every linear"),
    "selective": Level(True, _SELECTIVE, "keep attentions and their linears, recompute ff_in and elementwise work"),
    "matmuls": Level(True, _SELECTIVE | {"ff_in"}, "keep every matmul, recompute elementwise work"),
    "all": Level(True, _SELECTIVE | {"ff_in"}, "recompute nothing"),
}


_ALLOCATOR_BYTES = 128 * 2**20  # cuBLAS and cuDNN workspaces, and what rounding leaves unused


_MARGIN = 0.03  # of the budget, left free: predictions are that good at best


_FEW = 0.1  # of the blocks: about 1 % of a step by its FLOPs, while each level is compiled for itself


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
        """Of all blocks: held in 16 bits, computed in float32."""
        per_row = self.time_dim + 1
        return (9 * self.num_visual_blocks + 6 * self.num_text_blocks) * self.model_dim * per_row


@dataclass(frozen=True)
class Work:
    """One forward and backward pass: the largest that the run will see."""

    batch_size: int
    num_tokens: int
    """Of the picture: width / 16 * height / 16."""
    num_text_tokens: int
    lora_parameters: int
    adapters_width: int
    """Sum over a visual block's adapted linears of the rank: what their down-projections keep."""
    precision: Literal["int8-quanto", "int8-dynamic", "no_change"]
    bytes_per_element: int = 2
    """Of activations: 2 in bf16, 4 in fp32."""
    compiled: bool = True
    bytes_per_lora_parameter: int = 16
    """In float32: the parameter, its gradient, and what the optimizer holds, 8 bytes in AdamW."""
    walking: tuple[float, ...] = ()
    """Share of the picture's tokens that goes through each visual block, where TREAD lets some skip it."""

    def in_block(self, i: int) -> Work:
        """What visual block ``i`` sees of it."""
        if not self.walking or self.walking[i] == 1:
            return self
        return replace(self, num_tokens=math.ceil(self.walking[i] * self.num_tokens))


@dataclass(frozen=True)
class Streaming:
    """Which visual blocks' weights live in host memory, and how many have room on the GPU at a time."""

    num_blocks: int
    slots: int = 2
    prefetch: bool = True
    """On a stream of its own, while the block before is computed."""


@dataclass(frozen=True)
class Plan:
    """What each visual block keeps, what is streamed, and what that takes."""

    levels: tuple[LevelName, ...]
    streaming: Streaming | None
    parts: Mapping[str, int]
    """Bytes on the GPU at the peak, by what they are."""
    budget: int | None
    host_bytes: int
    """Page-locked host memory of the streamed weights."""
    sizes: tuple[int, int] | None = None
    """The most tokens of a picture and of a caption that it is for."""

    @property
    def peak(self) -> int:
        """Bytes of VRAM that torch reserves at the peak, predicted."""
        return sum(self.parts.values())


def architecture(config: Mapping[str, Any]) -> Architecture:
    """From a diffusers ``config.json``."""
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
    """Activations that one visual block keeps from forward to backward, its input included."""
    size, tokens = work.bytes_per_element, work.batch_size * work.num_tokens
    row = tokens * arch.model_dim * size
    logsumexp = tokens * (arch.model_dim // arch.head_dim) * 4
    kept = row  # the block's input
    if level == "nothing":
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
    if level == "all":
        kept += int(_EXTRA_ROWS["compiled" if work.compiled else "eager"] * row)
    return kept


# Without recompute, beyond the matmuls: what the compiler's partitioner keeps of elementwise work, and what eager does.
_EXTRA_ROWS = {"compiled": 5.5, "eager": 15.0}


def estimate(
    arch: Architecture, work: Work, levels: tuple[LevelName, ...], streaming: Streaming | None
) -> dict[str, int]:
    """Bytes on the GPU at the peak of a step, by what they are."""
    weight_bytes = work.bytes_per_element if work.precision == "no_change" else 1
    small_bytes = work.bytes_per_element  # scales, biases, embeddings
    per_block = arch.block_parameters * weight_bytes + (17 * arch.model_dim + arch.ff_dim) * small_bytes
    resident = arch.num_visual_blocks - (streaming.num_blocks if streaming else 0)
    slots = min(streaming.slots, streaming.num_blocks) if streaming else 0
    weights = per_block * resident + arch.num_text_blocks * (arch.text_block_parameters * weight_bytes)
    weights += (arch.modulation_parameters + arch.num_other_parameters) * small_bytes
    return {
        "weights": weights,
        "streamed weights' room": per_block * slots,
        # Each block keeps its adapters in the compute dtype too.
        "LoRA, gradients, optimizer": (work.bytes_per_lora_parameter + small_bytes) * work.lora_parameters,
        "kept activations": sum(kept_bytes(level, arch, work.in_block(i)) for i, level in enumerate(levels)),
        "one block's work": max(_work_bytes(level, arch, work) for level in set(levels)),
        "allocator": _ALLOCATOR_BYTES,
    }


def _work_bytes(level: LevelName, arch: Architecture, work: Work) -> int:
    """What the backward pass of one block holds at its fullest beyond what was kept."""
    size, tokens = work.bytes_per_element, work.batch_size * work.num_tokens
    row, hidden = tokens * arch.model_dim * size, tokens * arch.ff_dim * size
    again = max(0, kept_bytes("matmuls", arch, work) - kept_bytes(level, arch, work))
    # Feed-forward: the gradient of the hidden layer, the residuals, and the weight as it is multiplied.
    weight = arch.model_dim * arch.ff_dim * (1 if work.precision == "int8-dynamic" else size)
    weight = 0 if work.precision == "no_change" else weight
    quantized = hidden // size if work.precision == "int8-dynamic" else 0
    unfused = 0 if work.compiled else 2 * hidden + 12 * row  # float32 copies that a compiled block never writes
    return again + hidden + 5 * row + unfused + weight + quantized


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

    Blocks climb the ladder of ``LEVELS`` together, so that a plan mixes two neighbouring levels at most: each step up
    saves less time a byte than the one before. A level of its own for a few blocks is not worth its compilation.
    Weights are streamed only when recomputing everything does not fit.

    Args:
        budget: None: no limit.
        level: for every block, instead of the ladder.
        streaming: asked for; None: only if needed.
        fixed_by: the option of ``[train.memory]`` that asks for ``level``.

    Raises:
        DoesNotFit: no plan fits, or not the one asked for; names the nearest that does.
    """
    count = arch.num_visual_blocks

    def plan(levels: tuple[LevelName, ...], streaming: Streaming | None) -> Plan:
        per_block = estimate(arch, work, levels, Streaming(1, 1))["streamed weights' room"]
        host = per_block * streaming.num_blocks if streaming else 0
        sizes = (work.num_tokens, work.num_text_tokens)
        return Plan(levels, streaming, estimate(arch, work, levels, streaming), budget, host, sizes)

    def fits(candidate: Plan) -> bool:
        return budget is None or candidate.peak <= budget * (1 - _MARGIN)

    if level is not None:
        chosen = plan(_mixed(level, level, 0, count), streaming)
        if not fits(chosen):
            what = f'activations = "{level}"' if fixed_by == "activations" else "with everything recomputed, this run"
            raise _too_small(chosen, arch, work, what, f"train.memory.{fixed_by}=auto")
        return chosen
    best: Plan | None = None
    ladder: list[LevelName] = list(LEVELS)
    for lower, upper in itertools.pairwise(ladder):
        for raised in range(count + 1):
            candidate = plan(_mixed(lower, upper, raised, count), streaming)
            if not fits(candidate):
                break
            if best is None or raised == 0 or raised >= _FEW * count:
                best = candidate
    if best is not None:
        return best
    lean = _mixed("nothing", "nothing", 0, count)
    if work.precision == "no_change":
        raise _too_small(plan(lean, None), arch, work, "with everything recomputed, this run")
    fixed = "train.memory.group_offload_blocks_per_group=1" if streaming and streaming.slots > 2 else ""
    if streaming is None:
        for num_blocks in range(3, count + 1):
            candidate = plan(lean, Streaming(num_blocks))
            if fits(candidate):
                return candidate
        streaming = Streaming(count)
    raise _too_small(plan(lean, streaming), arch, work, "even with all weights streamed, this run", fixed)


def _mixed(lower: LevelName, upper: LevelName, raised: int, count: int) -> tuple[LevelName, ...]:
    """``raised`` of ``count`` blocks at ``upper``, spread evenly."""
    return tuple(upper if (i + 1) * raised // count > i * raised // count else lower for i in range(count))


def _too_small(plan: Plan, arch: Architecture, work: Work, what: str, fixed: str = "") -> DoesNotFit:
    """The error for a plan over its budget, with the nearest change that fits.

    Args:
        fixed: the option without which something leaner would be planned, as ``--set`` takes it.
    """
    assert plan.budget is not None
    room = plan.budget * (1 - _MARGIN)
    problem = f"{what} needs {human_bytes(plan.peak)} of VRAM, there is {human_bytes(plan.budget)} for torch"
    lean = _mixed("nothing", "nothing", 0, arch.num_visual_blocks)

    def peak(changed: Work) -> int:
        return sum(estimate(arch, changed, lean, Streaming(arch.num_visual_blocks)).values())

    if work.precision == "no_change" and peak(replace(work, precision="int8-quanto")) <= room:
        return DoesNotFit(problem, "Use --set train.base_model_precision=int8-quanto")
    if fixed and peak(work) <= room:
        return DoesNotFit(problem, f"Use --set {fixed}, with which what fits is planned")
    one = replace(work, batch_size=1)
    sides = [side for side in (768, 512, 256) if (side // 16) ** 2 < work.num_tokens]
    smaller = [("", one)] + [
        (f"a cache encoded with cache.resolution={side}", replace(one, num_tokens=(side // 16) ** 2)) for side in sides
    ]
    shares = [1, 4] if work.lora_parameters else [1]
    for share, (words, changed) in ((share, size) for share in shares for size in smaller):
        less = replace(changed, lora_parameters=changed.lora_parameters // share,
                       adapters_width=changed.adapters_width // share)  # fmt: skip
        if peak(less) <= room:
            changes = ["--set train.batch_size=1"] if work.batch_size > 1 else []
            changes += ["a quarter of train.lora.rank"] if share > 1 else []
            changes += [words] if words else []
            return DoesNotFit(problem, f"Nearest that fits, with {human_bytes(peak(less))}: {', '.join(changes)}")
    needed = int(peak(work) / (1 - _MARGIN)) + vram.CONTEXT_BYTES
    return DoesNotFit(problem, f"Use a GPU with at least {human_bytes(needed)} of memory")


def describe(plan: Plan) -> list[tuple[str, str]]:
    """A plan as rows of a table: what, and how much or how."""
    rows = [(name, human_bytes(size)) for name, size in plan.parts.items() if size]
    budget = f" of {human_bytes(plan.budget)}" if plan.budget is not None else ""
    rows.append(("predicted peak, torch reserved", human_bytes(plan.peak) + budget))
    rows += [(f"{plan.levels.count(name)} blocks: {name}", LEVELS[name].help) for name in dict.fromkeys(plan.levels)]
    if plan.streaming:
        how = "ahead of their use" if plan.streaming.prefetch else "when they are needed"
        rows.append((f"{plan.streaming.num_blocks} blocks streamed", f"{human_bytes(plan.host_bytes)} of pinned host "
                     f"memory, copied {how}"))  # fmt: skip
    return rows

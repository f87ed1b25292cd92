"""How long will a step take? Counted up from the times of single blocks, which ``k5train/bench/probe.py`` measures.

Arithmetic only: a step takes what its blocks take at their levels and sizes, and what all around the blocks takes.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from k5cache.shared.console import human_seconds
from k5cache.shared.units import count_of
from k5train.options.train import TrainConfig
from k5train.planning.memory import LevelName, Plan

MEASURED_ERROR = 0.3
"""Of what was counted up beside real steps on an H200: -28 to +14 % (docs/measurements.md)."""


class Size(NamedTuple):
    """Pictures of one size, with a caption of the usual length."""

    num_tokens: int
    num_text_tokens: int
    share: float
    """Of all rows."""


class Block(NamedTuple):
    """What decides how long a block takes."""

    level: LevelName
    num_tokens: int
    num_text_tokens: int


@dataclass(frozen=True)
class Seconds:
    """Measured on this machine: the median, and the fastest."""

    median: float
    fastest: float


@dataclass(frozen=True)
class Probed:
    """What was measured of the parts of a step."""

    blocks: Mapping[Block, Seconds]
    """Forward and backward of one block with its adapters and their update."""
    around: Mapping[Size, Seconds]
    """Everything else in a forward and a backward pass, and in the update."""
    seconds_per_byte: float = 0.0
    """From host memory to the GPU."""


@dataclass(frozen=True)
class StepTime:
    """What a step takes by a plan, update included."""

    seconds: float
    fastest: float
    """If nothing else uses the GPU and the processor: no step is faster."""
    copying: float = 0.0
    """Seconds in which streamed weights travel, in a step."""

    def describe(self, config: TrainConfig) -> str:
        """A sentence for a table: a step, the whole run, and how sure that is."""
        steps, sure = config.steps, max(MEASURED_ERROR, self.seconds / self.fastest - 1 if self.fastest else 0)
        left_out = [
            name
            for name, is_on in (
                ("preservation_weight's passes", config.objective.preservation_weight > 0),
                ("rollout's passes", config.rollout.probability > 0),
            )
            if is_on
        ]
        without = ", ".join(["compiling, pictures and measurements", *left_out])
        whole = (
            f"{human_seconds(steps * self.seconds)} for {count_of(steps, 'step')}, " if config.epochs is None else ""
        )
        return (
            f"{1000 * self.seconds:.0f} ms a step, {whole}give or take {sure:.0%}, without {without}: counted up "
            "from blocks timed on this GPU"
        )


def blocks_of(plan: Plan, size: Size, token_shares: Sequence[float] = ()) -> Counter[Block]:
    """How many blocks of each kind a forward pass goes through.

    Args:
        token_shares: as ``Work.token_shares``.
    """
    shares = token_shares or [1.0] * len(plan.levels)
    return Counter(
        Block(level, math.ceil(share * size.num_tokens), size.num_text_tokens)
        for level, share in zip(plan.levels, shares, strict=True)
    )


def count_up(
    probed: Probed, plan: Plan, sizes: Sequence[Size], token_shares: Sequence[float] = (), num_passes: int = 1
) -> StepTime:
    """The mean step over all sizes, by their shares.

    Args:
        num_passes: micro-batches in a step. What is around the blocks is counted with each, the update too.
    """

    def mean(of: Callable[[Seconds], float]) -> float:
        per_size = [
            of(probed.around[size])
            + sum(n * of(probed.blocks[block]) for block, n in blocks_of(plan, size, token_shares).items())
            for size in sizes
        ]
        return sum(size.share * seconds for size, seconds in zip(sizes, per_size, strict=True))

    copying = 0.0
    if plan.streaming:  # for the forward and for the backward pass
        copying = 2 * plan.host_bytes * probed.seconds_per_byte
    ahead = plan.streaming is not None and plan.streaming.prefetch

    def step(computing: float) -> float:
        return num_passes * (max(computing, copying) if ahead else computing + copying)

    return StepTime(step(mean(lambda s: s.median)), step(mean(lambda s: s.fastest)), num_passes * copying)

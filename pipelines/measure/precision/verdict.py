"""How does the trial decide whether the two precisions train alike? The rule was written before the trial ran.

Two runs that differ in their precision alone have the same seed: the same order of pictures, noise and first weights. A
run's share is its loss over the base's. The difference of a pair is the share of ``int8-dynamic`` minus that of
``int8-quanto``, and it is divided by the spread of seeds: the standard deviation of the shares of ``int8-quanto`` over
the seeds of that concept.

``int8-dynamic`` trains as well as ``int8-quanto`` if all of this holds, for what was learned and what was forgotten:

1. over all pairs, the upper end of the mean difference's 95 % confidence interval is below one spread of seeds;
2. in no concept is the mean difference above one spread of seeds;
3. in every concept, pictures of a pair are at most as far apart as those of two seeds of ``int8-quanto`` (the root of
   the mean squared difference of pixels, from the same noise).

A LoRA that is better by more than the spread does not fail.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from statistics import mean, stdev
from typing import Any

from k5train.base.quantize import Precision

REFERENCE: Precision = "int8-quanto"
TRIED: Precision = "int8-dynamic"
UNQUANTISED: Precision = "no_change"
JUDGED_ON = {"held_out": "learned", "known": "forgot"}
"""Pictures of the concept that nothing was trained on, and pictures in the base's own styles."""
# Student's t for a two-sided interval of 95 %, by degrees of freedom; beyond the table the last is a little too wide.
_T = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145)

Shares = Mapping[str, Mapping[int, float]]
"""Concept -> seed -> a run's loss over the base's."""
Pictures = Mapping[int, Sequence[float]]
"""Seed -> the values of all pixels of what its LoRA drew, in one order."""


@dataclass(frozen=True)
class Compared:
    """One measure of two precisions."""

    by_concept: dict[str, float]
    """The mean difference in each concept, in spreads of seeds."""
    mean: float
    """Over all pairs, in spreads of seeds."""
    half_width: float
    """Of the mean's 95 % confidence interval."""
    num_pairs: int

    @property
    def is_within_the_spread(self) -> bool:
        """Whether the first two parts of the rule hold."""
        return self.mean + self.half_width < 1 and all(value <= 1 for value in self.by_concept.values())


def compared(tried: Shares, reference: Shares) -> Compared:
    """Compare two precisions by the pairs of runs that are there.

    Raises:
        ValueError: a concept has fewer than two pairs.
    """
    differences: dict[str, list[float]] = {}
    for concept, by_seed in reference.items():
        seeds = sorted(set(by_seed) & set(tried.get(concept, {})))
        if len(seeds) < 2:
            raise ValueError(f"{concept} needs at least two seeds of both precisions, found {len(seeds)}")
        spread = stdev(by_seed[seed] for seed in seeds)
        differences[concept] = [(tried[concept][seed] - by_seed[seed]) / spread for seed in seeds]
    pairs = [value for values in differences.values() for value in values]
    t = _T[min(len(pairs) - 1, len(_T)) - 1]
    return Compared(
        {concept: mean(values) for concept, values in differences.items()},
        mean(pairs), t * stdev(pairs) / math.sqrt(len(pairs)), len(pairs),
    )  # fmt: skip


@dataclass(frozen=True)
class Distances:
    """How far pictures of one concept are apart, from 0 to 255."""

    of_pairs: float
    """Of the two precisions, the same seed: the mean."""
    of_seeds: float
    """Of two seeds of the reference: the mean over all twos."""

    @property
    def is_within_the_spread(self) -> bool:
        """Whether the third part of the rule holds."""
        return self.of_pairs <= self.of_seeds


def distances(tried: Pictures, reference: Pictures) -> Distances:
    """Compare what two precisions' LoRAs of one concept drew from the same noise.

    Raises:
        ValueError: there are fewer than two seeds of both.
    """
    seeds = sorted(set(tried) & set(reference))
    if len(seeds) < 2:
        raise ValueError(f"pictures need at least two seeds of both precisions, found {len(seeds)}")
    return Distances(
        mean(_apart(tried[seed], reference[seed]) for seed in seeds),
        mean(_apart(reference[a], reference[b]) for a, b in combinations(seeds, 2)),
    )


def _apart(one: Sequence[float], other: Sequence[float]) -> float:
    return math.sqrt(mean((a - b) ** 2 for a, b in zip(one, other, strict=True)))


@dataclass(frozen=True)
class Verdict:
    """What the trial says."""

    losses: dict[str, Compared]
    """By ``learned`` and ``forgot``."""
    pictures: dict[str, Distances]
    """By concept."""

    @property
    def is_alike(self) -> bool:
        """Whether no difference shows beyond the spread of seeds."""
        parts: list[Any] = [*self.losses.values(), *self.pictures.values()]
        return all(part.is_within_the_spread for part in parts)

    def __str__(self) -> str:
        lines = [
            f"{name}: {TRIED} minus {REFERENCE} is {c.mean:+.2f} ± {c.half_width:.2f} spreads of seeds over"
            f" {c.num_pairs} pairs; " + ", ".join(f"{concept} {value:+.2f}" for concept, value in c.by_concept.items())
            for name, c in self.losses.items()
        ]
        lines += [
            f"pictures of {concept}: {d.of_pairs:.1f} apart in a pair, {d.of_seeds:.1f} between two seeds"
            for concept, d in self.pictures.items()
        ]
        says = (
            "no difference beyond the spread of seeds" if self.is_alike else "a difference beyond the spread of seeds"
        )
        return "\n".join((*lines, f"Verdict: {says}"))

"""Which factors does a LoKr have at a linear, by peft's rule, and when does its rank do nothing?"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import NamedTuple

from peft.tuners.lokr.layer import factorization

from k5train.options.adapter import LoraConfig

Size = tuple[int, int]


class Factors(NamedTuple):
    """The weight's change is ``kron(first, second)``. The second is whole, or a product of two matrices of the rank."""

    first: Size
    second: Size
    is_pair: bool

    def num_parameters(self, rank: int) -> int:
        """Trained parameters."""
        (a, b), (c, d) = self.first, self.second
        return a * b + (rank * (c + d) if self.is_pair else c * d)


def factors_of(size: Size, rank: int, decompose_factor: int) -> Factors:
    """The factors at a linear with these outputs and inputs.

    ``peft.tuners.lokr.LoKrLayer``: the second factor is whole unless the rank is below half of its longer side.
    """
    (small_out, large_out), (small_in, large_in) = (factorization(n, decompose_factor) for n in size)
    return Factors((small_out, small_in), (large_out, large_in), rank < max(large_out, large_in) / 2)


def lokr_warnings(config: LoraConfig, sizes: Mapping[str, Size]) -> list[str]:
    """Options of a LoKr that do nothing at these modules: the LoRA has the same bits with another value.

    Args:
        sizes: outputs and inputs of each adapted module.
    """

    def factors(config: LoraConfig) -> list[Factors]:
        return [factors_of(size, config.rank, config.decompose_factor) for size in sizes.values()]

    lines, made = [], factors(config)
    if not any(one.is_pair for one in made):
        least = max(-(-max(one.second) // 2) for one in made)
        lines.append(
            f"train.lora.rank does nothing here: a LoKr of rank {least} or more trains whole factors at all {len(made)}"
            f" modules, found {config.rank}. A small train.lora.decompose_factor, such as 4, makes the factors larger"
        )
    if config.decompose_factor != -1 and made == factors(replace(config, decompose_factor=-1)):
        lines.append(
            f"train.lora.decompose_factor does nothing here: {config.decompose_factor} gives the factors that -1 gives"
        )
    return lines

"""Where does an axis begin and end, and which values does it name? Pure arithmetic."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

ROOM = 0.06
LOGARITHMIC_FROM = 30.0  # times from the lowest value to the highest: a curve that diverged would hide all before it


@dataclass(frozen=True)
class Axis:
    """The range of an axis and its ticks."""

    low: float
    high: float
    ticks: tuple[float, ...]
    is_logarithmic: bool = False

    def share(self, value: float) -> float:
        """Where a value lies: 0 is the beginning of the axis, 1 its end."""
        return float(self.shares(np.array([value]))[0])

    def shares(self, values: NDArray[np.float64]) -> NDArray[np.float64]:
        """``share`` of each value. On a logarithmic axis, what is not above 0 lies below the beginning."""
        if self.is_logarithmic:
            values = np.log(np.maximum(values, self.low / 2))
            return (values - math.log(self.low)) / (math.log(self.high) - math.log(self.low))
        return (values - self.low) / (self.high - self.low)

    def labels(self) -> list[str]:
        """The ticks as text, all with as many decimals as tell them apart."""
        largest = max(map(abs, self.ticks), default=0.0)
        if self.is_logarithmic or not 1e-3 <= largest < 1e7:
            return [_short(tick) for tick in self.ticks]
        apart = min((b - a for a, b in zip(self.ticks[:-1], self.ticks[1:], strict=True)), default=largest)
        decimals = max(0, -math.floor(math.log10(apart) + 1e-9))
        return [f"{tick:,.{decimals}f}" for tick in self.ticks]


def axis_for(values: Sequence[float], most_ticks: int = 7, may_be_logarithmic: bool = True) -> Axis:
    """Around finite ``values``, with ``ROOM`` of their span on each side.

    It does not start at 0, because a curve must show a held-out loss that rises from 0.412 to 0.420: a sign of
    overfitting. It may be logarithmic if the values, all above 0, span more than ``LOGARITHMIC_FROM``.
    """
    low, high = min(values), max(values)
    if may_be_logarithmic and low > 0 and high / low > LOGARITHMIC_FROM:
        beyond = (high / low) ** ROOM
        low, high = low / beyond, high * beyond
        return Axis(low, high, _decades(low, high, most_ticks), is_logarithmic=True)
    missing = max(0.0, max(0.05 * abs(high), 1e-9) - (high - low))
    span = high - low + missing
    start = low - missing / 2 - ROOM * span
    low, high = max(0.0, start) if low >= 0 else start, high + missing / 2 + ROOM * span
    return Axis(low, high, _ticks(low, high, most_ticks))


def steps_axis(first: float, last: float, most_ticks: int = 7) -> Axis:
    """From ``first`` to ``last``, at least 1 apart; ticks at whole steps."""
    last = max(last, first + 1)
    return Axis(first, last, _ticks(first, last, most_ticks, least=1.0))


def _short(value: float) -> str:
    """0.05, 300, 1e-5: at most three digits, and a power of ten where zeros would be counted."""
    if value == 0 or 1e-3 <= abs(value) < 1e5:
        return f"{value:.3g}" if abs(value) < 1e3 else f"{value:,.0f}"
    digits, power = f"{value:.2e}".split("e")
    return f"{digits.rstrip('0').rstrip('.')}e{int(power)}"


def _ticks(low: float, high: float, most: int, least: float = 0.0) -> tuple[float, ...]:
    """As many multiples of 1, 2 or 5 times a power of ten as fit, which are at least ``least`` apart."""
    power = 10.0 ** math.floor(math.log10((high - low) / most))
    for apart in (n * power for n in (1, 2, 5, 10, 20)):
        first, last = math.ceil(low / apart - 1e-9), math.floor(high / apart + 1e-9)
        if apart >= least and last - first < most:
            break
    return tuple(apart * i for i in range(first, last + 1))


def _decades(low: float, high: float, most: int) -> tuple[float, ...]:
    """Powers of ten, as many apart as keeps them few; with 2 and 5 times each while these are few."""
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    every = max(1, math.ceil((last - first) / most))
    factors = (1, 2, 5) if last - first <= 2 else (1, 3) if last - first <= 3 else (1,)
    ticks = [n * 10.0**power for power in range(first, last + 1, every) for n in factors]
    return tuple(tick for tick in ticks if low <= tick <= high)

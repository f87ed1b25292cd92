"""Two computations of one thing: how far apart are they, and where do they first differ? Shared by both selftests."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from rich.text import Text

from k5cache.shared import console

if TYPE_CHECKING:
    import torch


Result = Literal["same bits", "rounding", "DIFFERS", "not run"]
_STYLES = {"same bits": "green", "rounding": "green", "DIFFERS": "bold red", "not run": "dim"}


@dataclass(frozen=True)
class Comparison:
    """One line of a selftest."""

    what: str
    """Ours."""
    against: str
    """The reference."""
    result: Result
    difference: float | None = None
    """Largest absolute difference of two elements."""
    relative: float | None = None
    """Norm of the difference over the norm of the reference, the largest of all tensors compared."""
    allowed: float = 0.0
    """What ``relative`` may be at most; 0: bit for bit."""
    note: str = ""
    """The first thing that differs, or why nothing was run."""

    @property
    def is_failed(self) -> bool:
        """Whether this is more than rounding explains."""
        return self.result == "DIFFERS"


def compare(
    what: str,
    against: str,
    pairs: Iterable[tuple[str, torch.Tensor, torch.Tensor]],
    allowed: float = 0.0,
) -> Comparison:
    """Compare tensors pairwise.

    Args:
        pairs: name, ours, the reference; on any devices. Values are compared, not dtypes.
        allowed: the largest relative norm of a difference that is rounding. 0: bit for bit.
    """
    difference = relative = 0.0
    first, first_wrong = "", ""
    for name, ours, theirs in pairs:
        a, b = ours.detach().double().cpu(), theirs.detach().double().cpu()
        if a.shape != b.shape:
            note = f"{name} is {list(a.shape)} instead of {list(b.shape)}"
            return Comparison(what, against, "DIFFERS", allowed=allowed, note=note)
        off = (a - b).abs()
        off = off.where(off == off, float("inf"))  # a NaN on one side or both is no agreement
        norm = float(off.norm() / b.norm()) if b.any() else float(off.norm())
        difference, relative = max(difference, float(off.max())), max(relative, norm)
        if norm != 0:
            first = first or _where(name, a, b, off)
        if not norm <= allowed:  # NaN is not
            first_wrong = first_wrong or _where(name, a, b, off)
    result: Result = "DIFFERS" if first_wrong else "rounding" if first else "same bits"
    return Comparison(what, against, result, difference, relative, allowed, first_wrong or first)


def check(what: str, against: str, problem: str) -> Comparison:
    """A comparison of facts: ``problem`` says what differs, or is empty."""
    return Comparison(what, against, "DIFFERS" if problem else "same bits", note=problem)


def not_run(what: str, against: str, why: str) -> Comparison:
    """A comparison that could not be made here."""
    return Comparison(what, against, "not run", note=why)


def print_comparisons(title: str, comparisons: Sequence[Comparison]) -> bool:
    """The table, then what differs first. Returns whether everything passes."""
    table = console.table(title, "what", "compared with", "max diff", "relative", "result",
                          numbers=("max diff", "relative"))  # fmt: skip
    for one in comparisons:
        table.add_row(
            Text(one.what),
            Text(one.against),
            "" if one.difference is None else f"{one.difference:.2g}",
            "" if one.relative is None else f"{one.relative:.2g}",
            Text(one.result, style=_STYLES[one.result]),
        )
    console.out.print(table)
    for one in comparisons:
        if one.result == "not run":
            console.out.print(Text(f"not run: {one.what}: {one.note}", style="dim"))
    failed = [one for one in comparisons if one.is_failed]
    if failed:
        allowed = (
            f" ({failed[0].relative:.2g} of the norm, {failed[0].allowed:.2g} allowed)" if failed[0].relative else ""
        )
        console.out.print(
            Text(f"The first that differs: {failed[0].what}: {failed[0].note}{allowed}", style="bold red")
        )
        return False
    run = [one for one in comparisons if one.result != "not run"]
    exact = sum(one.result == "same bits" for one in run)
    console.out.print(Text(f"All {len(run)} comparisons pass, {exact} of them bit for bit", style="green"))
    return True


def _where(name: str, ours: torch.Tensor, theirs: torch.Tensor, off: torch.Tensor) -> str:
    """The first element that differs, by name and place."""
    flat = int((off.flatten() != 0).nonzero()[0])
    place, rest = [], flat
    for side in reversed(off.shape):
        place.append(rest % side)
        rest //= side
    at = f" at {list(reversed(place))}" if place else ""
    return f"{name}{at} is {float(ours.flatten()[flat]):.6g} instead of {float(theirs.flatten()[flat]):.6g}"

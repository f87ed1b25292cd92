"""How far apart are two computations of the same thing, and where do they first differ? Both selftests use this."""

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
    """What we compute."""
    against: str
    """The reference."""
    result: Result
    difference: float | None = None
    """Largest absolute difference of two elements."""
    relative: float | None = None
    """Norm of the difference divided by the norm of the reference; the largest of all tensors compared."""
    allowed: float = 0.0
    """The largest ``relative`` that passes; 0 allows only the same bits."""
    note: str = ""
    """The first thing that differs, or why the comparison was not run."""

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
        pairs: name, our tensor and the reference, on any devices. Values are compared, not dtypes.
        allowed: the largest relative norm of a difference that counts as rounding. 0 allows only the same bits.
    """
    difference = relative = 0.0
    first, first_wrong = "", ""
    for name, ours, theirs in pairs:
        a, b = ours.detach().double().cpu(), theirs.detach().double().cpu()
        if a.shape != b.shape:
            note = f"{name} is {list(a.shape)} instead of {list(b.shape)}"
            return Comparison(what, against, "DIFFERS", allowed=allowed, note=note)
        off = (a - b).abs()
        off = off.where(off == off, float("inf"))  # a NaN on either side is a difference, also if both have it
        norm = float(off.norm() / b.norm()) if b.any() else float(off.norm())
        difference, relative = max(difference, float(off.max())), max(relative, norm)
        if norm != 0:
            first = first or _where(name, a, b, off)
        if not norm <= allowed:  # also if the norm is NaN
            first_wrong = first_wrong or _where(name, a, b, off)
    result: Result = "DIFFERS" if first_wrong else "rounding" if first else "same bits"
    return Comparison(what, against, result, difference, relative, allowed, first_wrong or first)


def check(what: str, against: str, problem: str) -> Comparison:
    """A comparison of facts instead of tensors. ``problem`` says what differs, or is empty."""
    return Comparison(what, against, "DIFFERS" if problem else "same bits", note=problem)


def not_run(what: str, against: str, reason: str) -> Comparison:
    """A comparison that cannot be run here."""
    return Comparison(what, against, "not run", note=reason)


def print_comparisons(title: str, comparisons: Sequence[Comparison]) -> bool:
    """Print the table, then the first difference. Returns whether everything passes."""
    table = console.table(title, "what", "compared with", "max diff", "relative", "result",
                          numbers=("max diff", "relative"))  # fmt: skip
    for row in comparisons:
        table.add_row(
            Text(row.what),
            Text(row.against),
            "" if row.difference is None else f"{row.difference:.2g}",
            "" if row.relative is None else f"{row.relative:.2g}",
            Text(row.result, style=_STYLES[row.result]),
        )
    console.out.print(table)
    for row in comparisons:
        if row.result == "not run":
            console.out.print(Text(f"not run: {row.what}: {row.note}", style="dim"))
    first_failed = next((row for row in comparisons if row.is_failed), None)
    if first_failed:
        norms = (
            f" ({first_failed.relative:.2g} of the norm, {first_failed.allowed:.2g} allowed)"
            if first_failed.relative
            else ""
        )
        console.out.print(
            Text(f"The first difference: {first_failed.what}: {first_failed.note}{norms}", style="bold red")
        )
        return False
    results = [row.result for row in comparisons if row.result != "not run"]
    num_exact = results.count("same bits")
    console.out.print(Text(f"All {len(results)} comparisons pass, {num_exact} of them bit for bit", style="green"))
    return True


def _where(name: str, ours: torch.Tensor, theirs: torch.Tensor, off: torch.Tensor) -> str:
    """The first element that differs: its tensor, its indices and both values."""
    flat = int((off.flatten() != 0).nonzero()[0])
    indices, rest = [], flat
    for side in reversed(off.shape):
        indices.append(rest % side)
        rest //= side
    at = f" at {list(reversed(indices))}" if indices else ""
    return f"{name}{at} is {float(ours.flatten()[flat]):.6g} instead of {float(theirs.flatten()[flat]):.6g}"

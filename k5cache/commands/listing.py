"""How does a command print a list or a long text for a person? A count and the first few; one line."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

from rich.text import Text

from k5cache.shared import console
from k5cache.shared.foreign import shown
from k5cache.shared.units import count_of
from k5cache.sources.items import Skipped
from k5cache.store.skipped import NAME, is_ours

MOST = 5  # entries of a list that are printed; the count is always given
_REASONS = 8  # for which something is skipped
_EXAMPLES = 3  # files that are named for each reason after the first


def print_some(title: str, entries: Sequence[str], style: str, most: int = MOST, one: str = "") -> None:
    """Print the number of ``entries`` and the first few of them, or nothing if there are none.

    Args:
        title: what follows the number.
        one: what follows a 1, if that is not the same.
    """
    if entries:
        console.out.print(Text(count_of(len(entries), one or title, title), style=style))
        for entry in entries[:most]:
            console.out.print(Text(f"  {shown(entry)}"))
        if len(entries) > most:
            console.out.print(Text(f"  and {len(entries) - most} more"))


def print_skipped(skipped: Sequence[Skipped], root: Path | None = None) -> None:
    """Print what cannot be used by its reasons: of each the first entry, and how many more there are and which.

    Args:
        root: the cache that may have a file of all of them.
    """
    groups: dict[str, list[Skipped]] = {}
    for skip in skipped:
        groups.setdefault(_kind(skip), []).append(skip)
    if groups:
        console.out.print(Text(f"{len(skipped)} skipped", style="yellow"))
    by_size = sorted(groups.values(), key=len, reverse=True)
    for first, *others in by_size[:_REASONS]:
        console.out.print(Text(f"  {shown(first.path)}: {shown(first.reason)}"))
        if others:
            names = ", ".join(shown(skip.path) for skip in others[:_EXAMPLES]) + (", ..." if others[_EXAMPLES:] else "")
            console.out.print(Text(f"    and {len(others)} more for this reason: {names}"))
    if rest := sum(map(len, by_size[_REASONS:])):
        console.out.print(Text(f"  and {rest} more"))
    if groups and root and is_ours(root):
        console.out.print(Text(f"  all of them: {shown(str(root / NAME))}"))


def _kind(skip: Skipped) -> str:
    """A reason without what differs from file to file: the file's own name, that of its partner, and numbers."""
    whole, stem = skip.path.rpartition(".")[0], PurePosixPath(skip.path).stem
    patterns = [rf"(?<!\w){re.escape(name)}(?=[.][\w*])" for name in (whole, stem) if name]
    if base := stem.rpartition("_")[0]:  # of cat_end.png: its source is cat_start.png
        patterns.append(rf"(?<!\w){re.escape(base)}(?=_\w+[.][\w*])")
    reason = skip.reason
    for pattern in patterns:
        reason = re.sub(pattern, "*", reason)
    return re.sub(r"\d+", "0", reason)


def shorten(text: str, width: int = 72) -> str:
    """``text`` as one line of at most ``width`` characters."""
    line = shown(" ".join(text.split()))
    return line if len(line) <= width else f"{line[: width - 3]}..."

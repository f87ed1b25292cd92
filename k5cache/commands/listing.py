"""How does a command print a list or a long text for a person? A count and the first few; one line."""

from __future__ import annotations

from collections.abc import Sequence

from rich.text import Text

from k5cache.shared import console

MOST = 5  # entries of a list that are printed; the count is always given


def print_some(title: str, entries: Sequence[str], style: str, most: int = MOST) -> None:
    """Print the number of ``entries`` and the first few of them, or nothing if there are none."""
    if entries:
        console.out.print(Text(f"{len(entries)} {title}", style=style))
        for entry in entries[:most]:
            console.out.print(Text(f"  {entry}"))
        if len(entries) > most:
            console.out.print(Text(f"  and {len(entries) - most} more"))


def shorten(text: str, width: int = 72) -> str:
    """``text`` as one line of at most ``width`` characters."""
    line = " ".join(text.split())
    return line if len(line) <= width else f"{line[: width - 3]}..."

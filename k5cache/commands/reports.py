"""What the commands that look after a cache say, as tables for a person."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.text import Text

from k5cache.shared import console

if TYPE_CHECKING:
    from k5cache.commands.gc import Collected
    from k5cache.commands.merge import Merged
    from k5cache.commands.prompts import Added
    from k5cache.commands.reencode import Reencoded
    from k5cache.commands.verify import Verified
    from k5cache.encode.update import Preview

SHOWN = 5  # examples of a list; the count is always given


def some(title: str, entries: Sequence[str], style: str, most: int = SHOWN) -> None:
    """A count and the first few; nothing where there are none."""
    if entries:
        console.out.print(Text(f"{len(entries)} {title}", style=style))
        for entry in entries[:most]:
            console.out.print(Text(f"  {entry}"))
        if len(entries) > most:
            console.out.print(Text(f"  and {len(entries) - most} more"))


def short(text: str, width: int = 72) -> str:
    """One line of at most ``width`` characters."""
    line = " ".join(text.split())
    return line if len(line) <= width else f"{line[: width - 3]}..."


def print_verified(found: Verified, again: Reencoded | None) -> None:
    """Every problem, and what was looked at."""
    table = console.table(f"Verified {found.root}", "what", "value", numbers=("value",))
    table.add_row("shards", str(found.num_shards))
    table.add_row("rows", str(found.num_rows))
    table.add_row("read", console.human_bytes(found.num_bytes))
    table.add_row("time", console.human_seconds(found.seconds))
    table.add_row("problems", str(len(found.problems)))
    console.out.print(table)
    if again:
        print_reencoded(again)
    some("problems", found.problems, "bold red", most=len(found.problems))
    some("files that nothing names (k5cache gc deletes them)", found.unnamed, "dim")


def print_reencoded(again: Reencoded) -> None:
    """How the rows that were encoded again compare with the stored ones."""
    columns = ("kind", "encoded again", "the same bits", "largest error", "wrong")
    table = console.table("", *columns, numbers=columns[1:])
    for kind in ("text", "latents"):
        rows = [row for row in again.compared if row.kind == kind]
        if rows:
            exact, wrong = sum(row.is_exact for row in rows), sum(row.is_wrong for row in rows)
            worst = max(row.error for row in rows)
            table.add_row(kind, str(len(rows)), str(exact), f"{worst:.2g}", str(wrong))
    console.out.print(table)
    some("not compared", again.not_compared, "yellow")


def print_collected(found: Collected, root: Path, is_dry_run: bool) -> None:
    """What a garbage collection freed, or would."""
    would = "would be" if is_dry_run else "were"
    title = f"Garbage in {root}" if is_dry_run else f"Collected {root}"
    table = console.table(title, "what", "value", numbers=("value",))
    table.add_row("rows that nothing names", str(found.num_rows))
    table.add_row("shards dropped", str(len(found.dropped)))
    table.add_row("shards rewritten without them", str(len(found.rewritten)))
    table.add_row("files that no manifest names", str(len(found.unnamed)))
    console.out.print(table)
    console.out.print(f"{console.human_bytes(found.num_bytes)} {would} freed", markup=False)


def print_merged(made: Merged, root: Path) -> None:
    """What a merge made."""
    table = console.table(f"Merged into {root}", "what", "value", numbers=("value",))
    table.add_row("items", str(made.num_items))
    table.add_row("shards", str(made.num_shards))
    table.add_row("bytes", console.human_bytes(made.num_bytes))
    table.add_row("shards are", "links" if made.is_linked else "copies")
    console.out.print(table)
    some("items were in several caches, and are in it once", made.duplicates, "yellow")


def print_added(added: Added, root: Path) -> None:
    """What became of the prompts."""
    some(f"prompts encoded into {root}", [short(prompt) or "(the empty prompt)" for prompt in added.encoded], "green")
    some("were there already", [short(prompt) or "(the empty prompt)" for prompt in added.already_there], "dim")
    cut = [f"{short(prompt)} (last {count} characters)" for prompt, count in added.truncated]
    some("truncated prompts", cut, "yellow")


def print_preview(would: Preview, root: Path) -> None:
    """What an encode would do."""
    some("differences of the recipe (encode would need --update)", would.differences, "yellow", most=99)
    table = console.table(f"Encoding into {root} would", "what", "images", "captions", numbers=("images", "captions"))
    table.add_row("encode", str(would.num_latents), str(would.num_texts))
    table.add_row("reuse", str(would.reused_latents), str(would.reused_texts))
    console.out.print(table)
    print_changes(would.added, would.changed, would.renamed, would.removed, would.reused_latents)
    some("skipped", [f"{s.path}: {s.reason}" for s in would.skipped], "yellow")
    some("upscaled, smaller than their bucket", would.upscaled, "yellow")


def print_changes(
    added: Sequence[str],
    changed: Sequence[str],
    renamed: Sequence[tuple[str, str]],
    removed: Sequence[str],
    reused: int,
) -> None:
    """What is not as it was; a first encode, where everything is new, needs no list."""
    some("added", added if reused or changed or renamed or removed else (), "green")
    some("changed", changed, "green")
    some("renamed", [f"{before} -> {now}" for before, now in renamed], "green")
    some("removed", removed, "yellow")

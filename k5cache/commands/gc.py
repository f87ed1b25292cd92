"""``k5cache gc``: delete what a cache does not need any more."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from k5cache.commands.arguments import CachePath, Json, Wait
from k5cache.commands.listing import print_some
from k5cache.shared import console

if TYPE_CHECKING:
    from k5cache.upkeep.gc import Collected

MOST_FILES = 100  # of each kind that are named; --json names all


def gc(
    cache: CachePath,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show what would be deleted, and delete nothing.")] = False,
    wait: Wait = 0,
    as_json: Json = False,
) -> None:
    """Delete rows that no item, prompt or pair to draw needs any more, and files that a crash left.

    Do not run it while a run trains on this cache: that run may need rows of an index that has been replaced.
    """
    from k5cache.upkeep.gc import collect

    with console.working("looking for rows that nothing names" if dry_run else "deleting what nothing names"):
        collected = collect(cache, dry_run, wait)
    if as_json:
        console.print_json(collected)
    else:
        print_collected(collected, cache, dry_run)


def print_collected(collected: Collected, root: Path, is_dry_run: bool) -> None:
    """What a garbage collection freed, or would free."""
    would = "would be" if is_dry_run else "were"
    title = f"Garbage in {root}" if is_dry_run else f"Collected {root}"
    table = console.table(title, "what", "value", numbers=("value",))
    table.add_row("rows that nothing names", str(collected.num_rows))
    table.add_row("shards dropped", str(len(collected.dropped)))
    table.add_row("shards rewritten without them", str(len(collected.rewritten)))
    table.add_row("files that no manifest names", str(len(collected.unnamed)))
    console.out.print(table)
    print_some(f"{would} deleted", collected.dropped + collected.unnamed, "dim", most=MOST_FILES)
    print_some(f"{would} rewritten", collected.rewritten, "dim", most=MOST_FILES)
    print_some(
        "files that are not of this cache (they stay)",
        collected.foreign,
        "yellow",
        most=MOST_FILES,
        one="file that is not of this cache (it stays)",
    )
    console.out.print(f"{console.human_bytes(collected.num_bytes)} {would} freed", markup=False)

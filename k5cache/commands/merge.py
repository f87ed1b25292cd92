"""``k5cache merge``: several caches as one."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from k5cache.commands.arguments import CachePaths, Json, NewCache, Wait, suggest_training
from k5cache.commands.listing import print_some
from k5cache.shared import console

if TYPE_CHECKING:
    from k5cache.upkeep.merge import Merged


def merge(
    caches: CachePaths,
    out: NewCache,
    incomplete: Annotated[
        bool,
        typer.Option(
            "--incomplete",
            help="Merge although parts are missing, or were encoded before others changed. More can be merged later.",
        ),
    ] = False,
    wait: Wait = 0,
    as_json: Json = False,
) -> None:
    """Merge caches into one, for example the parts of `k5cache encode --part` from several GPUs or machines."""
    from k5cache.store.manifest import read_manifest
    from k5cache.upkeep.merge import merge_caches

    with console.working(f"merging {len(caches)} caches"):
        merged = merge_caches(caches, out, incomplete, wait)
    if as_json:
        console.print_json(merged)
        return
    print_merged(merged, out)
    if not merged.has_one_state:
        up_to_date = console.command("k5cache", "encode", "SOURCE", "-o", out)
        console.out.print(
            "The parts saw the same images, but other captions, masks or times of the files. This encodes what is "
            f"new, if anything: {up_to_date}",
            markup=False,
        )
    suggest_training(out, read_manifest(out))


def print_merged(merged: Merged, root: Path) -> None:
    """What the merged cache holds."""
    table = console.table(f"Merged into {root}", "what", "value", numbers=("value",))
    table.add_row("items", str(merged.num_items))
    table.add_row("shards", str(merged.num_shards))
    table.add_row("bytes", console.human_bytes(merged.num_bytes))
    table.add_row("shards are", "links" if merged.is_linked else "copies")
    console.out.print(table)
    print_some(
        "items were in several caches, and are in it once",
        merged.duplicates,
        "yellow",
        one="item was in several caches, and is in it once",
    )

"""``k5cache verify``: is a cache as it was written, and do the encoders still give what it holds?"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from k5cache.commands.arguments import CachePath, Device, Json, Model, Sources, model_of_cache
from k5cache.commands.listing import print_some
from k5cache.shared import console

if TYPE_CHECKING:
    from k5cache.exact.reencode import Reencoded
    from k5cache.upkeep.verify import Verified


def verify(
    cache: CachePath,
    reencode: Annotated[int, typer.Option(help="Encode this many random rows again and compare.")] = 0,
    source: Annotated[
        Path | None, typer.Option(help="Where the images are; without it --reencode compares captions only.")
    ] = None,
    sources: Sources = None,
    model: Model = None,
    device: Device = "auto",
    seed: Annotated[int, typer.Option(help="Decides which rows --reencode draws.")] = 0,
    as_json: Json = False,
) -> None:
    """Check every byte and number of a cache. Lists every problem and exits with code 1 if there is one."""
    from dataclasses import replace

    from k5cache.upkeep.verify import verify_cache

    reencoded = None
    with console.progress() as bars:
        task = bars.add_task("verifying", total=None, unit="byte", note="")
        verified = verify_cache(cache, lambda num_bytes: bars.advance(task, num_bytes))
        bars.remove_task(task)
        if reencode and not verified.problems:
            from k5cache.exact.reencode import reencode as reencode_rows
            from k5cache.store.reader import open_cache

            opened = open_cache(cache)
            model_config = model_of_cache(cache, opened.manifest, model)
            reencoded = reencode_rows(opened, reencode, source, model_config, device, bars, seed, sources)
            verified = replace(verified, problems=reencoded.problems)
    if as_json:
        console.print_json({"verified": verified, "reencoded": reencoded})
    else:
        print_verified(verified, reencoded)
    if verified.problems:
        raise typer.Exit(1)


def print_verified(verified: Verified, reencoded: Reencoded | None) -> None:
    """What was looked at, and every problem."""
    table = console.table(f"Verified {verified.root}", "what", "value", numbers=("value",))
    table.add_row("shards", str(verified.num_shards))
    table.add_row("rows", str(verified.num_rows))
    table.add_row("read", console.human_bytes(verified.num_bytes))
    table.add_row("time", console.human_seconds(verified.seconds))
    table.add_row("problems", str(len(verified.problems)))
    console.out.print(table)
    if reencoded:
        print_reencoded(reencoded)
    print_some("problems", verified.problems, "bold red", most=len(verified.problems), one="problem")
    print_some(
        "files that nothing names (k5cache gc deletes them)",
        verified.unnamed,
        "dim",
        one="file that nothing names (k5cache gc deletes it)",
    )
    print_some(
        "files that are not of this cache (they stay)",
        verified.foreign,
        "yellow",
        one="file that is not of this cache (it stays)",
    )


def print_reencoded(reencoded: Reencoded) -> None:
    """How the rows that were encoded again compare with the stored ones."""
    columns = ("kind", "encoded again", "the same bits", "largest error", "wrong")
    table = console.table("", *columns, numbers=columns[1:])
    for kind in ("text", "latents"):
        rows = [row for row in reencoded.compared if row.kind == kind]
        if rows:
            num_exact, num_wrong = sum(row.is_exact for row in rows), sum(row.is_wrong for row in rows)
            worst = max(row.error for row in rows)
            table.add_row(kind, str(len(rows)), str(num_exact), f"{worst:.2g}", str(num_wrong))
    console.out.print(table)
    print_some("not compared", reencoded.not_compared, "yellow")

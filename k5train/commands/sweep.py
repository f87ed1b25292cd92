"""``k5train sweep``: train many LoRAs over one cache and compare them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table
from rich.text import Text

from k5cache.shared import console
from k5cache.shared.errors import RunError
from k5train.commands.arguments import Model, Recipe, Set, find_cache, made_with

if TYPE_CHECKING:
    from k5train.training.sweep import Row


def sweep(
    cache: Annotated[Path | None, typer.Argument(help="A cache. Default: the only one under cache/.")] = None,
    grid: Annotated[
        list[str] | None, typer.Option("--grid", help="train.option=a,b,c. All combinations of several are run.")
    ] = None,
    listed: Annotated[
        Path | None, typer.Option("--list", help="A TOML file of [[run]] tables instead: name and options.")
    ] = None,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Default: sweeps/<name of CACHE>.")] = None,
    recipe: Recipe = None,
    model: Model = None,
    options: Set = None,
) -> None:
    """Train many LoRAs over one cache with the base loaded once, and compare them.

    The same command again skips what is finished and goes on with what was stopped.
    """
    from k5cache.shared.recipe import read
    from k5train.training import sweep as sweeping

    document = read(recipe, options or [])
    if model is not None:
        document.setdefault("model", {})["path"] = model
    model_config, runs = sweeping.settings(document, grid or [], listed, recipe)
    if cache is None and not runs[0].config.data:
        cache = find_cache(Path("cache"))
    if not document.get("model"):
        model_config = made_with(cache or Path(runs[0].config.data[0].cache))
    name = cache.resolve().name if cache else Path(runs[0].config.data[0].cache).name
    target = out or Path("sweeps") / name
    rows, pictures = sweeping.sweep(cache, target, model_config, runs)
    print_sweep(rows)
    if pictures:
        console.out.print(f"pictures {pictures}", markup=False)
    ended_well = [row for row in rows if not row.problem]
    if not ended_well:
        raise RunError("No run came to its end", "Their problems are above; often a lower train.optim.lr helps")
    best = min(ended_well, key=lambda r: r.best_loss or r.last_loss or float("inf"))
    console.next_step("Next, draw more with the lowest loss", console.command("k5train", "sample", target / best.label))


def print_sweep(rows: list[Row]) -> None:
    """One line a run."""
    table = Table(box=None, pad_edge=False)
    for column in ("run", "steps", "loss", "held out", "time", "started in", "problem"):
        table.add_column(column, overflow="fold")
    for row in rows:
        losses = [f"{loss:.4f}" if loss is not None else "" for loss in (row.last_loss, row.best_loss)]
        times = [console.human_seconds(s) if s is not None else "" for s in (row.seconds, row.seconds_to_start)]
        cells = [row.label, str(row.steps), *losses, *times, row.problem or ""]
        table.add_row(*(Text(cell) for cell in cells))
    console.out.print(table)

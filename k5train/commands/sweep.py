"""``k5train sweep``: train many LoRAs on one cache and compare them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table
from rich.text import Text

from k5cache.shared import console, interrupt
from k5cache.shared.errors import RunError
from k5train.commands.arguments import Model, Recipe, Set, find_cache, model_of_cache, read_document

if TYPE_CHECKING:
    from k5train.training.sweep import Outcome


def sweep(
    cache: Annotated[Path | None, typer.Argument(help="A cache. Default: the only one under cache/.")] = None,
    grid: Annotated[
        list[str] | None, typer.Option("--grid", help="train.option=a,b,c. Several give all combinations.")
    ] = None,
    listed: Annotated[
        Path | None,
        typer.Option("--list", help="Instead of --grid: a TOML file of [[run]] tables, each with a name and options."),
    ] = None,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Default: sweeps/<name of CACHE>.")] = None,
    recipe: Recipe = None,
    model: Model = None,
    options: Set = None,
) -> None:
    """Train many LoRAs on one cache with the base loaded once, and compare them.

    The same command again skips the finished runs and continues one that was stopped.
    """
    with interrupt.saying(f"Stopped before training began. To start again: {console.this_command()}"):
        from k5cache.options import CacheConfig
        from k5train.training import sweep as sweeping
        from k5train.training.best_run import best_run
        from k5train.training.sweep_runs import sweep_runs

    document = read_document(recipe, model, options)
    model_config, runs = sweep_runs(document, grid or [], listed, {"cache": CacheConfig})
    if cache is None and not runs[0].config.data:
        cache = find_cache(Path("cache"))
    if not document.get("model"):
        model_config = model_of_cache(cache or Path(runs[0].config.data[0].cache))
    name = cache.resolve().name if cache else Path(runs[0].config.data[0].cache).name
    target = out or Path("sweeps") / name
    with _going_on_with_the_same_command():
        outcomes, pictures = sweeping.sweep(cache, target, model_config, runs)
    print_sweep(outcomes)
    if pictures:
        console.out.print(f"pictures {pictures}", markup=False)
    if all(outcome.problem for outcome in outcomes):
        raise RunError("No run was finished", "Their problems are above; often a lower train.optim.lr helps")
    best = best_run(runs, outcomes)
    if best.label is None:
        console.warn(best.reason)
        return
    console.out.print(f"best     {best.label}, by its {best.by}", markup=False)
    if pictures:
        console.next_step("Next, draw more with the best", console.command("k5train", "sample", target / best.label))


@contextmanager
def _going_on_with_the_same_command() -> Iterator[None]:
    """A run of a sweep that is stopped advises to resume it alone. Say how the sweep goes on."""
    try:
        yield
    except KeyboardInterrupt as stopped:
        saved = str(stopped).partition(". Go on with")[0] or "Stopped"
        again = f"{saved}. The finished runs are kept. To go on, run the same command: {console.this_command()}"
        raise KeyboardInterrupt(again) from stopped


def print_sweep(outcomes: list[Outcome]) -> None:
    """One line for each run."""
    table = Table(box=None, pad_edge=False)
    for column in ("run", "steps", "loss", "held out", "time", "started in", "problem"):
        table.add_column(column, overflow="fold")
    for outcome in outcomes:
        losses = [f"{loss:.4f}" if loss is not None else "" for loss in (outcome.last_loss, outcome.best_loss)]
        seconds = (outcome.seconds, outcome.seconds_to_start)
        times = [console.human_seconds(s) if s is not None else "" for s in seconds]
        cells = [outcome.label, str(outcome.steps), *losses, *times, outcome.problem or ""]
        table.add_row(*(Text(cell) for cell in cells))
    console.out.print(table)

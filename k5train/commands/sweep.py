"""``k5train sweep``: train many LoRAs on one cache and compare them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from operator import attrgetter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table
from rich.text import Text

from k5cache.shared import console, interrupt
from k5cache.shared.errors import RunError
from k5cache.shared.foreign import shown
from k5train.commands.arguments import (
    Model,
    Recipe,
    Set,
    Vram,
    find_cache,
    model_of_cache,
    parse_document,
    read_document,
    with_vram,
)

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from k5train.options.train import TrainConfig
    from k5train.runs.compared import Comparison
    from k5train.runs.outcomes import Outcome
    from k5train.training.sweep import Swept


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
    vram: Vram = None,
    gpus: Annotated[int, typer.Option("--gpus", help="Train this many runs at a time, each on a GPU of its own.")] = 1,
    options: Set = None,
) -> None:
    """Train many LoRAs on one cache with the base loaded once, and compare them.

    The same command again skips the finished runs and continues those that were stopped, also with another --gpus.
    Another grid in the same folder adds its runs, and all are compared.
    """
    with interrupt.saying(f"Stopped before training began. To start again: {console.this_command()}"):
        from k5cache.options import CacheConfig
        from k5cache.shared.gpus import choose_slots
        from k5train.training import sweep as sweeping
        from k5train.training.start import resolved
        from k5train.training.sweep_runs import sweep_runs

    slots = choose_slots(gpus) if gpus != 1 else ()
    document = read_document(recipe, model, with_vram(options, vram))
    model_config, runs = sweep_runs(document, grid or [], listed, {"cache": CacheConfig})
    for line in overruled(options or [], resolved(parse_document(document)[1]), [run.config for run in runs]):
        console.warn(line)
    if cache is None and not runs[0].config.data:
        cache = find_cache(Path("cache"))
    if not document.get("model"):
        model_config = model_of_cache(cache or Path(runs[0].config.data[0].cache))
    name = cache.resolve().name if cache else Path(runs[0].config.data[0].cache).name
    target = out or Path("sweeps") / name
    with _going_on_with_the_same_command():
        swept = sweeping.sweep(cache, target, model_config, runs, slots)
    print_sweep(swept)
    labels = {sweep_run.label for sweep_run in runs}
    if all(outcome.problem for outcome in swept.outcomes if outcome.label in labels):
        raise RunError("No run was finished", what_helps(swept.advice))


def what_helps(advice: Mapping[str, str]) -> str:
    """What to do about a sweep of which every run failed: what each run's own error says.

    Args:
        advice: of each run that failed in this command.
    """
    fixes = list(dict.fromkeys(advice.values()))
    if not fixes:
        return "Their problems are above"
    if len(fixes) == 1:
        return fixes[0]
    return f"For {next(iter(advice))}: {fixes[0]}. What helps the others stands with their problems above"


def overruled(options: Sequence[str], asked: TrainConfig, configs: Sequence[TrainConfig]) -> list[str]:
    """Which ``--set train.x=y`` no run has, because the grid or the list sets the option too."""
    lines = []
    for option in options:
        name = option.partition("=")[0].strip()
        value_in = attrgetter(name.removeprefix("train."))
        if name.startswith("train.") and all(value_in(config) != value_in(asked) for config in configs):
            lines.append(f"--set {option} does nothing: the grid or the list sets {name} for every run")
    return lines


@contextmanager
def _going_on_with_the_same_command() -> Iterator[None]:
    """A run of a sweep that is stopped advises to resume it alone. Say how the sweep goes on."""
    try:
        yield
    except KeyboardInterrupt as stopped:
        saved = str(stopped).partition(". Go on with")[0] or "Stopped"
        again = f"{saved}. The finished runs are kept. To go on, run the same command: {console.this_command()}"
        raise KeyboardInterrupt(again) from stopped


def print_sweep(swept: Swept) -> None:
    """A line for each run, then the best of them, its file, and how to draw it."""
    console.out.print(_table(swept.outcomes))
    for outcome in swept.outcomes:
        for said in [outcome.problem] if outcome.problem else outcome.remarks:
            console.out.print(Text(shown(f"{outcome.label}: {said}")))
    if swept.comparison:
        _print_best(swept.comparison, swept.grids)


def _table(outcomes: Sequence[Outcome]) -> Table:
    """A column only for what at least one run has."""
    columns: dict[str, list[str]] = {
        "steps": [str(outcome.steps) for outcome in outcomes],
        "base": [_loss(outcome.base_loss) for outcome in outcomes],
        "final": [_loss(outcome.final_loss) for outcome in outcomes],
        "best": [_loss(outcome.best_loss) for outcome in outcomes],
        "at": ["" if outcome.best_step is None else str(outcome.best_step) for outcome in outcomes],
        "EMA": [_loss(outcome.ema_loss) for outcome in outcomes],
        "probe base": ["" if outcome.base_loss else _loss(outcome.base_probe_loss) for outcome in outcomes],
        "probe": [_loss(outcome.probe_loss) for outcome in outcomes],
        "time": ["" if outcome.seconds is None else console.human_seconds(outcome.seconds) for outcome in outcomes],
    }
    kept = {name: cells for name, cells in columns.items() if any(cells)}
    table = console.table("Held-out loss, and the loss on images that were trained on (probe)", "run", *kept,
                          numbers=tuple(kept))  # fmt: skip
    for column in table.columns[1:]:
        column.no_wrap = True  # a narrow terminal folds the names
    for outcome, cells in zip(outcomes, zip(*kept.values(), strict=True), strict=True):
        table.add_row(shown(outcome.label), *cells)
    return table


def _loss(loss: float | None) -> str:
    return "" if loss is None else f"{loss:.4f}"


def _print_best(comparison: Comparison, grids: Sequence[Path]) -> None:
    """The best run and its file; or why no run is called the best."""
    from k5train.runs.compared import averages, which

    for grid in grids:
        console.out.print(f"pictures {grid}, after the last step of each run", markup=False)
    if comparison.best is None:
        console.warn(comparison.reason)
        folder = comparison.runs[0].root.parent
        console.next_step("Next, see their settings and curves", console.command("k5train", "compare", folder))
        return
    best = comparison[comparison.best]
    assert best.best is not None
    chosen, file = which(best), best.best.file or "the LoRA of that step was not kept"
    loss = f"held-out loss {_loss(best.best.loss)}"
    console.out.print(f"best     {best.name}, step {best.best.step}, {loss}, {file}", markup=False)
    for line in averages(comparison, best.best):
        console.out.print(line, markup=False)
    if grids and best.best.file:
        is_final = chosen == "final"
        draw = console.command("k5train", "sample", best.root, which=None if is_final else chosen)
        console.next_step("Next, draw more with the best" if is_final else "Next, draw the best itself", draw)

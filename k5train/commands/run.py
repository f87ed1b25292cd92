"""``k5train run`` and ``k5train resume``: train a LoRA, or go on with one."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from k5cache.shared import console
from k5train.commands.arguments import Model, Recipe, RunPath, Set, find_cache, made_with, read_recipe

if TYPE_CHECKING:
    from k5train.training.loop import Result


def run(
    cache: Annotated[
        list[Path] | None, typer.Argument(help="A cache, or several. Default: the recipe's, or the only one in cache/.")
    ] = None,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="The run. Default: runs/<name of CACHE>.")] = None,
    recipe: Recipe = None,
    model: Model = None,
    is_new: Annotated[bool, typer.Option("--new", help="Never go on with a run that was stopped.")] = False,
    options: Set = None,
) -> None:
    """Train a LoRA on a cache. Loads the transformer only, never a text encoder.

    The same command again, after a crash or Ctrl-C, goes on where the run was stopped.
    """
    model_config, config = read_recipe(recipe, model, options)
    from k5train.training.start import named, start

    caches = cache or ([] if config.data else [find_cache(Path("cache"))])
    chosen = model_config or made_with(caches[0] if caches else Path(config.data[0].cache))
    print_result(start(*named(caches, config), out, chosen, is_new))


def resume(
    run: RunPath,
    cache: Annotated[Path | None, typer.Option("--cache", help="Where the cache is now, if it moved.")] = None,
    options: Set = None,
) -> None:
    """Go on with a run that was stopped, exactly as if it had not been; or train a finished one for more steps."""
    from k5train.training import start

    print_result(start.resume(run, options or [], cache))


def print_result(result: Result) -> None:
    """What ends a run."""
    reasons = {"max_hours": ", the time it was given", "patience": ", as the held-out loss no longer fell"}
    console.out.print(
        f"Trained {result.steps} steps in {console.human_seconds(result.seconds)}{reasons.get(result.ended_by, '')}, "
        f"loss {result.first_loss:.4f} -> {result.last_loss:.4f} (means of the first and last tenth)",
        markup=False,
    )
    console.out.print(f"LoRA     {result.lora}", markup=False)
    console.out.print(f"loads by {result.loads_by}: loaded back by diffusers and compared", markup=False)
    if result.best_step == 0:
        console.warn(f"The held-out loss was never below the base's, {result.best_loss:.4f}")
    elif result.best_step is not None:
        best = result.lora.with_name(f"{result.lora.stem}-best.safetensors")
        console.out.print(
            f"best     {best}, step {result.best_step}, held-out loss {result.best_loss:.4f}", markup=False
        )
    if result.grid:
        console.out.print(f"pictures {result.grid}", markup=False)
    console.next_step("Next, draw more", console.command("k5train", "sample", result.lora.parent))

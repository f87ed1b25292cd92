"""``k5train run`` and ``k5train resume``: train a LoRA, or continue a run."""

from __future__ import annotations

from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from k5cache.shared import console, interrupt
from k5cache.shared.template import PIPELINES
from k5train.commands.arguments import Model, Recipe, RunPath, Set, find_cache, model_of_cache, read_recipe

if TYPE_CHECKING:
    from k5train.training.train import Result


def run(
    cache: Annotated[
        list[Path] | None, typer.Argument(help="A cache, or several. Default: the recipe's, or the only one in cache/.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="The run's folder. Default: runs/<name of CACHE>.")
    ] = None,
    recipe: Recipe = None,
    model: Model = None,
    is_new: Annotated[
        bool, typer.Option("--new", help="Start a new run, even if this command was stopped before.")
    ] = False,
    options: Set = None,
) -> None:
    """Train a LoRA on a cache. Loads the transformer only, never a text encoder.

    After a crash or Ctrl-C, the same command continues where the run stopped.
    """
    model_config, config = read_recipe(recipe, model, options)
    caches = cache or ([] if config.data else [find_cache(Path("cache"))])
    with _before_the_first_step():
        from k5train.training.start import named, start  # torch is imported here, which takes seconds

        chosen = model_config or model_of_cache(caches[0] if caches else Path(config.data[0].cache))
        result = start(*named(caches, config), out, chosen, is_new)
    print_result(result)


def resume(
    run: RunPath,
    cache: Annotated[Path | None, typer.Option("--cache", help="Where the cache is now, if it has moved.")] = None,
    step: Annotated[
        int | None, typer.Option(help="Go on from the state of this step. Default: the newest; the last two are kept.")
    ] = None,
    options: Set = None,
) -> None:
    """Continue a run that was stopped, exactly as if it had not stopped, or train a finished one for more steps."""
    with _before_the_first_step():
        from k5train.training import start

        result = start.resume(run, options or [], cache, step)
    print_result(result)


def _before_the_first_step() -> AbstractContextManager[None]:
    """What Ctrl-C says before the loop can say it: nothing is lost."""
    return interrupt.saying(
        f"Stopped before training began. To start again, run the same command: {console.this_command()}"
    )


def print_result(result: Result) -> None:
    """How a run ended, and its files."""
    reasons = {
        "max_hours": " and stopped at train.max_hours",
        "patience": " and stopped early, as the held-out loss did not improve",
    }
    console.out.print(
        f"Trained {result.steps} steps in {console.human_seconds(result.seconds)}{reasons.get(result.ended_by, '')}, "
        f"loss {result.first_loss:.4f} -> {result.last_loss:.4f} (means of the first and last tenth)",
        markup=False,
    )
    console.out.print(f"LoRA     {result.lora}", markup=False)
    pipe = f" of a {result.pipeline}" if result.pipeline != PIPELINES["t2i"] else ""
    console.out.print(
        f"loads by {result.loads_by}{pipe}: diffusers has loaded it back and the numbers agree", markup=False
    )
    if result.best_step == 0:
        console.warn(f"The held-out loss was never below the base's, {result.best_loss:.4f}")
    elif result.best_step is not None:
        best = result.lora.with_name(f"{result.lora.stem}-best.safetensors")
        console.out.print(
            f"best     {best}, step {result.best_step}, held-out loss {result.best_loss:.4f}", markup=False
        )
    if result.grid:
        console.out.print(f"pictures {result.grid}", markup=False)
    if result.grid:
        console.next_step("Next, draw more", console.command("k5train", "sample", result.lora.parent))
        return
    # Without validation prompts or pairs there are none to draw again.
    source = "PICTURE" if pipe else None
    title = f"Next, draw a {'pair' if pipe else 'prompt'} that the cache holds"
    console.next_step(title, console.command("k5train", "sample", result.lora.parent, source=source, prompt="PROMPT"))

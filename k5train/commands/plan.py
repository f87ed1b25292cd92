"""``k5train plan``: what would a run keep, recompute and stream?"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from k5cache.buckets import MAX_SIDE, MAX_TEXT_TOKENS, SIDE_MULTIPLE, is_side
from k5cache.shared import console
from k5cache.shared.errors import RecipeError
from k5cache.shared.kind import Kind, kind_of_flavour
from k5cache.shared.model import validation_prompts
from k5train.commands.arguments import Model, Recipe, Set, parse_document, read_document
from k5train.forward.precision import decided_for_plan


def plan(
    cache: Annotated[
        Path | None, typer.Argument(help="A cache. Without one, give --resolution and --text-tokens.")
    ] = None,
    vram: Annotated[str | None, typer.Option(help='Plan for a card of this size: "12GB".')] = None,
    resolution: Annotated[int, typer.Option(help="Width and height of the pictures in pixels, without CACHE.")] = 1024,
    text_tokens: Annotated[int, typer.Option(help="Tokens of the longest caption, without CACHE.")] = 512,
    i2i: Annotated[
        bool, typer.Option("--i2i", help="Plan for the published image-to-image model, without CACHE and model.")
    ] = False,
    is_timed: Annotated[
        bool,
        typer.Option("--time/--no-time", help="On a GPU, time a few blocks with random weights, and count them up."),
    ] = True,
    recipe: Recipe = None,
    model: Model = None,
    options: Set = None,
) -> None:
    """Say what a run keeps, recomputes and streams in the available VRAM, and how long it takes. Loads no model."""
    document = read_document(recipe, model, options)
    if vram is not None:
        document.give("train.memory.vram", vram, f"--vram {vram}")
    model_config, config = parse_document(document)
    validation_prompts(document)  # a run would read its library of prompts
    kind: Kind = "i2i" if i2i or (model_config and kind_of_flavour(model_config) == "i2i") else "t2i"
    if model_config and model_config.path is None:
        model_config = None  # a published one, whose shapes are known
    if not is_side(resolution):
        raise RecipeError(
            f"--resolution {resolution} is not a size that the model takes",
            f"Give a multiple of {SIDE_MULTIPLE} up to {MAX_SIDE}",
        )
    if not 1 <= text_tokens <= MAX_TEXT_TOKENS:
        raise RecipeError(
            f"--text-tokens {text_tokens} is not a length that the model takes", f"Give 1 to {MAX_TEXT_TOKENS}"
        )

    from k5train.commands.time_row import time_of
    from k5train.planning.without_loading import plan_without_loading

    shown = plan_without_loading(
        cache, config, model_config, (resolution // 16) ** 2, text_tokens, kind, decide=decided_for_plan
    )
    table = console.table(shown.title, "what", "how", numbers=())
    for row in [*shown.rows, *([("time", time_of(shown.timed))] if is_timed else [])]:
        table.add_row(*row)
    console.out.print(table)

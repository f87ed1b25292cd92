"""``k5train plan``: what a run keeps, recomputes and streams."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from k5cache.shared import console
from k5cache.shared.errors import RecipeError
from k5train.commands.arguments import Model, Recipe, Set


def plan(
    cache: Annotated[Path | None, typer.Argument(help="A cache. Without one: --resolution, --text-tokens.")] = None,
    vram: Annotated[str | None, typer.Option(help='Plan for a card of this size: "12GB".')] = None,
    resolution: Annotated[int, typer.Option(help="Pixels of a square picture, without CACHE.")] = 1024,
    text_tokens: Annotated[int, typer.Option(help="Of the longest caption, without CACHE.")] = 512,
    recipe: Recipe = None,
    model: Model = None,
    options: Set = None,
) -> None:
    """Say what a run keeps, recomputes and streams in the VRAM there is. Loads nothing."""
    from k5cache.shared.model import ModelConfig
    from k5cache.shared.recipe import parse, read
    from k5train.options.train import TrainConfig

    document = read(recipe, options or [])
    if vram is not None:
        document.setdefault("train", {}).setdefault("memory", {})["vram"] = vram
    if model is not None:
        document.setdefault("model", {})["path"] = model
    given = document.get("model", {}).get("path")
    model_config, config = parse(document, {"model": ModelConfig, "train": TrainConfig}, recipe)
    if resolution < 16 or text_tokens < 1:
        raise RecipeError("--resolution is at least 16 and --text-tokens at least 1", "Give the size of your pictures")

    from k5train.planning.without_loading import plan_without_loading

    shown = plan_without_loading(cache, config, model_config if given else None, (resolution // 16) ** 2, text_tokens)
    table = console.table(shown.title, "what", "how", numbers=())
    for row in shown.rows:
        table.add_row(*row)
    console.out.print(table)

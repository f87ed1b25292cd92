"""The commands about memory and speed: ``plan``, ``bench`` and ``base``. Parsed here, done elsewhere."""

from __future__ import annotations

from typing import Annotated

import typer

from k5cache.shared import console
from k5train.commands.arguments import Model, Recipe, Set

base = typer.Typer(help="The int8 base models on disk, under K5_HOME (~/.cache/k5).", no_args_is_help=True)


@base.command()
def prepare(recipe: Recipe = None, model: Model = None, options: Set = None) -> None:
    """Quantise the transformer once, into its file. A run does this by itself on first use."""
    from k5cache.shared.checkpoint import model_folder
    from k5cache.shared.model import ModelConfig
    from k5cache.shared.recipe import parse, read
    from k5train.options.train import TrainConfig

    document = read(recipe, options or [])
    if model is not None:
        document.setdefault("model", {})["path"] = model
    model_config, config = parse(document, {"model": ModelConfig, "train": TrainConfig}, recipe)

    import torch

    from k5train.base.architecture import DTYPES
    from k5train.base.prepared import prepare

    device = "cuda" if torch.cuda.is_available() else "cpu"
    path = prepare(model_folder(model_config, ("transformer",)), DTYPES[config.mixed_precision], device)
    console.out.print(str(path), markup=False)


@base.command(name="list")
def list_() -> None:
    """List the prepared bases: file, size, what each was made of."""
    from k5train.base.prepared import home, listed

    found = listed()
    if not found:
        console.out.print(f"There is none under {home()}", markup=False)
        return
    table = console.table(str(home()), "file", "size", "numbers", "made of", numbers=("size",))
    for item in found:
        state = item.dtype if item.is_whole else "damaged: made again when needed"
        table.add_row(item.path.name, console.human_bytes(item.num_bytes), state, item.source)
    console.out.print(table)


@base.command()
def rm(name: Annotated[str, typer.Argument(help="A file's name, or the start of it.")]) -> None:
    """Remove one prepared base. It is made again when it is needed."""
    from k5train.base.prepared import remove

    removed = remove(name)
    console.out.print(f"Removed {removed.path} ({console.human_bytes(removed.num_bytes)})", markup=False)

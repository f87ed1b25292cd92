"""``k5train base``: make, list and remove the int8 base models on disk."""

from __future__ import annotations

from typing import Annotated

import typer

from k5cache.shared import console, help
from k5train.commands.arguments import Model, Recipe, Set, read_recipe

base = typer.Typer(
    cls=help.Grouped, help="The int8 base models on disk, under K5_HOME (~/.cache/k5).", no_args_is_help=True
)


@base.command(epilog=help.examples("k5train base prepare", "k5train base prepare --model models/k5"))
def prepare(recipe: Recipe = None, model: Model = None, options: Set = None) -> None:
    """Quantise the transformer once, into a file. A run does this by itself when it first needs the file."""
    model_config, config = read_recipe(recipe, model, options)

    from k5cache.shared.checkpoint import model_folder
    from k5cache.shared.loading import begin_to_collect
    from k5cache.shared.model import ModelConfig

    folder = model_folder(model_config or ModelConfig(), ("transformer",))
    import torch  # only now: a model that is missing is named at once

    from k5train.base.architecture import DTYPES
    from k5train.base.prepared import prepare

    begin_to_collect()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with console.working("quantising the transformer"):
        path = prepare(folder, DTYPES[config.mixed_precision], device)
    console.out.print(str(path), markup=False)


@base.command(name="list", epilog=help.examples("k5train base list"))
def list_() -> None:
    """List the prepared bases: file, size, number format, and the checkpoint that each was made from."""
    from k5train.base.prepared_files import home, list_bases

    bases = list_bases()
    if not bases:
        console.out.print(f"There is none under {home()}", markup=False)
        return
    table = console.table(str(home()), "file", "size", "numbers", "made from", numbers=("size",))
    for prepared in bases:
        numbers = prepared.dtype if prepared.is_whole else "damaged: made again when needed"
        table.add_row(prepared.path.name, console.human_bytes(prepared.num_bytes), numbers, prepared.source)
    console.out.print(table)


@base.command(epilog=help.examples("k5train base rm 5f0c"))
def rm(name: Annotated[str, typer.Argument(help="The file's name, or the beginning of it.")]) -> None:
    """Remove one prepared base. It is made again when it is needed."""
    from k5train.base.prepared_files import remove

    removed = remove(name)
    console.out.print(f"Removed {removed.path} ({console.human_bytes(removed.num_bytes)})", markup=False)

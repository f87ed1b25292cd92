"""What every measurement's command line does: ask for a GPU, print a table, write JSON."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, NoReturn

import torch
import typer

from k5cache.shared import console

Out = Annotated[Path | None, typer.Option("--out", "-o", help="Also write the numbers here, as JSON.")]


def run(command: Callable[..., None]) -> NoReturn:
    """Run a function as a command line. Its annotations are the options, its docstring is the help."""
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)
    app.command()(command)
    console.run(app)


def environment(folder: Path) -> dict[str, str]:
    """The environment of a process that is timed from its beginning. It keeps bytecode, as pip leaves it with packages:
    imports take three times as long without. Where Python is told to keep none, it is kept under ``folder``."""
    known = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    return known if len(known) == len(os.environ) else known | {"PYTHONPYCACHEPREFIX": str(folder / "bytecode")}


def print_table(setting: str, columns: Sequence[str], rows: Sequence[Sequence[str]], numbers: Sequence[str]) -> None:
    """Print a table; its title names the GPU, if there is one, torch and the setting."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    title = f"{device}, torch {torch.__version__}, {setting}"
    table = console.table(title, *columns, numbers=tuple(numbers))
    for row in rows:
        table.add_row(*row)
    console.out.print(table)


def write_json(out: Path | None, document: object) -> None:
    """Write the numbers to ``out``, if it is given."""
    if out is not None:
        out.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")

"""``k5train recipes``: list the packaged recipes, or write one to change."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated

import typer

from k5cache.shared import console, packaged
from k5cache.shared.errors import OutputError
from k5cache.shared.plain import read_text


def recipes(
    name: Annotated[str | None, typer.Argument(help="One of the listed names: print this recipe.")] = None,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Write the recipe here instead of printing it.")
    ] = None,
) -> None:
    """List the recipes that come with this program, or print one as a file to change.

    `--recipe NAME` uses one as it is, in both programs. Loads no model.
    """
    if name is None:
        _list()
    elif out is None:
        console.out.print(_text(name, Path("my.toml")), markup=False, soft_wrap=True, end="", highlight=False)
    else:
        _write(name, out)


def _text(name: str, out: Path) -> str:
    """A packaged recipe whose commands name the file that it will be in."""
    from k5train.recipes.listed import PACKAGED

    path = packaged.path(name)
    return PACKAGED[name].as_file(str(out)) if name in PACKAGED else path.read_text(encoding="utf-8")


def _write(name: str, out: Path) -> None:
    from k5cache.shared.files import make_folder, write_whole
    from k5cache.shared.outputs import check_file

    text = _text(name, out)
    target = check_file(out, ".toml")
    if target.exists() and not _holds(target, text):
        other = out.with_name(f"{out.stem}-2.toml")
        raise OutputError(f"{out} is there already", f"Choose another name: {console.command('-o', other)}")
    make_folder(target.parent)
    write_whole(target, lambda path: path.write_text(text, encoding="utf-8"))
    console.out.print(f"Wrote {out}", markup=False)
    for first, line in zip(("Next, encode", "then train"), _commands(text), strict=False):
        console.next_step(first, line)


def _commands(text: str) -> list[str]:
    """The commands that open a recipe."""
    return re.findall(r"^#   (k5(?:cache encode|train run) .*)$", text, flags=re.MULTILINE)


def _holds(path: Path, text: str) -> bool:
    try:
        return read_text(path) == text
    except (OSError, UnicodeDecodeError):
        return False


def _list() -> None:
    from k5train.recipes.listed import PACKAGED, row_of

    table = console.table("Recipes", "name", "teaches", "images", "steps", "peak of VRAM", numbers=("images", "steps"))
    for name in PACKAGED:
        table.add_row(*row_of(name))
    console.out.print(table)
    for name in packaged.LISTS:
        console.out.print(f"{name}: a list for `k5train sweep --list {name}`", markup=False)
    console.next_step("Write one to change", "k5train recipes style-16gb -o my.toml")
    console.next_step("or use it as it is", "k5cache encode datasets/my_images --recipe style-16gb")

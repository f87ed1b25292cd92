"""May a recipe be written here? One that was edited by hand is only replaced if its owner says so."""

from __future__ import annotations

import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from k5cache.shared import console
from k5cache.shared.command_line import command
from k5cache.shared.errors import OutputError, RecipeError
from k5cache.shared.files import make_folder, write_whole
from k5cache.shared.outputs import check_file
from k5cache.shared.plain import read_text
from k5cache.shared.recipe import TABLES
from k5cache.sources.find import default_name
from k5train.configure.ask import Asker, Question, is_yes
from k5train.configure.read_back import answers_of, edits

_MOST_BYTES = 1 << 20
_MOST_NAMED = 8


@dataclass(frozen=True)
class Target:
    """The file that a recipe is written to."""

    path: Path
    text: str | None = None
    """What is there; None if there is nothing."""
    offered: dict[str, Any] = field(default_factory=dict)
    """The answers that it is made of."""

    def edited(self, compose: Callable[[Mapping[str, Any]], str]) -> list[str] | None:
        """What was edited by hand since the recipe was written. None: nothing; comments alone are an empty list.

        Args:
            compose: the recipe of some answers. Raises ``RecipeError`` for those that cannot be.
        """
        if self.text is None:
            return None
        try:
            written = compose(self.offered)
        except RecipeError as error:
            return [error.problem]
        return None if written == self.text else edits(self.text, written)

    def write(self, text: str) -> None:
        """Put a recipe there, as a whole."""
        real = check_file(self.path, ".toml")
        make_folder(real.parent)
        write_whole(real, lambda path: path.write_text(text, encoding="utf-8"))


def read_target(path: Path) -> Target:
    """What is at the path that a recipe is to be written to.

    Raises:
        OutputError: another file is there, or it cannot be written.
    """
    real = check_file(path, ".toml")
    if not real.exists():
        return Target(path)
    fix = f"Choose another name: {command('-o', path.with_name(f'{path.stem}-2.toml'))}"
    try:
        text = read_text(real, _MOST_BYTES).replace("\r\n", "\n")  # as editors of Windows save it
        tables = tomllib.loads(text)
    except OSError as error:
        raise OutputError(f"{path} is there and cannot be read: {error.strerror}", fix) from None
    except (ValueError, RecursionError) as error:
        raise OutputError(f"{path} is there and is not valid TOML: {error}", fix) from None
    if not tables.keys() <= set(TABLES):
        raise OutputError(f"{path} is there and is not a recipe: it has {', '.join(sorted(tables)[:3])}", fix)
    return Target(path, text, answers_of(text))


def default_target(source: Path) -> Path:
    """Where the recipe of a source is written if nobody says otherwise."""
    return Path(f"{default_name(source)}.toml")


def settle(target: Target, compose: Callable[[Mapping[str, Any]], str], asker: Asker, may_overwrite: bool) -> Target:
    """The file to write to, which is another one if its owner keeps what was edited by hand.

    Raises:
        OutputError: it was edited by hand, and nobody says that it may be replaced.
    """
    edited = target.edited(compose)
    if edited is None:
        return target
    what = "; ".join(edited[:_MOST_NAMED]) or "its comments"
    console.warn(f"{target.path} is not as this command writes it, but edited by hand or another recipe: {what}")
    if may_overwrite:
        return target
    other = next(
        path for number in range(2, 10_000)
        if not (path := target.path.with_name(f"{target.path.stem}-{number}.toml")).exists()
    )  # fmt: skip
    if not asker.is_terminal:
        raise OutputError(
            f"{target.path} was edited by hand or is another recipe, and that would be lost",
            f"Write another file with {command('-o', other)}, or replace this one with --overwrite",
        )
    help = (f"If not, {other} is written, and {target.path} stays as it is.",)
    is_replaced = asker.ask(Question("Replace it?", "--overwrite", is_yes, "n", help))
    return target if is_replaced else Target(other)

"""Where did a value of a recipe come from? A line of its file, or an option of the command line."""

from __future__ import annotations

import functools
import re
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from k5cache.shared.errors import RecipeError

Keys = tuple[str | int, ...]
_INDEXED = re.compile(r"(.+)\[([0-9]{1,9})\]", re.DOTALL)  # an entry of a list; a user's own key may have brackets too
_MOST_LINES = 1000  # of a recipe in which lines are found: the time grows with their square, here to 2 s


class Problem(NamedTuple):
    """What is wrong with one value of a recipe."""

    name: str
    """Of the value, or of the table that it is in: ``train.lora.rank``, ``train.data[0].cache``."""
    text: str
    """One phrase."""


class Document(dict[str, Any]):
    """The tables of a recipe as plain values. Knows where each value came from.

    Args:
        path: of the file; None if there is none.
        text: of the file.
    """

    def __init__(self, tables: Mapping[str, Any] | None = None, path: Path | None = None, text: str = "") -> None:
        super().__init__(tables or {})
        self.path, self.text = path, text
        self.given: list[tuple[Keys, str]] = []
        """(name, how it was written) of what the command line sets, the last one counts."""

    def give(self, name: str, value: Any, origin: str) -> None:
        """Set one value that is not from the file.

        Args:
            name: ``table.key``, with tables in between.
            origin: as the user wrote it: ``--set train.steps=500``.

        Raises:
            RecipeError: what should be a table is a value.
        """
        keys = name.split(".")
        table: dict[str, Any] = self
        for key in keys[:-1]:
            inner = table.setdefault(key, {})
            if not isinstance(inner, dict):
                raise RecipeError(f"{origin}: {key} is a value, not a table", "Write it like --set train.lora.rank=32")
            table = inner
        table[keys[-1]] = value
        self.given.append((_keys(name), origin))

    def origin(self, name: str) -> tuple[str, int | None]:
        """Where the value of this name came from: an option or a file, and the line in that file.

        ("", None) if it is a default. A value that is not there itself has the origin of its table.
        """
        keys = _keys(name)
        option = next((origin for given, origin in reversed(self.given) if keys[: len(given)] == given), None)
        if option is None and (self.path is None or line_of(self.text, keys) is None):
            option = next((origin for given, origin in reversed(self.given) if given[: len(keys)] == keys), None)
        if option is not None:
            return option, None
        if self.path is None:
            return "", None
        lines = (line_of(self.text, keys[:count]) for count in range(len(keys), 0, -1))
        return str(self.path), next((line for line in lines if line is not None), None)


def described(document: Mapping[str, Any], problems: Sequence[Problem]) -> str:
    """All problems in one sentence, each after where its value came from."""
    parts: list[str] = []
    last: tuple[str, int | None] = ("", None)
    for problem in problems:
        here = document.origin(problem.name) if isinstance(document, Document) else ("", None)
        where, line = here
        if here == last or not where:
            parts.append(problem.text)
        elif line is None:
            parts.append(f"{where}: {problem.text}")
        else:
            parts.append(f"{'' if where == last[0] else f'{where}, '}line {line}: {problem.text}")
        last = here
    return "; ".join(parts)


def line_of(text: str, keys: Keys) -> int | None:
    """The line of a TOML text on which the value or the table of this name begins. None if it is not in there."""
    return next((line for line, values in _beginnings(text) if _has(values, keys)), None)


def lines_of(text: str, keys: Keys) -> tuple[int, int] | None:
    """The first and the last line of the statement that gives a value of this name. None if none does, or if it stands
    behind the lines that are looked through."""
    begins = statements(text)
    first = line_of(text, keys)
    if first is None:
        return None
    following = next((line for line in begins if line > first), len(text.split("\n")) + 1)
    return first, following - 1


def statements(text: str) -> list[int]:
    """The line on which each statement of a TOML text begins; comments and empty lines are statements too."""
    return [line for line, _ in _beginnings(text)]


@functools.lru_cache(maxsize=4)
def _beginnings(text: str) -> list[tuple[int, dict[str, Any]]]:
    """(line, what is in the text to the end of the value that begins there).

    tomllib gives no positions, but a text cut off behind a value is TOML too. Recipes are short.
    """
    lines = [f"{line}\n" for line in text.split("\n", _MOST_LINES)[:_MOST_LINES]]
    beginnings, begins = [], 1
    for count in range(1, len(lines) + 1):
        try:
            values = tomllib.loads("".join(lines[:count]))
        except (ValueError, RecursionError):
            continue  # in the middle of a value of several lines
        beginnings.append((begins, values))
        begins = count + 1
    return beginnings


def _has(values: Any, keys: Keys) -> bool:
    for key in keys:
        if isinstance(key, int):
            if not isinstance(values, list) or key >= len(values):
                return False
        elif not isinstance(values, dict) or key not in values:
            return False
        values = values[key]
    return True


def _keys(name: str) -> Keys:
    """``train.data[0].cache`` -> ``("train", "data", 0, "cache")``."""
    keys: list[str | int] = []
    for part in name.split("."):
        indexed = _INDEXED.fullmatch(part)
        keys += [indexed[1], int(indexed[2])] if indexed else [part]
    return tuple(keys)

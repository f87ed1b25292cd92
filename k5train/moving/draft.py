"""What is taken over of another trainer's setup, and what is said of each of its keys?"""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

from k5cache.shared.errors import RecipeError
from k5cache.shared.recipe import parse
from k5train.moving.credentials import safe

Outcome = Literal["taken over", "not needed", "not supported", "unknown"]
Schemas = Mapping[str, type[Any]]
OFF = ("false", "no", "off", "0")
ON = ("true", "yes", "on", "1")


class Entry(NamedTuple):
    """A key of another trainer."""

    where: str
    """Its file, and the data in it: ``config.json``, ``multidatabackend.json, my-images``."""
    key: str
    value: Any


@dataclass(frozen=True)
class Row:
    """What is said of one key."""

    where: str
    key: str
    value: str
    """Shortened, without credentials."""
    outcome: Outcome
    text: str
    """What it is here, or why it is not."""


@dataclass(frozen=True)
class Taken:
    """A value of the recipe."""

    value: Any
    key: str
    """What it was called."""
    row: int | None
    """Its place in ``Draft.rows``."""


@dataclass
class CacheDraft:
    """A cache to encode."""

    name: str
    source: str = ""
    """A folder, a table or the name of a dataset."""
    options: dict[str, Any] = field(default_factory=dict)
    """Of ``[cache]``, by their names without the table."""
    repeats: int = 1
    weight: float | None = None
    is_regularisation_data: bool = False
    sources: str | None = None
    """For image-to-image, the folder with the pictures before the edit."""


class NotAChoice(ValueError):
    """A value that an option does not have."""


class Draft:
    """A recipe in the making.

    Args:
        schemas: the tables of a recipe.
        config: the file that names other files.
    """

    def __init__(self, schemas: Schemas, config: Path) -> None:
        self.schemas, self.config = schemas, config
        self.cache = CacheDraft("")
        """The one whose keys are read."""
        self.taken: dict[str, Taken] = {}
        """By the full names of our options, without those of caches."""
        self.rows: list[Row] = []
        self.caches: list[CacheDraft] = []
        self.is_uniform = False
        """Whether caches are used alike, whatever their size."""
        self.run: str | None = None
        """The folder that runs went to."""

    def say(self, entry: Entry, outcome: Outcome, text: str) -> None:
        """Note what becomes of a key."""
        self.rows.append(Row(entry.where, entry.key, safe(entry.key, entry.value), outcome, text))

    def take(self, entry: Entry, option: str, value: Any, note: str = "", is_of_cache: bool = False) -> None:
        """Take a value over, unless the option does not have it: then say so.

        Args:
            option: its full name.
            note: more to say of it.
            is_of_cache: for options of ``[cache]``: of ``cache`` alone, not of all.

        Raises:
            RecipeError: the value is of another type.
        """
        try:
            value = self.converted(entry, option, value)
        except NotAChoice as problem:
            self.say(entry, "not supported", str(problem))
            return
        if problem_text := self._problem(option, value):
            self.say(entry, "not supported", problem_text)
            return
        text = f"{option} = {safe(entry.key, value)}{f': {note}' if note else ''}"
        if is_of_cache:
            self.cache.options[option.removeprefix("cache.")] = value
        else:
            self.taken[option] = Taken(value, entry.key, len(self.rows))
        self.say(entry, "taken over", text)

    def say_of_rest(self, where: str, values: Mapping[str, Any], text: str) -> None:
        """Note the keys of which nothing was said: nothing is left out in silence."""
        said = {row.key.partition(".")[0] for row in self.rows if row.where == where}
        said |= {row.key for row in self.rows if row.where == where}
        for key, value in values.items():
            if key not in said:
                self.say(Entry(where, key, value), "not supported", text)

    def put(self, option: str, value: Any, key: str) -> None:
        """Set a value that has no row of its own."""
        self.taken[option] = Taken(value, key, None)

    def value(self, option: str) -> Any:
        """What has been taken over for an option; None if nothing has."""
        taken = self.taken.get(option)
        return taken.value if taken else None

    def drop(self, option: str, why: str, outcome: Outcome = "not supported") -> None:
        """Leave a value out after all."""
        taken = self.taken.pop(option, None)
        if taken and taken.row is not None:
            row = self.rows[taken.row]
            self.rows[taken.row] = dataclasses.replace(row, outcome=outcome, text=why)

    def converted(self, entry: Entry, option: str, value: Any) -> Any:
        """A value as the type of an option; env files and command lines have text only.

        Raises:
            NotAChoice: the option has a fixed set of values, without this one.
            RecipeError: it is of another type.
        """
        hint = hint_of(option, self.schemas)
        converted = _as(hint, value)
        if converted is not None:
            return converted
        if typing.get_origin(hint) is Literal and isinstance(value, str):
            choices = ", ".join(map(str, typing.get_args(hint)))
            raise NotAChoice(f"{option} has {choices}")
        raise wrong_type(entry, _type_name(hint))

    def _problem(self, option: str, value: Any) -> str:
        """Why our own checks refuse a value; empty if they do not."""
        if option.startswith(("cache.caption_strategy", "cache.instance_prompt", "cache.crop")):
            return ""  # checked with the options that go with them
        document: Any = value
        for key in reversed(option.split(".")):
            document = {key: document}
        try:
            parse(document, dict(self.schemas))
        except RecipeError as error:
            return error.problem
        return ""


def wrong_type(entry: Entry, expected: str) -> RecipeError:
    """The error about a value of another type."""
    return RecipeError(
        f"{entry.where}: {entry.key} must be {expected}, found {safe(entry.key, entry.value) or 'nothing'}",
        "Correct it there, or remove it",
    )


def number(entry: Entry) -> float:
    """A value as a number.

    Raises:
        RecipeError: it is none.
    """
    value = _number(entry.value)
    if value is None:
        raise wrong_type(entry, "a number")
    return value


def flag(entry: Entry) -> bool:
    """A value as true or false. A flag of a command line without a value is true.

    Raises:
        RecipeError: it is neither.
    """
    value = _flag(entry.value)
    if value is None:
        raise wrong_type(entry, "true or false")
    return value


def text(entry: Entry) -> str:
    """A value as text.

    Raises:
        RecipeError: it is a list, a table or a truth value.
    """
    if isinstance(entry.value, bool) or not isinstance(entry.value, str | int | float):
        raise wrong_type(entry, "text")
    return str(entry.value)


def hint_of(option: str, schemas: Schemas) -> Any:
    """The type of an option, without None."""
    table, *keys = option.split(".")
    hint: Any = schemas[table]
    for key in keys:
        hint = typing.get_type_hints(hint)[key]
        if isinstance(hint, types.UnionType):
            hint = next(part for part in typing.get_args(hint) if part is not type(None))
    return hint


def _as(hint: Any, value: Any) -> Any:
    """A value as a type; None if it is not one."""
    if typing.get_origin(hint) is Literal:
        return value if isinstance(value, str) and value in typing.get_args(hint) else None
    if hint is bool:
        return _flag(value)
    if dataclasses.is_dataclass(hint):
        return value if isinstance(value, dict) else None
    if hint is str:
        return value if isinstance(value, str) else None
    if hint in (int, float):
        found = _number(value)
        if found is None or (hint is int and not found.is_integer()):
            return None
        return hint(found)
    if isinstance(value, str | list) and typing.get_args(hint)[-1] is Ellipsis:
        parts = [_as(typing.get_args(hint)[0], part) for part in ([value] if isinstance(value, str) else value)]
        return None if None in parts else parts
    return value if isinstance(value, list) else None


def _number(value: Any) -> float | None:
    if isinstance(value, bool):
        return None
    try:
        return float(value)
    except (TypeError, ValueError, OverflowError):
        return None


def _flag(value: Any) -> bool | None:
    if isinstance(value, str):
        return value.lower() in ON if value.lower() in (*ON, *OFF) else None
    return bool(value) if value in (0, 1) and isinstance(value, bool | int) else None


def _type_name(hint: Any) -> str:
    names = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
    return names.get(hint, "text" if typing.get_origin(hint) is Literal else "a list")

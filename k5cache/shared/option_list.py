"""Every option of a recipe with its default and its help: as TOML to copy from, and as a page.

The help of an option is the docstring under it in its dataclass.
"""

from __future__ import annotations

import ast
import dataclasses
import inspect
import itertools
import textwrap
import types
import typing
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

from k5cache.shared.errors import RecipeError
from k5cache.shared.recipe import toml_value
from k5cache.shared.spelling import problem_of


@dataclasses.dataclass(frozen=True)
class Option:
    """One option of a table."""

    name: str
    hint: Any
    default: Any
    """``dataclasses.MISSING``: it has to be given. None: it has none."""
    help: str


@dataclasses.dataclass(frozen=True)
class Table:
    """One table of a recipe with its options, without the tables inside it."""

    name: str
    """As a recipe writes it, ``train.lora``."""
    listed: bool
    """Whether a recipe may have several, each under ``[[name]]``."""
    help: str
    options: tuple[Option, ...]


def tables(schemas: dict[str, type[Any]], *, listed: bool = True) -> Iterator[Table]:
    """Every table of these, in the order of a recipe. ``listed``: also those of which a recipe may have several."""
    for name, schema in schemas.items():
        yield from _tables_of(name, schema, False, listed)


def _tables_of(name: str, schema: type[Any], several: bool, listed: bool) -> Iterator[Table]:
    helps, hints = _helps(schema), typing.get_type_hints(schema)
    options, inner = [], []
    for field in dataclasses.fields(schema):
        hint = hints[field.name]
        if dataclasses.is_dataclass(hint):
            inner.append((field.name, typing.cast(type[Any], hint), False))
            continue
        if listed and (entry := _entry(hint)) is not None:
            inner.append((field.name, entry, True))
        default = field.default_factory() if field.default_factory is not dataclasses.MISSING else field.default
        options.append(Option(field.name, hint, default, helps.get(field.name, "")))
    yield Table(name, several, " ".join((schema.__doc__ or "").split()), tuple(options))
    for key, table, entries in inner:
        yield from _tables_of(f"{name}.{key}", table, entries, listed)


def _entry(hint: Any) -> type[Any] | None:
    """The dataclass of ``tuple[X, ...]``."""
    args = typing.get_args(hint)
    if typing.get_origin(hint) is not tuple or not dataclasses.is_dataclass(args[0]):
        return None
    return typing.cast(type[Any], args[0])


def _helps(schema: type[Any]) -> dict[str, str]:
    """The docstring under each option of a dataclass, read from its source."""
    body = ast.parse(textwrap.dedent(inspect.getsource(schema))).body[0]
    assert isinstance(body, ast.ClassDef)
    helps: dict[str, str] = {}
    for option, text in itertools.pairwise(body.body):
        if isinstance(option, ast.AnnAssign) and isinstance(option.target, ast.Name) and isinstance(text, ast.Expr):
            assert isinstance(text.value, ast.Constant)
            helps[option.target.id] = " ".join(str(text.value.value).split())
    return helps


def as_toml(schemas: dict[str, type[Any]], words: Sequence[str] = ()) -> str:
    """Every option with its default and its help, as TOML text to copy from. Options without a default are comments.

    Args:
        words: list only options that have one of these in their names, as ``train.lora.rank``, or, if no name has it,
            in their help. None given: all.

    Raises:
        RecipeError: no option has one of them. Says which one another trainer's word or a misspelt one stands for.
    """
    chosen = {name for word in words for name in _with_word(schemas, word)}
    lines: list[str] = []
    for table in tables(schemas, listed=False):
        options = [option for option in table.options if not words or f"{table.name}.{option.name}" in chosen]
        lines += ["", f"# --- {table.help}", f"[{table.name}]"] if options or not words else []
        for option in options:
            lines += [f"# {help_line}" for help_line in textwrap.wrap(option.help, 110)]
            default = option.default
            lines.append(f"# {option.name} =" if default is None else f"{option.name} = {_written(default)}")
    return "\n".join(lines).strip()


def _with_word(schemas: dict[str, type[Any]], word: str) -> list[str]:
    """The names of options that have a word, or that speak of it."""
    helps = {f"{t.name}.{option.name}": option.help for t in tables(schemas, listed=False) for option in t.options}
    part = word.lower()
    named = [name for name in helps if part in name]
    if found := named or [name for name, text in helps.items() if part in text.lower()]:
        return found
    problem = problem_of("option", word, None, "", (), schemas) or f"no option is called {word!r}"
    raise RecipeError(problem, "Without a word, all options are listed")


def as_markdown(schemas: dict[str, type[Any]]) -> str:
    """The same as sections of a page, a table for each table of a recipe, with what each option takes."""
    lines: list[str] = []
    for table in tables(schemas):
        heading = f"[[{table.name}]]" if table.listed else f"[{table.name}]"
        about = table.help.removeprefix(f"``{heading}``").lstrip(": ")
        lines += ["", f"## {heading}", "", _marked(about[:1].upper() + about[1:]), ""]
        lines += ["| option | takes | default | what it does |", "|---|---|---|---|"]
        lines += [f"| {' | '.join(map(_cell, _columns(option)))} |" for option in table.options]
    return "\n".join(lines).strip()


def _columns(option: Option) -> tuple[str, str, str, str]:
    if option.default is dataclasses.MISSING:
        default = "must be given"
    else:
        default = "none" if option.default is None else f"`{_written(option.default)}`"
    return f"`{option.name}`", takes(option.hint), default, _marked(option.help)


def takes(hint: Any) -> str:
    """What an option takes, in words: ``a whole number``, or its choices in code."""
    names = {int: "a whole number", float: "a number", bool: "`true` or `false`", str: "a string", Path: "a path"}
    if hint in names:
        return names[hint]
    origin, args = typing.get_origin(hint), [a for a in typing.get_args(hint) if a not in (type(None), Ellipsis)]
    if origin is Literal:
        return ", ".join(f"`{toml_value(choice)}`" for choice in args)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(takes(arg) for arg in args)
    if origin is tuple and dataclasses.is_dataclass(args[0]):
        return "tables"
    if origin is tuple:
        return "a list, each " + takes(args[0]) if len(args) == 1 else "a list of " + ", ".join(map(takes, args))
    return "a table"


def _written(value: Any) -> str:
    return toml_value(list(value) if isinstance(value, tuple) else value)


def _marked(text: str) -> str:
    """A docstring's code as a page marks it."""
    return text.replace("``", "`")


def _cell(text: str) -> str:
    """As a cell of a table: every bar with a backslash, and each star outside code."""
    prose_and_code = text.replace("|", "\\|").split("`")
    return "`".join(part if i % 2 else part.replace("*", "\\*") for i, part in enumerate(prose_and_code))

"""How does a recipe, a TOML file, become options? All problems are named at once, with the nearest name for a typo.

A schema is a frozen dataclass. This file turns TOML tables into schemas and back, and knows no option by name.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import os
import re
import tomllib
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar

from k5cache.shared import console
from k5cache.shared.errors import RecipeError
from k5cache.shared.origins import Document, Problem, described
from k5cache.shared.other_words import our_value
from k5cache.shared.packaged import advice, located
from k5cache.shared.plain import read_text
from k5cache.shared.spelling import problem_of

T = TypeVar("T")
TABLES = ("model", "cache", "train")
"""The tables of a recipe. Both stages check all of them."""
_MOST_BYTES = 1 << 20  # of a recipe; the longest of ours has 4,000
_BAD: Any = object()
"""What a conversion returns when it has noted a problem."""


def read(path: Path | None, overrides: Sequence[str]) -> Document:
    """Read a recipe and apply ``--set table.key=value`` to it.

    Args:
        path: a TOML file, or the name of a packaged recipe. None means all defaults.
        overrides: ``table.key=value``. The value is read as TOML, or as a plain string if it is not TOML.

    Raises:
        RecipeError: the file is missing or not TOML, or an override is not ``key=value``.
    """
    document = Document()
    if path is not None:
        path, said = located(path)
        if said:
            console.note(said)
        if not os.path.exists(path):  # noqa: PTH110 (False for a name that the system does not allow)
            raise RecipeError(f"There is no recipe {path}", advice(path))
        document = Document(*read_toml(path, "Correct that line; see https://toml.io"))
    for override in overrides:
        set_option(document, override)
    return document


def read_toml(path: Path, fix: str) -> tuple[dict[str, Any], Path, str]:
    """The values of a TOML file, its path and its text.

    Raises:
        RecipeError: it cannot be read or is not TOML.
    """
    try:
        text = read_text(path, _MOST_BYTES)
    except OSError as error:
        raise RecipeError(f"{path} cannot be read: {error.strerror}", fix) from error
    except UnicodeDecodeError as error:
        raise RecipeError(f"{path} is not UTF-8: {error}", "Save it as UTF-8") from error
    return parse_toml(text, str(path), fix), path, text


def parse_toml(text: str, named: str, fix: str) -> dict[str, Any]:
    """The values of a TOML text.

    Args:
        named: what it is called, such as its file.

    Raises:
        RecipeError: it is not TOML.
    """
    try:
        return tomllib.loads(text)
    except (ValueError, RecursionError) as error:  # TOML's own errors, a number of 10,000 digits, 10,000 brackets
        raise RecipeError(f"{named} is not valid TOML: {error}", _about_backslashes(text, error) or fix) from error


def _about_backslashes(text: str, error: Exception) -> str:
    """What to do about a Windows path in double quotes, if that is what the error is about; else empty."""
    number = re.search(r"at line (\d+)", str(error))
    lines = text.split("\n")
    line = lines[int(number[1]) - 1] if number and int(number[1]) <= len(lines) else ""
    path = re.search(r'"([^"]*\\[^"]*)', line)
    if not path:
        return ""
    return (
        "In double quotes a backslash begins a special character. Write the path in single quotes, or with slashes: "
        f"'{path[1]}' or \"{path[1].replace(chr(92), '/')}\""
    )


def parse(document: Mapping[str, Any], schemas: dict[str, type[Any]]) -> list[Any]:
    """Turn the tables of a document into their dataclasses, in the order of ``schemas``.

    Raises:
        RecipeError: unknown tables and keys (with the nearest name), wrong types, values that a schema's ``check``
            refuses. All problems are named, each with the line or the option that it came from.
    """
    parsed, problems = parse_with_problems(document, schemas)
    if problems:
        raise RecipeError(described(document, problems), "Correct that; `k5train options` lists every option")
    return parsed


def parse_with_problems(
    document: Mapping[str, Any], schemas: dict[str, type[Any]]
) -> tuple[list[Any], Sequence[Problem]]:
    """What ``parse`` gives, and all that it would refuse. If there is any of that, the dataclasses must not be used."""
    problems = _Problems(schemas)
    for name, value in document.items():
        if name not in TABLES:
            kind, own = ("table", TABLES) if isinstance(value, dict) else ("option", ())
            problems.unknown(kind, name, value, "", own)
    return [_build(schema, document.get(name, {}), name, problems) for name, schema in schemas.items()], problems


class _Problems(list[Problem]):
    """What is wrong with a recipe so far.

    Args:
        schemas: all tables, in which a misspelt option is looked for.
    """

    def __init__(self, schemas: Mapping[str, type[Any]]) -> None:
        super().__init__()
        self.schemas = schemas

    def unknown(self, kind: str, name: str, value: Any, where: str, own: Sequence[str]) -> None:
        """Note a name that is no option, unless it asks for nothing."""
        text = problem_of(kind, name, value, where, own, self.schemas)
        if text is not None:
            self.append(Problem(f"{where}.{name}" if where else name, text))


def to_dict(config: Any) -> dict[str, Any]:
    """The inverse of ``parse`` for one table: plain TOML values, without keys that are unset (None)."""

    def plain(value: Any) -> Any:
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            return {f.name: plain(v) for f in dataclasses.fields(value) if (v := getattr(value, f.name)) is not None}
        if isinstance(value, tuple | list):
            return [plain(v) for v in value]
        return str(value) if isinstance(value, Path) else value

    return typing.cast(dict[str, Any], plain(config))


def to_toml(document: Mapping[str, Any]) -> str:
    """A document as TOML text, from which ``read`` gives the same values."""
    lines: list[str] = []

    def emit(table: Mapping[str, Any], name: str) -> None:
        scalars = {k: v for k, v in table.items() if not _is_table(v)}
        if name and (scalars or not table):
            lines.append(f"[{name}]")
        lines.extend(f"{key} = {toml_value(value)}" for key, value in scalars.items())
        if scalars or (name and not table):
            lines.append("")
        for key, value in table.items():
            inner = f"{name}.{key}" if name else key
            if isinstance(value, dict):
                emit(value, inner)
            elif _is_table(value):
                for entry in value:
                    lines.append(f"[[{inner}]]")
                    lines.extend(f"{k} = {toml_value(v)}" for k, v in entry.items())
                    lines.append("")

    emit(document, "")
    return "\n".join(lines)


def _is_table(value: Any) -> bool:
    return isinstance(value, dict) or (
        isinstance(value, list) and bool(value) and all(isinstance(v, dict) for v in value)
    )


def toml_value(value: Any) -> str:
    """One value in one line."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, list):
        return f"[{', '.join(toml_value(v) for v in value)}]"
    if isinstance(value, dict):
        return f"{{{', '.join(f'{json.dumps(k)} = {toml_value(v)}' for k, v in value.items())}}}"
    # A JSON string is a TOML basic string, except that TOML also forbids a bare DEL.
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f") if isinstance(value, str) else repr(value)


def set_option(document: Document, override: str, option: str = "--set") -> None:
    """Apply one ``table.key=value`` to a document, in place.

    Args:
        option: of the command line, as which it was given.

    Raises:
        RecipeError: it is not ``table.key=value``.
    """
    name, equals, text = override.partition("=")
    name = name.strip()
    if not equals or not all(name.split(".")):  # a name without a table is answered with its full one by ``parse``
        raise RecipeError(f"{option} {override} is not table.key=value", f"Write it like {option} train.steps=500")
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except (ValueError, RecursionError):
        value = text.strip()
    document.give(name, value, f"{option} {override}")


def _build(schema: type[T], table: Any, where: str, problems: _Problems) -> T:
    """A table as its dataclass, with problems added to ``problems``; then the result must not be used."""
    if not isinstance(table, dict):
        problems.append(Problem(where, f"[{where}] must be a table, found {_shown(table)}"))
        return schema()
    hints = typing.get_type_hints(schema)
    options = dataclasses.fields(typing.cast(Any, schema))
    names = tuple(option.name for option in options)
    values: dict[str, Any] = {}
    for key, value in table.items():
        if key not in names:
            problems.unknown("key", key, value, where, names)
        else:
            name = f"{where}.{key}"
            converted = _convert(hints[key], our_value(name, value), name, problems)
            if converted is not _BAD:
                values[key] = converted
    required = [o.name for o in options if o.default is o.default_factory is dataclasses.MISSING]
    missing = [name for name in required if name not in values]
    if missing:
        problems += [Problem(where, f"{where}.{name} is required") for name in missing if name not in table]
        return typing.cast(T, _BAD)
    config = schema(**values)
    check = getattr(config, "check", None)
    if check is not None:
        # Each phrase begins with the option that it is about.
        problems += [Problem(f"{where}.{phrase.split()[0]}", f"{where}.{phrase}") for phrase in check()]
    return config


def _convert(hint: Any, value: Any, where: str, problems: _Problems) -> Any:
    """``value`` as type ``hint``; or _BAD, with a problem added to ``problems``."""
    origin = typing.get_origin(hint)
    if origin in (typing.Union, types.UnionType):
        return _convert_to_either(hint, value, where, problems)
    if origin is Literal:
        return _convert_to_choice(hint, value, where, problems)
    if origin is tuple and isinstance(value, list):
        return _convert_to_tuple(hint, value, where, problems)
    if origin is dict and isinstance(value, dict):
        _, value_hint = typing.get_args(hint)
        entries = {key: _convert(value_hint, entry, f"{where}.{key}", problems) for key, entry in value.items()}
        return _BAD if any(entry is _BAD for entry in entries.values()) else entries
    if dataclasses.is_dataclass(hint):
        return _build(typing.cast(type[Any], hint), value, where, problems)
    if hint is Path and isinstance(value, str):
        return Path(value)
    if hint is float and type(value) in (int, float):
        return float(value)
    if type(value) is hint:
        return value
    return _wrong_type(hint, value, where, problems)


def _convert_to_either(hint: Any, value: Any, where: str, problems: _Problems) -> Any:
    """The value as the first type of a union that accepts it. For ``X | None`` the problems are those with X."""
    options = [option for option in typing.get_args(hint) if option is not type(None)]
    for option in options:
        attempt = _Problems(problems.schemas)
        converted = _convert(option, value, where, attempt)
        if not attempt:
            return converted
    if len(options) == 1:
        problems.extend(attempt)
        return _BAD
    return _wrong_type(hint, value, where, problems)


def _convert_to_choice(hint: Any, value: Any, where: str, problems: _Problems) -> Any:
    choices = typing.get_args(hint)
    if value in choices and type(value) in {type(choice) for choice in choices}:
        return value
    near = difflib.get_close_matches(str(value), [str(choice) for choice in choices], n=1, cutoff=0.5)
    suggestion = f"; did you mean {near[0]!r}?" if near else ""
    listed = ", ".join(map(repr, choices))
    problems.append(Problem(where, f"{where} must be one of {listed}, found {_shown(value)}{suggestion}"))
    return _BAD


def _convert_to_tuple(hint: Any, values: list[Any], where: str, problems: _Problems) -> Any:
    """A list as ``tuple[X, ...]``, or a list of a given length as ``tuple[X, Y]``."""
    hints = typing.get_args(hint)
    if hints[-1] is Ellipsis:
        hints = (hints[0],) * len(values)
    if len(hints) != len(values):
        problems.append(Problem(where, f"{where} must have {len(hints)} values, found {len(values)}"))
        return _BAD
    entries = [
        _convert(entry_hint, value, f"{where}[{i}]", problems)
        for i, (entry_hint, value) in enumerate(zip(hints, values, strict=True))
    ]
    return _BAD if any(entry is _BAD for entry in entries) else tuple(entries)


def _wrong_type(hint: Any, value: Any, where: str, problems: _Problems) -> Any:
    problems.append(Problem(where, f"{where} must be {_type_name(hint)}, found {_shown(value)}"))
    return _BAD


def _type_name(hint: Any) -> str:
    names = {int: "a whole number", float: "a number", bool: "true or false", str: "a string", Path: "a path"}
    args = [a for a in typing.get_args(hint) if a not in (type(None), Ellipsis)]
    if hint in names:
        return names[hint]
    if typing.get_origin(hint) is tuple:
        return "a list"
    return " or ".join(_type_name(a) for a in args) if args else "a table"


def _shown(value: Any) -> str:
    try:
        text = repr(value)
    except RecursionError:
        text = "something nested too deeply"
    return text if len(text) <= 60 else f"{text[:57]}..."

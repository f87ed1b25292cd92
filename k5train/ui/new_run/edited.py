"""How is one value of a recipe changed in its text, so that everything else in it stays, comments too?

The text is changed by lines, and read again: if it does not say what it should, such as where a table stands in one
line, the whole text is written anew from its values.
"""

from __future__ import annotations

import re
import textwrap
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from copy import deepcopy
from typing import Any

from k5cache.shared.origins import Keys, lines_of, statements
from k5cache.shared.recipe import to_toml, toml_value
from k5train.ui.new_run.fields import LEFT_OUT, Field, groups

_WIDTH = 116
_HEADER = re.compile(r"\s*\[\[?\s*([A-Za-z0-9_.\- ]+?)\s*\]?\]\s*(#.*)?")


def with_value(text: str, field: Field, value: Any) -> str:
    """A recipe's text in which an option has another value.

    Args:
        text: valid TOML.
        value: ``LEFT_OUT`` to leave the option out; its line then stays as a comment.
    """
    wanted = _changed(tomllib.loads(text), field.name.split("."), value)
    keys = tuple(field.name.split("."))
    place = lines_of(text, keys)
    lines = text.split("\n")
    if value is LEFT_OUT:
        edited = _commented_out(lines, place, field.key) if place else lines
    else:
        edited = _replaced(lines, place, value) if place else _inserted(text, lines, keys, field, value)
    written = "\n".join(edited)
    return written if _says(written, wanted) else to_toml(wanted)


def comment_of(field: Field) -> list[str]:
    """The help of an option as comment lines, with what it is if it is left out."""
    default = f" Left out, it is {toml_value(_plain(field.default))}." if field.default not in (None, (), "") else ""
    return [f"# {line}" for line in textwrap.wrap(f"{field.help}{default}", _WIDTH - 2, break_long_words=False)]


def assigned(key: str, value: Any) -> list[str]:
    """A value in one line, or a list with one entry a line where that is too long."""
    line = f"{key} = {toml_value(_plain(value))}"
    if len(line) <= _WIDTH or not isinstance(value, list):
        return [line]
    return [f"{key} = [", *(f"    {toml_value(entry)}," for entry in value), "]"]


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _changed(document: dict[str, Any], keys: Sequence[str], value: Any) -> dict[str, Any]:
    wanted = deepcopy(document)
    table = wanted
    for key in keys[:-1]:
        inner = table.setdefault(key, {})
        if not isinstance(inner, dict):  # the recipe has a value where a table should be: the form's is a table
            inner = table[key] = {}
        table = inner
    if value is LEFT_OUT:
        table.pop(keys[-1], None)
    else:
        table[keys[-1]] = value
    return wanted


def _says(text: str, wanted: Mapping[str, Any]) -> bool:
    try:
        return toml_value(_without_empty(tomllib.loads(text))) == toml_value(_without_empty(wanted))
    except (ValueError, RecursionError):
        return False


def _without_empty(document: Mapping[str, Any]) -> dict[str, Any]:
    """The values in the order of their names, without tables that hold nothing."""
    inner = {key: _without_empty(v) if isinstance(v, dict) else v for key, v in sorted(document.items())}
    return {key: value for key, value in inner.items() if value != {}}


def _replaced(lines: list[str], place: tuple[int, int], value: Any) -> list[str]:
    first, last = place
    old = lines[first - 1 : last]
    name = old[0].partition("=")[0].rstrip()
    new = assigned(name, value)
    if len(old) == len(new) == 1:
        new = [new[0] + _remark_of(old[0])]
    return [*lines[: first - 1], *new, *lines[last:]]


def _remark_of(line: str) -> str:
    """The comment behind a value, with the space before it."""
    try:
        value = tomllib.loads(line)
    except ValueError:
        return ""
    for match in re.finditer(r"\s*#", line):
        if toml_value(value) == _written(line[: match.start()]):
            return line[match.start() :]
    return ""


def _written(line: str) -> str:
    try:
        return toml_value(tomllib.loads(line))
    except ValueError:
        return ""


def _commented_out(lines: list[str], place: tuple[int, int], key: str) -> list[str]:
    """In one line, so that it can be taken back."""
    first, last = place
    try:
        inner: Any = tomllib.loads("\n".join(lines[first - 1 : last]))
        line = f"{key} = {toml_value(inner[key])}"
    except (ValueError, KeyError):
        line = lines[first - 1].strip()
    return [*lines[: first - 1], f"# {line}", *lines[last:]]


def _inserted(text: str, lines: list[str], keys: Keys, field: Field, value: Any) -> list[str]:
    table = ".".join(map(str, keys[:-1]))
    headers = _headers(text, lines)
    new = assigned(field.key, value)
    at = next((line for line, name in headers if name == table and not lines[line - 1].lstrip().startswith("[[")), None)
    if at is None:
        before = _before(lines, headers, table)
        start = lines[:before]
        while start and not start[-1].strip():
            start.pop()
        rest = ["", *lines[before:]] if any(line.strip() for line in lines[before:]) else [""]
        return [*start, *([""] if start else []), f"[{table}]", *comment_of(field), *new, *rest]
    end = next((line for line, _ in headers if line > at), len(lines) + 1)
    old = re.compile(rf"#\s*{re.escape(field.key)}\s*=")
    for number in range(at, end - 1):
        if old.match(lines[number]):
            return [*lines[:number], *new, *lines[number + 1 :]]
    last = max((n for n in range(at, end) if _is_given(lines[n - 1])), default=at)
    return [*lines[:last], *comment_of(field), *new, *lines[last:]]


def _is_given(line: str) -> bool:
    return bool(line.strip()) and not line.lstrip().startswith("#")


def _headers(text: str, lines: Sequence[str]) -> list[tuple[int, str]]:
    """(line, table) of each header."""
    return [
        (line, match[1].replace(" ", ""))
        for line in statements(text)
        if line <= len(lines) and (match := _HEADER.fullmatch(lines[line - 1]))
    ]


def _before(lines: Sequence[str], headers: Sequence[tuple[int, str]], table: str) -> int:
    """How many lines stand before the place of a new table, in the order of all tables."""
    order = list(_order())
    place = order.index(table)
    later = [line for line, name in headers if name in order and order.index(name) > place]
    if not later:
        return len(lines)
    number = later[0] - 1
    while number and lines[number - 1].startswith("#"):
        number -= 1
    return number


def _order() -> Iterator[str]:
    for group in groups():
        if group.name == "train":
            yield "cache"
        yield group.name
        yield from (entry.name for entry in group.entries)

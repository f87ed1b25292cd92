"""How is a config of another trainer read? JSON, TOML, YAML, an env file or a command line, told apart by content.

Nothing in it is executed: variables of an env file are filled in from the same file, and nothing else.
"""

from __future__ import annotations

import json
import re
import shlex
import tomllib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from k5cache.shared.errors import RecipeError
from k5cache.shared.foreign import shown
from k5cache.shared.plain import read_text

_MOST_BYTES = 1 << 20
_MOST_VALUES = 20_000  # a YAML alias may stand for as many as it likes
_ENV = re.compile(r"(?:export\s+)?([A-Za-z_]\w*)=(.*)", re.DOTALL)
_VARIABLE = re.compile(r"\$(?:\{(\w+)\}|(\w+))")
_SURROGATE = re.compile(r"[\ud800-\udfff]")
_ARGUMENT = re.compile(r"(?:^|\s)--[A-Za-z]")


class _Malformed(ValueError):
    """What is wrong with a file, without its content."""


def read(path: Path, fix: str = "Give the path of a config file") -> Any:
    """The values of a config file.

    Raises:
        RecipeError: it cannot be read, or is none of the formats.
    """
    try:
        return _checked(parsed(read_text(path, _MOST_BYTES), path.suffix.lower()))
    except FileNotFoundError:
        raise RecipeError(f"There is no file {path}", fix) from None
    except OSError as error:
        raise RecipeError(f"{path} cannot be read: {error.strerror}", fix) from error
    except UnicodeDecodeError:
        raise RecipeError(f"{path} is not UTF-8 text", fix) from None
    except RecursionError:
        raise RecipeError(f"{path} is nested too deeply", fix) from None
    except _Malformed as error:
        raise RecipeError(f"{path} {error}", "Correct it there") from None


def parsed(text: str, suffix: str = "") -> Any:
    """The values of a text, whose format is told by its content; by its suffix where content leaves it open."""
    if text.lstrip()[:1] in ("{", "["):
        as_toml = suffix == ".toml" or re.match(r"\s*\[+[\w.-]+\]+\s*$", text, re.MULTILINE)
        return _toml(text) if as_toml else _json(text)
    lines = [line.strip() for line in text.splitlines() if line.strip() and not line.strip().startswith("#")]
    if not lines:
        raise _Malformed("is empty")
    reader = _by_lines(lines, suffix)
    if reader:
        return reader(text)
    try:
        return _toml(text)
    except _Malformed:
        if suffix == ".toml":
            raise
    return _yaml(text)


def _by_lines(lines: list[str], suffix: str) -> Callable[[str], Any] | None:
    """The reader of what can be told from single lines."""
    if suffix == ".json":
        return _json
    if suffix in (".yaml", ".yml") or lines[0] == "---" or any(re.match(r"[\w-]+:(\s|$)", line) for line in lines):
        return _yaml
    if suffix == ".env" or (suffix != ".toml" and all(_ENV.match(line) for line in lines)):
        return _env
    if suffix != ".toml" and _ARGUMENT.search("\n".join(lines)):
        return arguments
    return None


def _json(text: str) -> Any:
    try:
        return json.loads(text, object_pairs_hook=_unique)
    except json.JSONDecodeError as error:
        raise _Malformed(f"is not JSON: {error.msg} at line {error.lineno}, column {error.colno}") from None
    except _Malformed:
        raise
    except ValueError:
        raise _Malformed("is not JSON: it has a number that is too long") from None


def _unique(pairs: Iterable[tuple[Any, Any]]) -> dict[str, Any]:
    table: dict[str, Any] = {}
    for key, value in pairs:
        if key in table:
            raise _Malformed(f"has the key {shown(str(key), 60)} twice")
        table[key] = value
    return table


def _toml(text: str) -> dict[str, Any]:
    try:
        return tomllib.loads(text)
    except ValueError as error:
        raise _Malformed(f"is not TOML: {shown(str(error), 100)}") from None


def _yaml(text: str) -> Any:
    import yaml

    class Loader(yaml.SafeLoader):
        """Plain values only, and no key twice."""

    def unique(loader: Any, node: Any) -> dict[str, Any]:
        loader.flatten_mapping(node)
        keys = [loader.construct_object(key, deep=True) for key, _ in node.value]
        if not all(isinstance(key, str | int | float | bool | None) for key in keys):
            raise _Malformed("is not YAML with plain keys")
        return _unique(
            (str(key), loader.construct_object(value, deep=True))
            for key, (_, value) in zip(keys, node.value, strict=True)
        )

    Loader.add_constructor("tag:yaml.org,2002:map", unique)
    try:
        return yaml.load(text, Loader)  # a SafeLoader
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        at = f" at line {mark.line + 1}" if mark else ""
        raise _Malformed(f"is no JSON, TOML, YAML, env file or command line{at}") from None


def _env(text: str) -> dict[str, str]:
    """``KEY=value`` lines as a shell reads them, with ``export``, quotes, comments and variables of the same file."""
    values: dict[str, str] = {}
    for word in _shell_words(text):
        match = _ENV.fullmatch(word)
        if word == "export":
            continue
        if not match:
            raise _Malformed(f"is not an env file: {shown(word.partition('=')[0], 40)} is no KEY=value")
        key, value = match[1], match[2]
        if key in values and f"{{{key}}}" not in value and f"${key}" not in value:
            raise _Malformed(f"has the key {shown(key, 60)} twice")
        values[key] = _VARIABLE.sub(lambda name: values.get(name[1] or name[2], ""), value)
    return values


def arguments(text: str) -> dict[str, Any]:
    """``--key value``, ``--key=value`` and ``--key`` of a command line; what is before them is left out.

    Several values of a key are a list.
    """
    values: dict[str, Any] = {}
    key = None
    for word in _shell_words(text.replace("\\\r\n", " ").replace("\\\n", " ").replace("^\n", " ")):
        if word.endswith(".py"):  # what is before the script is for its launcher
            values, key = {}, None
        elif re.match(r"--[A-Za-z]", word):
            key, equals, value = word[2:].partition("=")
            if key in values:
                raise _Malformed(f"has the option --{shown(key, 60)} twice")
            values[key] = value if equals else True
        elif key is not None:
            before = values[key]
            values[key] = word if before is True else [*(before if isinstance(before, list) else [before]), word]
    if not values:
        raise _Malformed("has no --key value")
    return values


def _shell_words(text: str) -> list[str]:
    try:
        return shlex.split(text, comments=True)
    except ValueError:
        raise _Malformed("has a quote that does not end") from None


def _checked(values: Any) -> Any:
    """The values, if they are no more than a person writes."""
    count, rest = 0, [values]
    while rest:
        count += 1
        if count > _MOST_VALUES:
            raise _Malformed(f"has more than {_MOST_VALUES:,} values")
        value = rest.pop()
        if isinstance(value, str) and _SURROGATE.search(value):
            raise _Malformed("has text that is not Unicode: a lone surrogate")
        rest += [*value, *value.values()] if isinstance(value, dict) else value if isinstance(value, list) else []
    return values


def subfolders(folder: Path) -> list[Path]:
    """The folders in a folder, by name; none if it cannot be read."""
    try:
        return sorted(path for path in folder.iterdir() if path.is_dir())
    except (OSError, ValueError):
        return []


def locate(name: str, config: Path) -> Path | None:
    """The file or folder that a config names: from this folder, from the config's, or from the one above that."""
    wanted = Path(name).expanduser()
    for base in (Path(), config.parent, config.parent.parent):
        try:
            if (base / wanted).exists():
                return base / wanted
        except (OSError, ValueError):  # a name that the system does not allow
            return None
    return None

"""Is a value of a manifest's JSON what the format allows? Each function returns it, or raises ValueError."""

from __future__ import annotations

import re
from typing import Any, NoReturn

SHA256 = re.compile(r"[0-9a-f]{64}", re.ASCII)


def mapping(value: object, name: str) -> dict[str, Any]:
    """An object."""
    if not isinstance(value, dict):
        wrong(name, value)
    return value


def items(document: dict[str, Any], key: str) -> list[Any]:
    """A list."""
    value = document.get(key)
    if not isinstance(value, list):
        wrong(key, value)
    return value


def string(document: dict[str, Any], key: str) -> str:
    """A string."""
    value = document.get(key)
    if not isinstance(value, str):
        wrong(key, value)
    return value


def strings(document: dict[str, Any], key: str) -> dict[str, str]:
    """An object whose values are strings."""
    value = document.get(key)
    if not isinstance(value, dict) or not all(isinstance(v, str) for v in value.values()):
        wrong(key, value)
    return value


def match(document: dict[str, Any], key: str, pattern: re.Pattern[str]) -> str:
    """A string that is wholly of this pattern."""
    text = document.get(key)
    if not isinstance(text, str) or not pattern.fullmatch(text):
        wrong(key, text)
    return text


def count(document: dict[str, Any], key: str, limit: int) -> int:
    """A whole number from 0 to below ``limit``."""
    value = document.get(key)
    if type(value) is not int or not 0 <= value < limit:
        wrong(key, value)
    return value


def wrong(name: str, value: object) -> NoReturn:
    """Raise the ValueError for a value."""
    raise ValueError(f"{name} is {repr(value)[:80]}")


def are_lists_of(entries: object, *types: type) -> bool:
    """Whether it is a list of lists with values of these types."""
    return isinstance(entries, list) and all(
        isinstance(entry, list) and tuple(map(type, entry)) == types for entry in entries
    )

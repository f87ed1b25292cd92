"""How do answers become a recipe and the two commands that use it?"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from k5cache.shared.command_line import command
from k5cache.shared.outputs import kind_of
from k5cache.sources.find import default_name
from k5train.recipes.answers import Answers
from k5train.recipes.compose import compose


def compose_from(answers: Mapping[str, Any]) -> str:
    """The whole recipe.

    Args:
        answers: by their names in ``Answers``; what is missing has its default.
    """
    return compose(answers_from(answers))


def answers_from(answers: Mapping[str, Any]) -> Answers:
    """Answers by their names, as what recipes are composed of."""
    names = {field.name for field in fields(Answers)}
    return Answers(**{name: value for name, value in answers.items() if name in names})


def cache_of(source: Path, offered: Mapping[str, Any]) -> str:
    """Where the cache of a source will be: where it was, or in a folder that is new or a cache."""
    if offered.get("cache") and offered.get("source") == str(source):
        return str(offered["cache"])
    path = Path("cache") / default_name(source)
    is_free = kind_of(path) == "cache" or not (path.exists() and any(path.iterdir() if path.is_dir() else [path]))
    return path.as_posix() if is_free else f"{path.as_posix()}-k5"


def commands_of(answers: Mapping[str, Any]) -> tuple[str, str]:
    """The command that encodes and the one that trains, to copy."""
    cache, recipe = answers["cache"], answers["recipe"]
    encode = command("k5cache", "encode", answers["source"], "-o", cache, sources=answers.get("sources"), recipe=recipe)
    return encode, command("k5train", "run", cache, recipe=recipe)

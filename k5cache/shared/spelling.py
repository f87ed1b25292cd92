"""Which option was meant by a name that is none? It is looked for in all tables, and among other trainers' words."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import typing
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from k5cache.shared.other_words import WORDS, word

_NEAR = 0.5  # the least likeness of a name in the same table
_NEAR_ELSEWHERE = 0.75
_AWAY = 0.1  # how much more like a name in another table must be


def problem_of(
    kind: str, name: str, value: Any, where: str, own: Sequence[str], schemas: Mapping[str, type[Any]]
) -> str | None:
    """What is said of a name that is no option; None if its value asks for what happens here anyway.

    Args:
        kind: ``table``, ``key`` or ``option``.
        where: the table that it stands in; empty for the recipe itself.
        own: the names of that table.
        schemas: all tables.

    Returns:
        such as ``[train.lora] unknown key 'rnak'; did you mean 'rank'?``
    """
    meaning = word(name, where)
    if meaning and meaning.asks_nothing(value):
        return None
    if meaning and meaning.why:
        return f"{where}.{name} {meaning.why}" if where else f"{name} {meaning.why}"
    meant = [meaning.option or ""] if meaning else _meant(name, where, own, _all_names(tuple(schemas.items())))
    suggestion = f"; did you mean {' or '.join(map(repr, meant))}?" if meant else ""
    return f"{f'[{where}] ' if where else ''}unknown {kind} {name!r}{suggestion}"


def _meant(name: str, where: str, own: Sequence[str], names: Sequence[str]) -> list[str]:
    """The options that may be meant; several if nothing tells them apart."""
    distances = {full: (-_shared(where, full), full.count(".")) for full in names if name in _endings(full)}
    if distances:
        return [full for full, distance in distances.items() if distance == min(distances.values())]
    alike = {ending: full for full in reversed(names) for ending in _endings(full)}
    alike |= {other: meaning.option for other, meaning in WORDS.items() if meaning.option}
    here, there = _nearest(name, own, _NEAR), _nearest(name, list(alike), _NEAR_ELSEWHERE)
    if here and (not there or _likeness(name, there) < _likeness(name, here) + _AWAY):
        return [here]
    return [alike[there]] if there else []


def _nearest(name: str, names: Sequence[str], cutoff: float) -> str | None:
    return next(iter(difflib.get_close_matches(name, names, n=1, cutoff=cutoff)), None)


def _likeness(name: str, other: str) -> float:
    return difflib.SequenceMatcher(None, other, name).ratio()


def _endings(full: str) -> tuple[str, ...]:
    """``train.lora.rank`` may be called ``rank``, ``lora_rank`` or ``train_lora_rank``."""
    keys = full.split(".")
    return tuple("_".join(keys[i:]) for i in range(len(keys)))


def _shared(where: str, full: str) -> int:
    """How many tables from the top two names have in common."""
    pairs = zip(where.split("."), full.split("."), strict=False)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), min(where.count("."), full.count(".")) + 1)


@functools.lru_cache(maxsize=8)
def _all_names(schemas: tuple[tuple[str, type[Any]], ...]) -> Sequence[str]:
    """Those of a recipe: a recipe with many mistakes asks for them many times."""
    return tuple(_names(dict(schemas)))


def _names(schemas: Mapping[str, type[Any]]) -> Iterator[str]:
    """The full name of every option and of every table below the first."""
    for table, schema in schemas.items():
        hints = typing.get_type_hints(schema)
        for option in dataclasses.fields(schema):
            full = f"{table}.{option.name}"
            yield full
            if dataclasses.is_dataclass(hints[option.name]):
                yield from _names({full: typing.cast(type[Any], hints[option.name])})

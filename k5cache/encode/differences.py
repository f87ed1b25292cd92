"""Is a cache what this recipe would make? Each difference by name, with both values, as a person reads them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from k5cache.shared.checkpoint import ENCODER_PARTS
from k5cache.shared.errors import CacheError, CacheStale

TABLES = ("text", "latents", "selection")


"""The parts of a recipe that decide rows. ``text`` is in every text key, ``latents`` in every latent key,
``selection`` says which rows there are."""


@dataclass(frozen=True)
class Difference:
    """One field of a recipe that a cache was made with and that is another now."""

    table: str
    key: str
    cached: Any
    now: Any

    def __str__(self) -> str:
        return self._say("in the cache", "now")

    def between(self, first: object, second: object) -> str:
        """The difference between two caches."""
        return self._say(f"in {first}", f"in {second}")

    def _say(self, there: str, here: str) -> str:
        name = f"{self.table}.{self.key}"
        if self.key in ENCODER_PARTS and self.cached and self.now:
            kind = "vocabulary" if self.key.startswith("tokenizer") else "weights"
            return f"{name} has other {kind} ({self.cached[:8]} {there}, {self.now[:8]} {here})"
        return f"{name} is {_shown(self.cached)} {there}, {_shown(self.now)} {here}"

    def to_json(self) -> dict[str, Any]:
        """``{"field", "cached", "now"}``."""
        return {"field": f"{self.table}.{self.key}", "cached": self.cached, "now": self.now}


def differences(
    cached: Mapping[str, Any], wanted: Mapping[str, Any], tables: Sequence[str] = TABLES
) -> list[Difference]:
    """Every value that changes the numbers or the rows and is not the same, in order."""
    return [
        Difference(table, key, was.get(key), now.get(key))
        for table in tables
        for was, now in [(_table(cached, table), _table(wanted, table))]
        for key in dict.fromkeys([*was, *now])
        if was.get(key) != now.get(key)
    ]


def consequences(found: Sequence[Difference]) -> str:
    """What ``--update`` would encode again for these differences."""
    tables = {difference.table for difference in found}
    again = [name for name, needs in (("captions", "text"), ("images", "latents")) if needs in tables]
    if "selection" in tables:
        again.append("whatever the selection changes")
    return " and ".join(again)


def refuse(root: Path, found: Sequence[Difference]) -> CacheStale:
    """The error for a cache that another recipe made."""
    return CacheStale(
        f"{root} was encoded with another recipe: {'; '.join(map(str, found))}",
        f"Run the same command with --update to encode {consequences(found)} again; what it replaces stays until "
        "`k5cache gc`. Or set these options back, or encode into a new cache with -o OTHER",
    )


def table_of(root: Path, recipe: Mapping[str, Any], name: str, *keys: str) -> Mapping[str, Any]:
    """One of ``TABLES`` of a cache, where ``keys`` are needed of it.

    Raises:
        CacheError: it lacks one: another program made the cache.
    """
    table = _table(recipe, name)
    if missing := [key for key in keys if key not in table]:
        raise CacheError(
            f"{root} was not made by `k5cache encode`: its recipe has no {name}.{missing[0]}",
            "Encode into a new cache: k5cache encode SOURCE -o OTHER",
        )
    return table


def _table(recipe: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    table = recipe.get(name)
    return table if isinstance(table, dict) else {}


def _shown(value: Any) -> str:
    if value is None:
        return "not set"
    text = repr(value)
    return text if len(text) <= 72 else f"{text[:50]}...{text[-15:]}"

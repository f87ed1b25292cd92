"""Is a cache what this recipe would make? Names each difference with both values, for a person to read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from k5cache.shared.checkpoint import ENCODER_PARTS
from k5cache.shared.command_line import command
from k5cache.shared.errors import CacheError, CacheStale
from k5cache.shared.kind import LONG_NAMES, Kind
from k5cache.shared.model import ModelConfig
from k5cache.store.notes import Part

TABLES = ("text", "latents", "selection")
"""The parts of a recipe that decide rows. ``text`` is part of every text key, ``latents`` of every latent key, and
``selection`` decides which rows there are."""


@dataclass(frozen=True)
class Difference:
    """One field of a recipe whose value differs from the one that the cache was made with."""

    table: str
    key: str
    cached: Any
    now: Any

    def __str__(self) -> str:
        return self._sentence("in the cache", "now")

    def between(self, first: object, second: object) -> str:
        """The difference as a sentence about two caches."""
        return self._sentence(f"in {first}", f"in {second}")

    def _sentence(self, there: str, here: str) -> str:
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
    differing: list[Difference] = []
    for table in tables:
        was, now = _table(cached, table), _table(wanted, table)
        differing += [
            Difference(table, key, was.get(key), now.get(key))
            for key in dict.fromkeys([*was, *now])
            if was.get(key) != now.get(key)
        ]
    return differing


def consequences(differing: Sequence[Difference]) -> str:
    """What ``--update`` would encode again because of these differences."""
    tables = {difference.table for difference in differing}
    again = [name for name, needs in (("captions", "text"), ("images", "latents")) if needs in tables]
    if "selection" in tables:
        again.append("whatever the selection changes")
    return " and ".join(again)


def refuse(root: Path, differing: Sequence[Difference]) -> CacheStale:
    """The error for a cache that another recipe made."""
    return CacheStale(
        f"{root} was encoded with another recipe: {'; '.join(map(str, differing))}",
        f"Run the same command with --update to encode {consequences(differing)} again; what it replaces stays until "
        "`k5cache gc`. Or set these options back, or encode into a new cache with -o OTHER",
    )


def refuse_kind(root: Path, cached: Kind, wanted: Kind, model: ModelConfig, source: Path) -> CacheStale:
    """The error for a cache for text-to-image and a model for image-to-image, or the reverse. No update helps."""
    sources = ("--sources", "SOURCES") if wanted == "i2i" else ()
    again = command("k5cache", "encode", source, *sources, "-o", "OTHER", model=model.path)
    return CacheStale(
        f"{root} was encoded for {LONG_NAMES[cached]}, and {model.source} is for {LONG_NAMES[wanted]}",
        f"Encode into another cache: {again}",
    )


def refuse_part(root: Path, cached: Part | None, wanted: Part | None) -> CacheStale:
    """The error for a cache of another part of a source, or of the whole of it."""
    holds = f"holds {cached.name} of a source" if cached else "was encoded without --part"
    asked = f"part {wanted} was asked for" if wanted else "the whole source was asked for"
    own = f"give --part {cached}" if cached else "leave --part out"
    if cached and len(cached.numbers) > 1:
        own = "encode the parts that are missing and merge them with it"
    return CacheStale(f"{root} {holds}, and {asked}", f"Encode into another cache with -o OTHER, or {own}")


def refuse_model(root: Path, model: str, differing: Sequence[Difference], fix: str) -> CacheStale:
    """The error for a model, by its source, that did not encode this cache."""
    return CacheStale(f"{root} was not encoded by {model}: {'; '.join(map(str, differing))}", fix)


def table_of(root: Path, recipe: Mapping[str, Any], name: str, *keys: str) -> Mapping[str, Any]:
    """One of ``TABLES`` of a cache.

    Raises:
        CacheError: the table lacks one of ``keys``: another program made the cache.
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

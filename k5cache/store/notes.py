"""What does a manifest note of the source, for the next encode and for a merge? Readers of rows use none of it."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

from k5cache.store import values

MOST_PARTS = 1_000_000
_SOURCE = re.compile(r"[0-9a-f]{0,64}", re.ASCII)


@dataclass(frozen=True)
class SourceNote:
    """Two hashes of the source that was encoded. In the JSON they are one string, one after the other."""

    listing: str = ""
    """Hash of paths, sizes, times, captions and masks: 32 hex digits, or empty if nothing is noted."""
    stats: str = ""
    """Hash of the files' stats: 32 hex digits, or empty if stats alone cannot show that the source is the same."""

    @classmethod
    def parse(cls, text: str) -> SourceNote:
        """The note in a manifest's ``source``."""
        return cls(text[:32], text[32:])

    def __str__(self) -> str:
        return self.listing + self.stats


@dataclass(frozen=True)
class LeftOut:
    """What the last encode could not use, so that the next one says so without trying it again."""

    skipped: tuple[tuple[str, str], ...] = ()
    """(path, reason) of everything in the source that has no row."""
    failed: dict[str, str] = field(default_factory=dict)
    """Key of latents or of a mask -> why the image or mask of these bytes cannot be decoded."""
    decoders: str = ""
    """The versions of what tried to decode them: others may succeed."""
    truncated: tuple[tuple[str, int, str], ...] = ()
    """(text key, number of characters, beginning of the caption) of captions whose last characters were cut off."""


@dataclass(frozen=True)
class Part:
    """Which parts of a source a cache holds, of how many."""

    numbers: tuple[int, ...]
    """From 1 on, ascending. An encode has one; a merge of some of the parts has several."""
    of: int

    def __str__(self) -> str:
        return f"{','.join(map(str, self.numbers))}/{self.of}"

    @property
    def name(self) -> str:
        """``part 3 of 8``, or ``parts 1, 2 and 4 of 8``."""
        return f"{numbered(self.numbers)} of {self.of}"

    @property
    def arguments(self) -> tuple[str, ...]:
        """For `k5cache encode`: ``--part 3/8``. Parts that were merged are encoded each by itself."""
        return ("--part", str(self) if len(self.numbers) == 1 else f"I/{self.of}")


def arguments_of(part: Part | None) -> tuple[str, ...]:
    """``Part.arguments``; none for the whole of a source."""
    return part.arguments if part else ()


def numbered(numbers: tuple[int, ...]) -> str:
    """``part 3``, or ``parts 1, 2 and 4``."""
    *first, last = map(str, numbers)
    return f"parts {', '.join(first)} and {last}" if first else f"part {last}"


def read_source_note(document: dict[str, Any]) -> SourceNote:
    """``source`` of a manifest's JSON. Raises ValueError."""
    return SourceNote.parse(values.match({"source": "", **document}, "source", _SOURCE))


def read_part(document: object) -> Part | None:
    """``part`` of a manifest's JSON. Raises ValueError."""
    if document is None:
        return None
    value = values.mapping(document, "part")
    of, numbers = values.count(value, "of", MOST_PARTS + 1), values.items(value, "numbers")
    is_sound = all(type(number) is int and 1 <= number <= of for number in numbers)
    if not numbers or not is_sound or sorted(set(numbers)) != numbers:
        values.wrong("part", value)
    return Part(tuple(numbers), of)


def read_left_out(document: object) -> LeftOut:
    """``left_out`` of a manifest's JSON. Raises ValueError."""
    value = {"skipped": [], "failed": {}, "decoders": "", "truncated": [], **values.mapping(document, "left_out")}
    skipped, truncated = value["skipped"], value["truncated"]
    is_sound = values.are_lists_of(skipped, str, str) and values.are_lists_of(truncated, str, int, str)
    if not is_sound or not isinstance(value["decoders"], str):
        values.wrong("left_out", value)
    failed = values.strings(value, "failed")
    return LeftOut(tuple(map(tuple, skipped)), failed, value["decoders"], tuple(map(tuple, truncated)))

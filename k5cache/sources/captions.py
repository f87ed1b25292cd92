"""What are the captions of an image? They come from a text file's lines, its name, an option or a table's cell."""

from __future__ import annotations

import re
from dataclasses import dataclass
from datetime import date, time
from decimal import Decimal
from typing import Any

from k5cache.options import CacheConfig

Captions = tuple[str, ...] | str
"""One or more captions; or, as a string, why there is none.

Each is the very text that its user wrote, with the white space around it: the pipeline's cleaning begins with ftfy,
which reads an ending such as ``Ã`` and a no-break space as one letter.
"""
_KINDS: dict[type, str] = {dict: "an object", list: "a list in a list", bytes: "bytes"}
_NEWLINES = re.compile(r"[\r\n]+")
_SURROGATE = re.compile("[\ud800-\udfff]")  # JSON can write one; it can be neither printed nor stored
_SPACES = re.compile(" +")


@dataclass(frozen=True)
class Unusable:
    """In the place of a table's cell: why there is none."""

    reason: str


def from_lines(text: str) -> Captions:
    """One caption a line; blank lines are ignored."""
    return tuple(line for line in _NEWLINES.split(text) if line.strip()) or "empty caption"


def from_file_name(name: str) -> Captions:
    """``sub/red_fox-at dusk.jpg`` -> ``red fox at dusk``: folders are ignored."""
    stem = name.replace("\\", "/").rpartition("/")[2]
    stem = stem.rpartition(".")[0] or stem
    caption = _SPACES.sub(" ", stem.replace("_", " ").replace("-", " "))
    return (caption,) if caption.strip() else "empty caption"


def from_cell(value: Any) -> Captions:
    """A table's cell: a caption, or a list of them. Empty ones are ignored."""
    if isinstance(value, Unusable):
        return value.reason
    # A number that is not equal to itself is NaN, which is how pandas writes a cell without a value.
    values = [v for v in (value if isinstance(value, list | tuple) else [value]) if v is not None and v == v]
    refused = next((v for v in values if not isinstance(v, str | int | float | Decimal | date | time)), None)
    if refused is not None:
        return f"its caption is not text but {_KINDS.get(type(refused), type(refused).__name__)}"
    captions = tuple(text for text in map(str, values) if text.strip())
    if any(not text.isascii() and _SURROGATE.search(text) for text in captions):
        return "its caption has half a character (a lone surrogate)"
    return captions or "empty caption"


def finish(captions: Captions, config: CacheConfig) -> Captions:
    """Put the trigger before each caption. This is the last step of every strategy, for text-to-image."""
    if isinstance(captions, str) or not config.trigger:
        return captions
    between = "" if config.trigger[-1].isspace() else ", "
    return tuple(f"{config.trigger}{between}{caption}" for caption in captions)


def with_trigger(instructions: tuple[str, ...], trigger: str) -> tuple[str, ...]:
    """Put the trigger behind each instruction, for image-to-image: its pipeline cuts off the first tokens for Qwen."""
    is_spaced = trigger[-1].isspace() or trigger[0].isspace()
    ends = [text.rstrip(" \t\r\n") for text in instructions]
    return tuple(f"{end}{' ' if is_spaced or end[-1:] in '.,;:!?' else ', '}{trigger.strip()}" for end in ends)


def without_source(name: str, config: CacheConfig) -> Captions | None:
    """The captions of a strategy that needs only the image's name or an option; None if it reads a file or a column."""
    if config.caption_strategy == "filename":
        return from_file_name(name)
    if config.caption_strategy == "instanceprompt":
        return (config.instance_prompt or "",)
    return None

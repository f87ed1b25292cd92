"""What are the captions of an image? They come from a text file's lines, its name, an option or a table's cell."""

from __future__ import annotations

import re
from dataclasses import dataclass
from datetime import date, time
from decimal import Decimal
from typing import Any

from k5cache.options import CacheConfig, CaptionLines
from k5cache.shared.kind import Kind
from k5cache.sources.variants import variants

Captions = tuple[str, ...] | str
"""One or more captions; or, as a string, why there is none.

Each is the very text that its user wrote, with the white space around it: the pipeline's cleaning begins with ftfy,
which reads an ending such as ``Ã`` and a no-break space as one letter.
"""
_KINDS: dict[type, str] = {dict: "an object", list: "a list in a list", bytes: "bytes"}
_NEWLINES = re.compile(r"[\r\n]+")
_SURROGATE = re.compile("[\ud800-\udfff]")  # JSON can write one; it can be neither printed nor stored
_MARKS = (".", ",", ";", ":", "!", "?")
JSON_FIELDS = ("caption", "text", "captions", "prompt")
"""Of a JSON file beside an image, where the captions are looked for; the first one that is not empty counts."""
_SPACES = re.compile(" +")


@dataclass(frozen=True)
class Unusable:
    """In the place of a table's cell: why there is none."""

    reason: str


def from_text(text: str, lines: CaptionLines = "each") -> Captions:
    """The text of a caption file by ``cache.caption_lines``; blank lines are ignored."""
    captions = tuple(line for line in _NEWLINES.split(text) if line.strip()) or "empty caption"
    if isinstance(captions, str) or lines == "each":
        return captions
    return captions[:1] if lines == "first" else (" ".join(captions),)


def from_json(value: Any, column: str | None) -> Captions:
    """A JSON file beside an image: text, a list of texts, or an object with a field of them.

    Args:
        column: ``cache.caption_column``, the field or the path to it: ``meta.caption``.
    """
    for field in column.split(".") if column else ():
        if not isinstance(value, dict) or field not in value:
            return f"has no field {column}"
        value = value[field]
    if column is None and isinstance(value, dict):
        fields = {name: value[name] for name in JSON_FIELDS if name in value}
        if not fields:
            return f"has no field {', '.join(JSON_FIELDS[:-1])} or {JSON_FIELDS[-1]}"
        value = next(filter(None, fields.values()), "")
    return from_cell(value)


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


def finish(captions: tuple[str, ...], config: CacheConfig, kind: Kind) -> tuple[str, ...]:
    """What is encoded of captions as written, in this order: variants, prefix and suffix, trigger. The last step of
    every strategy."""
    if config.shuffle_tags or config.wildcards:
        drawn = [
            variants(
                caption, shuffle=config.shuffle_tags, keep=config.keep_tokens, wildcards=config.wildcards,
                most=config.caption_variants,
            )
            for caption in captions
        ]  # fmt: skip
        captions = tuple(text for texts in drawn for text in texts if text.strip())
    if config.caption_prefix or config.caption_suffix:
        prefix, suffix = config.caption_prefix or "", config.caption_suffix or ""
        captions = tuple(between(caption, prefix, suffix) for caption in captions)
    if not config.trigger:
        return captions
    if kind == "i2i":
        return with_trigger(captions, config.trigger)
    return tuple(behind(config.trigger, caption) for caption in captions)


def between(caption: str, prefix: str, suffix: str) -> str:
    """A caption with ``cache.caption_prefix`` and ``cache.caption_suffix``."""
    if prefix:
        end = prefix.rstrip()
        caption = f"{prefix if prefix != end else f'{end} ' if end[-1] in _MARKS else f'{end}, '}{caption}"
    if suffix:
        end = caption.rstrip(" \t\r\n")
        is_apart = suffix[0].isspace() or suffix[0] in _MARKS
        caption = f"{end}{'' if is_apart else ' ' if end[-1:] in _MARKS else ', '}{suffix}"
    return caption


def behind(trigger: str, caption: str) -> str:
    """Put the trigger before a caption, for text-to-image."""
    return f"{trigger}{'' if trigger[-1].isspace() else ', '}{caption}"


def with_trigger(instructions: tuple[str, ...], trigger: str) -> tuple[str, ...]:
    """Put the trigger behind each instruction, for image-to-image: its pipeline cuts off the first tokens for Qwen."""
    is_spaced = trigger[-1].isspace() or trigger[0].isspace()
    ends = [text.rstrip(" \t\r\n") for text in instructions]
    return tuple(f"{end}{' ' if is_spaced or end[-1:] in _MARKS else ', '}{trigger.strip()}" for end in ends)


def without_source(name: str, config: CacheConfig) -> Captions | None:
    """The captions of a strategy that needs only the image's name or an option; None if it reads a file or a column."""
    if config.caption_strategy == "filename":
        return from_file_name(name)
    if config.caption_strategy == "instanceprompt":
        return (config.instance_prompt or "",)
    return None

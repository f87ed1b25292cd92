"""What are the captions of an image? From a text file's lines, its name, an option or a table's cell."""

from __future__ import annotations

import re
from typing import Any

from k5cache.options import CacheConfig

Captions = tuple[str, ...] | str
"""One or more captions; or, as a string, the reason why there is none."""
_NEWLINES = re.compile(r"[\r\n]+")


def from_lines(text: str) -> Captions:
    """One caption a line; blank lines count for nothing."""
    return tuple(line for line in map(str.strip, _NEWLINES.split(text)) if line) or "empty caption"


def from_file_name(name: str) -> Captions:
    """``red_fox-at dusk.jpg`` -> ``red fox at dusk``; folders before it count for nothing."""
    stem = name.replace("\\", "/").rpartition("/")[2]
    stem = stem.rpartition(".")[0] or stem
    caption = " ".join(stem.replace("_", " ").replace("-", " ").split())
    return (caption,) if caption else "empty caption"


def from_cell(value: Any) -> Captions:
    """A table's cell: a caption, or a list of them. Empty ones count for nothing."""
    values = value if isinstance(value, list | tuple) else [value]
    if any(isinstance(v, dict | list | bytes) for v in values):
        return f"its caption is not text but {type(values[0]).__name__}"
    found = tuple(text for text in (str(v).strip() for v in values if v is not None) if text)
    return found or "empty caption"


def finish(captions: Captions, config: CacheConfig) -> Captions:
    """What every strategy does last: the trigger in front."""
    if isinstance(captions, str) or not config.trigger:
        return captions
    between = "" if config.trigger[-1].isspace() else ", "
    return tuple(f"{config.trigger}{between}{caption}" for caption in captions)


def without_source(name: str, config: CacheConfig) -> Captions | None:
    """The captions of the strategies that need nothing but the image's name; None where another source is needed."""
    if config.caption_strategy == "filename":
        return from_file_name(name)
    if config.caption_strategy == "instanceprompt":
        return ((config.instance_prompt or "").strip(),)
    return None

"""What is a caption without what is trained, for differential output preservation? Pure."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable

from k5cache.options import CacheConfig

_ASCII_WORD = re.compile(r"[A-Za-z0-9_]")


def class_of(config: CacheConfig) -> Callable[[str], str | None] | None:
    """A caption as encoded -> its class caption, with the trigger replaced by the class; None where it has no trigger.

    ``sks, a portrait`` with the class ``woman`` gives ``woman, a portrait``. The trigger must be a word of its own:
    ``cat`` is not replaced in ``category``. In scripts without spaces it may stand anywhere.

    Returns:
        None if no class is asked for.
    """
    word = (config.class_replaces or config.trigger or "").strip()
    class_word = config.class_word
    if class_word is None or not word:
        return None
    before = r"(?<![A-Za-z0-9_])" if _ASCII_WORD.match(word[0]) else ""
    after = r"(?![A-Za-z0-9_])" if _ASCII_WORD.match(word[-1]) else ""
    pattern = re.compile(f"{before}{re.escape(word)}{after}")

    def replaced(caption: str) -> str | None:
        text, count = pattern.subn(lambda match: class_word, caption)
        return text if count else None

    return replaced


def notice(captions: Iterable[str], config: CacheConfig) -> list[str]:
    """A sentence on captions without a class caption; none if all have one, or no class is asked for."""
    of_class = class_of(config)
    if of_class is None:
        return []
    different = set(captions)
    lacking = sorted(caption for caption in different if of_class(caption) is None)
    if not lacking:
        return []
    word = (config.class_replaces or config.trigger or "").strip()
    return [
        f"{len(lacking)} of {len(different)} captions do not have {word!r}, which cache.class_word replaces, such as"
        f" {lacking[0][:60]!r}: nothing is preserved for them"
    ]

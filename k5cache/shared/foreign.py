"""How is text shown that somebody else wrote: prompts, captions, names of files and keys? As text, and as nothing else.

A terminal obeys what follows an escape character, and rich reads ``[b]`` as markup. Everything that both command lines
print goes through ``Terminal``, which does neither. ``shown`` is for a text that must stay in one line of its own.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment

from k5cache.shared.urls import with_urls

# C0 and C1 control characters without tab and line break; marks that reverse or hide what follows; lone surrogates,
# which stand for bytes of a file name that are no text and cannot be printed.
_UNSEEN = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ufeff\ud800-\udfff]")
_BREAKS = re.compile(r"[\t\n]")
_MOST = 1000


def visible(text: str) -> str:
    r"""``text`` with control characters as escapes, such as ``\x1b``. Tabs and line breaks stay."""
    return _UNSEEN.sub(_escape, text)


def shown(text: str, most: int = _MOST) -> str:
    r"""``text`` in one line of at most ``most`` characters; line breaks are ``\n``."""
    line = _BREAKS.sub(_escape, visible(text[: most + 1]))
    return line if len(line) <= most else f"{line[: most - 3]}..."


def _escape(match: re.Match[str]) -> str:
    return match[0].encode("unicode_escape").decode("ascii")


class Terminal(Console):
    """A rich console that reads no markup in what it prints, and shows control characters instead of sending them."""

    def __init__(self, **options: Any) -> None:
        super().__init__(markup=False, emoji=False, highlight=False, soft_wrap=True, **options)

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        """rich's own segments, with their text made visible. Its control segments, which move the cursor, stay."""
        for segment in super().render(renderable, options):
            text = segment.text if segment.control else with_urls(segment.text)
            if text is segment.text and (segment.control or not _UNSEEN.search(text)):
                yield segment
            else:
                yield Segment(visible(text), segment.style)

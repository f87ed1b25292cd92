"""Which texts does one caption become by shuffled tags and wildcards? A function of the caption alone.

Stage 2 has no text encoder, so what other trainers draw anew in every step is drawn here, once, as rows to choose from.
"""

from __future__ import annotations

import hashlib
import random
import re
from collections.abc import Sequence

_TOKEN = re.compile(r"\\[{|}]|[{|}]|[^{|}\\]+|\\", re.DOTALL)
_DEEPEST = 20
_LONGEST = 50_000  # characters; the encoders take about 2,000, and millions of wildcards would take minutes
_MISSES = 16  # draws in a row that gave nothing new, for each variant wanted: then there are no more
_MOST_DRAWN = 1_000_000  # characters of one caption in all draws: else 50,000 of a{b|b} that never differ take 30 s
Part = str | tuple["Parts", ...]
"""Text, or the options of a wildcard."""
Parts = list[Part]


def variants(caption: str, *, shuffle: bool, keep: int, wildcards: bool, most: int) -> tuple[str, ...]:
    """Different texts of a caption, at most ``most``. They depend on nothing but these arguments.

    Args:
        shuffle: change the order of its tags; the first text has them in the order in which they are written.
        keep: the number of first tags that keep their places.
        wildcards: draw one of the parts of every ``{a|b|c}``.
    """
    if len(caption) > _LONGEST:
        return (caption,)
    parts: Parts = parse(caption) if wildcards else [caption]
    is_drawn = any(isinstance(part, tuple) for part in parts)
    if not is_drawn and not (shuffle and len(_tags(caption)) > keep + 1):
        return (_text(parts),)
    digest = hashlib.sha256(caption.encode("utf-8", "surrogatepass")).digest()
    rng = random.Random(int.from_bytes(digest[:8], "little"))
    texts: dict[str, None] = {}
    misses = draws = 0
    most_draws = _MOST_DRAWN // (len(caption) + 1)
    while len(texts) < most and misses < _MISSES * most and draws < most_draws:
        draws += 1
        text = _drawn(parts, rng)
        if shuffle and texts:
            text = _shuffled(text, keep, rng)
        misses = misses + 1 if text in texts else 0
        texts[text] = None
    return tuple(texts)


def parse(caption: str) -> Parts:
    """``a {red|blue} cat`` -> ``["a ", (["red"], ["blue"]), " cat"]``. Braces without ``|`` or partner are text."""
    if _is_too_deep(caption):
        return [caption]
    levels: list[list[Parts]] = [[[]]]
    """Of every open brace, the options so far; the first level is the caption itself."""
    for token in _TOKEN.findall(caption):
        if token == "{":
            levels.append([[]])
        elif token == "}" and len(levels) > 1:
            options = levels.pop()
            levels[-1][-1] += [tuple(options)] if len(options) > 1 else ["{", *options[0], "}"]
        elif token == "|" and len(levels) > 1:
            levels[-1].append([])
        else:
            levels[-1][-1].append(token[-1] if len(token) == 2 and token[0] == "\\" else token)
    while len(levels) > 1:  # braces that are never closed
        first, *others = levels.pop()
        levels[-1][-1] += ["{", *first, *(part for option in others for part in ("|", *option))]
    return levels[0][0]


def _is_too_deep(caption: str) -> bool:
    depth = 0
    for brace in re.findall(r"[{}]", caption):
        depth = max(0, depth + (1 if brace == "{" else -1))
        if depth > _DEEPEST:
            return True
    return False


def _text(parts: Sequence[Part]) -> str:
    """Parts without wildcards, as text."""
    return "".join(part for part in parts if isinstance(part, str))


def _drawn(parts: Sequence[Part], rng: random.Random) -> str:
    return "".join(part if isinstance(part, str) else _drawn(part[_below(len(part), rng)], rng) for part in parts)


def _shuffled(text: str, keep: int, rng: random.Random) -> str:
    tags = _tags(text)
    for last in range(len(tags) - 1, keep, -1):  # Fisher and Yates
        other = keep + _below(last + 1 - keep, rng)
        tags[last], tags[other] = tags[other], tags[last]
    return ", ".join(tags)


def _tags(text: str) -> list[str]:
    return [tag for part in text.split(",") if (tag := part.strip())]


def _below(count: int, rng: random.Random) -> int:
    """A whole number from 0 to ``count - 1``. Only ``random()`` gives the same numbers in all versions of Python."""
    return int(rng.random() * count)

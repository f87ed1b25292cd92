"""How often is an image used that lies in a folder such as ``10_cat``? As kohya's trainers read the names. Pure."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable

from k5cache.shared.units import count_of

_NUMBERED = re.compile(r"(\d{1,6})_.+", re.ASCII | re.DOTALL)


def folder_repeats(path: str) -> int:
    """The number with which the name of a folder in ``path`` begins, the first that has one; 1 if none has."""
    names = (_NUMBERED.fullmatch(folder) for folder in path.split("/")[:-1])
    return next((int(name[1]) for name in names if name), 1)


def used_never(paths: Iterable[str]) -> list[str]:
    """The paths whose folder has the number 0."""
    return [path for path in paths if folder_repeats(path) == 0]


def described(paths: Iterable[str]) -> str:
    """``12 images 10 times, 40 images once``; "" if all are used once."""
    counts = sorted(Counter(map(folder_repeats, paths)).items(), reverse=True)
    if [repeats for repeats, _ in counts] == [1]:
        return ""
    return ", ".join(
        f"{count_of(count, 'image')} {'once' if repeats == 1 else f'{repeats} times'}" for repeats, count in counts
    )

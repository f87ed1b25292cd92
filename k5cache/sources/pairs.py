"""Which picture is the source of which, by their names? Pure: no file is looked at.

An edit is a pair of pictures: the source, as it was before, and the target, as it is after.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

MARK = ".source"
"""``cat.source.png`` is the source of ``cat.jpg``."""
SOURCES_OF = {
    "end": ("start",),
    "target": ("source", "input"),
    "output": ("input",),
    "after": ("before",),
}
"""How the names of targets end, after ``_`` -> the endings that their sources may have."""
NO_SOURCE = "has no source"
"""How the reason begins for which a picture without its partner is skipped."""
_SOURCE_ENDINGS = {ending for endings in SOURCES_OF.values() for ending in endings}
_ENDING = re.compile(rf"(.+)_({'|'.join(sorted({*SOURCES_OF, *_SOURCE_ENDINGS}))})", re.IGNORECASE | re.DOTALL)


@dataclass(frozen=True)
class Paired:
    """The pictures of one folder as pairs. A stem is a name without its last suffix."""

    sources: Mapping[str, str] = field(default_factory=dict)
    """Stem of a target -> name of its source."""
    used: frozenset[str] = frozenset()
    """Names of the pictures that are sources only."""
    refused: Mapping[str, str] = field(default_factory=dict)
    """Name of a picture without exactly one partner -> what is said of it."""


def pair(names: Iterable[tuple[str, str]]) -> Paired:
    """Pair the pictures of a folder: ``X_start`` with ``X_end``, and ``X.source`` with ``X``.

    Args:
        names: the stem and the name of every picture.
    """
    by_stem: dict[str, list[str]] = {}
    for stem, name in names:
        by_stem.setdefault(stem, []).append(name)
    candidates = {stem: found for stem in by_stem if (found := _sources_of(stem, by_stem))}
    sources = {stem: found[0] for stem, found in candidates.items() if len(found) == 1}
    known = {name for found in candidates.values() for name in found}
    alike = {_folded(stem): stem for stem in by_stem}
    refused = dict[str, str]()
    for stem, of_stem in by_stem.items():
        for name in of_stem:
            if len(candidates.get(stem, ())) > 1:
                refused[name] = has_several(candidates[stem])
            elif stem not in candidates and name not in known:
                refused[name] = _lone(stem, alike)
    of_targets = {name for stem in candidates for name in by_stem[stem]}
    return Paired(sources, frozenset(known - of_targets), refused)


def caption_stems(target: str) -> tuple[str, ...]:
    """The stems that a target's caption file may have: its own, and of ``X_end`` also ``X``."""
    ending = _ending(target)
    return (target, ending[0]) if ending and ending[1] in SOURCES_OF else (target,)


def without_ending(target: str) -> str:
    """``red_fox_end`` -> ``red_fox``, for captions that are made of names."""
    return caption_stems(target)[-1]


def has_several(names: Sequence[str]) -> str:
    """What is said of a target with more than one source."""
    return f"has {len(names)} sources, {' and '.join(sorted(names))}: keep one of them"


def similar_to(stem: str, stems: Iterable[str]) -> str | None:
    """A stem that differs only in the case of letters, or in how accents are written (macOS writes them apart)."""
    folded = _folded(stem)
    return next((other for other in stems if other != stem and _folded(other) == folded), None)


def _sources_of(stem: str, by_stem: Mapping[str, Sequence[str]]) -> list[str]:
    """The pictures that may be the source of ``stem``."""
    partners = [stem + MARK]
    ending = _ending(stem)
    if ending and ending[1] in SOURCES_OF:
        partners += [f"{ending[0]}_{of}" for of in SOURCES_OF[ending[1]]]
    return [name for partner in partners for written in _spellings(partner, stem) for name in by_stem.get(written, ())]


def _spellings(partner: str, stem: str) -> list[str]:
    """``fox_start`` -> ``fox_start``, ``fox_START``, ``fox_Start``: case counts in names, but not in their endings."""
    base, mark, end = partner.rpartition("." if partner == stem + MARK else "_")
    return [base + mark + written for written in (end, end.upper(), end.capitalize())]


def _ending(stem: str) -> tuple[str, str] | None:
    """``fox_END`` -> ``fox``, ``end``; None if it ends otherwise."""
    match = _ENDING.fullmatch(stem)
    return (match[1], match[2].lower()) if match else None


def _lone(stem: str, alike: Mapping[str, str]) -> str:
    """What is said of a picture without a partner."""
    ending = _ending(stem)
    if stem.lower().endswith(MARK):
        target = stem[: -len(MARK)]
        return f"is a source without a target: there is no {target}.*" + _but(target, alike)
    if ending and ending[1] in _SOURCE_ENDINGS:
        base, of = ending
        targets = [f"{base}_{target}" for target, sources in SOURCES_OF.items() if of in sources]
        plain = f": if {base} is its target, rename it {base}{MARK}.*" if base in alike.values() else ""
        but = next((note for target in targets if (note := _but(target, alike))), plain)
        return f"is a source without a target: there is no {' or '.join(f'{target}.*' for target in targets)}{but}"
    sources = [f"{ending[0]}_{source}" for source in SOURCES_OF[ending[1]]] if ending else []
    sources.append(stem + MARK)
    but = next((note for source in sources if (note := _but(source, alike))), "")
    return f"{NO_SOURCE}: there is no {' or '.join(f'{source}.*' for source in sources)}{but}"


def _but(stem: str, alike: Mapping[str, str]) -> str:
    other = alike.get(_folded(stem))
    return f", but {other}.*, whose letters differ in case or accents" if other not in (None, stem) else ""


def _folded(text: str) -> str:
    return unicodedata.normalize("NFC", text).casefold()

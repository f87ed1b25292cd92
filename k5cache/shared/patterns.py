"""Does a regular expression that somebody else wrote match a whole name? In bounded time, whatever the expression is.

``re`` goes back and tries again, and a short expression such as ``((a+)+)+!`` can keep it busy for years. Here all
places of a name are followed at once, as bits of one number, so nothing is tried twice. The answers are those of
``re.fullmatch``.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

_sre: Any = re._parser  # type: ignore[attr-defined]  # the only parser of exactly re's notation
LONGEST = 2_000
"""Characters of an expression."""
MOST_STEPS = 100_000
"""Parts of an expression that are tried in all, about 0.2 s. Over 600 names, ordinary expressions need 20,000."""
_FEW_CHOICES, _FEW_REPEATS = 8, 2  # at most 2**6 * 100**2 / 2 tries for a name of 100 characters

_CATEGORIES: dict[str, Callable[[str], bool]] = {
    "CATEGORY_DIGIT": str.isdecimal,
    "CATEGORY_SPACE": str.isspace,
    "CATEGORY_WORD": lambda character: character.isalnum() or character == "_",
}
_REPEATS = ("MAX_REPEAT", "MIN_REPEAT")
_CHARACTERS = ("LITERAL", "NOT_LITERAL", "ANY", "IN")
_FOLLOWED = (*_REPEATS, *_CHARACTERS, "BRANCH", "SUBPATTERN", "ASSERT", "ASSERT_NOT", "AT")


class PatternProblem(ValueError):
    """Why an expression is not used: a phrase that follows its name, such as ``takes too long``."""


@dataclass
class Steps:
    """How many steps are left for all expressions of one file or recipe."""

    left: float = MOST_STEPS


class Pattern:
    """An expression to match names with.

    Args:
        steps: shared by expressions that come together. None: it has ``MOST_STEPS`` of its own.

    Raises:
        PatternProblem: it is too long, is not a regular expression, or has parts that cannot be bounded.
    """

    def __init__(self, text: str, steps: Steps | None = None) -> None:
        if len(text) > LONGEST:
            raise PatternProblem(f"has {len(text):,} characters, and at most {LONGEST:,} are allowed")
        try:
            with warnings.catch_warnings(action="ignore"):  # of notation that may mean something else one day
                self._tree = _sre.parse(text)
                choices, repeats = _count(self._tree)
                self.is_quick = choices <= _FEW_CHOICES and repeats <= _FEW_REPEATS and not _is_nested(self._tree)
                """Whether it may also be given to a library that uses ``re``."""
                self._simple = re.compile(text) if self.is_quick and choices <= 2 and repeats <= 1 else None
        except re.error as error:
            raise PatternProblem(f"is not a regular expression: {error}") from None
        except (RecursionError, OverflowError):
            raise PatternProblem("is nested too deeply") from None
        self._ignores_case = bool(self._tree.state.flags & re.IGNORECASE)
        self._meant: dict[tuple[int, bool, str], bool] = {}
        self._steps = steps or Steps()

    def fullmatch(self, name: str) -> bool:
        """Whether the expression is all of ``name``, as ``re.fullmatch``.

        Raises:
            PatternProblem: no steps are left.
        """
        if self._simple:  # such as the name of a module: re cannot go back often, and is faster
            return self._simple.fullmatch(name) is not None
        return bool(_Matcher(name, self._ignores_case, self._steps, self._meant).follow(self._tree, 1) >> len(name) & 1)


def _count(tree: Any) -> tuple[int, int]:
    """How often an expression leaves ``re`` a choice, and how many of these choices are repetitions.

    Raises:
        PatternProblem: it has what is not regular: references to groups, and groups that give nothing back.
    """
    choices = repeats = 0
    for kind, value in tree:
        choices += str(kind) in (*_REPEATS, "BRANCH")
        choices += _FEW_CHOICES if str(kind) in _REPEATS and value[0] > _FEW_CHOICES else 0  # re counts one by one
        repeats += str(kind) in _REPEATS and value[1] > 1
        if str(kind) not in _FOLLOWED:
            names = {"GROUPREF": "a reference to a group", "GROUPREF_EXISTS": "a condition on a group"}
            raise PatternProblem(f"has {names.get(str(kind), 'a group or a repetition that gives nothing back')}")
        for inner in _inner(str(kind), value):
            of_inner = _count(inner)
            choices, repeats = choices + of_inner[0], repeats + of_inner[1]
    return choices, repeats


def _is_nested(tree: Any, inside: bool = False) -> bool:
    """Whether a repetition has a choice inside it, so that ``re`` may try every combination."""
    for kind, value in tree:
        is_choice = str(kind) in (*_REPEATS, "BRANCH")
        is_repeated = str(kind) in _REPEATS and value[1] > 1
        if (inside and is_choice) or any(_is_nested(t, inside or is_repeated) for t in _inner(str(kind), value)):
            return True
    return False


def _inner(kind: str, value: Any) -> list[Any]:
    if kind in _REPEATS:
        return [value[2]]
    if kind == "BRANCH":
        return list(value[1])
    if kind == "SUBPATTERN":
        return [value[3]]
    return [value[1]] if kind in ("ASSERT", "ASSERT_NOT") else []


class _Matcher:
    """Follows an expression through one name. Places are the bits of a number: bit 3 is before the fourth character."""

    def __init__(self, name: str, ignores_case: bool, steps: Steps, meant: dict[tuple[int, bool, str], bool]) -> None:
        self._name = name
        self._ignores_case = ignores_case
        self._steps = steps
        self._meant = meant
        """(part of the expression, whether case counts, character) -> whether it is meant; for all names."""
        self._places: dict[tuple[int, bool], int] = {}

    def follow(self, tree: Any, places: int) -> int:
        """Where the expression can end if it begins at one of ``places``."""
        for node in tree:
            if not places:
                return 0
            self._steps.left -= 1
            if self._steps.left < 0:
                raise PatternProblem("takes too long to match")
            places = self._part(node, places)
        return places

    def _part(self, node: Any, places: int) -> int:
        kind, value = str(node[0]), node[1]
        if kind in _CHARACTERS:
            return (places & self._where(node)) << 1
        if kind in _REPEATS:
            return self._repeat(value, places)
        if kind == "BRANCH":
            ends = 0
            for branch in value[1]:
                ends |= self.follow(branch, places)
            return ends
        if kind == "SUBPATTERN":
            return self._group(value, places)
        if kind == "AT":
            return places & self._border(str(value))
        return self._look(value, places, wanted=kind == "ASSERT")

    def _group(self, value: Any, places: int) -> int:
        _, added, removed, tree = value
        before = self._ignores_case
        self._ignores_case = (before or bool(added & re.IGNORECASE)) and not removed & re.IGNORECASE
        ends = self.follow(tree, places)
        self._ignores_case = before
        return ends

    def _repeat(self, value: Any, places: int) -> int:
        least, most, tree = value
        follow = self._one_character(tree) or (lambda starts: self.follow(tree, starts))
        for _ in range(least):
            before, places = places, follow(places)
            if places in (0, before):
                break
        reached = new = places
        for _ in range(most - least):
            new = follow(new) & ~reached
            if not new:
                break
            reached |= new
        return reached

    def _one_character(self, tree: Any) -> Callable[[int], int] | None:
        """How ``\\w`` in ``\\w*`` goes on, without a step for each character."""
        if len(tree) != 1 or str(tree[0][0]) not in _CHARACTERS:
            return None
        where = self._where(tree[0])
        return lambda places: (places & where) << 1

    def _where(self, node: Any) -> int:
        """The places before a character that is meant."""
        key = (id(node), self._ignores_case)
        if key not in self._places:
            self._places[key] = sum(1 << i for i, character in enumerate(self._name) if self._is_meant(node, character))
        return self._places[key]

    def _is_meant(self, node: Any, character: str) -> bool:
        key = (id(node), self._ignores_case, character)
        if key not in self._meant:
            cases = {character, character.lower(), character.upper()} if self._ignores_case else {character}
            self._meant[key] = _is_any_meant(str(node[0]), node[1], cases)
        return self._meant[key]

    def _border(self, kind: str) -> int:
        """The places that ``^``, ``$``, ``\\b`` and the like mean."""
        end = 1 << len(self._name)
        if kind.startswith("AT_BEGINNING"):
            return 1
        if kind == "AT_END":
            return end | (end >> 1 if self._name.endswith("\n") else 0)
        if kind == "AT_END_STRING":
            return end
        words = [False, *(_CATEGORIES["CATEGORY_WORD"](character) for character in self._name), False]
        is_wanted = kind == "AT_BOUNDARY"
        return sum(1 << i for i in range(len(words) - 1) if (words[i] != words[i + 1]) == is_wanted)

    def _look(self, value: Any, places: int, wanted: bool) -> int:
        """The places before or behind which an expression is there, or is not."""
        direction, tree = value
        width = 0 if direction > 0 else tree.getwidth()[0]  # re allows only fixed widths behind a place
        kept = 0
        for place in range(len(self._name) + 1):
            if places >> place & 1:
                ends = self.follow(tree, 1 << place - width) if place >= width else 0
                is_there = bool(ends if direction > 0 else ends >> place & 1)
                kept |= (is_there == wanted) << place
        return kept


def _is_any_meant(kind: str, value: Any, cases: set[str]) -> bool:
    """Whether a part of an expression for one character means it, in any of its cases."""
    if kind == "ANY":
        return "\n" not in cases
    if kind in ("LITERAL", "NOT_LITERAL"):
        return (chr(value) in cases) == (kind == "LITERAL")
    is_negated = str(value[0][0]) == "NEGATE"
    items = value[1:] if is_negated else value
    return any(_is_in(str(item), of_item, case) for item, of_item in items for case in cases) != is_negated


def _is_in(kind: str, value: Any, character: str) -> bool:
    """Whether a character is in one part of ``[...]``."""
    if kind == "LITERAL":
        return ord(character) == value
    if kind == "RANGE":
        return bool(value[0] <= ord(character) <= value[1])
    category = str(value)
    return _CATEGORIES[category.replace("_NOT_", "_")](character) != ("_NOT_" in category)

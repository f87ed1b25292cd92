"""What is wrong with a recipe that is being written, and what is to be said of it? No torch, and no cache is opened.

Everything that a cache or a plan is needed for comes from the planner.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from k5cache.options import CacheConfig
from k5cache.shared.errors import K5Error, RecipeError
from k5cache.shared.foreign import shown
from k5cache.shared.model import ModelConfig, drawn_by, named_prompts
from k5cache.shared.origins import Document, Problem
from k5cache.shared.recipe import parse_toml, parse_with_problems
from k5train.options.extremes import extreme_values
from k5train.options.rate import rate_warnings
from k5train.options.train import TrainConfig
from k5train.options.without_effect import options_without_effect
from k5train.ui.new_run.allowed import path_problems
from k5train.ui.new_run.fields import LEFT_OUT, fields, value_in
from k5train.ui.project import Project

_MOST_CHARACTERS, _MOST_LINES = 100_000, 1000  # the longest of ours has 4,000 in 100; longer ones take long to check
SCHEMAS: dict[str, type[Any]] = {"model": ModelConfig, "cache": CacheConfig, "train": TrainConfig}
_LIBRARY = "train.validation.prompt_library"
_AT_LINE = re.compile(r"at line (\d+)")


@dataclass(frozen=True)
class Said:
    """Something about a recipe, for a person."""

    text: str
    name: str = ""
    """The option that it is about, if that has a field; it stands beside the field then."""
    line: int | None = None
    """Of the recipe's text."""
    fix: str = ""


@dataclass(frozen=True)
class Checked:
    """A recipe as far as it can be understood."""

    document: Mapping[str, Any] = field(default_factory=dict)
    is_toml: bool = True
    problems: tuple[Said, ...] = ()
    cautions: tuple[Said, ...] = ()
    config: TrainConfig | None = None
    """None if there is a problem."""
    model: ModelConfig | None = None
    """None if the recipe does not say which, or if there is a problem."""


def check(project: Project, text: str, models: Sequence[str] = ()) -> Checked:
    """All that is wrong with a recipe at once, in the words of the program; or what is to be said of it.

    Args:
        text: as TOML.
        models: as for ``path_problems``.
    """
    try:
        if is_too_long(text):
            raise RecipeError(
                f"The recipe is longer than {_MOST_LINES:,} lines or {_MOST_CHARACTERS:,} characters",
                "Start it in a terminal with --recipe",
            )
        document = Document(parse_toml(text, "The recipe", "See https://toml.io"), Path("recipe"), text)
    except RecipeError as error:
        line = _AT_LINE.search(error.problem)
        said = Said(shown(error.problem), line=int(line[1]) if line else None, fix=shown(error.fix))
        return Checked(is_toml=False, problems=(said,))
    (model, _, config), wrong = parse_with_problems(document, SCHEMAS)
    wrong = [*wrong, *path_problems(project, document, models)]
    problems = [_said(document, problem) for problem in wrong]
    if not problems:
        problems = _of_prompts(project, document)
    if problems:
        return Checked(document, problems=tuple(problems))
    lines = [*options_without_effect(config), *rate_warnings(config), *extreme_values(config)]
    return Checked(document, cautions=tuple(map(caution, lines)), config=config,
                   model=model if document.get("model") else None)  # fmt: skip


def is_too_long(text: str) -> bool:
    """Whether a recipe is longer than any that a person writes."""
    return len(text) > _MOST_CHARACTERS or text.count("\n") >= _MOST_LINES


def caution(line: str) -> Said:
    """A warning of a run, beside the option whose name it begins with. The form needs no ``--set``."""
    first = line.partition(" ")[0]
    return Said(shown(line.replace("Use --set ", "Use ")), first if first in fields() else "")


def _said(document: Document, problem: Problem) -> Said:
    """A problem beside its field, or with the line of the text if the option has none."""
    name = problem.name if problem.name in fields() else ""
    line = document.origin(problem.name)[1] if not name or value_in(document, name) is not LEFT_OUT else None
    return Said(shown(problem.text), name, line)


def _of_prompts(project: Project, document: dict[str, Any]) -> list[Said]:
    """What is wrong with what is to be drawn. A library is looked for from the project's folder."""
    library = value_in(document, _LIBRARY)
    try:
        if isinstance(library, str):
            named_prompts(project.inside(Path(library)))
        train = document.get("train", {})
        validation = {k: v for k, v in train.get("validation", {}).items() if k != "prompt_library"}
        drawn_by({"train": {"validation": validation}})
    except K5Error as error:
        named = str(project.root / library) if isinstance(library, str) else ""
        text = error.problem.replace(named, str(library)) if named else error.problem
        return [Said(shown(text), _LIBRARY if named else "", fix=shown(error.fix))]
    return []

"""Which paths may a recipe name that comes from the page? Those inside the project, repositories, and the page's model.

A terminal may name any path: whoever types there may read the machine's files anyway.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from k5cache.shared.foreign import shown
from k5cache.shared.inside import is_inside
from k5cache.shared.origins import Problem
from k5train.ui.new_run.fields import value_in
from k5train.ui.new_run.to_encode import held_by
from k5train.ui.project import Project

_REPOSITORY = re.compile(r"(?!\.)[\w.-]+/[\w.-]+", re.ASCII)
_MOST = 300  # characters of a path in a message
MODEL = "model.path"


def path_problems(project: Project, document: Mapping[str, Any], models: Sequence[str] = ()) -> list[Problem]:
    """What is wrong with the paths of a recipe: each is named with what to do instead.

    Args:
        models: folders outside the project that may be named all the same: those of the chosen caches, which a run
            uses without being told.
    """
    return [
        Problem(name, f"{name} names {shown(path, _MOST)}, which is outside the project. {_what_to_do(name)}")
        for name, path in paths_of(document)
        if not _is_allowed(project, name, path, models)
    ]


def paths_of(document: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """(name, path) of every path that a recipe names."""
    for name in (MODEL, "cache.source_dir", "train.lora.init_lora", "train.validation.prompt_library"):
        if isinstance(path := value_in(document, name), str):
            yield name, path
    for table, key in (("train.data", "cache"), ("train.validation.edits", "source")):
        entries = value_in(document, table)
        for number, entry in enumerate(entries if isinstance(entries, list) else []):
            if isinstance(entry, Mapping) and isinstance(entry.get(key), str):
                yield f"{table}[{number}].{key}", entry[key]


def in_project(project: Project, path: str) -> bool:
    """Whether a path, read from the project's folder, stays in it. One that cannot be a path does not."""
    if not path.strip() or path.startswith("~"):  # the home of somebody
        return not path.strip()
    try:
        return is_inside(project.root, project.root / path)
    except ValueError:  # a NUL
        return False


def local(project: Project, path: str) -> str:
    """A path as the project's folder would write it. One that leads out stays as it is."""
    absolute = os.path.join(project.root, path)  # noqa: PTH118 (links are not followed)
    if not os.path.isabs(path) or not in_project(project, path):  # noqa: PTH117
        return path
    return Path(os.path.relpath(absolute, project.root)).as_posix()


def models_of(project: Project, caches: Sequence[Path]) -> list[str]:
    """The models that caches were encoded with. What cannot be read names none."""
    held = (held_by(project, cache) for cache in caches)
    return [of_cache.model for of_cache in held if of_cache]


def _is_allowed(project: Project, name: str, path: str, models: Sequence[str]) -> bool:
    if in_project(project, path):
        return True
    if name != MODEL:
        return False
    is_repository = _REPOSITORY.fullmatch(path) and not os.path.lexists(project.root / path.partition("/")[0])
    return bool(is_repository) or path == project.model or path in models


def _what_to_do(name: str) -> str:
    if name == MODEL:
        return "Leave it out, name a repository, or start the page with --model and this folder"
    return "Copy it into the project, or start this run in a terminal"

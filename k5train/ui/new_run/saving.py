"""How is a recipe saved in the project, so that neither its editor nor another person loses anything?"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from k5cache.shared.errors import OutputError
from k5cache.shared.files import write_whole
from k5cache.shared.foreign import shown
from k5cache.shared.inside import name_problem
from k5cache.shared.outputs import check_file
from k5cache.shared.plain import read_text
from k5train.ui.editing import one_at_a_time
from k5train.ui.ids import id_of
from k5train.ui.new_run.draft import Draft
from k5train.ui.new_run.starts import RecipeFile, digest, is_recipe
from k5train.ui.project import Project

_MOST_BYTES = 1 << 20


class WouldReplace(OutputError):
    """A recipe of this name is there that the person at the form has not seen.

    Args:
        seen: a hash of what is in it now, with which it may be replaced.
    """

    def __init__(self, problem: str, fix: str, seen: str) -> None:
        super().__init__(problem, fix)
        self.seen = seen

    def __reduce__(self) -> tuple[type[WouldReplace], tuple[str, str, str]]:  # type: ignore[override]
        return type(self), (self.problem, self.fix, self.seen)


@dataclass(frozen=True)
class Changed:
    """How the file that a form was made from has changed since."""

    name: str
    is_gone: bool


def save(project: Project, draft: Draft) -> RecipeFile:
    """Write a recipe to the project's folder, whole or not at all.

    Raises:
        WouldReplace: the file is not the one that the form was made from, or was changed since.
        OutputError: the name cannot be that of a recipe, or the file cannot be written.
    """
    name = draft.save_as if draft.save_as.lower().endswith(".toml") else f"{draft.save_as}.toml"
    if problem := name_problem(draft.save_as) or name_problem(name):
        raise OutputError(f"The name of the recipe {problem}", "Give a name such as cats.toml")
    target = project.inside(Path(name))
    with one_at_a_time(project):
        there = _text_of(target)
        if there is not None and there != draft.text:
            _check_may_replace(name, there, draft)
        check_file(target, ".toml")
        write_whole(target, lambda path: path.write_text(draft.text, encoding="utf-8", newline="\n"))
    return RecipeFile(id_of(name), name, draft.text)


def _check_may_replace(name: str, there: str, draft: Draft) -> None:
    if not is_recipe(there):
        raise OutputError(f"{name} is there already, and is no recipe", "Choose another name")
    now = digest(there)
    is_the_same_file = draft.file == id_of(name)
    if now == draft.replaces or (is_the_same_file and now == draft.seen):
        return
    if is_the_same_file:
        raise WouldReplace(
            f"{name} was changed since you opened it, and was not saved over", "Choose another name, or replace it", now
        )
    raise WouldReplace(f"{name} is there already", "Choose another name, or replace it", now)


def changed(project: Project, draft: Draft) -> Changed | None:
    """Whether somebody else changed the file that a form was made from. None if not, or if there is none."""
    if not draft.file or not draft.save_as or id_of(draft.save_as) != draft.file:
        return None
    try:
        there = _text_of(project.inside(Path(draft.save_as)))
    except OutputError:
        there = None
    if there is None:
        return Changed(shown(draft.save_as), True)
    return None if digest(there) in (draft.seen, draft.replaces) else Changed(shown(draft.save_as), False)


def _text_of(path: Path) -> str | None:
    """What is in a file; None if there is none. What cannot be read as text is no recipe, and is never replaced."""
    try:
        return read_text(path, _MOST_BYTES)
    except FileNotFoundError:
        return None
    except (OSError, ValueError):
        return ""

"""What does the page of a new run show? The draft with what is said of it, as values for the template."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import PurePath

from markupsafe import Markup

from k5cache.shared.inside import name_problem
from k5cache.shared.option_list import Table
from k5train.options.train import FIXED
from k5train.ui.jobs import slots
from k5train.ui.listing import Entry, caches, runs
from k5train.ui.new_run import to_encode
from k5train.ui.new_run.allowed import models_of
from k5train.ui.new_run.checked import Checked, Said, check
from k5train.ui.new_run.draft import Draft
from k5train.ui.new_run.fields import FIRST, Field, fields, groups, value_in
from k5train.ui.new_run.launching import free_name
from k5train.ui.new_run.planning import Room, room
from k5train.ui.new_run.saving import Changed, changed
from k5train.ui.new_run.starts import Choice, RecipeFile, packaged_recipes, recipe_files
from k5train.ui.project import Project

_SENTENCE = re.compile(r"(.+?\.)(?:\s+(.*))?", re.DOTALL)
_MOST_RUNS = 12
_PROMPTS = "train.validation.prompts"
_SHORT_HELP = 110


def with_code(text: str) -> Markup:
    """A help whose words in backticks are code."""
    prose_and_code = text.split("`")
    marked = (Markup("<code>{}</code>") if i % 2 else Markup("{}") for i in range(len(prose_and_code)))
    return Markup().join(how.format(part) for how, part in zip(marked, prose_and_code, strict=True))


@dataclass(frozen=True)
class Shown:
    """One option as it stands in the form."""

    field: Field
    text: str
    is_changed: bool
    problems: tuple[str, ...] = ()
    cautions: tuple[str, ...] = ()

    @property
    def help(self) -> tuple[Markup, Markup]:
        """Its help: what stands there, and what unfolds."""
        text = self.field.help
        match = _SENTENCE.fullmatch(text)
        if len(text) <= _SHORT_HELP or match is None or not match[2]:
            return with_code(text), Markup()
        return with_code(match[1]), with_code(match[2])

    @property
    def table(self) -> str:
        """Its table, without that of the run: ``lora``. Empty for one of the run itself."""
        return self.field.name.removeprefix("train.").rpartition(".")[0]

    @property
    def lines(self) -> list[str]:
        """What is chosen of several."""
        return self.text.split("\n")


@dataclass(frozen=True)
class Fold:
    """A table of a recipe, folded."""

    name: str
    help: Markup
    options: tuple[Shown, ...]
    entries: tuple[Table, ...]

    @property
    def num_changed(self) -> int:
        """How many of its options have another value than their default."""
        return sum(shown.is_changed for shown in self.options)

    @property
    def is_wrong(self) -> bool:
        """Whether something is to be said of one of its options."""
        return any(shown.problems or shown.cautions for shown in self.options)


@dataclass(frozen=True)
class View:
    """The form and what stands beside it."""

    draft: Draft
    checked: Checked
    first: tuple[Shown, ...]
    folds: tuple[Fold, ...]
    problems: tuple[Said, ...]
    """Those that belong to no field."""
    cautions: tuple[Said, ...]
    caches: tuple[Entry, ...]
    chosen: tuple[Entry, ...]
    own_caches: tuple[str, ...]
    """Those that the recipe names itself; then none is chosen."""
    base_name: str
    """What the run is called if no other run is."""
    name: str
    """The name that is proposed for the run."""
    waits_for: str
    """What uses the GPU that the run needs; empty if it begins at once."""
    room: Room
    changed: Changed | None
    sweepable: tuple[str, ...]
    num_gpus: int
    """How many GPUs there are; 1 where there is only the processor."""

    @property
    def num_problems(self) -> int:
        """How many problems there are in all."""
        return len(self.checked.problems)

    @property
    def num_cautions(self) -> int:
        """How many cautions there are in all."""
        return len(self.checked.cautions)

    def options(self) -> list[Shown]:
        """Every option of the form."""
        return [*self.first, *(shown for fold in self.folds for shown in fold.options)]


@dataclass(frozen=True)
class Choices:
    """What a new run can start from."""

    packaged: dict[str, list[Choice]]
    files: tuple[RecipeFile, ...]
    runs: tuple[Entry, ...]
    """The newest."""


def choices(project: Project) -> Choices:
    """Everything that a new run can start from."""
    newest = sorted(runs(project), key=lambda run: run.changed, reverse=True)
    return Choices(dict(packaged_recipes()), tuple(recipe_files(project)), tuple(newest[:_MOST_RUNS]))


def chosen_caches(project: Project, draft: Draft) -> list[Entry]:
    """The chosen caches that are still there."""
    return [entry for entry in caches(project) if entry.id in draft.caches]


def checked_draft(project: Project, draft: Draft) -> tuple[Checked, list[Entry]]:
    """What is wrong with a draft, and its caches."""
    chosen = chosen_caches(project, draft)
    return check(project, draft.text, models_of(project, [cache.path for cache in chosen])), chosen


def view(project: Project, draft: Draft) -> View:
    """The form with what is said of it."""
    checked, chosen = checked_draft(project, draft)
    shown = {name: _shown(field, draft, checked) for name, field in fields().items()}
    own = _own_caches(draft)
    drawn_from = own[:1] or tuple(cache.relative for cache in chosen[:1])
    if checked.config and drawn_from and (note := to_encode.note(project, checked.config, drawn_from[0])):
        prompts = shown[_PROMPTS]
        shown[_PROMPTS] = replace(prompts, cautions=(*prompts.cautions, note))
    folds = tuple(
        Fold(group.name, with_code(group.help), tuple(shown[field.name] for field in group.fields), group.entries)
        for group in groups()
        if group.fields or group.entries
    )
    problems = [said for said in checked.problems if not said.name]
    missing = set(draft.caches) - {entry.id for entry in chosen}
    if missing:
        problems.append(Said("A chosen cache is no longer here: it was deleted, moved or renamed"))
    base = chosen[0].name if chosen else PurePath(own[0]).name if own else draft.save_as.removesuffix(".toml")
    base = "my_run" if name_problem(base) else base
    here = room(project)
    return View(
        draft, checked, tuple(shown[name] for name in FIRST), folds, tuple(problems),
        tuple(said for said in checked.cautions if not said.name), tuple(caches(project)), tuple(chosen), own,
        base, free_name(project, base), here.used_by, here, changed(project, draft), tuple(_sweepable()),
        len(slots.slots()),
    )  # fmt: skip


def _own_caches(draft: Draft) -> tuple[str, ...]:
    entries = value_in(draft.document, "train.data")
    named = [entry.get("cache") for entry in entries if isinstance(entry, dict)] if isinstance(entries, list) else []
    return tuple(str(cache) for cache in named)


def _shown(field: Field, draft: Draft, checked: Checked) -> Shown:
    def of(lines: Sequence[Said]) -> tuple[str, ...]:
        # Beside its field an option need not be named.
        return tuple(
            said.text.removeprefix(f"{field.name} ") + (f". {said.fix}" if said.fix else "")
            for said in lines
            if said.name == field.name
        )

    return Shown(
        field, draft.text_of(field.name), field.is_changed(draft.document), of(checked.problems), of(checked.cautions)
    )


def _sweepable() -> list[str]:
    """The options over which a sweep may go: not those that decide the base that all runs share."""
    words = (name for name in fields() if name.startswith("train.") and name.split(".")[1] not in FIXED)
    return [name for name in words if fields()[name].control != "lines" or name == "train.lora.targets"]

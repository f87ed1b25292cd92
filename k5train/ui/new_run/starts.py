"""What can a new run start from? A packaged recipe, one of the project, that of an earlier run, or defaults."""

from __future__ import annotations

import hashlib
import os
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from k5cache.shared.command_line import command
from k5cache.shared.errors import K5Error
from k5cache.shared.model import ModelConfig
from k5cache.shared.option_list import Table, tables
from k5cache.shared.plain import read_text
from k5cache.shared.recipe import TABLES
from k5cache.shared.urls import is_url, url_of
from k5train.options.train import TrainConfig
from k5train.recipes.listed import PACKAGED, row_of
from k5train.ui.ids import id_of
from k5train.ui.listing import Entry, NotHere, caches, find, runs
from k5train.ui.new_run.allowed import MODEL, local, paths_of
from k5train.ui.new_run.edited import assigned, comment_of, with_value
from k5train.ui.new_run.fields import Field, fields
from k5train.ui.project import Project

_MOST_FILES = 200
_MOST_BYTES = 1 << 20
DEFAULTS = "# A recipe in which every option has its default. What is set in the form is written here.\n"


@dataclass(frozen=True)
class RecipeFile:
    """A recipe of the project."""

    id: str
    name: str
    """With its ending: ``cats.toml``."""
    text: str

    @property
    def seen(self) -> str:
        """A hash of what was in it when it was read."""
        return digest(self.text)


@dataclass(frozen=True)
class Start:
    """What a form begins with."""

    text: str
    title: str
    """What it is, for a person."""
    file: RecipeFile | None = None
    caches: tuple[str, ...] = ()
    """Ids of the caches that are chosen."""
    save_as: str = ""
    """A name for the file, with its ending."""
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Choice:
    """A packaged recipe in a list."""

    name: str
    card: str
    images: str
    steps: str
    peak: str


def packaged_recipes() -> Mapping[str, list[Choice]]:
    """All of them by what they teach."""
    groups: dict[str, list[Choice]] = {}
    for name, recipe in PACKAGED.items():
        _, teaches, images, steps, peak = row_of(name)
        groups.setdefault(teaches, []).append(Choice(name, recipe.answers.vram or "any card", images, steps, peak))
    return groups


def digest(text: str) -> str:
    """A hash of a text."""
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def recipe_files(project: Project) -> list[RecipeFile]:
    """The recipes in the project's folder: TOML files whose tables are those of a recipe. Links out are left out."""
    return list(_recipe_files(project))


def _recipe_files(project: Project) -> Iterator[RecipeFile]:
    with os.scandir(project.root) as found:
        names = sorted(entry.name for entry in found if entry.name.endswith(".toml") and entry.is_file())
    for name in names[:_MOST_FILES]:
        try:
            text = read_text(project.inside(Path(name)), _MOST_BYTES)
        except (K5Error, OSError, ValueError):
            continue
        if is_recipe(text):
            yield RecipeFile(id_of(name), name, text)


def is_recipe(text: str) -> bool:
    """Whether a text has the tables of a recipe and no others. A recipe with a mistake in it is one too."""
    try:
        names = tomllib.loads(text).keys()
    except (ValueError, RecursionError):
        return any(line.strip().startswith(tuple(f"[{table}" for table in TABLES)) for line in text.split("\n"))
    return bool(names) and names <= set(TABLES)


def started(project: Project, recipe: str = "", file: str = "", run: str = "", chosen: Sequence[str] = ()) -> Start:
    """What a form begins with: a packaged recipe's name, or the id of a file or of a run.

    Args:
        chosen: ids of caches.

    Raises:
        NotHere: there is none of that name or id.
        K5Error: its files cannot be read.
    """
    if run:
        return of_run(project, find(runs(project), run))
    if file:
        found = next((f for f in _recipe_files(project) if f.id == file), None)
        if found is None:
            raise NotHere("This recipe is no longer here: it was deleted, moved or renamed", "Choose another one")
        return Start(found.text, found.name, found, _chosen(project, chosen), found.name)
    if recipe:
        if recipe not in PACKAGED:
            raise NotHere("There is no packaged recipe of this name", "Choose another one from the list")
        text = PACKAGED[recipe].as_file(f"{recipe}.toml")
        return Start(with_model(project, text), recipe, None, _chosen(project, chosen), f"{recipe}.toml")
    return Start(with_model(project, DEFAULTS), "defaults", None, _chosen(project, chosen))


def with_model(project: Project, text: str) -> str:
    """A recipe that names the page's model, if it names none itself."""
    if project.model is None or "path" in tomllib.loads(text).get("model", {}):
        return text
    return with_value(text, fields()[MODEL], local(project, project.model))


def _chosen(project: Project, chosen: Sequence[str]) -> tuple[str, ...]:
    """The caches that were asked for; or the only one."""
    entries = caches(project)
    if chosen:
        return tuple(find(entries, id).id for id in dict.fromkeys(chosen))
    return (entries[0].id,) if len(entries) == 1 else ()


def of_run(project: Project, run: Entry) -> Start:
    """The recipe of an earlier run, as short as it can be said, and its caches.

    Raises:
        K5Error: the run's files cannot be read, or a link in it leads out.
    """
    from k5cache.shared.inside import check_inside
    from k5train.runs.recipe import cache_of, read_facts, read_recipe

    check_inside(run.path, ("run.json", "recipe.toml"))
    document = read_recipe(run.path)
    train = document.get("train")
    if isinstance(train, dict):
        train.pop("name", None)
    _name_paths_from_here(project, document)
    chosen: list[str] = []
    notes: list[str] = []
    if not (isinstance(train, dict) and train.get("data")):
        recorded = cache_of(run.path, read_facts(run.path))
        cache = url_of(recorded) if is_url(recorded) else local(project, str(project.root / recorded))
        chosen = [entry.id for entry in caches(project) if entry.relative == cache]
        if not chosen:
            pull = f", or get it here: {command('k5cache', 'pull', cache)}" if is_url(recorded) else ""
            notes.append(f"{run.relative} was trained on {cache}, which is not under cache/: choose another one{pull}")
    return Start(as_text(document, f"The recipe of {run.relative}."), f"as {run.relative}", None, tuple(chosen),
                 notes=tuple(notes))  # fmt: skip


def _name_paths_from_here(project: Project, document: dict[str, Any]) -> None:
    for name, path in list(paths_of(document)):
        *tables_above, key = name.split(".")
        table: Any = document
        for part in tables_above:
            word, _, number = part.partition("[")
            table = table[word] if not number else table[word][int(number.rstrip("]"))]
        table[key] = local(project, path)


def as_text(document: Mapping[str, Any], title: str) -> str:
    """A recipe with what differs from the defaults, each value under the help of its option."""
    lines = [f"# {title} Options that are not set here have their defaults."]
    for table in tables({"model": ModelConfig, "train": TrainConfig}):
        values: Any = document
        for key in table.name.split("."):
            values = values.get(key, {}) if isinstance(values, Mapping) else {}
        if table.listed:
            for entry in values if isinstance(values, list) else []:
                lines += ["", f"[[{table.name}]]", *_entry(table, entry)]
        elif isinstance(values, Mapping):
            given = list(_given(table, values))
            lines += ["", f"[{table.name}]", *given] if given else []
    return "\n".join(lines) + "\n"


def _given(table: Table, values: Mapping[str, Any]) -> Iterator[str]:
    for option in table.options:
        field: Field | None = fields().get(f"{table.name}.{option.name}")
        if field and field.is_changed({**_nested(table.name, values)}):
            yield from (*comment_of(field), *assigned(option.name, values[option.name]))


def _nested(name: str, values: Mapping[str, Any]) -> Mapping[str, Any]:
    for key in reversed(name.split(".")):
        values = {key: values}
    return values


def _entry(table: Table, entry: Mapping[str, Any]) -> Iterator[str]:
    defaults = {option.name: option.default for option in table.options}
    for key, value in entry.items():
        if value != defaults.get(key):
            yield from assigned(key, value)

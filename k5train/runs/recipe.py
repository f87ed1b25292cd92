"""Which recipe does a run go on with? The one in ``run.json``, which has a checksum.

``recipe.toml`` is for people, who read and copy it. If somebody, or a failing disk, has changed a value in it, that is
neither obeyed nor passed over: the error names the value, and ``--set`` decides about it.
"""

from __future__ import annotations

import os
import tomllib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from k5cache.shared import console, places
from k5cache.shared.errors import RecipeError, RunError
from k5cache.shared.files import write_whole
from k5cache.shared.model import ModelConfig
from k5cache.shared.origins import Document
from k5cache.shared.places import Place, find, is_cache, is_model, place_of
from k5cache.shared.plain import read_plain
from k5cache.shared.recipe import parse, read, set_option, to_dict, to_toml, toml_value
from k5cache.shared.sealed import unseal_if_sealed, write_sealed
from k5cache.shared.urls import with_urls
from k5train.options.removed import without_removed
from k5train.options.train import TrainConfig
from k5train.runs.differences import differences

FILE = "run.json"
RECIPE = "recipe.toml"
FACTS = ("cache", "versions")
"""All that earlier versions wrote into ``run.json``, without a checksum. Then ``recipe.toml`` is the run's recipe."""
_MOST_NAMED = 3  # options in a command to copy


@dataclass(frozen=True)
class Facts:
    """What ``run.json`` says of a run."""

    cache: str
    """As its user wrote it."""
    versions: Mapping[str, str]
    recipe: str | None = None
    """As TOML. None: an earlier version started the run."""
    before: str | None = None
    """The recipe until now, while ``recipe.toml`` is being replaced: a kill may leave either of the two."""
    places: Mapping[str, Place] = field(default_factory=dict)
    """A path in the recipe, or of the cache, as its user wrote it -> where that was. Earlier versions kept none."""


def read_facts(root: Path) -> Facts:
    """Read ``run.json``.

    Raises:
        RunError: it has changed.
    """
    path = root / FILE
    try:
        document = unseal_if_sealed(read_plain(path), FACTS)
        texts = [document["cache"], document.get("recipe", ""), document.get("before", "")]
        if not all(isinstance(text, str) for text in texts):
            raise TypeError("a text is something else")
        were = {named: Place(*map(_text_of, place)) for named, place in document.get("places", {}).items()}
        return Facts(**{"versions": {}, **document, "places": were})
    except (ValueError, KeyError, TypeError) as error:
        raise RunError(
            f"{path} is not the file that was written, so it cannot be trusted to name the run's cache and recipe",
            f'To go on by {root / RECIPE}, write {{"cache": "PATH"}} into it, with the path of the cache',
        ) from error


def write_new(root: Path, cache: Path, versions: Mapping[str, str], model: ModelConfig, config: TrainConfig) -> None:
    """Write the two files of a new run. ``recipe.toml`` is the last: with it the folder is a run."""
    document = _document(model, config)
    named = with_urls(str(cache))
    text, paths = to_toml(document), [named, *(path for path, _, _ in _paths(document))]
    _write_facts(root, Facts(named, versions, text, places=_places(root, paths, {}, {})))
    _write_text(root, text)


def write_recipe(root: Path, model: ModelConfig, config: TrainConfig, cache: Path | None = None) -> None:
    """Make this the recipe of a run, in both files. A kill at any time leaves a run that goes on.

    If nothing changes, neither does ``recipe.toml``, into which its user may have written a comment.

    Args:
        config: a path in it may be where ``read_recipe`` found what the run names; the recipe keeps its name.
        cache: where the run's cache is now. None: where it was found.
    """
    facts, document = read_facts(root), _document(model, config)
    before = tomllib.loads(facts.recipe) if facts.recipe else {}
    names = {find(name, facts.places.get(name), root, is_it): name for name, is_it, _ in _paths(before)}
    here = with_urls(str(cache or cache_of(root, facts)))
    named = here if cache else facts.cache
    paths = [here, *(path for path, _, _ in _paths(document))]
    now = _places(root, paths, {**names, here: named}, facts.places)
    for path, _, put in _paths(document):
        put(names.get(path, path))
    text = to_toml(document)
    if (named, text, now) == (facts.cache, facts.recipe, facts.places) and (
        facts.before is None and (root / RECIPE).exists() and not _changes(root, text)
    ):
        return
    _write_facts(root, Facts(named, facts.versions, text, facts.recipe, now))
    _write_text(root, text)
    _write_facts(root, Facts(named, facts.versions, text, places=now))


def cache_of(root: Path, facts: Facts) -> Path:
    """Where the cache of a run is now, as far as that can be found."""
    return Path(find(facts.cache, facts.places.get(facts.cache), root, is_cache))


def comparable(model: ModelConfig, config: TrainConfig) -> dict[str, Any]:
    """A recipe as plain values, in which two paths to the same place are equal."""
    document = _document(model, config)
    for path, _, put in _paths(document):
        put(places.comparable(path))
    return document


def _document(model: ModelConfig, config: TrainConfig) -> dict[str, Any]:
    return {"model": to_dict(model), "train": to_dict(config)}


def _places(
    root: Path, paths: Sequence[str], names: Mapping[str, str], before: Mapping[str, Place]
) -> dict[str, Place]:
    """Where everything is that a run names. What is nowhere keeps the place that it had.

    Args:
        paths: from the working directory.
        names: a path -> what the run calls it, if that is something else.
    """
    now = {name: place_of(path, root) or before.get(name) for path in paths for name in [names.get(path, path)]}
    return {name: place for name, place in now.items() if place}


def _paths(document: Mapping[str, Any]) -> Iterator[tuple[str, Callable[[str], bool], Callable[[str], None]]]:
    """Each path of a recipe that a run needs: itself, whether a place can be what it names, and how to replace it.

    A source to draw is none of them: its pair is in the cache, by its name.
    """

    def table(values: Any, name: str) -> dict[str, Any]:
        found = values.get(name) if isinstance(values, Mapping) else None
        return found if isinstance(found, dict) else {}

    train = document.get("train")
    entries = train.get("data") if isinstance(train, Mapping) else None
    holders: list[tuple[dict[str, Any], str, Callable[[str], bool]]] = [
        (table(document, "model"), "path", is_model),
        (table(train, "lora"), "init_lora", os.path.exists),
    ]
    entries = entries if isinstance(entries, list) else []
    holders += [(entry, "cache", is_cache) for entry in entries if isinstance(entry, dict)]
    for holder, key, is_it in holders:
        if isinstance(holder.get(key), str):
            yield holder[key], is_it, partial(holder.__setitem__, key)


def _text_of(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError("a text is something else")
    return value


def _write_text(root: Path, text: str) -> None:
    write_whole(root / RECIPE, lambda path: path.write_text(text, encoding="utf-8", newline="\n"))


def _write_facts(root: Path, facts: Facts) -> None:
    document = {name: value for name, value in vars(facts).items() if value is not None}
    document["places"] = {named: [place.from_here, place.absolute] for named, place in facts.places.items()}
    write_sealed(root / FILE, document)


def read_recipe(root: Path, options: Sequence[str] = ()) -> Document:
    """The recipe of a run. Options that no longer exist are left out of it: none of them ever did anything.

    Args:
        options: ``table.key=value``, which override it; an unknown option in these is still refused.

    Raises:
        RunError: ``recipe.toml`` has other values, in options that ``options`` does not set.
        RecipeError: as ``k5cache.shared.recipe.read``.
    """
    facts = read_facts(root)
    if facts.recipe is None:
        document = read(root / RECIPE, [])
    else:
        document = Document(tomllib.loads(facts.recipe), root / FILE)
        if facts.before is None or _changes(root, facts.before):
            _check_unchanged(root, facts.recipe, options)
    if isinstance(document.get("train"), dict):
        document["train"] = without_removed(document["train"])
    for named, is_it, put in _paths(document):
        put(find(named, facts.places.get(named), root, is_it))
    for option in options:
        set_option(document, option)
    return document


def caches_of(root: Path) -> list[str]:
    """The caches to name in a command that trains a run's recipe again. None of them if the recipe names its own."""
    try:
        facts = read_facts(root)
        recipe = tomllib.loads(facts.recipe or (root / RECIPE).read_text(encoding="utf-8"))
        return [] if recipe["train"].get("data") else [str(cache_of(root, facts))]
    except (RunError, OSError, ValueError, KeyError, AttributeError):
        return ["CACHE"]


def _check_unchanged(root: Path, text: str, options: Sequence[str]) -> None:
    given = [option.partition("=")[0].strip() for option in options]
    changes = _changes(root, text)
    changed = {name: v for name, v in changes.items() if not any(f"{name}.".startswith(f"{g}.") for g in given)}
    if not changed:
        return
    raise RunError(
        f"{root / RECIPE} was changed since the run began: {'; '.join(line for line, _ in changed.values())}",
        f"Undo that, or delete the file: {root / FILE} has the recipe too. To train on with the change: "
        + console.command("k5train", "resume", root, set=_as_options(changed)),
    )


def _as_options(changed: Mapping[str, tuple[str, Any]]) -> list[str]:
    values = {name: value for name, (_, value) in changed.items() if value is not None}
    if len(values) < len(changed) or len(values) > _MOST_NAMED:
        return ["TABLE.KEY=VALUE"]
    return [f"{name}={toml_value(value)}" for name, value in values.items()]


def _changes(root: Path, text: str) -> dict[str, tuple[str, Any]]:
    """Name -> (a line about it, its value in ``recipe.toml``) of all in which that differs from ``text``.

    Without the file nothing differs.

    Raises:
        RunError: it is not a recipe any more.
    """
    path = root / RECIPE
    if not path.exists() or path.read_bytes() == text.encode():
        return {}
    before = _values(tomllib.loads(text))
    try:
        now = _values(read(path, []))
    except RecipeError as error:
        raise RunError(
            f"{path} was changed since the run began: {error.problem.removeprefix(f'{path} ')}",
            f"Undo that, or delete the file: {root / FILE} has the recipe too",
        ) from error
    lines = differences(before, now)
    return {name: (line, _value(now, name)) for line in lines for name in [line.partition(": ")[0]]}


def _values(document: dict[str, Any]) -> dict[str, Any]:
    """Every option and its value, defaults included."""
    if isinstance(document.get("train"), dict):
        document["train"] = without_removed(document["train"])
    model, config = parse(document, {"model": ModelConfig, "train": TrainConfig})
    return {"model": to_dict(model), "train": to_dict(config)}


def _value(values: Any, name: str) -> Any:
    for key in name.split("."):
        values = values.get(key) if isinstance(values, dict) else None
    return values

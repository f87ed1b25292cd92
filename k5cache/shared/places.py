"""Where is a folder or a file now that was named when a run or a cache was made?

Then it was named from one folder, and now a command may be called from another one. Either side may have been moved or
renamed meanwhile, or both together. So a run keeps two places of everything that it names, the way from itself and the
absolute path, and what is at neither is looked for by its name near the run.
"""

# os.path answers False for a name that the system does not allow, where Path raises an error.
# ruff: noqa: PTH100, PTH110, PTH111, PTH112, PTH113, PTH117, PTH118, PTH121

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

from k5cache.shared import console
from k5cache.shared.model import ModelConfig
from k5cache.shared.urls import is_url, url_of, with_urls


@dataclass(frozen=True)
class Place:
    """Where something was when it was named."""

    from_here: str
    """Its path from the folder of what names it. Empty if there is none, as from one disk of Windows to another."""
    absolute: str


def place_of(named: str, root: Path) -> Place | None:
    """Where ``named`` is, for something in the folder ``root`` that names it. None if there is nothing at it."""
    path = os.path.abspath(named if os.path.exists(named) else os.path.expanduser(named))
    if not os.path.exists(path):
        return None
    here = os.path.realpath(root)
    try:
        way = os.path.relpath(path, os.path.abspath(root))  # with the user's own links in it, if they lead there
        if not _same(os.path.join(here, way), path):
            way = os.path.relpath(os.path.realpath(path), here)
    except ValueError:
        way = ""
    return Place(Path(way).as_posix() if way else "", path)


def find(named: str, place: Place | None, root: Path, is_it: Callable[[str], bool] = os.path.exists) -> str:
    """Where ``named`` is now, as a path from the working directory.

    The way from ``root`` is tried first, which holds after both were moved or copied together; then the absolute path;
    then the working directory and the folders above ``root``, below which its name may be.

    Args:
        named: as its user wrote it.
        place: None if only the name was kept.
        is_it: whether what is at a path can be what is looked for.

    Returns:
        ``named`` itself if that leads there, or if nothing is anywhere.
    """
    candidates = [path for path in dict.fromkeys(_candidates(named, place, root)) if is_it(path)]
    if not candidates:
        return place.absolute if place and not is_it(named) else named
    best = candidates[0]
    if place and not _same(best, place.absolute):
        if is_it(place.absolute):
            _say(
                f"{root} was made with {place.absolute}. Using {_readable(best, named)}, which is now at the same place"
                f" beside it"
            )
        else:
            _say(f"{place.absolute}, which {root} names, is not there: using {_readable(best, named)}")
    return _readable(best, named)


def model_near(model: ModelConfig, root: Path) -> ModelConfig:
    """The model that a cache names: a folder whose path is a relative one may lie near the cache."""
    if model.path is None or os.path.isdir(os.path.expanduser(model.path)) or os.path.isabs(model.path):
        return model
    return replace(model, path=find(model.path, None, root, is_model))


def comparable(path: str) -> str:
    """A path written as any other that leads to the same place. One that leads nowhere is as it is."""
    named = with_urls(path)
    if is_url(named):
        return url_of(named)
    return _readable(os.path.realpath(path), "") if os.path.exists(path) else path


def is_there(path: Path) -> bool:
    """Whether there is something at a path. Of a URL only its store knows, and it says so itself."""
    return is_url(path) or path.exists()


def is_model(path: str) -> bool:
    """Whether a folder may be a model in the diffusers layout."""
    return os.path.isdir(os.path.join(path, "transformer"))


def is_cache(path: str) -> bool:
    """Whether a folder may be a cache."""
    return os.path.isfile(os.path.join(path, "manifest.json"))


def _candidates(named: str, place: Place | None, root: Path) -> Iterator[str]:
    here = Path(os.path.realpath(root))
    if place:
        if place.from_here:
            yield os.path.normpath(here / place.from_here)
        yield place.absolute
    if named:
        yield named
    last = [name for name in Path((place.from_here if place else "") or named).parts if name != ".."]
    if not last or Path(*last).is_absolute():
        return
    for folder in (Path.cwd(), *here.parents):
        yield str(folder.joinpath(*last))


def _same(path: str, other: str) -> bool:
    try:
        return os.path.samefile(path, other)
    except (OSError, ValueError):
        return False


def _readable(path: str, named: str) -> str:
    """A path as a person would write it here."""
    if _same(path, named):
        return named
    absolute, here = Path(os.path.abspath(path)), Path.cwd()
    return str(absolute.relative_to(here)) if absolute.is_relative_to(here) else str(absolute)


@cache
def _say(message: str) -> None:
    console.note(message)

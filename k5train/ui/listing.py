"""Which datasets, caches, runs and sweeps does a project have? One look into each folder; no file is opened."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from k5cache.shared.errors import K5Error
from k5cache.shared.inside import is_inside
from k5train.ui.ids import id_of
from k5train.ui.project import Project


@dataclass(frozen=True)
class Entry:
    """A folder of the project."""

    id: str
    """As it is called in URLs."""
    name: str
    path: Path
    relative: str
    """Its place in the project, with ``/``."""
    changed: float
    """Seconds since 1970, by the folder's own clock: a file was last added to it or removed."""


class NotHere(K5Error):
    """A URL names something that the project does not have, or no longer has."""


def folders(project: Project) -> list[Entry]:
    """The folders of pictures: ``datasets/*``."""
    return list(_below(project, "datasets", lambda path: True))


def caches(project: Project) -> list[Entry]:
    """``cache/*``, those that are being encoded for the first time too."""
    return list(_below(project, "cache", lambda path: _has(path, "manifest.json") or _has(path, ".lock")))


def runs(project: Project) -> list[Entry]:
    """``runs/*``, without the runs of sweeps: ``runs_of``."""
    return list(_below(project, "runs", _is_run))


def sweeps(project: Project) -> list[Entry]:
    """``sweeps/*``, and sweeps that somebody made under ``runs/``."""
    in_sweeps = _below(project, "sweeps", lambda path: not _is_run(path))
    return [*in_sweeps, *_below(project, "runs", lambda path: _has(path, "sweep.json") and not _is_run(path))]


def runs_of(project: Project, sweep: Entry) -> list[Entry]:
    """The runs in a sweep's folder."""
    return list(_below(project, sweep.relative, _is_run))


def all_runs(project: Project) -> list[Entry]:
    """The runs, and those of the sweeps."""
    return [*runs(project), *(run for sweep in sweeps(project) for run in runs_of(project, sweep))]


def find(entries: Sequence[Entry], id: str) -> Entry:
    """The entry that a URL names.

    Raises:
        NotHere: none of them has this id.
    """
    for entry in entries:
        if entry.id == id:
            return entry
    raise NotHere("This is no longer here: it was deleted, moved or renamed", "Choose another one from the list")


def entry_of(project: Project, path: Path) -> Entry:
    """The entry of one folder in the project. Raises ``OutputError`` if it leads out, ``OSError`` if it is gone."""
    project.inside(path)
    relative = project.relative(path)
    return Entry(id_of(relative), path.name, path, relative, path.stat().st_mtime)


def leading_out(project: Project) -> list[str]:
    """Links that are not listed because they lead out of the project."""
    found = []
    for name in ("datasets", "cache", "runs", "sweeps"):
        folder = project.root / name
        inner = [folder] if folder.is_symlink() else list(folder.iterdir()) if folder.is_dir() else []
        found += [path for path in inner if path.is_symlink() and not is_inside(project.root, path)]
    return sorted(map(project.relative, found))


def _below(project: Project, place: str, is_one: Callable[[str], bool]) -> Iterator[Entry]:
    """The folders in a folder of the project that are what is asked for, by name."""
    folder = project.root / place
    if not folder.is_dir() or not is_inside(project.root, folder):
        return
    with os.scandir(folder) as found:
        entries = sorted((entry for entry in found if not entry.name.startswith(".")), key=lambda entry: entry.name)
    for entry in entries:
        try:
            is_here = entry.is_dir() and (not entry.is_symlink() or is_inside(project.root, Path(entry.path)))
            if is_here and is_one(entry.path):
                relative = f"{place}/{entry.name}"
                yield Entry(id_of(relative), entry.name, Path(entry.path), relative, entry.stat().st_mtime)
        except OSError:  # it was deleted meanwhile, or may not be read
            continue


def _is_run(path: str) -> bool:
    return _has(path, "run.json")


def _has(path: str, name: str) -> bool:
    return os.path.isfile(f"{path}/{name}")  # noqa: PTH113 (of hundreds of folders, for which no paths are made)

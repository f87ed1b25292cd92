"""Which folder was a cache made of, and which cache was made of a folder? A cache does not say: names and paths do."""

from __future__ import annotations

from pathlib import Path

from k5cache.shared.errors import CacheError
from k5cache.store.index import IndexRow
from k5cache.store.manifest import read_manifest
from k5train.ui import listing
from k5train.ui.data.opened import open_index
from k5train.ui.listing import Entry
from k5train.ui.project import Project

_LOOKED_AT = 5
_QUICK_BYTES = 30 << 20


def source_of(project: Project, cache: Entry, is_thorough: bool = True) -> Entry | None:
    """The folder that a cache was made of: the one of its name, or else one in which its first pictures lie.

    None if there is none: it was made elsewhere, or of a table.

    Args:
        is_thorough: False does not open an index of more than 30 MB, which takes a second.
    """
    folders = listing.folders(project)
    same = next((folder for folder in folders if folder.name == cache.name), None)
    if same:
        return same
    if not is_thorough and not _is_small(cache):
        return None
    rows = _first_rows(cache)
    return next((folder for folder in folders if _has_all(folder, [row.path for row in rows])), None)


def sources_of(project: Project, cache: Entry, source: Entry | None) -> Entry | None:
    """For image-to-image, the folder with the sources; None if they are beside their targets, or nowhere."""
    paths = [row.source_path for row in _first_rows(cache) if row.source_path]
    if not paths or (source and not _is_apart(cache) and _has_all(source, paths)):
        return None
    others = [folder for folder in listing.folders(project) if source is None or folder.id != source.id]
    return next((folder for folder in others if _has_all(folder, paths)), None)


def caches_of(project: Project, folder: Entry) -> list[Entry]:
    """The caches that were made of a folder, the one of its name first."""
    caches = listing.caches(project)
    own = [cache for cache in caches if cache.name == folder.name]
    others = [cache for cache in caches if cache.name != folder.name]
    return own + [cache for cache in others if (source := source_of(project, cache, False)) and source.id == folder.id]


def is_tame(path: str) -> bool:
    """Whether a path of an index stays in its folder by itself: the index may be a stranger's."""
    parts = path.split("/")
    return bool(path) and not path.startswith("/") and ".." not in parts and "\0" not in path and "\\" not in path


def _is_small(cache: Entry) -> bool:
    try:
        index = read_manifest(cache.path).index
    except (CacheError, OSError):
        return False
    return index is not None and index.num_bytes < _QUICK_BYTES


def _is_apart(cache: Entry) -> bool:
    """Whether sources have the very names of their targets, and so lie in another folder."""
    return all(row.source_path == row.path for row in _first_rows(cache))


def _has_all(folder: Entry, paths: list[str]) -> bool:
    return bool(paths) and all(is_tame(path) and Path(folder.path, path).is_file() for path in paths)


def _first_rows(cache: Entry) -> list[IndexRow]:
    try:
        opened = open_index(cache.path)
        return opened.cache.rows(range(min(_LOOKED_AT, len(opened.cache))))
    except (CacheError, OSError):
        return []

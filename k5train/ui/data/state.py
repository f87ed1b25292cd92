"""How does a folder or a cache stand? Never encoded, up to date, changed since, or being encoded: from cheap looks."""

from __future__ import annotations

import functools
import os
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from k5cache.options import CacheConfig, config_of, with_source_dir
from k5cache.shared.errors import CacheError, K5Error
from k5cache.shared.kind import Kind
from k5cache.shared.lock import holder
from k5cache.shared.model import model_name
from k5cache.sources.folder import walk
from k5cache.sources.items import IMAGE_SUFFIXES, Skipped
from k5cache.sources.unchanged import is_untouched
from k5cache.store.manifest import Manifest, read_manifest
from k5train.ui import listing
from k5train.ui.data.origin import caches_of, sources_of
from k5train.ui.listing import Entry
from k5train.ui.project import Project

Word = Literal["up to date", "files changed", "not known", "being encoded", "unfinished", "damaged", "no folder"]
MOST_LOOKED_AT = 20_000
"""Files of a folder that the list of folders counts. With more, it says so, and the folder's page looks further."""
MOST_COMPARED = 50_000
"""Items of a cache whose folder is compared with it each time it is shown: 15 us for each file."""
BADGES: dict[str, str] = {
    "up to date": "done", "files changed": "waiting", "being encoded": "running", "damaged": "failed",
    "unfinished": "stopped", "never encoded": "waiting",
}  # fmt: skip


@dataclass(frozen=True)
class CacheState:
    """What the list says of a cache."""

    entry: Entry
    word: Word
    detail: str = ""
    """Who encodes it, or what is damaged."""
    num_items: int | None = None
    num_bytes: int | None = None
    num_left_out: int = 0
    kind: Kind = "t2i"
    model: str = ""
    trigger: str = ""
    resolution: int | None = None

    @property
    def badge(self) -> str:
        """The class of its badge."""
        return BADGES.get(self.word, "")


@dataclass(frozen=True)
class FolderState:
    """What the list says of a folder."""

    entry: Entry
    num_pictures: int
    num_files: int
    num_bytes: int
    is_whole: bool
    """Whether all of it was looked at."""
    caches: tuple[Entry, ...]
    word: str
    """As of its cache, or ``never encoded``."""

    @property
    def badge(self) -> str:
        """The class of its badge."""
        return BADGES.get(self.word, "")


def cache_state(project: Project, entry: Entry, source: Entry | None) -> CacheState:
    """How a cache stands. Its index is not opened; the stats of its folder's files are read."""
    owner = holder(entry.path / ".lock")
    busy = f"by process {owner.pid} on {owner.host} since {owner.since}" if owner else ""
    try:
        manifest = read_manifest(entry.path)
    except (CacheError, OSError) as error:
        if owner:
            return CacheState(entry, "being encoded", busy)
        is_there = (entry.path / "manifest.json").is_file()
        problem = error.problem if isinstance(error, CacheError) else str(error)
        return CacheState(entry, "damaged" if is_there else "unfinished", problem if is_there else "")
    facts = _facts(manifest)
    if owner:
        return CacheState(entry, "being encoded", busy, **facts)
    if manifest.index is None:
        return CacheState(entry, "unfinished", "Its encode was stopped. Encode again, and it goes on", **facts)
    return CacheState(entry, _compared(project, entry, source, manifest), **facts)


def _facts(manifest: Manifest) -> dict[str, Any]:
    tables = [info.num_bytes for info in (manifest.index, manifest.locations, manifest.split) if info]
    selection = manifest.recipe.get("selection", {})
    resolution = selection.get("resolution")
    return {
        "num_items": manifest.index.num_rows if manifest.index else None,
        "num_bytes": sum(shard.num_bytes for shard in manifest.shards) + sum(tables),
        "num_left_out": len(manifest.left_out.skipped),
        "kind": manifest.kind,
        "model": model_name(manifest.recipe),
        "trigger": str(selection.get("trigger") or ""),
        "resolution": resolution if isinstance(resolution, int) else None,
    }


def _compared(project: Project, entry: Entry, source: Entry | None, manifest: Manifest) -> Word:
    if source is None:
        return "no folder"
    try:
        config = config_of(manifest.recipe)
    except CacheError:
        return "not known"
    if manifest.kind == "i2i":
        apart = sources_of(project, entry, source)
        config = with_source_dir(config, apart.path if apart else None)
    is_large = manifest.index is not None and manifest.index.num_rows > MOST_COMPARED
    if not manifest.source.stats or is_large:
        return "not known"
    return "up to date" if is_untouched(source.path, config, manifest.source, project.root) else "files changed"


def folder_state(project: Project, entry: Entry, states: Sequence[CacheState]) -> FolderState:
    """How a folder stands.

    Args:
        states: of its caches.
    """
    num_pictures, num_files, num_bytes, is_whole = 0, 0, 0, True
    for files, _ in walk(entry.path, list[Skipped](), within=project.root):
        for file in files[: MOST_LOOKED_AT - num_files]:
            stem, _, suffix = file.name.rpartition(".")
            num_pictures += f".{suffix.lower()}" in IMAGE_SUFFIXES and not stem.lower().endswith(".mask")
            try:
                num_bytes += file.stat(follow_symlinks=False).st_size
            except OSError:
                continue
        num_files += len(files)
        if num_files > MOST_LOOKED_AT:
            is_whole = False
            break
    word = states[0].word if states else "never encoded"
    return FolderState(
        entry, num_pictures, num_files, num_bytes, is_whole, tuple(state.entry for state in states), word
    )


@dataclass(frozen=True)
class Overview:
    """Everything on the first page of data."""

    folders: tuple[FolderState, ...]
    caches: tuple[tuple[CacheState, Entry | None], ...]
    """With the folder that each was made of."""
    leading_out: tuple[str, ...]


def overview(project: Project) -> Overview:
    """All folders and caches."""
    from k5train.ui.data.origin import source_of

    caches = []
    for cache in listing.caches(project):
        source = source_of(project, cache, is_thorough=False)
        caches.append((cache_state(project, cache, source), source))
    folders = []
    for folder in listing.folders(project):
        own = [state for state, source in caches if source and source.id == folder.id]
        own.sort(key=lambda state: state.entry.name != folder.name)
        folders.append(folder_state(project, folder, own))
    return Overview(tuple(folders), tuple(caches), tuple(listing.leading_out(project)))


def folder_config(project: Project, cache: Entry | None, base: CacheConfig, source: Entry | None) -> CacheConfig:
    """The options of a cache, with the folder of sources where that is in the project."""
    if cache is None:
        return base
    apart = sources_of(project, cache, source)
    return with_source_dir(base, apart.path if apart else None)


def first_cache(project: Project, folder: Entry) -> Entry | None:
    """The cache whose options a folder is shown with."""
    return next(iter(caches_of(project, folder)), None)


def used_by(project: Project, cache: Entry, most: int = 500) -> tuple[Entry, ...]:
    """The runs that train on a cache, the newest first. Each run's file is read once while it stays as it is."""
    wanted = os.path.realpath(cache.path)
    newest = sorted(listing.all_runs(project), key=lambda run: -run.changed)[:most]
    return tuple(run for run in newest if wanted in caches_of_run(project, run.path))


def caches_of_run(project: Project, run: Path) -> list[str]:
    """Where the caches of a run are, without links. Nothing if its file cannot be read."""
    try:
        status = (run / "run.json").stat()
        named = _caches_of_run(run, (status.st_mtime_ns, status.st_size, status.st_ino))
    except (K5Error, OSError):
        return []
    return [os.path.realpath(project.root / path) for path in named]


@functools.lru_cache(maxsize=2000)
def _caches_of_run(run: Path, stamp: tuple[int, ...]) -> tuple[str, ...]:
    """The caches of a run as it names them: those of ``[[train.data]]``, or else that of the command."""
    from k5train.runs.recipe import cache_of, read_facts

    facts = read_facts(run)
    if "train.data" not in (facts.recipe or ""):
        return (os.path.abspath(cache_of(run, facts)),)  # noqa: PTH100 (it may be from where the page was started)
    try:
        train = tomllib.loads(facts.recipe or "").get("train", {})
    except ValueError:
        return ()
    entries = train.get("data", []) if isinstance(train, dict) else []
    return tuple(str(entry["cache"]) for entry in entries if isinstance(entry, dict) and "cache" in entry)

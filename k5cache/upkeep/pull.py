"""How does a cache come from the hub? Every file is compared with the manifest, which is written last."""

from __future__ import annotations

import glob
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from k5cache.shared import hub
from k5cache.shared.command_line import command
from k5cache.shared.console import human_bytes, note
from k5cache.shared.errors import CacheError, HubError
from k5cache.shared.files import new_file
from k5cache.shared.units import count_of
from k5cache.store import files
from k5cache.store.manifest import IndexInfo, Manifest, ShardInfo, lock, read_manifest
from k5cache.store.ours import FILE, check_root
from k5cache.upkeep.remote import remote_manifest


@dataclass(frozen=True)
class Pulled:
    """What a pull did."""

    root: Path
    repo: str
    commit: str
    num_items: int
    num_bytes: int
    """That were fetched."""
    num_here: int
    """Files that were here already."""
    is_unchanged: bool
    """The cache was here already, and nothing was written."""


def pull_cache(
    repo: str,
    root: Path,
    revision: str | None = None,
    wait_seconds: float = 0,
    advance: Callable[[str, int, int], None] = lambda *numbers: None,
) -> Pulled:
    """Fetch a cache from a dataset repository into a folder. A second call goes on where the first was interrupted.

    A folder that has an earlier state of the same cache is brought up to date: nothing that it names is lost.

    Args:
        advance: called with what is being done, the bytes that were checked or fetched, and of how many.

    Raises:
        HubError: there is no such repository, it holds no cache, or the disk has no room for it.
        OutputError: ``root`` holds something else.
        CacheError: ``root`` is another cache, or has rows that the one on the hub lacks.
        CacheLocked: another process is writing it.
    """
    with hub.answering(f"pull {repo}"):
        info = hub.api().dataset_info(repo, revision=revision, timeout=10)
        names = {file.rfilename for file in info.siblings or ()}
        if FILE not in names:
            raise HubError(f"{repo} holds no cache: it has no {FILE}", "Name a cache that `k5cache push` has sent")
        raw, manifest = remote_manifest(repo, info.sha)
        if lacking := sorted(manifest.named - names):
            raise HubError(f"{repo} is incomplete: it lacks {lacking[0]}", "Push it again: k5cache push CACHE REPO")
        check_root(root)
        check_earlier(root, repo, manifest)
        with lock(root, wait_seconds):
            wanted: list[ShardInfo | IndexInfo] = [*manifest.shards]
            wanted += [table for table in (manifest.index, manifest.locations, manifest.split) if table]
            total = sum(file.num_bytes for file in wanted)
            check = partial(advance, "checking")
            absent = [file for file in wanted if not is_here(root, file, lambda read: check(read, total))]
            if absent:
                _fetch(repo, str(info.sha), root, absent, total, advance)
            is_unchanged = not absent and (root / FILE).is_file() and (root / FILE).read_bytes() == raw
            if not is_unchanged:
                with new_file(root / FILE) as file:
                    file.write(raw)
    num_items = manifest.index.num_rows if manifest.index else 0
    fetched = sum(file.num_bytes for file in absent)
    return Pulled(root, repo, str(info.sha), num_items, fetched, len(wanted) - len(absent), is_unchanged)


def check_earlier(root: Path, repo: str, manifest: Manifest) -> None:
    """Refuse a cache at ``root`` from which a pull would take rows away.

    Raises:
        CacheError: it has shards that the one on the hub has not.
    """
    if not (root / FILE).exists():
        return
    others = {shard.file for shard in read_manifest(root).shards} - manifest.named
    if others:
        raise CacheError(
            f"{root} is a cache already, with {count_of(len(others), 'shard')} that {repo} does not have",
            f"Pull into another folder: {command('k5cache', 'pull', repo, f'{root}-of-the-hub')}",
        )


def is_here(root: Path, file: ShardInfo | IndexInfo, advance: Callable[[int], None]) -> bool:
    """Whether a file of the manifest is in the folder with the bytes that it should have."""
    try:
        fd = files.open_inside(root, file.file, file.num_bytes)
    except CacheError:
        return False
    try:
        return files.sha256_of(fd) == file.sha256
    finally:
        advance(file.num_bytes)
        os.close(fd)


def size_of(path: Path) -> int:
    """The bytes of a file; 0 if there is none."""
    try:
        return path.stat().st_size
    except OSError:
        return 0


def _fetch(
    repo: str,
    commit: str,
    root: Path,
    absent: list[ShardInfo | IndexInfo],
    total: int,
    advance: Callable[[str, int, int], None],
) -> None:
    size = sum(file.num_bytes for file in absent)
    if (free := shutil.disk_usage(root).free) < size:
        raise HubError(
            f"{repo} needs {human_bytes(size)} more, and the disk of {root} has {human_bytes(free)} free",
            "Free some space, or name a folder on another disk",
        )
    here = total - size
    note(f"Fetching {human_bytes(size)} of {repo}" + (f", {human_bytes(here)} is here" if here else ""))
    parts = root / ".cache" / "huggingface" / "download"  # where its client writes until a file is whole

    def arrived() -> int:
        paths = [*(root / file.file for file in absent), *parts.rglob("*.incomplete")]
        return sum(size_of(path) for path in paths)

    damaged = [file.file for file in absent if (root / file.file).exists()]
    with hub.counted(arrived, lambda num_bytes: advance("fetching", num_bytes, size)):
        for names in (damaged, [file.file for file in absent if file.file not in damaged]):
            if names:
                hub.api(quiet=True).snapshot_download(
                    repo,
                    repo_type="dataset",
                    revision=commit,
                    local_dir=root,
                    allow_patterns=[glob.escape(name) for name in names],
                    force_download=names is damaged,  # its client takes what it once fetched for whole
                )
    for file in absent:
        if not is_here(root, file, lambda read: advance("checking", read, total)):
            (root / file.file).unlink(missing_ok=True)  # it was fetched a moment ago
            raise CacheError(
                f"{root / file.file} did not arrive with the bytes that the manifest of {repo} names",
                "Pull again; if that ends in the same way, push the cache again from where it was made",
            )

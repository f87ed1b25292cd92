"""How does a cache of this machine get to a URL, and one at a URL to this machine? Checked, the manifest last."""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from k5cache.remote.mirror import behind, folder_of
from k5cache.remote.objects import Entry, Objects
from k5cache.remote.sending import AT_ONCE
from k5cache.shared.command_line import command
from k5cache.shared.console import note
from k5cache.shared.errors import CacheCorrupt, CacheError, OutputError, StoreError
from k5cache.shared.files import make_folder, new_file, sync_folder
from k5cache.shared.units import count_of, human_bytes
from k5cache.shared.urls import url_of
from k5cache.store import files
from k5cache.store.manifest import IndexInfo, Manifest, ShardInfo, lock, read_manifest, write_manifest
from k5cache.store.ours import FILE, check_root
from k5cache.upkeep.finished import finished_index
from k5cache.upkeep.pull import Pulled, check_earlier, is_here
from k5cache.upkeep.push import Pushed
from k5cache.upkeep.verify import verify_cache

Advance = Callable[[str, int, int], None]


def send_cache(root: Path, url: Path, advance: Advance = lambda *numbers: None) -> Pushed:
    """Send a cache to a URL. What is there already is not sent again.

    Raises:
        CacheCorrupt: a byte of the cache is not the byte that was written.
        CacheError: it is not finished, changed meanwhile, or another cache is at the URL.
        StoreError: the store refuses.
    """
    if behind(root):
        raise CacheError(
            f"{root} is at a URL itself",
            f"Pull it first, and send that: {command('k5cache', 'pull', root, root.name)}",
        )
    manifest = read_manifest(root)
    index = finished_index(root, manifest)
    out = folder_of(url, is_new=True)
    theirs = read_manifest(out) if (out / FILE).exists() else Manifest(recipe=manifest.recipe)
    there = {shard.file for shard in theirs.shards}
    if there and there.isdisjoint(manifest.named):
        raise CacheError(f"{out} is another cache, with none of the shards of {root}", "Name another URL")
    total = sum(shard.num_bytes for shard in manifest.shards)
    if problems := verify_cache(root, lambda read: advance("verifying", read, total)).problems:
        raise CacheCorrupt(
            f"{root} is damaged and is not sent: {problems[0]}",
            f"See all of it with {command('k5cache', 'verify', root)}, and mend it: {files.repair(root)}",
        )
    mirror = behind(out)
    assert mirror
    kept = [shard for shard in manifest.shards if shard.file in there]
    damaged = _damaged(mirror.objects, {shard.file: root / shard.file for shard in kept})
    if damaged:
        note(f"{count_of(len(damaged), 'shard')} at {mirror.objects.url} will be sent again: {sorted(damaged)[0]}, ...")
    absent = [shard for shard in manifest.shards if shard.file not in there or shard.file in damaged]
    with lock(out):
        mirror.again(damaged)
        mirror.send_again(damaged)
        for shard in absent:
            _link(root, out, shard.file, shard.file)
        wanted = _with_tables(root, out, manifest, _without_damaged(theirs, root, manifest, mirror.objects))
        is_changed = wanted != theirs
        if is_changed or damaged:
            write_manifest(out, wanted)
    num_bytes = sum(shard.num_bytes for shard in absent)
    num_files = len(absent) + 3 * is_changed
    return Pushed(str(out), url_of(url), False, index.num_rows, num_files, num_bytes, len(there) - len(damaged), ())


def _damaged(objects: Objects, files_here: dict[str, Path]) -> set[str]:
    """The names of objects that are not there, or are known not to have the bytes of these files."""
    listing: dict[str, Entry] = {}
    with suppress(StoreError):  # who may read may not always list
        listing = {entry.name: entry for entry in objects.entries()}

    def is_damaged(name: str) -> bool:
        entry = listing.get(name) or objects.stat(name)
        return entry is None or objects.is_another(entry, files_here[name])

    with ThreadPoolExecutor(AT_ONCE, "k5-compare") as pool:
        return {name for name, damaged in zip(files_here, pool.map(is_damaged, files_here), strict=True) if damaged}


def _without_damaged(theirs: Manifest, root: Path, ours: Manifest, objects: Objects) -> Manifest:
    """The store's manifest without tables that are the same here, and not there: they are sent under other names."""

    def whole(known: IndexInfo | None, info: IndexInfo | None) -> IndexInfo | None:
        is_same = known and info and known.sha256 == info.sha256
        return None if is_same and known and info and _damaged(objects, {known.file: root / info.file}) else known

    return replace(
        theirs,
        index=whole(theirs.index, ours.index),
        locations=whole(theirs.locations, ours.locations),
        split=whole(theirs.split, ours.split),
    )


def _with_tables(root: Path, out: Path, manifest: Manifest, theirs: Manifest) -> Manifest:
    """The manifest with tables of names that nothing else has: an object that is there is never written over."""
    generation = secrets.randbelow(10**12 - 10**11) + 10**11

    def table(info: IndexInfo | None, known: IndexInfo | None, kind: str) -> IndexInfo | None:
        if info is None or (known and known.sha256 == info.sha256):
            return info and known
        name = f"{kind}-{generation:06d}.parquet"
        _link(root, out, info.file, name)
        return replace(info, file=name)

    return replace(
        manifest,
        index=table(manifest.index, theirs.index, "index"),
        locations=table(manifest.locations, theirs.locations, "locations"),
        split=table(manifest.split, theirs.split, "split"),
    )


def _link(root: Path, out: Path, old_name: str, new_name: str) -> None:
    """The same file in another folder, or a copy of it.

    Raises:
        CacheError: a writer has replaced it since the manifest was read.
    """
    old, new = root / old_name, out / new_name
    make_folder(new.parent)
    if new.exists():
        return
    try:
        os.link(old.resolve(), new)
        sync_folder(new.parent)
    except FileNotFoundError:
        raise CacheError(f"{root} changed while it was pushed: {old} is gone", "Push it again") from None
    except OSError:  # another disk, or one without hard links
        with new_file(new) as copy, old.open("rb") as file:
            shutil.copyfileobj(file, copy, 1 << 20)


def fetch_cache(url: Path, root: Path, wait_seconds: float = 0, advance: Advance = lambda *numbers: None) -> Pulled:
    """Copy a cache from a URL to a folder. A second call goes on where the first was interrupted.

    Raises:
        OutputError: ``root`` holds something else.
        CacheError: ``root`` is another cache, or has rows that the one at the URL lacks.
        CacheCorrupt: an object is not the one that was written.
        StoreError: the store cannot be reached, or refuses.
    """
    objects, from_folder = Objects(url), folder_of(url)
    manifest = read_manifest(from_folder)
    raw = (from_folder / FILE).read_bytes()
    if behind(root):
        raise OutputError(f"{root} is a URL", "Name a folder of this machine")
    check_root(root)
    check_earlier(root, objects.url, manifest)
    with lock(root, wait_seconds):
        wanted: list[ShardInfo | IndexInfo] = [*manifest.shards]
        wanted += [table for table in (manifest.index, manifest.locations, manifest.split) if table]
        total = sum(file.num_bytes for file in wanted)
        absent = [file for file in wanted if not is_here(root, file, lambda read: advance("checking", read, total))]
        size = sum(file.num_bytes for file in absent)
        if (free := shutil.disk_usage(root).free) < size:
            raise StoreError(
                f"{objects.url} needs {human_bytes(size)} more, and the disk of {root} has {human_bytes(free)} free",
                "Free some space, or name a folder on another disk",
            )
        with ThreadPoolExecutor(AT_ONCE, "k5-fetch") as pool:
            for file in pool.map(lambda file: _fetch(objects, root, file), absent):
                advance("fetching", file.num_bytes, size)
        is_unchanged = not absent and (root / FILE).is_file() and (root / FILE).read_bytes() == raw
        if not is_unchanged:
            with new_file(root / FILE) as new:
                new.write(raw)
    num_items = manifest.index.num_rows if manifest.index else 0
    return Pulled(root, objects.url, "", num_items, size, len(wanted) - len(absent), is_unchanged)


def _fetch(objects: Objects, root: Path, file: ShardInfo | IndexInfo) -> ShardInfo | IndexInfo:
    if objects.fetch(file.file, root / file.file, file.num_bytes) != file.sha256:
        (root / file.file).unlink()
        raise CacheCorrupt(
            f"{objects.url}/{file.file} is not the file that was written: its sha256 does not match",
            f"k5cache verify {objects.url} lists all damage",
        )
    return file

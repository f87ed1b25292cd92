"""What does a cache hold that nothing needs any more? Rows that no item, prompt or pair to draw names are deleted."""

from __future__ import annotations

from collections.abc import Mapping, Set
from dataclasses import dataclass, replace
from pathlib import Path

from k5cache.remote.mirror import behind
from k5cache.shared.errors import CacheCorrupt
from k5cache.shared.files import sync_folder
from k5cache.store import files
from k5cache.store.index import IndexRows, index_rows, read_index, with_index
from k5cache.store.manifest import Manifest, ShardInfo, lock, read_manifest, require_files, write_manifest
from k5cache.store.ours import unnamed_files
from k5cache.store.shards import Shard, ShardWriter
from k5cache.upkeep.meanwhile import was_replaced


@dataclass(frozen=True)
class Collected:
    """What a collection freed, or would free."""

    dropped: tuple[str, ...]
    """Shards without a row that is needed."""
    rewritten: tuple[str, ...]
    """Shards with some rows that are needed: these rows are copied into a new shard."""
    unnamed: tuple[str, ...]
    """Files of ours that the manifest does not name: left by a crash or by an earlier collection."""
    foreign: tuple[str, ...]
    """Files that are not of this cache. They stay."""
    num_rows: int
    """Rows that are deleted."""
    num_bytes: int
    """Bytes that are freed; for rewritten shards an estimate from their number of rows."""


def collect(root: Path, dry_run: bool = False, wait_seconds: float = 0) -> Collected:
    """Delete what neither the index nor a prompt nor a pair to draw needs.

    Only files are deleted that the manifest names, or whose content proves that they are ours. All others stay.

    The new shards are whole and named before the old ones are deleted, so a crash at any instant loses nothing, and
    the next collection finishes the work. Do not collect while a run trains on this cache and another index has been
    written since that run started: the run reads the older index, whose rows may be deleted.

    Raises:
        CacheError: there is no cache.
        CacheCorrupt: a file is damaged; then nothing is deleted.
        CacheLocked: another process is writing this cache.
    """
    manifest = read_manifest(root)  # before the lock, which would create the folder of a mistyped name
    while dry_run:
        try:
            return _look(root, manifest, _needed_keys(manifest, _read_rows(root, manifest)))
        except (CacheCorrupt, FileNotFoundError):  # perhaps a writer replaced the index after we read the manifest
            if not was_replaced(root, manifest):
                raise
            manifest = read_manifest(root)
    mirror = behind(root)
    with lock(root, wait_seconds) as temporary_files:
        manifest = read_manifest(root)
        rows = _read_rows(root, manifest)
        needed = _needed_keys(manifest, rows)
        collected = _look(root, manifest, needed)
        if collected.rewritten or collected.dropped:
            manifest = _commit(root, manifest, collected, rows, needed)
        # A shard that a killed collection left without a name may have been written again now, and named.
        named = manifest.named
        collected = replace(collected, unnamed=tuple(name for name in collected.unnamed if name not in named))
        for name in (*collected.dropped, *collected.rewritten, *collected.unnamed):
            (root / name).unlink(missing_ok=True)
        for folder in files.FOLDERS:
            if (root / folder).is_dir():
                sync_folder(root / folder)
    if mirror:  # the store's manifest does not name them any more
        mirror.delete({*collected.dropped, *collected.rewritten, *collected.unnamed})
    return replace(collected, unnamed=tuple(sorted({*temporary_files, *collected.unnamed})))


def _read_rows(root: Path, manifest: Manifest) -> IndexRows:
    require_files(root, manifest)
    return index_rows(read_index(root, manifest.index, manifest.format)) if manifest.index else IndexRows.of([])


def _needed_keys(manifest: Manifest, rows: IndexRows) -> dict[str, set[str]]:
    """The keys of each kind that must stay."""
    return {
        "latents": {*rows.latent_keys.to_pylist(), *(edit.source_key for edit in manifest.edits)},
        "masks": {*rows.keys("mask_key").to_pylist()},
        "text": {
            *rows.text_keys.to_pylist(),
            *manifest.prompts.values(),
            *manifest.classes.values(),
            *(key for edit in manifest.edits for key in edit.text_keys),
        },
    }


def _look(root: Path, manifest: Manifest, needed: Mapping[str, Set[str]]) -> Collected:
    """What can be deleted; nothing is changed."""
    foreign = mirror.bring_unnamed(manifest.named) if (mirror := behind(root)) else []
    unnamed = unnamed_files(root, manifest.named)
    unnamed = replace(unnamed, foreign=tuple(sorted({*unnamed.foreign, *foreign})))
    num_rows, num_bytes = 0, sum((root / name).stat().st_size for name in unnamed.ours)
    if manifest.index is None:  # an interrupted encode goes on from here: all its rows are needed
        return Collected((), (), unnamed.ours, unnamed.foreign, num_rows, num_bytes)
    dropped, rewritten = list[str](), list[str]()
    missing = {kind: set(keys) for kind, keys in needed.items()}  # needed keys that were not found in a shard yet
    for shard in manifest.shards:
        keys = Shard(root, shard).keys
        needed_here = missing[shard.kind] & set(keys)
        missing[shard.kind] -= needed_here  # if two shards have one key, the first is read
        num_unneeded = len(keys) - len(needed_here)
        if num_unneeded:
            (rewritten if needed_here else dropped).append(shard.file)
            num_rows += num_unneeded
            num_bytes += shard.num_bytes * num_unneeded // len(keys)
    return Collected(tuple(dropped), tuple(rewritten), unnamed.ours, unnamed.foreign, num_rows, num_bytes)


def _commit(
    root: Path,
    manifest: Manifest,
    collected: Collected,
    rows: IndexRows,
    needed: Mapping[str, Set[str]],
) -> Manifest:
    """Name the new shards instead of the old, with an index and locations to match."""
    shards: list[ShardInfo] = []
    missing = {kind: set(keys) for kind, keys in needed.items()}
    for shard in manifest.shards:
        if shard.file in collected.rewritten:
            shards.append(_copy(root, shard, missing[shard.kind]))
        elif shard.file not in collected.dropped:
            shards.append(shard)
        missing[shard.kind] -= set(Shard(root, shard).keys)
    lean = replace(manifest, shards=tuple(shards))
    lean = with_index(root, lean, rows)
    write_manifest(root, lean)
    return lean


def _copy(root: Path, shard: ShardInfo, needed: Set[str]) -> ShardInfo:
    """A new shard with the needed rows of ``shard``; each row is checked as it is read."""
    old = Shard(root, shard)
    with ShardWriter(root, shard.kind, old.specs, shard.bucket) as writer:
        for number, key in enumerate(old.keys):
            if key in needed:
                row = old.read(number, key)
                writer.append({"key": key, **row.tensors, "n_tokens": row.n_tokens, "caption": row.caption})
        return writer.finish()

"""What does a cache hold that nothing needs any more? Shards lose the rows that no item and no prompt names."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from k5cache.store import files
from k5cache.store.index import IndexRow, index_rows, read_index, with_index
from k5cache.store.manifest import Manifest, ShardInfo, lock, read_manifest, require_files, write_manifest
from k5cache.store.shards import Shard, ShardWriter
from k5cache.upkeep.verify import unnamed_files


@dataclass(frozen=True)
class Collected:
    """What a collection freed, or would free."""

    dropped: tuple[str, ...]
    """Shards none of whose rows is needed."""
    rewritten: tuple[str, ...]
    """Shards some of whose rows are needed: these are copied into a new shard."""
    unnamed: tuple[str, ...]
    """Files that no manifest names: left by a crash or by an earlier collection."""
    num_rows: int
    """Rows that go."""
    num_bytes: int
    """Bytes that are freed; of rewritten shards an estimate, by their rows."""


def collect(root: Path, dry_run: bool = False, wait_seconds: float = 0) -> Collected:
    """Delete what neither the index nor a prompt needs.

    The new shards are whole and named before the old ones are deleted, so a crash at any instant loses nothing; run it
    again. A run that reads this cache keeps the rows of its own index only while no other index has been written since:
    do not collect while one trains on an older index.

    Raises:
        CacheError: there is no cache.
        CacheCorrupt: a file is damaged; nothing is deleted then.
        CacheLocked: another process is writing this cache.
    """
    seen = read_manifest(root)  # before the lock: it makes the folder of a mistyped name
    if dry_run:
        return _look(root, seen)[0]
    with lock(root, wait_seconds):
        manifest = read_manifest(root)
        found, rows, needed = _look(root, manifest)
        if found.rewritten or found.dropped:
            manifest = _commit(root, manifest, found, rows, needed)
        for name in unnamed_files(root, manifest):
            (root / name).unlink(missing_ok=True)
        for folder in files.FOLDERS:
            if (root / folder).is_dir():
                files.sync_folder(root / folder)
    return found


def _look(root: Path, manifest: Manifest) -> tuple[Collected, list[IndexRow], dict[str, set[str]]]:
    """What can go, the index, and the keys of each kind that must stay."""
    require_files(root, manifest)
    if manifest.index is None:  # an encode goes on from here: all its rows are needed
        return Collected((), (), tuple(sorted(unnamed_files(root, manifest))), 0, _sizes(root, manifest)), [], {}
    rows = index_rows(read_index(root, manifest.index))
    needed = {
        "latents": {row.latent_key for row in rows},
        "masks": {row.mask_key for row in rows if row.mask_key},
        "text": {key for row in rows for key in row.caption_keys} | set(manifest.prompts.values()),
    }
    dropped, rewritten = list[str](), list[str]()
    num_rows, num_bytes = 0, _sizes(root, manifest)
    left = {kind: set(keys) for kind, keys in needed.items()}
    for shard in manifest.shards:
        keys = Shard(root, shard).keys
        kept = left[shard.kind] & set(keys)
        left[shard.kind] -= kept  # where two shards hold one key, the first is read
        if len(kept) < len(keys):
            (rewritten if kept else dropped).append(shard.file)
            num_rows += len(keys) - len(kept)
            num_bytes += shard.num_bytes * (len(keys) - len(kept)) // len(keys)
    unnamed = tuple(sorted(unnamed_files(root, manifest)))
    return Collected(tuple(dropped), tuple(rewritten), unnamed, num_rows, num_bytes), rows, needed


def _commit(
    root: Path, manifest: Manifest, found: Collected, rows: Sequence[IndexRow], needed: dict[str, set[str]]
) -> Manifest:
    """Name the new shards in the place of the old, with an index and locations to match."""
    shards: list[ShardInfo] = []
    left = {kind: set(keys) for kind, keys in needed.items()}
    for shard in manifest.shards:
        if shard.file in found.rewritten:
            shards.append(_copy(root, shard, left[shard.kind]))
        elif shard.file not in found.dropped:
            shards.append(shard)
        left[shard.kind] -= set(Shard(root, shard).keys)
    lean = replace(manifest, shards=tuple(shards))
    lean = with_index(root, lean, [replace(row, caption_lengths=()) for row in rows])
    write_manifest(root, lean)
    return lean


def _copy(root: Path, shard: ShardInfo, needed: set[str]) -> ShardInfo:
    """A new shard with the needed rows of ``shard``, each checked as it is read."""
    old = Shard(root, shard)
    with ShardWriter(root, shard.kind, old.specs, shard.bucket) as writer:
        for number, key in enumerate(old.keys):
            if key in needed:
                row = old.read(number, key)
                writer.append({"key": key, **row.tensors, "n_tokens": row.n_tokens, "caption": row.caption})
        return writer.finish()


def _sizes(root: Path, manifest: Manifest) -> int:
    return sum((root / name).stat().st_size for name in unnamed_files(root, manifest))

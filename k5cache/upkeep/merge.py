"""Several caches of one recipe as one: encodes of parts of a source on several machines, put together."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from k5cache.encode import differences
from k5cache.shared.errors import CacheError, CacheStale
from k5cache.store import files
from k5cache.store.index import IndexRow, index_rows, read_index, with_index
from k5cache.store.manifest import Manifest, ShardInfo, lock, read_manifest, require_files, write_manifest
from k5cache.store.shards import verify_shard


@dataclass(frozen=True)
class Merged:
    """What a merge made."""

    num_items: int
    num_shards: int
    num_bytes: int
    duplicates: tuple[str, ...]
    """Paths that an earlier cache had with the same image, captions and crop; each is in the merged cache once."""
    is_linked: bool
    """Whether the shards are hard links: one copy on disk for both caches."""


def merge_caches(parts: Sequence[Path], out: Path) -> Merged:
    """Put caches together. The parts stay as they are; where they lie on the same disk, shards are linked, not copied.

    Args:
        parts: two or more finished caches with the same recipe.
        out: a folder that is not there yet, or one that an interrupted merge left.

    Raises:
        CacheStale: two recipes differ; says where.
        CacheCorrupt: a shard is damaged: it is named before anything is linked to it.
        CacheError: a path stands for different images in two caches, or ``out`` is a cache already.
    """
    if len(parts) < 2:
        raise CacheError("There is one cache to merge", "Name two or more: k5cache merge A B -o C")
    manifests = [_finished(root) for root in parts]
    for root, manifest in zip(parts[1:], manifests[1:], strict=True):
        found = differences.differences(manifests[0].recipe, manifest.recipe)
        if found:
            raise CacheStale(
                f"{parts[0]} and {root} have other recipes: {'; '.join(f.between(parts[0], root) for f in found)}",
                "Encode one of them again with the recipe of the other, and --update",
            )
    with lock(out):
        if (out / "manifest.json").exists():
            raise CacheError(f"{out} is a cache already", "Merge into a new folder with -o OTHER")
        rows, duplicates = _rows(parts, manifests)
        shards: dict[str, ShardInfo] = {}
        linked = True
        for root, manifest in zip(parts, manifests, strict=True):
            for shard in manifest.shards:
                if shard.file not in shards:
                    linked = _bring(root, out, shard) and linked
                    shards[shard.file] = shard
        made = Manifest(
            recipe=manifests[0].recipe,
            shards=tuple(shards.values()),
            prompts={raw: key for manifest in reversed(manifests) for raw, key in manifest.prompts.items()},
            created_by=manifests[0].created_by,
        )
        write_manifest(out, with_index(out, made, rows))
    return Merged(len(rows), len(shards), sum(s.num_bytes for s in shards.values()), duplicates, linked)


def _finished(root: Path) -> Manifest:
    manifest = read_manifest(root)
    if manifest.index is None:
        raise CacheError(
            f"{root} holds no finished index: its encode was interrupted",
            f"Finish it first: k5cache encode SOURCE -o {root}",
        )
    require_files(root, manifest)
    return manifest


def _rows(parts: Sequence[Path], manifests: Sequence[Manifest]) -> tuple[list[IndexRow], tuple[str, ...]]:
    """The rows of all parts by path, and the paths that came twice."""
    found: dict[tuple[str, bool], tuple[IndexRow, Path]] = {}
    duplicates: dict[str, None] = {}
    for root, manifest in zip(parts, manifests, strict=True):
        for row in index_rows(read_index(root, manifest.index)) if manifest.index else ():
            before = found.setdefault((row.path, row.flipped), (row, root))
            if before[1] is root:
                continue
            if _content(before[0]) != _content(row):
                raise CacheError(
                    f"{row.path} is one item in {before[1]} and another in {root}",
                    "Rename it in one of the sources and encode that again; a path stands for one image",
                )
            duplicates[row.path] = None
    return [replace(found[at][0], caption_lengths=()) for at in sorted(found)], tuple(duplicates)


def _content(row: IndexRow) -> tuple[object, ...]:
    return row.latent_key, row.mask_key, row.caption_keys


def _bring(root: Path, out: Path, shard: ShardInfo) -> bool:
    """Have ``shard`` in ``out``, checked, whole and durable. Returns whether it is a hard link."""
    problems = verify_shard(root, shard)
    if problems:
        raise files.corrupt(root, problems[0])
    target = out / shard.file
    target.parent.mkdir(parents=True, exist_ok=True)
    target.unlink(missing_ok=True)
    try:
        os.link((root / shard.file).resolve(), target)
    except OSError:  # another disk, or one without hard links
        with files.new_file(target) as new, (root / shard.file).open("rb") as old:
            shutil.copyfileobj(old, new, 1 << 20)
        return False
    files.sync_folder(target.parent)
    return True

"""How do several caches of one recipe become one? For example caches of parts that were encoded on several machines."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from k5cache.remote.behind import mirror_of
from k5cache.shared.errors import CacheCorrupt, CacheError
from k5cache.shared.files import make_folder, new_file, sync_folder
from k5cache.shared.outputs import check_writable
from k5cache.store import files
from k5cache.store.columns import flags, numbers, one_array
from k5cache.store.index import IndexRows, read_index, with_index
from k5cache.store.manifest import Edit, Manifest, ShardInfo, lock, read_manifest, require_files, write_manifest
from k5cache.store.notes import Part
from k5cache.store.ours import check_root
from k5cache.store.shards import verify_shard
from k5cache.store.skipped import read_skipped, write_skipped
from k5cache.store.split import write_split
from k5cache.upkeep.finished import finished_index
from k5cache.upkeep.meanwhile import was_replaced
from k5cache.upkeep.parts import require_one_recipe, require_rows, require_whole
from k5cache.upkeep.united import merge_left_out, merge_recipe, merge_source, merge_versions


@dataclass(frozen=True)
class Merged:
    """What the merged cache holds."""

    num_items: int
    num_shards: int
    num_bytes: int
    duplicates: tuple[str, ...]
    """Paths that several caches had, with the same image, captions and crop. The merged cache has each once."""
    is_linked: bool
    """Whether the shards are hard links: one copy on disk for both caches."""
    has_one_state: bool = True
    """False if parts of one source saw the same images, but other captions or masks, or other times of the files."""


def merge_caches(
    parts: Sequence[Path], out: Path, is_incomplete: bool = False, wait_seconds: float | None = None
) -> Merged:
    """Merge caches into a new one.

    The parts stay as they are, and may be written meanwhile. Shards on the same disk are linked, not copied.

    Args:
        parts: two or more finished caches with the same recipe.
        out: a folder that is not there yet, or one that an interrupted merge left.
        is_incomplete: of the parts of a source some may be missing, and some may be of an earlier state of it.
        wait_seconds: for another process that writes ``out``.

    Raises:
        CacheStale: two recipes differ, or parts of a source are missing or doubled; the message names them.
        CacheCorrupt: a shard is damaged; it is named before anything is linked to it.
        CacheError: a path stands for different images in two caches, or ``out`` is a cache already.
        CacheLocked: another process writes ``out``.
        OutputError: ``out`` is one of the parts, holds something other than a cache, or cannot be written.
    """
    check_root(out, reads=parts)
    _check_is_new(out)
    check_writable(out)
    while True:
        manifests = [read_manifest(root) for root in parts]
        try:
            return _merge(parts, manifests, out, is_incomplete, wait_seconds)
        except CacheCorrupt:
            if not any(map(was_replaced, parts, manifests)):
                raise


def _merge(
    parts: Sequence[Path], manifests: Sequence[Manifest], out: Path, is_incomplete: bool, wait_seconds: float | None
) -> Merged:
    for root, manifest in zip(parts, manifests, strict=True):
        finished_index(root, manifest)
        require_files(root, manifest)
    if len(parts) < 2 and manifests[0].part != Part((1,), 1):
        raise CacheError("There is one cache to merge", "Name two or more: k5cache merge A B -o C")
    require_one_recipe(parts, manifests)
    whole = require_whole(parts, manifests, is_incomplete)
    with lock(out, wait_seconds):
        _check_is_new(out)  # another process may have made it while the parts were read
        rows, duplicates = merge_rows(parts, manifests)
        require_rows(len(rows), parts)
        order = whole.order(rows.column("path"))
        rows = rows if order is None else rows.take(order)
        shards: dict[str, ShardInfo] = {}
        is_linked = not mirror_of(out)  # what is sent to a store is a second copy
        for root, manifest in zip(parts, manifests, strict=True):
            for shard in manifest.shards:
                if shard.file not in shards:
                    is_linked = _bring(root, out, shard) and is_linked
                    shards[shard.file] = shard
        merged = Manifest(
            recipe=merge_recipe(manifests),
            shards=tuple(shards.values()),
            prompts={raw: key for manifest in reversed(manifests) for raw, key in manifest.prompts.items()},
            created_by=merge_versions(manifests),
            source=merge_source(whole, manifests),
            left_out=merge_left_out(manifests),
            edits=_merge_edits(manifests),
            part=whole.part,
            classes={key: of_class for manifest in reversed(manifests) for key, of_class in manifest.classes.items()},
        )
        if whole.part and whole.split:
            merged = replace(merged, split=write_split(out, merged, whole.split))
        write_skipped(
            out, dict.fromkeys(entry for pair in zip(parts, manifests, strict=True) for entry in _skipped(*pair))
        )
        write_manifest(out, with_index(out, merged, rows))
    num_bytes = sum(shard.num_bytes for shard in shards.values())
    listings = {manifest.source.listing for manifest in manifests} - {""} if whole.split else set()
    return Merged(len(rows), len(shards), num_bytes, duplicates, is_linked, len(listings) < 2)


def _check_is_new(out: Path) -> None:
    if (out / "manifest.json").exists():
        raise CacheError(f"{out} is a cache already", "Merge into a new folder with -o OTHER")


def _skipped(root: Path, manifest: Manifest) -> Iterable[tuple[str, str]]:
    """(path, reason) of everything that an encode could not use; the manifest has only the first."""
    return read_skipped(root) or manifest.left_out.skipped


def merge_rows(parts: Sequence[Path], manifests: Sequence[Manifest]) -> tuple[IndexRows, tuple[str, ...]]:
    """The rows of all parts by path, and the paths that several parts have."""
    tables = [
        read_index(root, finished_index(root, manifest), manifest.format).append_column(
            "part", pa.array(np.full(manifest.index.num_rows if manifest.index else 0, number, "int32"))
        )
        for number, (root, manifest) in enumerate(zip(parts, manifests, strict=True))
    ]
    table = pa.concat_tables(tables)
    tables.clear()
    table = table.sort_by([(name, "ascending") for name in ("path", "flipped", "part")]).combine_chunks()
    of_part = numbers(one_array(table["part"]))
    rows = IndexRows(table.drop_columns(["part"]))
    del table
    again = np.concatenate([[False], *_repeats(rows)])[: len(rows)]
    firsts = np.maximum.accumulate(np.where(again, 0, np.arange(len(rows))))
    (repeated,) = np.nonzero(again & (of_part != of_part[firsts]))
    if len(repeated):
        is_same = rows.take(pa.array(repeated)).have_same_keys(rows.take(pa.array(firsts[repeated])))
        if not pc.all(is_same).as_py():
            row = repeated[is_same.index(False).as_py()]
            first, other = of_part[firsts[row]], of_part[row]
            are_parts = manifests[first].part is not None and manifests[other].part is not None
            raise _two_items(rows[row].path, parts[first], parts[other], are_parts)
    duplicates = tuple(dict.fromkeys(rows.column("path").take(pa.array(repeated)).to_pylist()))
    return (rows.where(~again) if again.any() else rows), duplicates


def _two_items(path: str, first: Path, other: Path, are_parts: bool) -> CacheError:
    fix = "Rename it in one of the sources and encode that again; a path stands for one image"
    if are_parts:
        fix = "It has changed between the encodes of these parts: encode both again, which encodes only what is new"
    return CacheError(f"{path} is one item in {first} and another in {other}", fix)


def _repeats(rows: IndexRows) -> list[np.ndarray[Any, Any]]:
    """Of each row but the first, whether it is the item of the row before it."""
    pairs = [pc.equal(column[1:], column[:-1]) for column in (rows.column("path"), rows.column("flipped"))]
    return [flags(pc.and_(*pairs))] if len(rows) else []


def _merge_edits(manifests: Sequence[Manifest]) -> tuple[Edit, ...]:
    """The pairs to draw of all parts, each once."""
    edits = [edit for manifest in manifests for edit in manifest.edits]
    return tuple({(edit.source_hash, edit.prompt): edit for edit in reversed(edits)}.values())[::-1]


def _bring(root: Path, out: Path, shard: ShardInfo) -> bool:
    """Check ``shard`` and link or copy it into ``out``. Returns whether it is a hard link.

    An interrupted merge may have brought it already. Then it is whole, as the lock has checked by its sha256.
    """
    problems = verify_shard(root, shard)
    if problems:
        raise files.corrupt(root, problems[0])
    target = out / shard.file
    make_folder(target.parent)
    if target.exists():
        return target.samefile(root / shard.file)
    try:
        os.link((root / shard.file).resolve(), target)
    except OSError:  # another disk, or one without hard links
        with new_file(target) as new, (root / shard.file).open("rb") as old:
            shutil.copyfileobj(old, new, 1 << 20)
        return False
    sync_folder(target.parent)
    return True

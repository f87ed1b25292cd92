"""Is every byte of a cache the byte that was written, and does every number make sense? Lists everything wrong."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING

from k5cache.remote.mirror import behind
from k5cache.shared.errors import CacheError
from k5cache.shared.kind import Kind
from k5cache.store import tables
from k5cache.store.index import IndexRow, index_rows, read_index
from k5cache.store.locations import SCHEMA as LOCATIONS_SCHEMA
from k5cache.store.locations import Locations, file_names, locate
from k5cache.store.manifest import IndexInfo, Manifest, ShardInfo, ShardKind, read_manifest
from k5cache.store.ours import unnamed_files
from k5cache.store.shards import StoredRow, verify_shard
from k5cache.store.split import read_split
from k5cache.upkeep.columns import column_problems

if TYPE_CHECKING:
    import torch

OUT_OF_LINE = 16.0
"""A row is reported if its norm is this many times the median of its kind, or this many times less. A test checks that
noise, plain black, white and red, and captions of 1 to 70 words stay within it. Rows with a wrong scale or of another
encoder are often far outside."""


@dataclass(frozen=True)
class Verified:
    """What a verification read, and what is wrong."""

    root: Path
    problems: tuple[str, ...]
    """One sentence each; none if the cache is as it was written."""
    num_shards: int = 0
    num_rows: int = 0
    num_bytes: int = 0
    unnamed: tuple[str, ...] = ()
    """Files of ours that the manifest does not name: left by a crash, or replaced. `k5cache gc` deletes them."""
    foreign: tuple[str, ...] = ()
    """Files that are not of this cache. Nothing of ours deletes them."""
    seconds: float = 0.0


def verify_cache(root: Path, advance: Callable[[int], None] = lambda num_bytes: None) -> Verified:
    """Check everything that can be checked without a model.

    Bytes: the manifest, the tables and every shard by sha256, every row by its own checksum. Numbers: row counts match,
    what the index names is there and has its size, every column that a trainer needs is there in the shape of its
    bucket, no NaN, no infinity, no negative standard deviation, norms like those of the other rows.

    Args:
        advance: called with the number of bytes that were read.

    Raises:
        CacheError: there is no cache at ``root`` at all.
    """
    started = time.monotonic()
    mirror = behind(root)
    if mirror:
        mirror.forget()  # what the store holds is verified, and not the copies of it
    if not (root / "manifest.json").exists():
        read_manifest(root)  # raises, saying what is there instead
    try:
        manifest = read_manifest(root)
    except CacheError as error:
        return Verified(root, (error.problem,))
    problems = list(_check_tables(root, manifest))
    norms = _Norms(manifest.recipe.get("latents", {}).get("posterior") != "mean")
    for shard in manifest.shards:
        problems += verify_shard(root, shard, partial(norms.visit, shard))
        advance(shard.num_bytes)
    problems += norms.out_of_line(root)
    foreign = mirror.bring_unnamed(manifest.named) if mirror else ()
    unnamed = unnamed_files(root, manifest.named)
    return Verified(
        root=root,
        problems=tuple(dict.fromkeys(problems)),  # a shard that cannot be opened is reported by its rows and its table
        num_shards=len(manifest.shards),
        num_rows=sum(shard.num_rows for shard in manifest.shards),
        num_bytes=sum(shard.num_bytes for shard in manifest.shards),
        unnamed=unnamed.ours,
        foreign=tuple(sorted({*unnamed.foreign, *foreign})),
        seconds=time.monotonic() - started,
    )


def _check_tables(root: Path, manifest: Manifest) -> Iterator[str]:
    """What is wrong with the index and the locations, and with what they say about the shards."""
    try:
        if manifest.locations and not _locations_are_true(root, manifest, manifest.locations):
            yield f"{root / manifest.locations.file}: it does not say where the rows of the shards are"
    except CacheError as error:
        yield error.problem
    try:
        if manifest.split:
            read_split(root, manifest.split)
    except CacheError as error:
        yield error.problem
    if manifest.index is None:
        yield f"{root} holds no finished index: its encode was interrupted"
        return
    try:
        rows = index_rows(read_index(root, manifest.index, manifest.format))
        locations = Locations(root, manifest.locations, manifest.shards)
        lengths = locations.text_lengths()
    except CacheError as error:
        yield error.problem
        return
    for raw, key in manifest.prompts.items():
        if key not in lengths:
            yield f"{root}: the prompt {raw[:80]!r} has no row"
    if lacking := [key for pair in manifest.classes.items() for key in pair if key not in lengths]:
        yield f"{root}: {len(lacking)} class captions, or the captions that they belong to, have no row"
    for edit in manifest.edits:
        if not all(key in lengths for key in edit.text_keys) or not locations.find("latents", edit.source_key):
            yield f"{root}: the pair to draw of {edit.source[:200]} and {edit.prompt[:80]!r} lacks a row"
    for row in rows:
        for problem in _check_index_row(row, manifest.kind, locations, lengths):
            yield f"{root / manifest.index.file}: {row.path[:200]} {problem}"


def _check_index_row(
    row: IndexRow, kind_of_cache: Kind, locations: Locations, lengths: Mapping[str, int]
) -> Iterator[str]:
    """What is wrong with one row of the index, given where rows are and how many tokens each text has."""
    bucket = (row.bucket_width, row.bucket_height)
    wanted: tuple[tuple[ShardKind, str | None, str], ...] = (
        ("latents", row.latent_key, "latents"),
        ("masks", row.mask_key, "masks"),
        ("latents", row.source_key, "latents of its source"),
    )
    for kind, key, name in wanted:
        place = locations.find(kind, key) if key else None
        if key and (place is None or place[0].bucket != bucket):
            yield f"has no {name} of {bucket[0]}x{bucket[1]}"
    if kind_of_cache == "i2i" and not row.source_key:
        yield "has no source"
    if row.empty_key and row.empty_key not in lengths:
        yield "has no empty instruction"
    if tuple(lengths.get(key) for key in row.caption_keys) != row.caption_lengths or not row.caption_keys:
        yield "has no captions of the lengths it says"


def _locations_are_true(root: Path, manifest: Manifest, info: IndexInfo) -> bool:
    """Whether the table agrees with the footers of the shards that it knows. Shards of later encodes are not in it."""
    file = tables.open_table(root, info, LOCATIONS_SCHEMA)
    by_name = {shard.file: shard for shard in manifest.shards}
    known = [by_name.get(name) for name in file_names(root, info, file.schema)]
    shards = [shard for shard in known if shard]
    return len(shards) < len(known) or bool(tables.read_table(file).equals(locate(root, shards)))


@dataclass
class _Norms:
    """The columns of every shard, and the root mean square of every tensor, compared when all are known."""

    has_std: bool
    """Whether latents have a standard deviation."""
    widths: dict[str, int] = field(default_factory=dict)
    """The last size of every tensor's shape, which is the same in all rows."""
    checked: set[str] = field(default_factory=set)
    """Shards whose columns were compared: a shard has one shape for all of its rows."""
    seen: dict[str, list[tuple[float, str]]] = field(default_factory=dict)

    def visit(self, shard: ShardInfo, row: int, stored: StoredRow) -> Iterator[str]:
        """What is wrong with the columns and the numbers of one row."""
        if shard.file not in self.checked or stored.n_tokens == 0:
            self.checked.add(shard.file)
            yield from column_problems(shard, stored.tensors, stored.n_tokens or 0, self.has_std, self.widths)
        for name, tensor in stored.tensors.items():
            if not tensor.is_floating_point() or not tensor.numel():
                continue
            is_finite, rms = _measure(tensor)
            if not is_finite:
                yield f"{name} of {stored.key} is not finite"
            elif name == "std":
                if tensor.min() < 0:
                    yield f"std of {stored.key} is negative"
            else:
                self.seen.setdefault(name, []).append((rms, f"{shard.file}, row {row}: {name} of {stored.key}"))

    def out_of_line(self, root: Path) -> Iterator[str]:
        """Rows whose norm is far from the median of their kind."""
        for rows in self.seen.values():
            usual = median(rms for rms, _ in rows)
            for rms, row in rows:
                if rms == 0 or not usual / OUT_OF_LINE <= rms <= usual * OUT_OF_LINE:
                    yield f"{root / row} has a norm out of line: {rms:.3g}, the median is {usual:.3g}"


def _measure(tensor: torch.Tensor) -> tuple[bool, float]:
    """Whether all values are finite, and their root mean square."""
    values = tensor.float()
    rms = values.square().mean().sqrt().item()
    if rms == rms and rms != float("inf"):  # no NaN and no infinity can hide in a finite sum of squares
        return True, rms
    return bool(values.isfinite().all()), rms

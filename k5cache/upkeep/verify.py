"""Is every byte of a cache the byte that was written, and does every number make sense? Lists everything wrong."""

from __future__ import annotations

import time
from array import array
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from k5cache.remote.mirror import behind
from k5cache.shared.errors import CacheError
from k5cache.store import tables
from k5cache.store.index import index_rows, read_index
from k5cache.store.locations import SCHEMA as LOCATIONS_SCHEMA
from k5cache.store.locations import Locations, file_names, locate
from k5cache.store.manifest import IndexInfo, Manifest, ShardInfo, read_manifest
from k5cache.store.ours import unnamed_files
from k5cache.store.shards import Shard, StoredRow, verify_shard
from k5cache.store.split import read_split
from k5cache.upkeep.columns import column_problems
from k5cache.upkeep.index_problems import problems_of_rows
from k5cache.upkeep.meanwhile import was_replaced

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

    A cache that is written meanwhile is looked at again.

    Bytes: the manifest, the tables and every shard by sha256, every row by its own checksum. Numbers: row counts match,
    what the index names is there and has its size, every column that a trainer needs is there in the shape of its
    bucket, no NaN, no infinity, no negative standard deviation, norms like those of the other rows.

    Args:
        advance: called with the number of bytes that were read.

    Raises:
        CacheError: there is no cache at ``root`` at all.
    """
    started = time.monotonic()
    if mirror := behind(root):
        mirror.forget()  # what the store holds is verified, and not the copies of it
    if not (root / "manifest.json").exists():
        read_manifest(root)  # raises, saying what is there instead
    while True:
        try:
            manifest = read_manifest(root)
        except CacheError as error:
            return Verified(root, (error.problem,))
        verified = _verify(root, manifest, advance)
        if not verified.problems or not was_replaced(root, manifest):
            return replace(verified, seconds=time.monotonic() - started)


def _verify(root: Path, manifest: Manifest, advance: Callable[[int], None]) -> Verified:
    problems = list(_check_tables(root, manifest))
    norms = _Norms(manifest.recipe.get("latents", {}).get("posterior") != "mean")
    for shard in manifest.shards:
        problems += verify_shard(root, shard, partial(norms.visit, shard))
        advance(shard.num_bytes)
    problems += norms.out_of_line(root)
    mirror = behind(root)
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
        texts = locations.texts()
    except CacheError as error:
        yield error.problem
        return

    def lack(keys: Iterable[str]) -> list[str]:
        wanted = pa.array(keys, pa.string())
        return wanted.filter(pc.invert(pc.is_in(wanted, value_set=texts.keys))).to_pylist()

    lacking = {*lack(manifest.prompts.values())}
    for raw, key in manifest.prompts.items():
        if key in lacking:
            yield f"{root}: the prompt {raw[:80]!r} has no row"
    if of_classes := lack(key for pair in manifest.classes.items() for key in pair):
        yield f"{root}: {len(of_classes)} class captions, or the captions that they belong to, have no row"
    for edit in manifest.edits:
        if lack(edit.text_keys) or not locations.find("latents", edit.source_key):
            yield f"{root}: the pair to draw of {edit.source[:200]} and {edit.prompt[:80]!r} lacks a row"
    for path, problem in problems_of_rows(rows, manifest.kind, locations, texts):
        yield f"{root / manifest.index.file}: {path[:200]} {problem}"


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
    seen: dict[str, _Seen] = field(default_factory=dict)

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
                self.seen.setdefault(name, _Seen()).add(shard, row, rms)

    def out_of_line(self, root: Path) -> Iterator[str]:
        """Rows whose norm is far from the median of their kind."""
        for name, seen in self.seen.items():
            norms = np.frombuffer(seen.norms)
            usual = float(np.median(norms))
            is_usual = (norms != 0) & (usual / OUT_OF_LINE <= norms) & (norms <= usual * OUT_OF_LINE)
            opened: Shard | None = None
            for i in np.flatnonzero(~is_usual).tolist():
                info, row = seen.shards[bisect_right(seen.firsts, i) - 1], seen.rows[i]
                if opened is None or opened.info is not info:
                    opened = Shard(root, info)
                place = f"{opened.path}, row {row}: {name} of {opened.keys[row]}"
                yield f"{place} has a norm out of line: {norms[i]:.3g}, the median is {usual:.3g}"


@dataclass
class _Seen:
    """The norms of all tensors of one name: 12 bytes a row, whatever the names of shards and keys take."""

    norms: array[float] = field(default_factory=lambda: array("d"))
    rows: array[int] = field(default_factory=lambda: array("i"))
    """Their numbers in their shards."""
    shards: list[ShardInfo] = field(default_factory=list)
    firsts: list[int] = field(default_factory=list)
    """Of each shard, the number of its first norm."""

    def add(self, shard: ShardInfo, row: int, norm: float) -> None:
        """Note one. Shards come one after another."""
        if not self.shards or self.shards[-1] is not shard:
            self.shards.append(shard)
            self.firsts.append(len(self.norms))
        self.norms.append(norm)
        self.rows.append(row)


def _measure(tensor: torch.Tensor) -> tuple[bool, float]:
    """Whether all values are finite, and their root mean square."""
    values = tensor.float()
    rms = values.square().mean().sqrt().item()
    if rms == rms and rms != float("inf"):  # no NaN and no infinity can hide in a finite sum of squares
        return True, rms
    return bool(values.isfinite().all()), rms

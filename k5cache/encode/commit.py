"""How does a cache grow? A shard is whole on disk before the manifest names it, and the index comes last."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import pyarrow as pa
import pyarrow.compute as pc

from k5cache.buckets import Bucket
from k5cache.encode.sink import Append
from k5cache.encoders.memory_plan import SECONDS_AT_RISK
from k5cache.remote.behind import mirror_of
from k5cache.shared import interrupt
from k5cache.shared.errors import CacheError, K5Error
from k5cache.store.index import SCHEMAS as INDEX_SCHEMAS
from k5cache.store.index import IndexRows, index_rows, read_index, with_index
from k5cache.store.keys import Keys
from k5cache.store.locations import SCHEMA as LOCATIONS_SCHEMA
from k5cache.store.locations import locate
from k5cache.store.manifest import Edit, IndexInfo, Manifest, ShardInfo, ShardKind, write_manifest
from k5cache.store.notes import LeftOut, SourceNote
from k5cache.store.shards import ShardWriter, verify_shard
from k5cache.store.split import SCHEMA as SPLIT_SCHEMA
from k5cache.store.split import write_split
from k5cache.store.tables import open_table, read_table
from k5cache.store.tensors import TensorSpec

_SMALL = 256
"""Shards of a manifest that is written after each of them: it takes about 10 ms."""
_LEAST_BETWEEN = 50
"""A larger one is written at most so often that writing takes one fiftieth of the time. It grows with the cache, so
writing it after each of 50,000 shards would take ten hours, and write 430 GB."""


class Committer:
    """The ``RowSink`` that writes shards and names each in the manifest once it is whole on disk.

    As a context manager it names at its end, whatever ended it, what ``add`` has not named yet.
    """

    def __init__(self, root: Path, manifest: Manifest, shard_bytes: int) -> None:
        self.root, self.manifest, self.shard_bytes = root, manifest, shard_bytes
        self._located: pa.Table | None = None
        self._waiting: list[ShardInfo] = []
        self._due = 0.0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with suppress(OSError, K5Error) if error else nullcontext():  # such as a full disk, which ended the block
            self.commit()

    def keys(self, kind: ShardKind) -> Keys:
        """Keys of every committed row of this kind. Reads the footers of shards that no index names yet."""
        if self._located is None:
            self._located = locate(self.root, self.manifest.shards, self.manifest.locations)
        shards = self.manifest.shards
        numbers = pa.array([i for i, shard in enumerate(shards) if shard.kind == kind], pa.int32())
        located = self._located.filter(pc.is_in(self._located["shard"], value_set=numbers))
        return Keys(located["key"].combine_chunks())

    @contextmanager
    def shards(self, kind: ShardKind, specs: dict[str, TensorSpec], bucket: Bucket | None = None) -> Iterator[Append]:
        """Yield ``append``. A shard is committed when it has ``shard_bytes`` or is old, at Ctrl-C, and at the end."""
        size = (bucket.width, bucket.height) if bucket else None
        writer: ShardWriter | None = None
        opened = 0.0
        is_between_rows = True

        def append(row: dict[str, Any]) -> None:
            nonlocal writer, opened, is_between_rows
            is_between_rows = False
            if writer is None:
                writer, opened = ShardWriter(self.root, kind, specs, size), time.monotonic()
            writer.append(row)
            # 256 images at 1024 px fill a shard: two minutes of a small GPU, hours of a CPU.
            if writer.num_bytes >= self.shard_bytes or time.monotonic() - opened >= SECONDS_AT_RISK:
                finished, writer = writer, None
                self.add([finished.finish()])
            is_between_rows = True

        try:
            yield append
        except BaseException as error:
            # Ctrl-C keeps the whole rows of the shard in flight; a second one does not wait for them.
            is_wanted = isinstance(error, KeyboardInterrupt) and is_between_rows and not interrupt.is_second(error)
            try:
                if writer and is_wanted:
                    self.add([writer.finish()])
            finally:
                if writer:
                    writer.abort()  # does nothing to a finished shard
            raise
        if writer:
            with interrupt.deferred():
                self.add([writer.finish()])

    def index(
        self,
        rows: IndexRows,
        prompts: dict[str, str],
        recipe: dict[str, Any],
        versions: dict[str, str],
        source: SourceNote = SourceNote(),  # noqa: B008 (frozen)
        left_out: LeftOut = LeftOut(),  # noqa: B008 (frozen)
        edits: tuple[Edit, ...] = (),
        classes: Mapping[str, str] | None = None,
        split: pa.Table | None = None,
    ) -> bool:
        """Write the index and name it, with the recipe that made its rows. From then on readers see these rows.

        Args:
            prompts: added to those that the manifest has.
            edits: all pairs to draw.
            classes: the keys of class captions, by those of captions. None: those that the manifest has.
            split: of the source, if this is a part of one. None: that which the manifest has.

        Returns:
            False if the cache says all this already; then nothing is written.
        """
        self.commit()
        before = self.manifest
        prompts = {**before.prompts, **prompts}
        self.manifest = replace(
            before, prompts=prompts, recipe=recipe, source=source, left_out=left_out, edits=edits,
            classes=before.classes if classes is None else dict(classes),
            split=before.split if split is None else write_split(self.root, before, split),
        )  # fmt: skip
        if (
            before.index
            and before.locations
            and before == self.manifest
            and rows.has_same_items(index_rows(read_index(self.root, before.index, before.format)), before.format)
        ):
            return False
        self.manifest = with_index(self.root, replace(self.manifest, created_by=versions), rows)
        write_manifest(self.root, self.manifest)
        return True

    def add(self, shards: Sequence[ShardInfo]) -> None:
        """Name shards that are whole on disk: at once, or after a while if the manifest is large."""
        self._waiting += shards
        if len(self.manifest.shards) < _SMALL or time.monotonic() >= self._due:
            self.commit()

    def commit(self) -> None:
        """Write a manifest that names all shards. One that is written again, to the same bytes, is named once."""
        if not self._waiting:
            return
        named = {shard.file: shard for shard in (*self.manifest.shards, *self._waiting)}
        manifest = replace(self.manifest, shards=tuple(named.values()))
        if len(named) < _SMALL:
            write_manifest(self.root, manifest)
        else:
            began = time.thread_time()  # without the time that it waits for a store
            write_manifest(self.root, manifest)
            seconds = _LEAST_BETWEEN * (time.thread_time() - began)
            self._due = time.monotonic() + min(seconds, SECONDS_AT_RISK)
        self.manifest, self._waiting = manifest, []


def drop_damaged(root: Path, manifest: Manifest) -> tuple[Manifest, tuple[str, ...]]:
    """The manifest without the files that are damaged, and their names. Every byte is read.

    Nothing changes on disk: no file is deleted, and the manifest is written with the next commit.
    """
    mirror = mirror_of(root)
    if mirror:
        mirror.forget()  # what the store holds is checked, and not the copies of it
    damaged = {shard.file for shard in manifest.shards if verify_shard(root, shard)}
    if mirror:
        mirror.send_again(damaged)
    intact = tuple(shard for shard in manifest.shards if shard.file not in damaged)
    manifest = replace(manifest, shards=intact)
    if not _is_whole(root, manifest.index, INDEX_SCHEMAS[manifest.format]):
        damaged.add(manifest.index.file if manifest.index else "")
        manifest = replace(manifest, index=None)
    if not _is_whole(root, manifest.locations, LOCATIONS_SCHEMA):
        damaged.add(manifest.locations.file if manifest.locations else "")
        manifest = replace(manifest, locations=None)
    if not _is_whole(root, manifest.split, SPLIT_SCHEMA):
        damaged.add(manifest.split.file if manifest.split else "")
        manifest = replace(manifest, split=None)
    return manifest, tuple(sorted(damaged))


def _is_whole(root: Path, info: IndexInfo | None, schema: pa.Schema) -> bool:
    try:
        if info:
            read_table(open_table(root, info, schema))
    except CacheError:
        return False
    return True

"""The manifest as a cache grows: a shard is whole on disk before the manifest names it, the index comes last."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from k5cache.buckets import Bucket
from k5cache.store.index import IndexRow, with_index
from k5cache.store.manifest import Manifest, ShardInfo, ShardKind, write_manifest
from k5cache.store.shards import ShardWriter, read_keys
from k5cache.store.tensors import TensorSpec


class Committer:
    """The manifest as it grows: a shard is whole on disk before the manifest names it."""

    def __init__(self, root: Path, manifest: Manifest, shard_bytes: int) -> None:
        self.root, self.manifest, self.shard_bytes = root, manifest, shard_bytes

    def keys(self, kind: str) -> set[str]:
        """Keys of every row of this kind that is committed."""
        return {key for shard in self.manifest.shards if shard.kind == kind for key in read_keys(self.root, shard)}

    @contextmanager
    def shards(
        self, kind: ShardKind, specs: dict[str, TensorSpec], bucket: Bucket | None = None
    ) -> Iterator[Callable[[dict[str, Any]], None]]:
        """Yield ``append``; a shard is committed whenever it has grown to ``shard_bytes``, and at the end."""
        size = (bucket.width, bucket.height) if bucket else None
        writer: ShardWriter | None = None

        def append(row: dict[str, Any]) -> None:
            nonlocal writer
            writer = writer or ShardWriter(self.root, kind, specs, size)
            writer.append(row)
            if writer.num_bytes >= self.shard_bytes:
                finished, writer = writer, None
                self._add(finished.finish())

        try:
            yield append
        except BaseException:
            if writer:
                writer.abort()
            raise
        if writer:
            self._add(writer.finish())

    def index(self, rows: Sequence[IndexRow], prompts: dict[str, str]) -> None:
        """Write the index and name it: from here on readers see these rows."""
        prompts = {**self.manifest.prompts, **prompts}
        self.manifest = with_index(self.root, replace(self.manifest, prompts=prompts), rows)
        write_manifest(self.root, self.manifest)

    def _add(self, shard: ShardInfo) -> None:
        self.manifest = replace(self.manifest, shards=(*self.manifest.shards, shard))
        write_manifest(self.root, self.manifest)

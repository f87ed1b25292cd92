"""The reader: how does a trainer read a cache? Any number of processes and threads can, even while it is extended.

Another trainer needs no more than this::

    import k5cache

    cache = k5cache.open("cache/my_images")
    scaling_factor = cache.manifest.recipe["latents"]["scaling_factor"]
    for item in cache:  # or cache[i], in any order, from any thread
        latents = (item["mean"] + item["std"] * torch.randn_like(item["std"])) * scaling_factor
        caption = random.choice(item["captions"])
        train(latents, caption.prompt_embeds, caption.pooled)
"""

from __future__ import annotations

import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from k5cache.remote.behind import mirror_of
from k5cache.shared import system
from k5cache.shared.command_line import command
from k5cache.shared.errors import CacheCorrupt, CacheError
from k5cache.shared.kind import Kind
from k5cache.shared.urls import is_url
from k5cache.store import files, tables
from k5cache.store.columns import getter
from k5cache.store.index import SCHEMAS, IndexRow, row_of
from k5cache.store.locations import Locations, Texts
from k5cache.store.manifest import Edit, Manifest, ShardInfo, ShardKind, read_manifest
from k5cache.store.notes import arguments_of
from k5cache.store.shards import Shard, StoredRow

if TYPE_CHECKING:
    import torch

OPEN_SHARDS = 128  # how many shards stay open at most. Each takes a descriptor and about 0.3 MB; opening one takes 1 ms
SHARE_OF_DESCRIPTORS = 4  # and of all caches at most a quarter of what the process may open: it has other files too


@dataclass(frozen=True)
class TextRow:
    """The embeddings of one caption or prompt."""

    key: str
    prompt_embeds: torch.Tensor
    """``[L, D]`` without padding; D is 3584."""
    pooled: torch.Tensor
    """``[768]``."""
    n_tokens: int
    """L."""
    caption: str
    """The text that was encoded, after the pipeline's cleaning."""


class Cache:
    """An open cache, from ``open_cache``: ``cache[i]`` is one of its ``len(cache)`` items, as tensors. Thread-safe.

    Every read checks its bytes against the stored checksums and raises ``CacheCorrupt`` with the row if they differ.
    """

    root: Path
    manifest: Manifest

    def __init__(self, root: Path, manifest: Manifest, pin_memory: bool = False) -> None:
        if manifest.index is None:
            again = command("k5cache", "encode", "SOURCE", *arguments_of(manifest.part), "-o", root)
            raise CacheError(
                f"{root} is not finished: its encode was interrupted",
                f"Run the same command again, and it continues: {again}",
            )
        self.root, self.manifest, self._pin_memory = root, manifest, pin_memory
        self._index_file = tables.open_table(root, manifest.index, SCHEMAS[manifest.format])
        self._num_items = manifest.index.num_rows
        self._group: tuple[int, pa.Table] = (-1, None)
        self._locations = Locations(root, manifest.locations, manifest.shards)
        self._open: OrderedDict[str, Shard] = OrderedDict()
        _CACHES.add(self)
        self._lock = threading.Lock()

    @property
    def kind(self) -> Kind:
        """For what it was encoded: ``t2i``, text-to-image, or ``i2i``, image-to-image."""
        return self.manifest.kind

    def __len__(self) -> int:
        return self._num_items

    def __getitem__(self, i: int) -> dict[str, Any]:
        """Item ``i``; a negative ``i`` counts from the end.

        Returns:
            ``mean`` and, unless the posterior is "mean", ``std``: ``[H/8, W/8, 16]`` float16, not multiplied by the
            VAE's ``scaling_factor``; ``captions``: a tuple of one or more ``TextRow``; ``mask``: ``[H/8, W/8]`` float32
            from 0 to 1, or None; ``path`` of the image; ``bucket``: (width, height) in pixels; ``row``: the
            ``IndexRow``. In a cache for image-to-image also ``source``, a dict with the source's ``mean`` and ``std``,
            and ``empty``, the ``TextRow`` of the empty instruction with this source, or None; both are None in others.

        Raises:
            IndexError: there is no such item.
            CacheCorrupt: a byte read is not the byte that was written.
        """
        row = self.row(i)
        return {
            **self.latents(row.latent_key),
            "captions": tuple(self.text(key) for key in row.caption_keys),
            "mask": self.mask(row.mask_key) if row.mask_key else None,
            "path": row.path,
            "bucket": (row.bucket_width, row.bucket_height),
            "row": row,
            "source": self.latents(row.source_key) if row.source_key else None,
            "empty": self.text(row.empty_key) if row.empty_key else None,
        }

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return (self[i] for i in range(len(self)))

    def row(self, i: int) -> IndexRow:
        """The index's row of item ``i``. No tensor is read."""
        if not -len(self) <= i < len(self):
            raise IndexError(f"item {i} of {len(self)}")
        return row_of({name: value(i % len(self)) for name, value in self._columns.items()})

    def rows(self, numbers: Sequence[int]) -> list[IndexRow]:
        """The rows of some items, in the order of ``numbers``. Only their row groups are decoded, 35 MB each.

        The last of these is kept, since pages of items lie side by side.
        """
        rows: dict[int, IndexRow] = {}
        for group, first, wanted in tables.by_group(self._index_file, numbers):
            known, table = self._group
            if known != group:
                table = tables.read_group(self._index_file, group)
                self._group = (group, table)
            values = table.take(pa.array([number - first for number in wanted])).to_pylist()
            rows |= {number: row_of(value) for number, value in zip(wanted, values, strict=True)}
        return [rows[number] for number in numbers]

    @cached_property
    def index(self) -> pa.Table:
        """The whole index as an Arrow table with the fields of ``IndexRow`` as columns. It is read on first use."""
        return tables.read_table(self._index_file)

    def columns(self, *names: str) -> pa.Table:
        """Some columns of the index, read each time, so that a plan over a million items needs little memory."""
        return tables.read_table(self._index_file, names)

    def latents(self, key: str) -> dict[str, torch.Tensor]:
        """``mean`` and ``std``, ``[H/8, W/8, 16]`` float16, unscaled. There is no ``std`` if the posterior is "mean".

        Raises:
            CacheError: the cache has no such row.
            CacheCorrupt: a byte read is not the byte that was written.
        """
        row = self._read("latents", key)
        if "mean" not in row.tensors:
            raise files.corrupt(self.root, f"{self.root}, latents row {key} has no mean")
        return row.tensors

    def mask(self, key: str) -> torch.Tensor:
        """``[H/8, W/8]`` float32 from 0 to 1: how much of each latent's 8x8 pixels the mask covers.

        Raises the same errors as ``latents``.
        """
        row = self._read("masks", key)
        if "mask" not in row.tensors:
            raise files.corrupt(self.root, f"{self.root}, masks row {key} has no mask")
        return row.tensors["mask"].float() / 255

    def text(self, key: str) -> TextRow:
        """The embeddings of one caption. Raises the same errors as ``latents``."""
        row = self._read("text", key)
        try:
            prompt_embeds, pooled = row.tensors["prompt_embeds"], row.tensors["pooled"]
        except KeyError as error:
            raise files.corrupt(self.root, f"{self.root}, text row {key} has no {error.args[0]}") from None
        return TextRow(key, prompt_embeds, pooled, row.n_tokens or 0, row.caption or "")

    def caption(self, key: str) -> str:
        """The caption of a text row, without its embeddings and without torch. Only the row's key is checked."""
        return self._value("text", key, "caption").decode(errors="replace")

    def mask_levels(self, key: str) -> bytes:
        """A mask as stored, ``[H/8, W/8]`` uint8 in C order, without torch. Only the row's key is checked."""
        return self._value("masks", key, "mask")

    def class_text(self, caption_key: str) -> TextRow | None:
        """The class caption of a caption: the same with the class in the place of the trigger. None if it has none.

        Raises the same errors as ``latents``.
        """
        key = self.manifest.classes.get(caption_key)
        return None if key is None else self.text(key)

    def prompt(self, raw: str) -> TextRow:
        """The embeddings of a prompt, given as the user wrote it. A cache for image-to-image has none: see ``edit``.

        Raises:
            CacheError: the prompt was not encoded; says how to add it.
        """
        if raw not in self.manifest.prompts:
            source = ("--source", "PICTURE") if self.kind == "i2i" else ()
            raise CacheError(f"{self.root} does not hold the prompt {_shown(raw)}", self._how_to_add(raw, *source))
        return self.text(self.manifest.prompts[raw])

    def edit(self, source_hash: str, prompt: str, source: str = "PICTURE") -> Edit:
        """The keys of a pair to draw: a source, by the content hash of its bytes, and a raw instruction.

        Args:
            source: the path of the source, for the message.

        Raises:
            CacheError: the pair was not encoded; says how to add it.
        """
        for edit in self.manifest.edits:
            if (edit.source_hash, edit.prompt) == (source_hash, prompt):
                return edit
        is_edited = any((edit.source, edit.prompt) == (source, prompt) for edit in self.manifest.edits)
        since = ", which has changed since it was added" if is_edited else ""
        raise CacheError(
            f"{self.root} does not hold the instruction {_shown(prompt)} for the picture {source}{since}",
            self._how_to_add(prompt, "--source", source),
        )

    def _how_to_add(self, prompt: str, *options: str) -> str:
        words = ("--", prompt) if prompt.startswith("-") else (prompt,)
        return f"Add it: {command('k5cache', 'prompts', 'add', self.root, *options, *words)}"

    def texts(self) -> Texts:
        """The keys and lengths of all captions and prompts, as columns. No tensor is read."""
        return self._locations.texts()

    @cached_property
    def _columns(self) -> dict[str, Callable[[int], Any]]:
        """Each column as a function from a row's number to its value. Columns of numbers are not copied."""
        return {name: getter(self.index.column(name).chunk(0)) for name in self.index.column_names}

    def _read(self, kind: ShardKind, key: str) -> StoredRow:
        shard, row = self._locate(kind, key)
        try:
            return shard.read(row, key, self._pin_memory)
        except CacheCorrupt:
            mirror = mirror_of(self.root)
            if not mirror or not mirror.again({shard.info.file}):
                raise
        with self._lock:  # the copy of a URL's shard was damaged: another one is fetched
            self._open.pop(shard.info.file, None)
        shard, row = self._locate(kind, key)
        return shard.read(row, key, self._pin_memory)

    def _value(self, kind: ShardKind, key: str, column: str) -> bytes:
        shard, row = self._locate(kind, key)
        return shard.value(row, key, column)

    def _locate(self, kind: ShardKind, key: str) -> tuple[Shard, int]:
        location = self._locations.find(kind, key)
        if location is None:
            again = command("k5cache", "encode", "SOURCE", *arguments_of(self.manifest.part), "-o", self.root)
            raise CacheError(f"{self.root} has no {kind} row with key {key[:80]!r}", f"Encode again: {again}")
        info, row = location
        return self._shard(info), row

    def _shard(self, info: ShardInfo) -> Shard:
        """An open shard. The least recently used makes room; if a thread is reading it, it closes after that read."""
        with self._lock:
            shard = self._open.pop(info.file, None) or self._opened(info)
            self._open[info.file] = shard
            while len(self._open) > most_open():
                self._open.popitem(last=False)
        return shard

    def _opened(self, info: ShardInfo) -> Shard:
        mirror = mirror_of(self.root)
        if not mirror:
            return Shard(self.root, info)
        try:
            shard = Shard(self.root, info)
        except CacheCorrupt:
            if not mirror.again({info.file}):
                raise
            shard = Shard(self.root, info)
        for name in [name for name in self._open if not mirror.is_here(name)]:
            del self._open[name]  # it has made room, but the disk has none until it is closed
        return shard


def no_items(cache: Cache) -> CacheError:
    """The error for a cache without items: a part of a source may have none."""
    part = cache.manifest.part
    if part is None:
        return CacheError(f"{cache.root} holds no images", "Encode some first: k5cache encode SOURCE")
    merge = command("k5cache", "merge", cache.root, "OTHERS", "-o", "NEW")
    return CacheError(f"{cache.root} holds no images: {part.name} has none", f"Merge it with the other parts: {merge}")


def most_open() -> int:
    """How many shards of each cache stay open, by this process's limit on open files (``ulimit -n``)."""
    limit = system.most_open_files()
    if limit is None:
        return OPEN_SHARDS
    return max(1, min(OPEN_SHARDS, limit // SHARE_OF_DESCRIPTORS // max(1, len(_CACHES))))


_CACHES: weakref.WeakSet[Cache] = weakref.WeakSet()  # those that are open share the limit


def _shown(prompt: str) -> str:
    return repr(prompt if len(prompt) <= 80 else prompt[:77] + "...")


def open_cache(path: str | Path, pin_memory: bool = False) -> Cache:
    """Open the cache at ``path`` for reading. No lock is taken and nothing is written.

    ``path`` may be a URL, such as ``s3://bucket/cache``: then shards are copied to this machine as they are read,
    within a bound (``K5_REMOTE_SIZE``).

    Args:
        pin_memory: read tensors into page-locked memory, so that copies to a GPU are asynchronous.

    Raises:
        CacheError: there is no cache, it is not finished, or it has a newer format.
        CacheCorrupt: its manifest, index or locations are not the bytes that were written.
        StoreError: the store of a URL cannot be reached, or refuses.
    """
    root = Path(path)
    if is_url(root):
        from k5cache.remote.mirror import folder_of

        root = folder_of(root)
    manifest = read_manifest(root)
    while True:
        try:
            return Cache(root, manifest, pin_memory)
        except CacheCorrupt:  # perhaps a writer replaced the index after we read the manifest
            newer, mirror = read_manifest(root), mirror_of(root)
            if newer == manifest and not (mirror and mirror.again(manifest.tables)):
                raise
            manifest = newer

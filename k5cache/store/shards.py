"""Shards: how are rows written to Parquet files that never change, and how is one row read and checked?

The reader copies a row's bytes from the file straight into tensors and checks one xxh3 over all of them, page headers
included, which Parquet's own page checksums leave out. On one core of an AMD EPYC, with rows of 2.8 MB in the page
cache, this takes 0.65 ms per row; pyarrow with page checksums takes 1.8 ms. FORMAT.md describes the layout.
"""

from __future__ import annotations

import hashlib
import json
import os
import weakref
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.parquet as pq
import xxhash

from k5cache.shared import system
from k5cache.shared.disk_errors import named
from k5cache.shared.errors import CacheCorrupt, CacheError
from k5cache.shared.files import NewFile
from k5cache.store import files
from k5cache.store.footer import MAX_COLUMNS, MAX_FOOTER_BYTES, MAX_HEADER_BYTES, parse_footer
from k5cache.store.manifest import ShardInfo, ShardKind
from k5cache.store.tensors import TensorSpec, to_bytes, torch_dtype

if TYPE_CHECKING:
    import torch

MAX_TOKENS = 1 << 16
SCHEMA_KEY, ROWS_KEY = b"k5cache", b"k5cache.rows"


class ShardWriter:
    """Writes one shard. Each row is a row group, and only one row is in memory at a time.

    As a context manager it deletes the temporary file unless ``finish`` was called. If the disk is full, it deletes the
    temporary file and raises ``OSError``.

    Args:
        root: the cache. The caller has its lock.
        specs: the tensor columns, in order.
        bucket: (width, height) in pixels, for latents and masks.
    """

    def __init__(
        self, root: Path, kind: ShardKind, specs: Mapping[str, TensorSpec], bucket: tuple[int, int] | None = None
    ) -> None:
        if (kind == "text") != (bucket is None):
            raise ValueError("latents and masks have a bucket, text has none")
        self.root, self.kind, self.specs, self.bucket = root, kind, dict(specs), bucket
        fields = [pa.field("key", pa.string(), nullable=False)]
        fields += [pa.field(name, pa.binary(), nullable=False) for name in self.specs]
        if kind == "text":
            fields += [pa.field("n_tokens", pa.int32(), nullable=False), pa.field("caption", pa.string(), False)]
        self._schema = pa.schema(fields)
        self._rows: dict[str, list[Any]] = {"key": [], "xxh3_64": [], "n_tokens": [], "caption_bytes": []}
        self._file = NewFile(root / kind)
        try:
            self._writer = pq.ParquetWriter(
                pa.PythonFile(self._file, mode="w"),
                self._schema,
                compression="none",
                use_dictionary=False,
                write_statistics=False,
                write_page_checksum=True,
                store_schema=False,
                data_page_version="1.0",
            )
        except BaseException:
            self._file.discard()
            raise

    @property
    def num_rows(self) -> int:
        """Rows appended so far."""
        return len(self._rows["key"])

    @property
    def num_bytes(self) -> int:
        """Bytes written so far, without the footer."""
        return self._file.num_bytes

    def append(self, row: Mapping[str, Any]) -> None:
        """Write one row: ``key``, the tensors, and for text ``n_tokens`` and ``caption``.

        Raises:
            ValueError: a tensor does not have the dtype or shape of its ``TensorSpec``.
            OSError: the disk is full; the shard is deleted.
        """
        n_tokens = int(row["n_tokens"]) if self.kind == "text" else 1
        values: dict[str, Any] = {"key": row["key"], **{k: row.get(k) for k in ("n_tokens", "caption")}}
        for name, spec in self.specs.items():
            tensor = row[name]
            if tensor.dtype != torch_dtype(spec.dtype) or tuple(tensor.shape) != spec.sizes(n_tokens):
                raise ValueError(
                    f"{name} is {tensor.dtype} {list(tensor.shape)}, not {spec.dtype} {list(spec.sizes(n_tokens))}"
                )
            values[name] = to_bytes(tensor)
        table = pa.Table.from_pydict({name: [values[name]] for name in self._schema.names}, schema=self._schema)
        digest = xxhash.xxh3_64()
        self._file.parts = [digest]
        try:
            self._writer.write_table(table)
        except BaseException:
            self.abort()
            raise
        self._rows["key"].append(row["key"])
        self._rows["xxh3_64"].append(digest.hexdigest())
        if self.kind == "text":
            self._rows["n_tokens"].append(n_tokens)
            self._rows["caption_bytes"].append(len(row["caption"].encode()))

    def finish(self) -> ShardInfo:
        """Make the shard durable and give it its name. The manifest does not name it yet.

        Raises:
            ValueError: no row was appended.
            OSError: the disk is full; the shard is deleted.
        """
        if not self.num_rows:
            self.abort()
            raise ValueError("a shard must have at least one row")
        footer = hashlib.sha256()
        self._file.parts = [footer]
        description = {
            "format": 1,
            "kind": self.kind,
            "bucket": list(self.bucket) if self.bucket else None,
            "tensors": [{"name": name, **spec.to_json()} for name, spec in self.specs.items()],
        }
        rows = {name: values for name, values in self._rows.items() if values}
        metadata = {SCHEMA_KEY: json.dumps(description), ROWS_KEY: json.dumps(rows, separators=(",", ":"))}
        try:
            self._writer.add_key_value_metadata(metadata)
            self._writer.close()
            sha256 = self._file.sha256.hexdigest()
            size = f"{self.bucket[0]}x{self.bucket[1]}-" if self.bucket else ""
            name = f"{self.kind}/{size}{sha256[:16]}.parquet"
            self._file.commit(self.root / name)
        except BaseException:
            self.abort()
            raise
        return ShardInfo(name, self.kind, self.num_rows, self._file.num_bytes, sha256, footer.hexdigest(), self.bucket)

    def abort(self) -> None:
        """Delete the temporary file. Does nothing after ``finish``."""
        self._file.discard()
        self._writer.close()

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.abort()


@dataclass(frozen=True)
class StoredRow:
    """One row of a shard."""

    key: str
    tensors: dict[str, torch.Tensor]
    n_tokens: int | None
    caption: str | None


@dataclass(frozen=True)
class _Column:
    """Where one value is in its row."""

    name: str
    header_bytes: int
    """Bytes of the page before the value."""
    value_bytes: int
    dtype: str
    """Empty if the value is not a tensor."""
    sizes: tuple[int, ...]


@dataclass(frozen=True)
class _Layout:
    """Where one row is in its file."""

    begin: int
    num_bytes: int
    columns: tuple[_Column, ...]


class Shard:
    """An open shard. Reading is thread-safe, because reads are positioned and share no state.

    Args:
        root: the cache.
        info: the shard's entry in the manifest.

    Raises:
        CacheCorrupt: the file is missing, has another size, or its footer is not the one that was written.
        CacheError: the footer is not that of a shard.
    """

    def __init__(self, root: Path, info: ShardInfo) -> None:
        self.root, self.info, self.path = root, info, root / info.file
        self._layouts: dict[int, _Layout] = {}  # of rows already read; each takes 40 us to work out and about 1 kB
        self._fd = files.open_inside(root, info.file, info.num_bytes)
        # Not `with`: the reader lets go of shards that other threads are still reading.
        weakref.finalize(self, os.close, self._fd)
        with named(self.path):
            footer = self._read_footer()
        try:
            self._footer = parse_footer(footer[:-8], self._footer_start)
            self.specs = self._read_specs(json.loads(self._footer.metadata[SCHEMA_KEY]))
            self._read_rows(json.loads(self._footer.metadata[ROWS_KEY]))
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise self._refused(str(error)) from None

    def read(self, row: int, key: str, pin_memory: bool = False) -> StoredRow:
        """Read row number ``row`` into new tensors and check all of its bytes.

        Args:
            key: the key that the row must have.
            pin_memory: allocate the tensors in page-locked memory, which needs a GPU.

        Raises:
            CacheCorrupt: a byte is not the byte that was written, or the row has another key.
        """
        import torch

        n_tokens = self.n_tokens[row] if self.n_tokens else None
        layout = self._layouts.get(row)
        if layout is None:
            layout = self._layouts[row] = self._layout(row)
        tensors: dict[str, torch.Tensor] = {}
        buffers: list[Any] = []  # for each column its page header, then its value
        for column in layout.columns:
            buffers.append(bytearray(column.header_bytes))
            if column.dtype:
                tensor = torch.empty(column.sizes, dtype=torch_dtype(column.dtype), pin_memory=pin_memory)
                tensors[column.name] = tensor
                buffers.append((tensor if tensor.dim() else tensor.view(1)).view(torch.uint8).numpy().data)
            else:
                buffers.append(bytearray(column.value_bytes))
        with named(self.path):
            num_read = system.read_into(self._fd, buffers, layout.begin)
        digest = xxhash.xxh3_64()
        for buffer in buffers:
            digest.update(buffer)
        if num_read != layout.num_bytes or digest.intdigest() != self._hashes[row]:
            raise files.corrupt(
                self.root, f"{self.path}, row {row} (key {key}): its bytes are not those that were written"
            )
        if bytes(buffers[1]) != key.encode():
            raise files.corrupt(
                self.root, f"{self.path}, row {row} has key {bytes(buffers[1])[:80]!r}, the cache says {key!r}"
            )
        return StoredRow(key, tensors, n_tokens, buffers[-1].decode(errors="replace") if self.n_tokens else None)

    def value(self, row: int, key: str, column: str) -> bytes:
        """One value of a row, without its tensors and torch. Only the key is checked: the checksum is of all the row.

        Raises:
            CacheCorrupt: the row has another key.
        """
        layout, values = self._layout(row), dict[str, bytes]()
        at = layout.begin
        for part in layout.columns:
            if part.name in ("key", column):
                with named(self.path):
                    values[part.name] = system.read_at(self._fd, part.value_bytes, at + part.header_bytes)
            at += part.header_bytes + part.value_bytes
        if values["key"] != key.encode() or column not in values:
            raise files.corrupt(self.root, f"{self.path}, row {row} is not the {column} of {key!r}")
        return values[column]

    def _layout(self, row: int) -> _Layout:
        """Where one row is. Its sizes are checked here, before memory is allocated for it."""
        chunks = self._footer.row_groups[row].chunks
        if len(chunks) != len(self._names):
            raise self._refused(f"row {row} has {len(chunks)} columns")
        caption_bytes = self._caption_bytes[row] if self._caption_bytes else 0
        num_bytes = {"key": len(self.keys[row].encode()), "n_tokens": 4, "caption": caption_bytes}
        length = self.n_tokens[row] if self.n_tokens else 1
        columns: list[_Column] = []
        end = None
        for name, chunk in zip(self._names, chunks, strict=True):
            spec = self.specs.get(name)
            value_bytes = spec.num_bytes(length) if spec else num_bytes[name]
            header_bytes = chunk.num_bytes - value_bytes
            is_one_value = chunk.num_values == 1 and 4 < header_bytes <= MAX_HEADER_BYTES
            if not is_one_value or end not in (None, chunk.offset):
                raise self._refused(f"row {row}: column {name} is not one plain value of {value_bytes} bytes")
            end = chunk.offset + chunk.num_bytes
            dtype, sizes = (spec.dtype, spec.sizes(length)) if spec else ("", ())
            columns.append(_Column(name, header_bytes, value_bytes, dtype, sizes))
        begin = chunks[0].offset
        return _Layout(begin, (end or begin) - begin, tuple(columns))

    def _read_footer(self) -> bytes:
        size = self.info.num_bytes
        tail = system.read_at(self._fd, 8, max(size - 8, 0))
        length = int.from_bytes(tail[:4], "little") + 8
        if tail[4:] != b"PAR1" or length + 4 > size or system.read_at(self._fd, 4, 0) != b"PAR1":
            raise files.corrupt(self.root, f"{self.path} is not a Parquet file")
        self._footer_start = size - length
        if length > MAX_FOOTER_BYTES:
            raise self._refused(f"its footer has {length} bytes")
        footer = system.read_at(self._fd, length, self._footer_start)
        if hashlib.sha256(footer).hexdigest() != self.info.footer_sha256:
            raise files.corrupt(self.root, f"{self.path}: its footer is not the one that was written")
        return footer

    def _read_specs(self, description: dict[str, Any]) -> dict[str, TensorSpec]:
        in_shard = (description["format"], description["kind"], description["bucket"])
        in_manifest = (1, self.info.kind, list(self.info.bucket) if self.info.bucket else None)
        if in_shard != in_manifest:
            raise ValueError(f"it says {in_shard}, the manifest says {in_manifest}")
        specs = {tensor["name"]: TensorSpec.from_json(tensor) for tensor in description["tensors"]}
        self._names = ["key", *specs, *(["n_tokens", "caption"] if self.info.kind == "text" else [])]
        names = self._footer.names[:MAX_COLUMNS]
        if len(self._names) > MAX_COLUMNS or self._footer.names != self._names:
            raise ValueError(f"it has the columns {names}, but describes the columns {self._names[:MAX_COLUMNS]}")
        if any(element.repetition or element.num_children for element in self._footer.elements[1:]):
            raise ValueError("a column is a list, or may have nulls")
        return specs

    def _read_rows(self, rows: dict[str, Any]) -> None:
        count = self.info.num_rows
        num_groups = len(self._footer.row_groups)
        if num_groups != count:
            raise ValueError(f"it has {num_groups} row groups, the manifest says {count} rows")
        self.keys: list[str] = rows["key"]
        if (
            type(self.keys) is not list
            or len(self.keys) != count
            or any(type(key) is not str or not 0 < len(key) <= 256 for key in self.keys)
        ):
            raise ValueError(f"it does not have {count} keys of at most 256 characters")
        "".join(self.keys).encode()  # ValueError for a lone surrogate
        self._hashes = [int(digest, 16) for digest in rows["xxh3_64"]]
        is_text = self.info.kind == "text"
        self.n_tokens = _counts(rows["n_tokens"], count, MAX_TOKENS) if is_text else None
        self._caption_bytes = _counts(rows["caption_bytes"], count, 1 << 24) if is_text else None
        for spec in self.specs.values():
            spec.num_bytes(max(self.n_tokens or [1]))
        if len(self._hashes) != count:
            raise ValueError(f"it has {len(self._hashes)} checksums for {count} rows")

    def _refused(self, reason: str) -> CacheError:
        return CacheError(f"{self.path} is not a shard: {reason}", "Use a cache made by: k5cache encode")


def _counts(values: list[Any], count: int, limit: int) -> list[int]:
    if (
        type(values) is not list
        or len(values) != count
        or any(type(v) is not int or not 0 <= v <= limit for v in values)
    ):
        raise ValueError(f"it does not have {count} numbers from 0 to {limit}")
    return values


def verify_shard(
    root: Path, info: ShardInfo, visit: Callable[[int, StoredRow], Iterable[str]] | None = None
) -> list[str]:
    """Read the whole shard. Returns what is wrong with it, one sentence per problem.

    Args:
        visit: called with each row that is as it was written. The problems it returns are added.
    """
    problems = []
    try:
        shard = Shard(root, info)
        for row, key in enumerate(shard.keys):
            try:
                stored = shard.read(row, key)
            except CacheCorrupt as error:
                problems.append(error.problem)
            else:
                problems.extend(f"{shard.path}, row {row}: {text}" for text in (visit(row, stored) if visit else ()))
        fd = files.open_inside(root, info.file, info.num_bytes)
        try:
            with named(root / info.file):
                is_whole = files.sha256_of(fd) == info.sha256
            if not is_whole:
                problems.append(f"{shard.path}: its sha256 is not the one in the manifest")
        finally:
            os.close(fd)
    except CacheError as error:
        problems.append(error.problem)
    return problems

"""The manifest: which files make up a cache, and what made them? It is the only file that changes.

The lock of a cache is here too, because whoever writes the manifest must have it.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from k5cache.remote.behind import mirror_of
from k5cache.shared.disk_errors import named
from k5cache.shared.errors import CacheError, CacheLocked
from k5cache.shared.files import make_folder, new_file
from k5cache.shared.inside import check_inside
from k5cache.shared.kind import KINDS, Kind, kind_of_recipe
from k5cache.shared.lock import Locked, lock_file
from k5cache.shared.sealed import Changed, seal, unseal
from k5cache.store import files, values
from k5cache.store.notes import LeftOut, Part, SourceNote, read_left_out, read_part, read_source_note
from k5cache.store.ours import FILE, LOCK, SHARD_FILE, TABLE_FILE, check_root, how_to_make_one

FORMATS: dict[Kind, int] = {"t2i": 1, "i2i": 2}
"""A cache for text-to-image is still of format 1, byte for byte."""
MAX_BYTES = 1 << 28  # 256 MiB, about 800,000 shards
MAX_ROWS = 1 << 31  # of an index or a shard: row numbers are int32
MAX_FILE_BYTES = 1 << 48
MAX_SIDE = 1 << 31

ShardKind = Literal["latents", "masks", "text"]


@dataclass(frozen=True)
class ShardInfo:
    """One shard: a file of rows that never changes."""

    file: str
    """``latents/1024x1024-<id>.parquet``, ``masks/...`` or ``text/<id>.parquet``; the id is how its sha256 begins."""
    kind: ShardKind
    num_rows: int
    num_bytes: int
    sha256: str
    """Of the whole file."""
    footer_sha256: str
    """Of the bytes from the start of the Parquet metadata to the end. Readers check it without reading the rest."""
    bucket: tuple[int, int] | None = None
    """(width, height) in pixels for latents and masks; None for text."""


@dataclass(frozen=True)
class IndexInfo:
    """One table file: ``index-000003.parquet`` or ``locations-000003.parquet``."""

    file: str
    num_rows: int
    num_bytes: int
    sha256: str


@dataclass(frozen=True)
class Edit:
    """A pair to draw that is no item: a source and an instruction. Only caches for image-to-image have any."""

    source: str
    """The path of the source, as its user wrote it."""
    source_hash: str
    """Content hash of the source's bytes."""
    prompt: str
    """Raw: the instruction as its user wrote it."""
    text_key: str
    empty_key: str | None
    """Text key of the empty instruction with this source; None if the cache has no empty instructions."""
    source_key: str
    """Of the source's latents."""
    width: int
    """Of the bucket, in pixels, as ``height``."""
    height: int

    @property
    def text_keys(self) -> tuple[str, ...]:
        """Of the instruction and of the empty one, if the cache has it."""
        return (self.text_key, self.empty_key) if self.empty_key else (self.text_key,)


@dataclass(frozen=True)
class Manifest:
    """What a cache is made of."""

    recipe: dict[str, Any]
    """Everything that changes the numbers: plain JSON values."""
    shards: tuple[ShardInfo, ...] = ()
    index: IndexInfo | None = None
    """None until the first encode has finished."""
    locations: IndexInfo | None = None
    """Which shard has each row. Without it a reader reads the footer of every shard."""
    prompts: dict[str, str] = field(default_factory=dict)
    """Raw prompt -> text key. A finished encode for text-to-image always has the empty prompt, others have none."""
    created_by: dict[str, str] = field(default_factory=dict)
    """Package -> version."""
    source: SourceNote = SourceNote()  # noqa: RUF009 (frozen)
    """What the encoder compares to see whether the source has changed. Readers do not use it."""
    left_out: LeftOut = LeftOut()  # noqa: RUF009 (frozen)
    """What the encoder could not use. Readers do not use it."""
    edits: tuple[Edit, ...] = ()
    """Pairs to draw. Only for image-to-image."""
    classes: dict[str, str] = field(default_factory=dict)
    """Text key of a caption -> that of its class caption, for differential output preservation."""
    part: Part | None = None
    """Which part of a source it holds; None for the whole of it. Readers do not use it."""
    split: IndexInfo | None = None
    """Only of a part: to which part each image of the source belongs (``split.py``). Readers do not use it."""

    @property
    def kind(self) -> Kind:
        """For what it was encoded: text-to-image or image-to-image."""
        return kind_of_recipe(self.recipe)

    @property
    def format(self) -> int:
        """Of the files: it follows from ``kind``."""
        return FORMATS[self.kind]

    @property
    def tables(self) -> set[str]:
        """The names of the index, the locations and the split, as far as there are any."""
        return {info.file for info in (self.index, self.locations, self.split) if info}

    @property
    def named(self) -> set[str]:
        """Every file that it names."""
        return {shard.file for shard in self.shards} | self.tables


def read_manifest(root: Path) -> Manifest:
    """Read and check ``root/manifest.json``.

    Raises:
        CacheError: there is no cache, it has a newer format, or it names files outside the cache.
        CacheCorrupt: a byte of the file is not the byte that was written.
    """
    path = root / FILE
    if not path.is_file():
        reason = "has no manifest.json" if root.is_dir() else "is a file" if root.exists() else "does not exist"
        raise CacheError(f"{root} is not a cache: it {reason}", how_to_make_one(root))
    fd = files.open_inside(root, FILE)
    with named(path), open(fd, "rb", buffering=0) as file:  # noqa: PTH123 (a descriptor, not a path)
        size = os.fstat(fd).st_size
        if size > MAX_BYTES:
            raise CacheError(f"{path} has {size} bytes, more than {MAX_BYTES >> 20} MiB", "Use another cache")
        raw = file.readall()
    return _parse(root, raw)


def write_manifest(root: Path, manifest: Manifest) -> None:
    """Replace ``root/manifest.json`` atomically, then delete the index and locations that only the one before it named.

    The caller has the lock, and every file that the manifest names is on disk. A file that no manifest named stays: it
    may be a stranger's, or ``k5cache gc`` finds out that it is ours.
    """
    raw = encode_document(_document(manifest))
    _parse(root, raw)  # never write what a reader would refuse
    named = manifest.tables
    is_replaced = any(TABLE_FILE.fullmatch(path.name) and path.name not in named for path in root.iterdir())
    replaced = _tables_named_before(root) - named if is_replaced else set()  # most commits replace none
    with new_file(root / FILE) as file:
        file.write(raw)
    for name in replaced:
        (root / name).unlink(missing_ok=True)
    if mirror := mirror_of(root):
        mirror.committed(raw)


def require_files(root: Path, manifest: Manifest) -> None:
    """Check that every file the manifest names exists and has its size. This takes 20 us per file and reads no byte.

    Raises:
        CacheCorrupt: a file is missing or has another size; names the first.
    """
    mirror = mirror_of(root)
    for info in (*manifest.shards, manifest.index, manifest.locations, manifest.split):
        if info and not (mirror and mirror.has(info.file, info.num_bytes)):
            os.close(files.open_inside(root, info.file, info.num_bytes))


def _tables_named_before(root: Path) -> set[str]:
    """The index and locations of the manifest on disk; none if there is none, or if it cannot be believed."""
    try:
        return read_manifest(root).tables
    except CacheError:
        return set()


@contextmanager
def lock(root: Path, wait_seconds: float | None = None) -> Iterator[list[str]]:
    """Let no other process write the cache at ``root`` until the end of the block. Readers need no lock.

    Makes the folder if there is none. Deletes temporary files that a killed writer left, and yields their names.

    Args:
        wait_seconds: for another process that has the lock, of the command's ``--wait``; None if it has no such option.

    Raises:
        OutputError: the folder holds files that are not of a cache, or a link leads out of it; nothing is written.
        CacheLocked: another process had the lock for all of ``wait_seconds``; says which.
        CacheError: the folder cannot be written.
    """
    check_root(root)
    check_inside(root, (FILE, LOCK, *files.FOLDERS))
    with ExitStack() as stack:
        try:
            make_folder(root)
            stack.enter_context(lock_file(root / LOCK, wait_seconds or 0))
        except Locked as error:
            raise CacheLocked(
                f"{root} is being written by {error.owner}",
                "Wait until it ends"
                + (", or let this command wait with --wait SECONDS" if wait_seconds is not None else ""),
            ) from None
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise
            raise CacheError(
                f"{root} cannot be written: {error.strerror}",
                "Copy it to a disk that can be written"
                if error.errno == errno.EROFS
                else "Change its permissions, or choose another folder",
            ) from None
        leftovers = files.remove_leftovers(root)
        if mirror := mirror_of(root):
            stack.enter_context(mirror.writing())
        yield leftovers


def encode_document(document: dict[str, Any]) -> bytes:
    """A sealed document with its keys in order."""
    return seal({key: document[key] for key in sorted(document)}, allow_nan=False)


def _document(manifest: Manifest) -> dict[str, Any]:
    """The JSON document of a manifest."""
    document = asdict(manifest) | {"source": str(manifest.source), "format": manifest.format}
    if manifest.kind == "t2i":
        del document["edits"]  # format 1 has none
    if not manifest.classes:  # caches without any are as they were before there were any
        del document["classes"]
    if not manifest.part:
        del document["part"], document["split"]
    if not manifest.left_out.truncated:  # caches from before it was noted have no such key
        del document["left_out"]["truncated"]
    return document


def _parse(root: Path, raw: bytes) -> Manifest:
    path = root / FILE
    try:
        document = unseal(raw)
    except Changed:
        raise files.corrupt(root, f"{path} is not the file that was written: its checksum does not match") from None
    except ValueError as error:
        raise CacheError(f"{path} is not JSON: {str(error)[:80]}", "Use a cache made by: k5cache encode") from None
    version = document.get("format")
    newest = max(FORMATS.values())
    if type(version) is int and version > newest:
        raise CacheError(
            f"{root} has cache format {version}; this k5cache reads up to {newest}",
            "Upgrade: pip install -U kandinsky5-lora",
        )
    try:
        return _manifest(document)
    except ValueError as error:
        raise CacheError(
            f"{path} is well-formed but not a manifest: {error}", "Use a cache made by: k5cache encode"
        ) from None


def _manifest(document: dict[str, Any]) -> Manifest:
    """The manifest in a JSON document, every value checked. Unknown keys are ignored (FORMAT.md, Versions).

    Raises:
        ValueError: a value is not what the format allows.
    """
    recipe = values.mapping(document.get("recipe"), "recipe")
    for name in ("model", "text", "latents", "selection"):
        values.mapping(recipe.get(name, {}), f"recipe.{name}")
    pipeline = recipe.get("text", {}).get("pipeline", "t2i")
    if pipeline not in KINDS:
        values.wrong("recipe.text.pipeline", pipeline)
    version = document.get("format")
    if type(version) is not int or version != FORMATS[kind_of_recipe(recipe)]:
        values.wrong("format", version)
    shards = tuple(_shard(value) for value in values.items(document, "shards"))
    if len({shard.file for shard in shards}) != len(shards):
        raise ValueError("it names a shard twice")
    return Manifest(
        recipe=recipe,
        shards=shards,
        index=_table(document.get("index"), "index-"),
        locations=_table(document.get("locations"), "locations-"),
        prompts=values.strings(document, "prompts"),
        created_by=values.strings(document, "created_by"),
        source=read_source_note(document),
        left_out=read_left_out(document.get("left_out", {})),
        edits=tuple(_edit(value) for value in values.items(document, "edits")) if version > 1 else (),
        classes=values.strings({"classes": {}, **document}, "classes"),
        part=read_part(document.get("part")),
        split=_table(document.get("split"), "split-"),
    )


def _shard(document: object) -> ShardInfo:
    value = values.mapping(document, "shard")
    bucket = value.get("bucket")
    kind = value.get("kind")
    if kind not in ("latents", "masks", "text"):
        values.wrong("kind", kind)
    file = values.match(value, "file", SHARD_FILE)
    if kind == "text":
        expected = "text/"
        if bucket is not None:
            values.wrong("bucket", bucket)
    else:
        if not (isinstance(bucket, list) and len(bucket) == 2 and all(type(v) is int and v > 0 for v in bucket)):
            values.wrong("bucket", bucket)
        expected = f"{kind}/{bucket[0]}x{bucket[1]}-"
    if not file.startswith(expected):
        raise ValueError(f"file {file!r} does not fit its kind and bucket")
    return ShardInfo(
        file=file,
        kind=kind,
        num_rows=values.count(value, "num_rows", MAX_ROWS),
        num_bytes=values.count(value, "num_bytes", MAX_FILE_BYTES),
        sha256=values.match(value, "sha256", values.SHA256),
        footer_sha256=values.match(value, "footer_sha256", values.SHA256),
        bucket=(bucket[0], bucket[1]) if bucket else None,
    )


def _edit(document: object) -> Edit:
    value = values.mapping(document, "edit")
    empty_key = None if value.get("empty_key") is None else values.string(value, "empty_key")
    return Edit(
        source=values.string(value, "source"),
        source_hash=values.string(value, "source_hash"),
        prompt=values.string(value, "prompt"),
        text_key=values.string(value, "text_key"),
        empty_key=empty_key,
        source_key=values.string(value, "source_key"),
        width=values.count(value, "width", MAX_SIDE),
        height=values.count(value, "height", MAX_SIDE),
    )


def _table(document: object, prefix: str) -> IndexInfo | None:
    if document is None:
        return None
    value = values.mapping(document, prefix)
    file = values.match(value, "file", TABLE_FILE)
    if not file.startswith(prefix):
        values.wrong("file", file)
    rows, size = values.count(value, "num_rows", MAX_ROWS), values.count(value, "num_bytes", MAX_FILE_BYTES)
    return IndexInfo(file, rows, size, values.match(value, "sha256", values.SHA256))

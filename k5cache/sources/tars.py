"""Which images does a tar hold, and which captions and masks belong to each? By their names, as WebDataset pairs them.

``0001.jpg``, ``0001.txt`` and ``0001.json`` belong together: in WebDataset a name ends at its first dot. Where an image
has dots of its own and companions to match (``photo.v2.jpg``, ``photo.v2.txt``), those are its own.
"""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import posixpath
import tarfile
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from lzma import LZMAError
from pathlib import Path
from threading import Lock
from typing import IO, Any

import pyarrow as pa

from k5cache.shared.errors import DatasetError
from k5cache.shared.plain import open_plain, too_large
from k5cache.sources.captions import Unusable
from k5cache.sources.folder import SYSTEM_FOLDERS
from k5cache.sources.inflated import Inflated, bounded
from k5cache.sources.items import IMAGE_SUFFIXES, NAMED_SUFFIXES, Skipped, UnreadableImage

_MASKS = (".mask.png", ".mask.webp", ".mask")
_JSON = ("json", "jsn")
_AFTER_END = 1 << 20
"""Bytes behind a tar's end in which another one is looked for; tars end with up to 10 KB of zeros."""
_MAX_HEADER = 512
_MOST_HEADER_BYTES = 1 << 20
"""Of one header of a tar, such as a long name, and of what is read behind its end."""
_MOST_CAPTION_BYTES = 16 << 20
_DAMAGED = (tarfile.TarError, OSError, EOFError, zlib.error, LZMAError, ValueError, OverflowError, RecursionError)
_COMPRESSED: dict[bytes, Callable[[IO[bytes]], Any]] = {
    b"\x1f\x8b": lambda raw: gzip.GzipFile(fileobj=raw),
    b"BZh": bz2.BZ2File,
    b"\xfd7zXZ\0": lzma.LZMAFile,
    b"\x5d\0\0": lzma.LZMAFile,
}
"""How a compressed file begins, and what decompresses it."""


@dataclass(frozen=True)
class Member:
    """A file in a tar."""

    name: str
    start: int
    """Where its bytes begin; in a compressed tar, after decompression."""
    num_bytes: int
    stem: str
    """Its name up to the last dot."""
    suffix: str
    """From its last dot, in lower case."""
    key: str
    """Up to the first dot after its folder, which is WebDataset's name of a row."""
    field: str
    """What follows its key, in lower case: ``jpg``, ``mask.png``."""
    is_mask: bool
    is_image: bool
    """This and the one before are what its name says."""


def member_of(name: str, start: int, num_bytes: int) -> Member:
    """A file in a tar, with the parts of its name. (Tars have millions of them, so these are worked out once.)"""
    folder, slash, base = name.rpartition("/")
    first, _, field_of_key = base.partition(".")
    own, dot, last = base.rpartition(".")
    stem = folder + slash + (own if dot else base)
    lower, suffix = field_of_key.lower(), dot + last.lower() if dot else ""
    is_mask = base.lower().endswith(_MASKS)
    is_image = not is_mask and (suffix in IMAGE_SUFFIXES or lower == "image")
    return Member(name, start, num_bytes, stem, suffix, folder + slash + first, lower, is_mask, is_image)


@dataclass(frozen=True)
class TarRow:
    """An image with what belongs to it."""

    image: Member
    others: Mapping[str, Member]
    """By field: its captions, its mask, and whatever else has its name."""
    companions: Sequence[Member] = ()
    """Other pictures of its name, such as its source ``0001.source.png``."""

    @property
    def mask(self) -> Member | None:
        """Its mask."""
        masks = (self.others.get(suffix[1:]) for suffix in _MASKS)
        return next((mask for mask in masks if mask is not None), None)


@dataclass(frozen=True)
class Tar:
    """The rows of one tar, as ``FileRows``. A column is the captions of one kind: ``txt``, ``json``."""

    file: Path
    rows: Sequence[TarRow]
    skipped: Sequence[Skipped]
    """Files that are neither an image nor beside one. Their paths are names within the tar."""
    _stream: _Stream = field(repr=False)

    @property
    def num_rows(self) -> int:
        """Of the whole tar."""
        return len(self.rows)

    @property
    def schema(self) -> pa.Schema:
        """One column for each kind of file: bytes for images, text for all others."""
        images = dict.fromkeys(row.image.field for row in self.rows)
        others = dict.fromkeys(name for row in self.rows for name in row.others if name not in images)
        return pa.schema([*((name, pa.binary()) for name in images), *((name, pa.string()) for name in others)])

    def column(self, name: str) -> list[Any]:
        """The text or the JSON value of one kind of file, for each row."""
        with self._stream.opened():
            return [self._value(row, name) for row in self.rows]

    def content(self, member: Member) -> bytes:
        """The bytes of a file in the tar. Raises ``UnreadableImage``."""
        return self._stream.read(member)

    def _value(self, row: TarRow, name: str) -> Any:
        member = row.others.get(name)
        if member is None:
            return Unusable(f"missing caption {posixpath.basename(row.image.stem)}.{name}")
        if member.num_bytes > _MOST_CAPTION_BYTES:
            large = too_large(member.num_bytes, _MOST_CAPTION_BYTES)
            return Unusable(f"caption {posixpath.basename(member.name)} cannot be read: {large}")
        try:
            text = self.content(member).decode("utf-8-sig")
            return json.loads(text) if name.rpartition(".")[2] in _JSON else text
        except UnicodeDecodeError:
            return Unusable(f"caption {posixpath.basename(member.name)} is not UTF-8")
        except (ValueError, RecursionError):  # also a number of more than 4,300 digits
            return Unusable(f"{posixpath.basename(member.name)} is not JSON")
        except UnreadableImage as error:
            return Unusable(f"caption {posixpath.basename(member.name)} {error.reason}")


def read_tar(file: Path, image_field: str | None) -> Tar:
    """List the files of a tar and pair them.

    Args:
        image_field: ``cache.image_column``: the suffix of the images to use, if there are others.

    Raises:
        DatasetError: it is no tar, is damaged, or has several images for one caption.
    """
    fix = "Repair it, or use another source"
    try:
        members, left_out, is_compressed = _members(file)
    except Inflated as error:
        raise DatasetError(f"{file.name} cannot be read: {error}", "Unpack it into a folder, and give that") from None
    except _DAMAGED as error:
        is_another = str(error) in ("invalid header", "bad checksum")  # tarfile's words for a beginning of any kind
        reason = "it is not a tar, nor a compressed one" if is_another else " ".join(str(error).split())[:200]
        raise DatasetError(f"{file.name} cannot be read as a tar: {reason}", fix) from None
    if not members:
        raise DatasetError(f"{file.name} holds no files", "Use another source")
    rows, skipped = _pair(file, members, image_field.lower() if image_field else None)
    return Tar(file, rows, [*skipped, *left_out], _Stream(file, is_compressed))


class _Stream:
    """Reads places in a tar. A plain one is opened for each read, so threads need not wait for each other."""

    def __init__(self, file: Path, is_compressed: bool) -> None:
        self._file, self._is_compressed = file, is_compressed
        self._lock = Lock()
        self._stack = ExitStack()
        self._stream: IO[bytes] | None = None

    def __reduce__(self) -> tuple[type[_Stream], tuple[Path, bool]]:
        """In another process it opens the tar itself."""
        return _Stream, (self._file, self._is_compressed)

    def __del__(self) -> None:
        self._close()

    @contextmanager
    def opened(self) -> Iterator[None]:
        """Keep it open for many reads of one thread."""
        with suppress(*_DAMAGED):  # each read then says why
            self._open()
        try:
            yield
        finally:
            self._close()

    def read(self, member: Member) -> bytes:
        try:
            content = self._shared(member) if self._is_compressed or self._stream else self._alone(member)
        except _DAMAGED as error:
            raise UnreadableImage(f"cannot be read ({error})") from None
        if len(content) < member.num_bytes:
            raise UnreadableImage("is cut off, since the tar is shorter than when it was listed")
        return content

    def _alone(self, member: Member) -> bytes:
        with open_plain(self._file) as stream:
            stream.seek(member.start)
            return _read(stream, member.num_bytes)

    def _shared(self, member: Member) -> bytes:
        """Through one open stream, since a compressed one is decompressed up to the place."""
        with self._lock:
            stream = self._stream or self._open()
            stream.seek(member.start)
            return _read(stream, member.num_bytes)

    def _open(self) -> IO[bytes]:
        self._stream, _ = self._stack.enter_context(_opened(self._file))
        return self._stream

    def _close(self) -> None:
        self._stream = None
        self._stack.close()


def _read(stream: IO[bytes], num_bytes: int) -> bytes:
    parts = []
    while num_bytes and (part := stream.read(num_bytes)):
        parts.append(part)
        num_bytes -= len(part)
    return b"".join(parts)


def _members(file: Path) -> tuple[list[Member], list[Skipped], bool]:
    """The files of a tar in their order, without hidden ones; what cannot be read; and whether it is compressed."""
    with _opened(file) as (stream, is_compressed), tarfile.open(fileobj=_Headers(stream), mode="r:") as archive:  # type: ignore[call-overload]  # it needs no more
        return *_listed(archive), is_compressed


@contextmanager
def _opened(file: Path) -> Iterator[tuple[IO[bytes], bool]]:
    """The bytes of a tar, decompressed if need be, and whether it is compressed."""
    with open_plain(file) as raw:
        start = raw.read(6)
        raw.seek(0)
        opener = next((opener for magic, opener in _COMPRESSED.items() if start.startswith(magic)), None)
        if opener is None:
            yield raw, False
            return
        with opener(raw) as stream:
            yield bounded(stream, raw), True


class _Headers:
    """What ``tarfile`` reads a tar by. It would read a header of any size into memory."""

    def __init__(self, stream: IO[bytes]) -> None:
        self._stream = stream
        self.seek, self.tell = stream.seek, stream.tell

    def read(self, num_bytes: int) -> bytes:
        if not 0 <= num_bytes <= _MOST_HEADER_BYTES:
            raise _Damaged(f"it has a header of {num_bytes:,} bytes")
        return self._stream.read(num_bytes)


class _Damaged(tarfile.ReadError):
    """A tar of which not every file can be listed. ``tarfile`` itself takes a damaged header for the end."""


def _listed(archive: tarfile.TarFile) -> tuple[list[Member], list[Skipped]]:
    members: list[Member] = []
    links: list[tuple[str, str]] = []
    skipped: list[Skipped] = []
    num_files = offset = 0
    while (info := archive.next()) is not None:
        archive.members.clear()  # type: ignore[attr-defined]  # tarfile keeps all that it passed
        num_files += 1
        if archive.offset <= offset or info.size < 0:
            raise _Damaged(f"it has a file of a negative size after {num_files - 1:,} files")
        offset = archive.offset
        name = _text(info.name)
        folder, base = posixpath.split(name)
        if base.startswith((".", "__")):
            continue
        if not SYSTEM_FOLDERS.isdisjoint(folder.lower().split("/")):
            if info.isreg():
                skipped.append(Skipped(name, "is in a folder of a NAS, an archiver or a system"))
        elif info.issparse():
            skipped.append(Skipped(name, "is stored as a sparse file: pack the tar without --sparse"))
        elif info.isreg():
            members.append(member_of(name, info.offset_data, info.size))
        elif info.islnk() or info.issym():
            target = _text(info.linkname)
            links.append((name, target if info.islnk() else posixpath.join(folder, target)))
    _check_end(archive, num_files)
    linked, broken = _followed(links, members)
    return members + linked, skipped + broken


def _followed(links: Sequence[tuple[str, str]], members: Sequence[Member]) -> tuple[list[Member], list[Skipped]]:
    """The links in a tar as files of their own. A file with two names is stored once; the second is a link to it."""
    if not links:
        return [], []
    files = {posixpath.normpath(member.name): member for member in members}
    targets = {posixpath.normpath(name): posixpath.normpath(target) for name, target in links}
    followed: list[Member] = []
    broken: list[Skipped] = []
    for name, target in links:
        end, passed = posixpath.normpath(target), set[str]()
        while end not in files and end in targets and end not in passed:
            passed.add(end)
            end = targets[end]
        if end in files:
            followed.append(member_of(name, files[end].start, files[end].num_bytes))
        else:
            broken.append(Skipped(name, f"is a link to {target}, which is not a file in the tar"))
    return followed, broken


def _check_end(archive: tarfile.TarFile, num_files: int) -> None:
    """Raise ``_Damaged`` unless zeros or nothing follow the last file."""
    stream: Any = archive.fileobj
    stream.seek(archive.offset)  # where the next file would begin
    if stream.read(tarfile.BLOCKSIZE).strip(b"\0"):
        raise _Damaged(f"it is damaged or cut off after {num_files:,} files")
    if stream.read(_AFTER_END).lstrip(b"\0")[:_MAX_HEADER].find(b"ustar") >= 0:
        raise _Damaged(f"another tar follows its end after {num_files:,} files, joined by cat and not by tar")


def _text(name: str) -> str:
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "replace")


def _pair(file: Path, members: Sequence[Member], image_field: str | None) -> tuple[list[TarRow], list[Skipped]]:
    """The rows of a tar, in its order, and what is in none of them."""
    last: dict[str, Member] = {}  # ``tar --append`` and ``--update`` write the new file behind the old one
    skipped: list[Skipped] = []
    for member in members:
        if member.name in last:
            skipped.append(Skipped(member.name, "is there twice: the later one is used, as tar itself does"))
        last[member.name] = member
    by_key: dict[str, list[Member]] = {}
    by_stem: dict[str, dict[str, Member]] = {}
    for member in last.values():
        by_key.setdefault(member.key, []).append(member)
        if not member.is_image:
            mask = next((suffix for suffix in _MASKS if member.name.lower().endswith(suffix)), "")
            stem = member.name[: -len(mask)] if mask else member.stem
            by_stem.setdefault(stem, {})[(mask or member.suffix)[1:]] = member
    rows: list[TarRow] = []
    for key, group in by_key.items():
        images = _images(file, key, group, by_stem, image_field)
        pictures = [member for member in group if member.is_image] if len(group) > 1 else []
        rows += [
            TarRow(image, _others(image, group, by_stem), tuple(m for m in pictures if m is not image))
            for image in images
        ]
        if not images:
            missing = f"has no {image_field}" if image_field else "has no image beside it"
            skipped.append(Skipped(group[0].name, NAMED_SUFFIXES.get(group[0].suffix, missing)))
    return rows, skipped


def _images(
    file: Path, key: str, group: Sequence[Member], by_stem: Mapping[str, Mapping[str, Member]], image_field: str | None
) -> list[Member]:
    """Which files of one key are images to train on. Others are companions, such as ``a.depth.png`` of ``a.jpg``."""
    if image_field:
        return [
            m
            for m in group
            if m.field == image_field or (m.is_image and m.suffix == "." + image_field and m.stem in by_stem)
        ]
    images = [member for member in group if member.is_image]
    own = [image for image in images if image.stem != key and image.stem in by_stem]
    plain = [image for image in images if image.stem == key]
    rest = [image for image in images if image.stem != key and image not in own]
    shared = plain or rest
    is_captioned = any(not member.is_image and member.stem not in {image.stem for image in own} for member in group)
    if len(shared) > 1 and (plain or is_captioned):
        fields = " and ".join(sorted({image.field for image in shared}))
        raise DatasetError(
            f"{file.name} has images in {fields} for {posixpath.basename(key)}",
            "Set cache.image_column to one of them, or use another source",
        )
    return [image for image in images if image in own or image in shared]


def _others(
    image: Member, group: Sequence[Member], by_stem: Mapping[str, Mapping[str, Member]]
) -> Mapping[str, Member]:
    """What belongs to an image: what has its whole name, or else what has its key."""
    if image.stem != image.key and image.stem in by_stem:
        return by_stem[image.stem]
    return {member.field: member for member in group if not member.is_image} | dict(by_stem.get(image.stem, {}))

"""What can be done with the objects below a URL? Read, list, send, replace one if it is unchanged, delete.

fsspec's file systems do it, each with its own configuration: credentials come from there and from the environment
alone. What a store answers becomes one line here, and what may pass is tried again.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar

from k5cache.remote.checksums import agrees, checksum_of
from k5cache.remote.failures import LOGIN, Asked, NotAStore, is_bucket, is_condition, is_of_store, may_pass, refusal
from k5cache.remote.filesystems import PACKAGES, address_of, open_filesystem
from k5cache.shared.console import note
from k5cache.shared.credentials import without_credentials
from k5cache.shared.errors import StoreError
from k5cache.shared.files import new_file
from k5cache.shared.foreign import shown
from k5cache.shared.urls import SCHEMES, url_of

WAITS = (0.5, 2.0, 8.0, 20.0, 30.0)
"""Seconds before each further try, so that a router may start again. Each try includes those that a file system makes
by itself (``filesystems.py``)."""
_LONG = 8.0
"""Seconds of a wait that the user is told of."""
PATIENCE = 60.0
"""Seconds after which nothing is tried again: the file system has itself asked a silent store often enough."""
_MOST_READS = 10
_TAGS = ("ETag", "etag", "generation", "blob_id")
_TIMES = ("LastModified", "updated", "mtime", "created", "timeCreated")
_SINGLE = 5 << 30  # bytes of the largest object that S3 takes in one request, which alone can be conditional
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\ud800-\udfff]")
Value = TypeVar("Value")


class Changed(Exception):
    """An object is not the one that was to be replaced: another process has written it."""


@dataclass(frozen=True)
class Entry:
    """One object."""

    name: str
    """Relative to the URL, with forward slashes."""
    num_bytes: int
    tag: str
    """Another one whenever the object was written anew: the store's ETag or generation, or else size and time."""
    mtime_ns: int
    """When it was written; 0 if the store does not say."""
    checksum: str = ""
    """``checksums.checksum_of``."""


class Objects:
    """The objects below a URL.

    Args:
        url: as its user wrote it. ``Objects`` keeps no credentials, and accepts none in it.

    Raises:
        StoreError: its kind is not supported, its package is missing, or it holds what may not be in it.
    """

    def __init__(self, url: str | Path) -> None:
        self.url = url_of(url)
        self.scheme, _, rest = self.url.partition("://")
        _check(self.url, self.scheme, rest)
        self._path = f"/{rest}" if self.scheme == "memory" else rest
        self._fs: Any = None
        self._has_told = False
        with suppress(ImportError):
            self._fs = self._answer("open", lambda: open_filesystem(self.scheme))
            self.is_conditional = self.scheme == "s3"
            return
        package = PACKAGES.get(self.scheme, ("fsspec", "fsspec"))[1]
        raise StoreError(f"{self.url} needs the package {package}", f"Install it: pip install {package}")

    def __reduce__(self) -> tuple[type[Objects], tuple[str]]:
        return Objects, (self.url,)  # another process opens the store by itself, with its own credentials

    def stat(self, name: str) -> Entry | None:
        """One object; None if there is none."""
        return self._answer("look at", lambda: self._entry(name, self._fs.info(self._at(name))), name, absent=True)

    def read(self, name: str, most: int) -> tuple[bytes, str] | None:
        """All bytes of an object and its tag, which belong together; None if there is none.

        Raises:
            StoreError: it has more than ``most`` bytes.
        """
        for _ in range(_MOST_READS):
            entry = self.stat(name)
            if entry is None:
                return None
            if entry.num_bytes > most:
                raise StoreError(f"{self.url}/{name} has {entry.num_bytes} bytes, more than {most}", "Name another URL")
            raw = self._answer("read", lambda: self._fs.cat_file(self._at(name)), name, absent=True)
            after = self.stat(name)
            if raw is not None and after and after.tag == entry.tag and len(raw) == entry.num_bytes:
                self._refuse_page(name, bytes(raw))
                return bytes(raw), entry.tag
        raise StoreError(
            f"Cannot read {self.url}/{name}: it has changed each of the {_MOST_READS} times that it was read, or the "
            "store says another size than it sends",
            "Try again when nobody writes it",
        )

    def _refuse_page(self, name: str, raw: bytes) -> None:
        """A server may give its page for every address, as applications of one page do."""
        if raw.lstrip()[:15].lower().startswith((b"<!doctype html", b"<html")):
            asked = Asked("read", self.url, name, *address_of(self._fs, self.scheme))
            raise refusal(NotAStore("a web page"), asked)

    def entries(self) -> list[Entry]:
        """All objects below the URL, by name. A store may list an object late: look for one by ``stat``.

        Names that would lead out of a folder of this machine are left out.
        """
        listing = self._answer("list", lambda: self._fs.find(self._path, detail=True), absent=True) or {}
        entries = (self._entry(self._name_of(path), info) for path, info in listing.items())
        return sorted((entry for entry in entries if is_clean(entry.name)), key=lambda entry: entry.name)

    def unusable(self) -> list[str]:
        """Names below the URL that cannot be the name of a file here, printable."""
        listing = self._answer("list", lambda: self._fs.find(self._path, detail=False), absent=True) or ()
        names = (self._name_of(path) for path in listing)
        return sorted(shown(name, 200) for name in names if not is_clean(name) and not name.endswith("/"))

    def fetch(self, name: str, path: Path, num_bytes: int | None = None) -> str:
        """Copy an object into a file, which appears whole or not at all. Returns its sha256.

        Raises:
            StoreError: it is gone, it does not have ``num_bytes``, or the network stays away.
        """

        def fetch() -> str:
            with new_file(path) as file:
                for chunk in self._chunks(name):
                    file.write(chunk)
                if num_bytes is not None and file.num_bytes != num_bytes:
                    raise _Short(f"{file.num_bytes} bytes arrived, {num_bytes} are meant to be there")
            return file.sha256.hexdigest()

        return self._answer("read", fetch, name)

    def bytes_of(self, name: str) -> bytes:
        """All bytes of an object. Raises as ``fetch``."""
        return self._answer("read", lambda: bytes(self._fs.cat_file(self._at(name))), name)

    def send(self, name: str, path: Path) -> None:
        """Copy a file to the store, where it appears whole or not at all."""
        self._answer("write", lambda: self._fs.put_file(str(path), self._at(name)), name)

    def is_another(self, entry: Entry, path: Path) -> bool:
        """Whether an object is known not to have the bytes of a file. Nothing is fetched: size and checksum tell."""
        if entry.num_bytes != path.stat().st_size:
            return True
        if agrees(entry.checksum, path) is not False:
            return False
        return self.scheme != "s3" or not self._answer("look at", lambda: self._is_encrypted(entry.name), entry.name)

    def _is_encrypted(self, name: str) -> bool:
        """Whether an ETag is not an MD5, since a key of KMS or of the user encrypts the object."""
        bucket, _, key = self._at(name).partition("/")
        head = self._fs.call_s3("head_object", Bucket=bucket, Key=key)
        return "kms" in str(head.get("ServerSideEncryption")) or "SSECustomerAlgorithm" in head

    def replace(self, name: str, data: bytes, expected: str | None) -> str:
        """Write an object if it is still the one with this tag, or if there still is none. Returns its new tag.

        S3 checks that itself (If-Match, If-None-Match). For any other store the tag is compared just before, so two
        writers within the same moment are not told apart.

        Raises:
            Changed: it is another one.
        """
        if self.is_conditional and len(data) < _SINGLE:
            condition = {"IfMatch": expected} if expected else {"IfNoneMatch": "*"}
            try:
                answer = self._answer("write", lambda: self._put(name, data, **condition), name, refused=is_condition)
                return str(answer["ETag"])
            except _Refused as error:
                if not error.is_unknown:
                    return self._own_or_changed(name, data)
                self.is_conditional = False
        now = self.stat(name)
        if (now.tag if now else None) != expected:
            return self._own_or_changed(name, data)
        self._answer("write", lambda: self._put(name, data), name)
        written = self.stat(name)
        return written.tag if written else ""

    def delete(self, names: Sequence[str]) -> None:
        """Delete objects. One that is not there any more is not an error."""
        for name in names:
            self._answer("delete", lambda name=name: self._fs.rm_file(self._at(name)), name, absent=True)  # type: ignore[misc]

    def _put(self, name: str, data: bytes, **condition: str) -> Any:
        if self.scheme == "s3":
            return self._fs.pipe_file(self._at(name), data, chunksize=_SINGLE, **condition)
        return self._fs.pipe_file(self._at(name), data)

    def _own_or_changed(self, name: str, data: bytes) -> str:
        """The tag of an object whose write was repeated after its answer had been lost; else it has changed."""
        there = self.read(name, 1 << 40)
        if there is None or there[0] != data:
            raise Changed(name)
        return there[1]

    def _chunks(self, name: str) -> Iterator[bytes]:
        with self._fs.open(self._at(name), "rb", block_size=8 << 20, cache_type="readahead") as file:
            while chunk := file.read(8 << 20):
                yield chunk

    def _at(self, name: str) -> str:
        return f"{self._path}/{name}"

    def _name_of(self, path: str) -> str:
        return path.lstrip("/").removeprefix(self._path.lstrip("/")).removeprefix("/")

    def _entry(self, name: str, info: dict[str, Any]) -> Entry:
        num_bytes, mtime_ns = int(info.get("size") or 0), _time_ns(info)
        tag = next((str(info[key]) for key in _TAGS if info.get(key)), f"{num_bytes}-{mtime_ns}")
        return Entry(name, num_bytes, tag, mtime_ns, checksum_of(self.scheme, info))

    def _answer(
        self,
        verb: str,
        ask: Callable[[], Value],
        name: str = "",
        absent: bool = False,
        refused: Callable[[Exception], bool | None] = lambda error: None,
    ) -> Any:
        """What the store answers. It is asked again if the network or the store fails for a moment.

        Args:
            absent: return None if there is no such object.
            refused: whether an error is the answer to a condition: ``_Refused`` is raised. None if it is not; False
                if the store does not know conditions.
        """
        began = time.monotonic()
        for wait in (*WAITS, None):
            try:
                answer = ask()
                self._has_told = False
                return answer
            except Exception as error:
                if (condition := refused(error)) is not None:
                    raise _Refused(is_unknown=not condition) from None
                if absent and isinstance(error, FileNotFoundError) and not is_bucket(error):
                    return None
                if not is_of_store(error):
                    raise
                seconds = time.monotonic() - began
                if wait is None or seconds > PATIENCE or not may_pass(error):
                    where = address_of(self._fs, self.scheme)
                    raise refusal(error, Asked(verb, self.url, name, *where, seconds)) from None
                if wait >= _LONG and not self._has_told:
                    self._has_told = True
                    note(f"{self.url} cannot be reached. Trying again for a minute")
                time.sleep(wait)
        raise AssertionError("unreachable")


class _Refused(Exception):
    """A conditional write was not made."""

    def __init__(self, is_unknown: bool) -> None:
        super().__init__()
        self.is_unknown = is_unknown
        """The store does not know conditions."""


class _Short(OSError):
    """Fewer bytes arrived than there are."""


def is_clean(name: str) -> bool:
    """Whether the name of an object can be the name of a file below a folder of this machine."""
    parts = PurePosixPath(name).parts
    is_relative = bool(parts) and "/".join(parts) == name and not name.startswith("/") and ".." not in parts
    return is_relative and "\\" not in name and not _CONTROL.search(name)


def _check(url: str, scheme: str, rest: str) -> None:
    first = rest.partition("/")[0]
    if re.match(r"[^/]*:[^/]*@", rest) or (scheme != "hf" and "@" in first):
        raise StoreError(
            f"A URL may hold no user and no password: {scheme}://(hidden)@{shown(first.rpartition('@')[2], 80)}",
            f"Leave them out. {LOGIN.get(scheme, 'Name another URL')}",
        )
    if scheme not in SCHEMES:
        raise StoreError(
            f"{without_credentials(shown(url, 200))} is not of a kind that is read: s3://, gs:// and hf:// are",
            "Copy it to a folder of this machine, or mount it, and name that",
        )
    if not first or not is_clean(rest) or "?" in rest or "#" in rest:
        raise StoreError(
            f"{without_credentials(shown(url.partition('?')[0], 200))} is not the URL of a folder in a bucket",
            f"Write it as {scheme}://BUCKET/FOLDER, without .. and without a query",
        )


def _time_ns(info: dict[str, Any]) -> int:
    for key in _TIMES:
        value = info.get(key)
        if isinstance(value, str):
            with suppress(ValueError):
                value = datetime.fromisoformat(value)
        if isinstance(value, datetime):
            return int(value.timestamp() * 1_000_000) * 1000
        if isinstance(value, int | float) and not isinstance(value, bool):
            return int(value * 1_000_000) * 1000
    return 0

"""What can be done with the objects below a URL? Read, list, send, replace one if it is unchanged, delete.

fsspec's file systems do it, each with its own configuration: credentials come from there and from the environment
alone. What a store answers becomes one line here, and what may pass is tried again.
"""

from __future__ import annotations

import errno
import importlib
import re
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path, PurePosixPath
from typing import Any, NoReturn, TypeVar

from k5cache.shared.credentials import without_credentials
from k5cache.shared.errors import StoreError
from k5cache.shared.files import new_file
from k5cache.shared.foreign import shown
from k5cache.shared.urls import SCHEMES, url_of

WAITS = (0.5, 2.0)
"""Seconds before each further try. s3fs itself tries five times within each."""
_PACKAGES = {"s3": ("s3fs", "s3fs"), "gs": ("gcsfs", "gcsfs"), "hf": ("huggingface_hub", "huggingface_hub")}
"""Scheme -> the module that fsspec needs, and what pip calls it."""
_LIBRARIES = frozenset({"botocore", "aiobotocore", "aiohttp", "s3fs", "gcsfs", "google", "huggingface_hub", "httpx",
                        "httpx2", "httpcore", "requests", "urllib3"})  # fmt: skip
_LOGIN = {
    "s3": "Set AWS_PROFILE, or AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, and AWS_ENDPOINT_URL if it is not Amazon's",
    "gs": "Log in with `gcloud auth application-default login`, or set GOOGLE_APPLICATION_CREDENTIALS",
    "hf": "Log in with `hf auth login`, or set HF_TOKEN",
    "memory": "Name another URL",
}
_MOST_READS = 10
_TAGS = ("ETag", "etag", "generation", "blob_id")
_TIMES = ("LastModified", "updated", "mtime", "created", "timeCreated")
_SINGLE = 5 << 30  # bytes of the largest object that S3 takes in one request, which alone can be conditional
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\ud800-\udfff]")
_QUERY = re.compile(r"(https?://[^\s?'\"]+)\?[^\s'\"]+")
"""An address with its query, which may hold a signature."""
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
        with suppress(ImportError):
            import fsspec

            if self.scheme in _PACKAGES:
                importlib.import_module(_PACKAGES[self.scheme][0])
            self._fs: Any = self._answer("open", lambda: fsspec.filesystem(
                self.scheme, skip_instance_cache=self.scheme != "memory", use_listings_cache=False
            ))  # fmt: skip
            self.is_conditional = self.scheme == "s3"
            return
        package = _PACKAGES.get(self.scheme, ("fsspec", "fsspec"))[1]
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
                return bytes(raw), entry.tag
        raise StoreError(
            f"Cannot read {self.url}/{name}: it has changed each of the {_MOST_READS} times that it was read, or the "
            "store says another size than it sends",
            "Try again when nobody writes it",
        )

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
                answer = self._answer("write", lambda: self._put(name, data, **condition), name, refused=_is_condition)
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
        return Entry(name, num_bytes, tag, mtime_ns)

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
        what = f"{self.url}/{name}" if name else self.url
        for wait in (*WAITS, None):
            try:
                return ask()
            except Exception as error:
                if (answer := refused(error)) is not None:
                    raise _Refused(is_unknown=not answer) from None
                if absent and isinstance(error, FileNotFoundError) and not _is_bucket(error):
                    return None
                if not _is_of_store(error):
                    raise
                if wait is None or not _may_pass(error):
                    self._refuse(verb, what, error)
                time.sleep(wait)
        raise AssertionError("unreachable")

    def _refuse(self, verb: str, what: str, error: Exception) -> NoReturn:
        words = " ".join(str(error).split()) or type(error).__name__
        reason = without_credentials(shown(_QUERY.sub(r"\1", words), 240))
        if isinstance(error, FileNotFoundError):
            bucket = self.url.partition("://")[2].partition("/")[0]
            if _is_bucket(error):
                raise StoreError(f"Cannot {verb} {what}: there is no bucket {bucket}", "Correct its name, or make it")
            raise StoreError(f"Cannot {verb} {what}: there is no such object", "Look at what the store holds") from None
        if "RequestTimeTooSkewed" in repr(error.__cause__):
            raise StoreError(f"Cannot {verb} {what}: {reason}", "Set the clock of this machine") from None
        if isinstance(error, PermissionError):
            may = f"They must allow to list, read and write below {self.url}, or to read it if nothing is written there"
            raise StoreError(f"Cannot {verb} {what}: {reason}", f"{_LOGIN[self.scheme]}. {may}") from None
        if "redentials" in type(error).__name__ + reason or _is_setting(error):
            raise StoreError(f"Cannot {verb} {what}: {reason}", _LOGIN[self.scheme]) from None
        raise StoreError(
            f"Cannot {verb} {what}: {reason}", "Check the network and try again: what has arrived is kept"
        ) from None


class _Refused(Exception):
    """A conditional write was not made."""

    def __init__(self, is_unknown: bool) -> None:
        super().__init__()
        self.is_unknown = is_unknown
        """The store does not know conditions."""


class _Short(OSError):
    """Fewer bytes arrived than there are."""


def _is_setting(error: Exception) -> bool:
    """Whether an error is about how the store is named, which no second try changes."""
    is_invalid = isinstance(error, ValueError) and str(error).startswith("Invalid endpoint")
    return is_invalid or type(error).__name__ in ("ParamValidationError", "ProfileNotFound", "ConfigParseError")


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
            f"Leave them out. {_LOGIN.get(scheme, 'Name another URL')}",
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


def _is_of_store(error: Exception) -> bool:
    """Whether an error is the store's or the network's, and not one of this code."""
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS):
        return False  # this machine's disk
    if isinstance(error, OSError) and error.errno and Path(str(error.filename)).is_absolute():
        return False  # a file of this machine; those of stores are no paths
    if _is_setting(error):
        return True
    roots = {kind.__module__.partition(".")[0] for kind in type(error).__mro__}
    return isinstance(error, OSError | TimeoutError | EOFError) or bool(roots & _LIBRARIES)


def _may_pass(error: Exception) -> bool:
    """Whether another try may succeed."""
    if isinstance(error, FileNotFoundError | PermissionError | FileExistsError | IsADirectoryError):
        return False
    if "redentials" in type(error).__name__ or _is_setting(error):
        return False
    status = getattr(getattr(error, "response", None), "status_code", None)
    is_invalid = isinstance(error, OSError) and error.errno in (errno.EINVAL, errno.EPERM, errno.EACCES)
    return not is_invalid and not (isinstance(status, int) and 400 <= status < 500)


def _is_bucket(error: Exception) -> bool:
    return "bucket does not exist" in str(error) or "NoSuchBucket" in repr(error.__cause__)


def _is_condition(error: Exception) -> bool | None:
    response = getattr(error.__cause__ or error, "response", None)
    code = response.get("Error", {}).get("Code") if isinstance(response, dict) else None
    if isinstance(error, FileExistsError) or code in ("PreconditionFailed", "412", "ConditionalRequestConflict"):
        return True
    if isinstance(error, FileNotFoundError) and code in ("NoSuchKey", "404"):  # If-Match, and it has been deleted
        return True
    return False if code in ("NotImplemented", "501") else None


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

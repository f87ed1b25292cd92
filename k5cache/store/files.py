"""Files of a cache: they appear whole or not at all, and only those inside its folder are opened."""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from k5cache.shared.errors import CacheCorrupt, CacheError

FOLDERS = ("latents", "masks", "text")
TEMPORARY = ".tmp-"


class NewFile:
    """A file being written under a temporary name; ``commit`` gives it its own. Hashes what passes through.

    It has the methods that ``pyarrow.PythonFile`` asks for. Bytes go straight to the descriptor, so a full disk
    raises in ``write`` or ``commit``, never later.
    """

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / f"{TEMPORARY}{os.getpid()}-{os.urandom(6).hex()}"
        self.num_bytes = 0
        self.sha256 = hashlib.sha256()
        self.parts: list[Any] = []  # more hashes to feed, swapped by the owner as it goes
        self.closed = False  # for Arrow, which writes a footer even into a file that is let go
        self._is_pending = True
        self._fd = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)

    def write(self, data: bytes) -> int:
        """Append. What arrives after ``discard`` is dropped."""
        if self._fd < 0:
            return len(data)
        rest = memoryview(data)
        with self._named_in_errors():
            while rest:
                rest = rest[os.write(self._fd, rest) :]
        self.sha256.update(data)
        for part in self.parts:
            part.update(data)
        self.num_bytes += len(data)
        return len(data)

    def tell(self) -> int:
        """Bytes written so far."""
        return self.num_bytes

    def flush(self) -> None:
        """Nothing is held back."""

    def close(self) -> None:
        """Arrow closes its sinks; ours stays open until ``commit`` or ``discard``."""

    def commit(self, path: Path) -> None:
        """Make the bytes durable, then visible as ``path``."""
        with self._named_in_errors():
            os.fsync(self._fd)
        os.close(self._fd)
        self._fd = -1
        self.path.replace(path)
        self._is_pending = False
        sync_folder(path.parent)

    def discard(self) -> None:
        """Leave nothing behind. Does nothing after ``commit``."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
        if self._is_pending:
            self._is_pending = False
            self.path.unlink(missing_ok=True)

    @contextmanager
    def _named_in_errors(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            error.filename = str(self.path)  # the console says where the disk is full
            raise


@contextmanager
def new_file(path: Path) -> Iterator[NewFile]:
    """``with new_file(path) as file: file.write(...)``: ``path`` is there, whole, after the block, or untouched."""
    made = NewFile(path.parent)
    try:
        yield made
        made.commit(path)
    finally:
        made.discard()


def sync_folder(folder: Path) -> None:
    """Make a rename in ``folder`` durable."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def remove_leftovers(root: Path) -> list[str]:
    """Delete temporary files that a killed writer left; call it with the lock held. Returns their names."""
    removed = []
    for folder in (root, *(root / name for name in FOLDERS)):
        if folder.is_dir() and not folder.is_symlink():
            for path in folder.glob(f"{TEMPORARY}*"):
                with suppress(FileNotFoundError):
                    path.unlink()
                    removed.append(path.name)
    return removed


def open_inside(root: Path, file: str, num_bytes: int | None = None) -> int:
    """Open a file of the cache for reading.

    Args:
        file: a path relative to ``root``, already checked to be one of the format's names.
        num_bytes: the size the manifest promises.

    Returns:
        A descriptor, the caller's to close.

    Raises:
        CacheCorrupt: it is missing or of another size.
        CacheError: it is not a plain file, or a link leads out of the cache.
    """
    path = root / file
    try:
        if not path.resolve(strict=True).is_relative_to(root.resolve()):
            raise CacheError(
                f"{path} is a link that leads out of the cache",
                f"Copy the cache with its files: cp -rL {root} COPY (from the hub: download with local_dir)",
            )
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)  # a pipe would block
    except FileNotFoundError:
        raise corrupt(root, f"{path} is missing") from None
    status = os.fstat(fd)
    if not stat.S_ISREG(status.st_mode):
        os.close(fd)
        raise CacheError(f"{path} is not a plain file", f"Use a cache made by: k5cache encode SOURCE -o {root}")
    if num_bytes is not None and status.st_size != num_bytes:
        os.close(fd)
        raise corrupt(root, f"{path} has {status.st_size} bytes, {num_bytes} were written")
    return fd


def sha256_of(fd: int) -> str:
    """sha256 of a whole open file, in hexadecimal; memory stays small."""
    with open(os.dup(fd), "rb", buffering=0) as file:  # noqa: PTH123 (a descriptor, not a path)
        file.seek(0)
        return hashlib.file_digest(file, "sha256").hexdigest()


def corrupt(root: Path, problem: str) -> CacheCorrupt:
    """The error for bytes that are not those written."""
    return CacheCorrupt(
        problem,
        f"k5cache verify {root} lists all damage; k5cache encode SOURCE -o {root} --repair encodes only that again "
        "(a damaged manifest: restore it from a copy, or encode into a new cache)",
    )

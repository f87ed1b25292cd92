"""Which int8 bases are on disk, and is each what was written? Their headers say so, and are read without torch."""

from __future__ import annotations

import errno
import json
import os
import re
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import xxhash

from k5cache.shared import system
from k5cache.shared.errors import ModelError
from k5cache.shared.home import k5_home

FOLDER = "base"
# Fixed, because checksums are known only after the tensors are written. 3,000 tensors take 0.5 MB.
HEADER_BYTES = 4 * 2**20
_BEGIN = b'{"__metadata__": {"checksum": "'
DIGITS = 16  # of the header's own xxh3_64, computed with zeros in their place
CHECKSUM = slice(8 + len(_BEGIN), 8 + len(_BEGIN) + DIGITS)
_NAME = re.compile(r"[0-9a-f]{32}\.safetensors", re.ASCII)


class Damaged(Exception):
    """A prepared file is not what was written. Says where."""


@dataclass(frozen=True)
class Prepared:
    """One prepared base, and what it was made from."""

    path: Path
    source: str
    dtype: str
    num_bytes: int
    is_whole: bool
    """Whether its header can be read and its length is what the header says."""


def home() -> Path:
    """The folder of prepared bases: ``$K5_HOME/base``, by default ``~/.cache/k5/base``."""
    return k5_home() / FOLDER


def list_bases() -> list[Prepared]:
    """Every prepared base. Files with other names than ``prepared_path`` gives are someone else's."""
    return [_describe(path) for path in sorted(home().glob("*.safetensors")) if _NAME.fullmatch(path.name)]


def remove(name: str) -> Prepared:
    """Remove one prepared base. The next run that needs it writes it again.

    Args:
        name: its file name, or the beginning of it.

    Raises:
        ModelError: no file name starts with ``name``, or several do.
    """
    bases = [base for base in list_bases() if name and base.path.name.startswith(name)]
    if len(bases) != 1:
        raise ModelError(
            f"{len(bases)} prepared bases under {home()} begin with {name!r}", "See their names: k5train base list"
        )
    bases[0].path.unlink()
    return bases[0]


@dataclass(frozen=True)
class Opened:
    """A prepared file whose header is the one that was written."""

    descriptor: int
    tensors: dict[str, Any]
    sums: dict[str, str]
    facts: dict[str, Any]


@contextmanager
def opened(path: Path) -> Iterator[Opened]:
    """Read the header and compare it with its checksum.

    Raises:
        Damaged: it has changed, or is of a version that saved no checksum of it; or the file has another length.
    """
    descriptor = system.open_bytes(path)
    try:
        raw = b"".join(iter(lambda: os.read(descriptor, 8 + HEADER_BYTES - os.lseek(descriptor, 0, os.SEEK_CUR)), b""))
        if raw[: CHECKSUM.start] != struct.pack("<Q", HEADER_BYTES) + _BEGIN:
            raise Damaged("it is not a base of this version")
        blank = raw[: CHECKSUM.start] + b"0" * DIGITS + raw[CHECKSUM.stop :]
        if raw[CHECKSUM] != xxhash.xxh3_64_hexdigest(blank).encode():
            raise Damaged("its header is not the one that was written")
        tensors = json.loads(raw[8:])
        metadata = tensors.pop("__metadata__")
        facts = json.loads(metadata["k5"])
        end = max((entry["data_offsets"][1] for entry in tensors.values()), default=0)
        if facts["name"] != path.stem:
            raise Damaged("it is another checkpoint's base")
        if os.fstat(descriptor).st_size != 8 + HEADER_BYTES + end:
            raise Damaged("it is cut short, or something was appended to it")
        yield Opened(descriptor, tensors, json.loads(metadata["xxh3_64"]), facts)
    except OSError as error:
        if error.errno != errno.EIO:
            raise
        raise Damaged("the disk reports an error") from error
    finally:
        os.close(descriptor)


def _describe(path: Path) -> Prepared:
    num_bytes = path.stat().st_size
    try:
        with opened(path) as file:
            return Prepared(path, file.facts["source"], file.facts["dtype"], num_bytes, True)
    except Damaged:
        return Prepared(path, "unknown", "unknown", num_bytes, False)

"""How is a changed byte found? A file by its length and sha256 in another file, a JSON file by its own at its start."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from k5cache.shared.disk_errors import named
from k5cache.shared.files import write_whole

_BEGIN = b'{\n "sha256": "'
_DIGITS = slice(len(_BEGIN), len(_BEGIN) + 64)
_CHUNK = 1 << 20


@dataclass(frozen=True)
class Digest:
    """What a file must be."""

    num_bytes: int
    sha256: str

    @classmethod
    def of(cls, path: Path) -> Digest:
        """The digest of a file as it is now."""
        sha256, num_bytes = hashlib.sha256(), 0
        with named(path), path.open("rb", buffering=0) as file:
            while chunk := file.read(_CHUNK):
                sha256.update(chunk)
                num_bytes += len(chunk)
        return cls(num_bytes, sha256.hexdigest())

    @classmethod
    def read(cls, document: Any) -> Digest:
        """From its JSON.

        Raises:
            ValueError: it is something else.
        """
        match document:
            case {"num_bytes": int(num_bytes), "sha256": str(sha256)}:
                return cls(num_bytes, sha256)
        raise ValueError(f"{str(document)[:40]} is not a length and a sha256")


def seal(document: Mapping[str, Any], allow_nan: bool = True) -> bytes:
    """A document as JSON that begins with its own sha256, computed with those 64 digits as zeros.

    Raises:
        ValueError: it has NaN or infinity, and ``allow_nan`` is False: other programs' JSON knows neither.
    """
    raw = json.dumps({"sha256": "0" * 64, **document}, indent=1, allow_nan=allow_nan).encode() + b"\n"
    return raw[: _DIGITS.start] + hashlib.sha256(raw).hexdigest().encode() + raw[_DIGITS.stop :]


def write_sealed(path: Path, document: Mapping[str, Any]) -> None:
    """Write a sealed file, whole or not at all."""
    raw = seal(document)
    write_whole(path, lambda temporary: temporary.write_bytes(raw))


class Changed(ValueError):
    """A sealed file is not the one that was written."""

    def __init__(self) -> None:
        super().__init__("it is not the file that was written: its checksum does not match")


def unseal(raw: bytes) -> dict[str, Any]:
    """The document that ``seal`` was given.

    Raises:
        Changed: a byte of it is another than was written.
        ValueError: it has a right checksum and is not JSON.
    """
    blank = raw[: _DIGITS.start] + b"0" * 64 + raw[_DIGITS.stop :]
    if not raw.startswith(_BEGIN) or hashlib.sha256(blank).hexdigest().encode() != raw[_DIGITS]:
        raise Changed
    try:
        document: dict[str, Any] = json.loads(raw)
    except RecursionError as error:
        raise ValueError(str(error)) from None
    del document["sha256"]
    return document


def unseal_if_sealed(raw: bytes, unsealed: Collection[str]) -> dict[str, Any]:
    """The document of a file that earlier versions wrote without a checksum.

    Args:
        unsealed: the keys that it had then. A file with any other key is a damaged one of this version.

    Raises:
        Changed: a byte of it is another than was written.
        ValueError: it is not a JSON object.
    """
    try:
        return unseal(raw)
    except Changed:
        try:
            document = json.loads(raw)
        except RecursionError as error:
            raise ValueError(str(error)) from None
        if not isinstance(document, dict):
            raise ValueError("it is not a JSON object") from None
        if not document.keys() <= set(unsealed):
            raise
        return document

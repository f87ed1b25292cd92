"""Does an object have the bytes of a file, as far as its store says so without sending it? By its MD5, in two forms.

S3's ETag is the MD5 of an object that was sent in one request, and the MD5 of the MD5s of its parts for one that was
sent in parts, unless a key of KMS or of the user encrypts it. Google's store gives an MD5 of what was not composed.
"""

from __future__ import annotations

import base64
import hashlib
import re
from pathlib import Path
from typing import Any

PART = 50 << 20
"""Bytes of a part as s3fs sends it (``s3fs.core.calculate_chunksize``), below 500 GB."""
_ETAG = re.compile(r'"?([0-9a-f]{32}(?:-\d+)?)"?')


def checksum_of(scheme: str, info: dict[str, Any]) -> str:
    """The MD5 that a store gives of an object, in hex, with ``-`` and the number of parts; empty if it gives none."""
    if scheme == "s3":
        match = _ETAG.fullmatch(str(info.get("ETag") or ""))
        return match[1] if match else ""
    try:
        return base64.b64decode(str(info.get("md5Hash") or ""), validate=True).hex() if scheme == "gs" else ""
    except ValueError:
        return ""


def agrees(checksum: str, path: Path) -> bool | None:
    """Whether a file has the checksum that a store gives of an object; None if that cannot be said."""
    md5, _, parts = checksum.partition("-")
    if not md5:
        return None
    if not parts:
        return md5_of(path) == md5
    if int(parts) != -(-path.stat().st_size // PART):
        return None  # another program sent it, in other parts
    return md5_of(path, PART) == md5


def md5_of(path: Path, part: int = 0) -> str:
    """The MD5 of a file, or with ``part``, the MD5 of the MD5s of its parts of so many bytes."""
    whole, digests = hashlib.md5(usedforsecurity=False), hashlib.md5(usedforsecurity=False)
    left = part
    with path.open("rb") as file:
        while piece := file.read(min(1 << 20, left) if part else 1 << 20):
            whole.update(piece)
            left -= len(piece)
            if part and not left:
                digests.update(whole.digest())
                whole, left = hashlib.md5(usedforsecurity=False), part
    if not part:
        return whole.hexdigest()
    if left < part:
        digests.update(whole.digest())
    return digests.hexdigest()

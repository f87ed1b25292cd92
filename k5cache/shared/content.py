"""By which hash does a cache know the bytes of a picture? And which hashes may a file have, without decoding it?"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

PICTURE_DECODER = 2
"""Raised when some kind of file decodes to other pixels than before. Every image is then looked at once more, and those
of the kinds in ``decode.decodes_anew`` get another content hash, so they are encoded again and no others are."""


def content_hash_of(sha256: Any, is_decoded_anew: bool) -> str:
    """The content hash, 32 hex digits.

    Args:
        sha256: ``hashlib``'s, of the picture's bytes. It is changed.
        is_decoded_anew: earlier versions decoded the picture to other pixels, so what they made of it must not be used.
    """
    if is_decoded_anew:
        sha256.update(b"picture decoder %d" % PICTURE_DECODER)
    return str(sha256.hexdigest())[:32]


def possible_hashes(path: Path) -> tuple[str, str]:
    """The two content hashes that a file may have. Which one it has, only the decoder knows; no other file has either.

    Raises:
        OSError: it cannot be read.
    """
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256")
    return content_hash_of(digest.copy(), False), content_hash_of(digest, True)

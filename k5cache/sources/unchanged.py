"""Has any file of a folder been touched since an encode looked at it? Stats only: no image and no caption is opened."""

from __future__ import annotations

import hashlib
import stat
from array import array
from dataclasses import dataclass
from pathlib import Path

from k5cache.sources.folder import MASK_SUFFIXES, walk
from k5cache.sources.items import IMAGE_SUFFIXES, Skipped

_COUNTS = IMAGE_SUFFIXES | MASK_SUFFIXES | {".txt"}
SETTLED_NS = 2_000_000_000
"""A file that was written less than this before it was read may be written again in the same tick of its clock, and no
stat would tell: FAT ticks every 2 s, ext4 every 4 ms."""


@dataclass(frozen=True)
class Glance:
    """What the stats of a folder's files say."""

    digest: str
    """Names, sizes, times of writing and of any other change (ctime), inodes: 32 hex digits."""
    newest_ns: int
    """Nanoseconds since the epoch: when the last of them was written or otherwise changed."""


def glance(source: Path) -> Glance | None:
    """Look at every image, mask and text file below ``source``: 0.15 s for 10,000 images with captions.

    ctime is in it, which no program can set: an edit that puts size and mtime back is seen. So is a harmless change, a
    new link or other permissions; then the captions are read, and found to be the same.

    Returns:
        None where there is something that a stat does not settle: no folder, a broken link, a pipe, a folder that
        cannot be read.
    """
    if not source.is_dir():
        return None
    sha256 = hashlib.sha256()
    newest, refused = 0, list[Skipped]()
    for files, prefix in walk(source, refused):
        names, numbers, kinds = [prefix], array("q"), set()
        for entry in files:
            name = entry.name
            if name[name.rfind(".") :].lower() in _COUNTS:
                try:
                    found = entry.stat()
                except OSError:
                    return None
                names.append(name)
                kinds.add(stat.S_IFMT(found.st_mode))
                # One list of integers a folder: text for each of 20,000 files takes as long as their stats.
                numbers.extend((found.st_mtime_ns, found.st_ctime_ns, found.st_size, found.st_ino & (2**63 - 1)))
        if not kinds <= {stat.S_IFREG}:
            return None
        newest = max([newest, *numbers[0::4], *numbers[1::4]])
        for field in ("\0".join(names).encode("utf-8", "surrogateescape"), numbers.tobytes()):
            sha256.update(len(field).to_bytes(8, "little") + field)
    return None if refused else Glance(sha256.hexdigest()[:32], newest)


def is_settled(seen: Glance, read_ns: int) -> bool:
    """Whether files that were read at ``read_ns`` or later (``time.time_ns``) must still be the same if ``seen`` holds.

    A clock in the future (another machine's, over a network) never settles: such a folder is read each time.
    """
    return seen.newest_ns + SETTLED_NS < read_ns

"""``skipped.csv`` in a cache: everything that the last encode could not use, for people and their spreadsheets.

No manifest names it and no reader needs it. Its header proves that it is ours: another file of that name stays.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable
from pathlib import Path

from k5cache.shared.files import new_file

NAME = "skipped.csv"
HEADER = ("path", "skipped by k5cache because")
_FIRST = (",".join(HEADER) + "\r\n").encode()  # as RFC 4180 ends a line


def is_ours(root: Path) -> bool:
    """Whether the cache has this file, and it is one that we wrote."""
    path = root / NAME
    try:
        if path.is_symlink() or not path.is_file():
            return False
        with path.open("rb") as file:
            return file.read(len(_FIRST)) == _FIRST
    except OSError:
        return False


def read_skipped(root: Path) -> list[tuple[str, str]]:
    """(path, reason) of every row of the file; none if the cache has no such file of ours."""
    if not is_ours(root):
        return []
    text = (root / NAME).read_bytes().decode("utf-8", "replace")
    return [(row[0], row[1]) for row in csv.reader(io.StringIO(text, newline="")) if len(row) == 2][1:]


def write_skipped(root: Path, skipped: Iterable[tuple[str, str]]) -> None:
    """Write the file, or delete it if nothing was skipped. What is not ours is neither overwritten nor deleted.

    Args:
        skipped: (path, reason).
    """
    path = root / NAME
    is_there = is_ours(root)
    if not is_there and (path.exists() or path.is_symlink()):
        return
    text = io.StringIO(newline="")
    rows = csv.writer(text)
    rows.writerow(HEADER)
    rows.writerows(skipped)
    data = text.getvalue().encode("utf-8", "replace")
    if data == _FIRST:
        if is_there:
            path.unlink(missing_ok=True)
    elif not is_there or path.read_bytes() != data:
        with new_file(path) as file:
            file.write(data)

"""Has a file changed since it was read? What is remembered of runs is remembered under these."""

from __future__ import annotations

from pathlib import Path

Stamp = tuple[int, int] | None
"""When a file was changed, in nanoseconds, and its size. None: it is not there, or cannot be asked."""


def stamp(path: Path) -> Stamp:
    """The stamp of a file or a folder. Links are followed."""
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_mtime_ns, status.st_size


def stamps(root: Path, *names: str) -> tuple[Stamp, ...]:
    """Those of some files of a run."""
    return tuple(stamp(root / name) for name in names)

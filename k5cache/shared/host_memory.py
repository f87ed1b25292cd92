"""How much host memory is free? One stage keeps hidden states in it, the other streams weights from it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from k5cache.shared import system


def free_ram(root: Path = Path("/")) -> int:
    """Bytes of host memory that are free without swapping; in a container, within its limit.

    Args:
        root: where ``proc`` and ``sys`` are.
    """
    meminfo = root / "proc/meminfo"
    for line in meminfo.read_text(encoding="ascii").splitlines() if meminfo.exists() else ():
        if line.startswith("MemAvailable:"):
            return min(int(line.split()[1]) * 1024, *_container_room(root))
    return system.available_ram()


def _container_room(root: Path) -> Iterator[int]:
    """Bytes that each memory limit leaves: of this process's cgroup and of those around it. 2**62 at the end."""
    names = {"": ("memory.max", "memory.current"), "memory": ("memory.limit_in_bytes", "memory.usage_in_bytes")}
    try:
        groups = [line.split(":", 2) for line in (root / "proc/self/cgroup").read_text().splitlines()]
    except OSError:
        groups = []
    for _, controller, path in groups:
        if controller not in names:
            continue
        top = root / "sys/fs/cgroup" / controller
        inside = top / path.strip("/")
        # A container often sees its own cgroup at the top, under a path that does not exist inside it.
        for folder in dict.fromkeys((inside, *inside.parents, top)):
            if folder.is_relative_to(top):
                yield from _room_of(folder, *names[controller])
    yield 2**62


def _room_of(folder: Path, limit: str, used: str) -> Iterator[int]:
    """What one cgroup has left. Cached files count as free: the system gives their memory back on demand."""
    try:
        most, now = (int((folder / name).read_text()) for name in (limit, used))
        stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):  # no such file, or "max": no limit
        return
    cached = sum(int(stat.get(f"{kind}_file", 0)) for kind in ("active", "inactive"))
    yield max(0, most - now + min(cached, now))

"""Is there room: on the disks, in RAM and for open files, and may K5_HOME be written? Facts are read, then judged."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from k5cache.shared.checkpoint import folder_on_disk
from k5cache.shared.console import human_bytes
from k5cache.shared.errors import RunError
from k5cache.shared.home import check_trusted, k5_home
from k5cache.shared.host_memory import free_ram
from k5cache.shared.model import ModelConfig
from k5train.doctor.check import Check, environment

# Bytes. What is fetched of each part of a published model: "The model: facts" in docs/architecture.md. The prepared
# base: the planner's weights. A row of a cache at 1024x1024 with 256 tokens, and the RAM of a run with mapped files:
# docs/measurements.md.
HUB_BYTES = {
    "transformer": 12_040_000_000,
    "text_encoder": 15_500_000_000,
    "text_encoder_2": 1_710_000_000,
    "vae": 340_000_000,
}
BASE_BYTES = 6_650_000_000
ROW_BYTES = 2_940_000
RUN_RAM = 22 * 2**30 // 10
_SPARE = 5_000_000_000
_FEW_FILES = 1024
"""The usual limit of Linux. A limit below it is one that somebody set."""


@dataclass(frozen=True)
class Volume:
    """One disk: what lies on it, the bytes free, and those that what is missing there will need."""

    holds: tuple[str, ...]
    free: int
    needed: int


def read_volumes(model: ModelConfig) -> list[Volume]:
    """The disks of this folder's datasets, caches and runs, of K5_HOME and of the hub's downloads."""
    from huggingface_hub.constants import HF_HUB_CACHE

    absent = sum(size for part, size in HUB_BYTES.items() if folder_on_disk(model, (part,)) is None)
    needs_base = not any((k5_home() / "base").glob("*"))
    places = [
        *((name, Path(name), 0) for name in ("datasets", "cache", "runs")),
        ("K5_HOME", k5_home(), BASE_BYTES if needs_base else 0),
        ("hub downloads", Path(HF_HUB_CACHE), absent),
    ]
    volumes: dict[int, Volume] = {}
    for name, path, needed in places:
        parent = _nearest(path.absolute())
        number = parent.stat().st_dev
        volume = volumes.get(number, Volume((), shutil.disk_usage(parent).free, 0))
        volumes[number] = replace(volume, holds=(*volume.holds, name), needed=volume.needed + needed)
    return list(volumes.values())


def _nearest(path: Path) -> Path:
    return next(folder for folder in (path, *path.parents) if folder.exists())


def judge_disk(volumes: Sequence[Volume]) -> Check:
    """Whether the model, its int8 weights and a cache fit the disks."""
    found = "; ".join(f"{human_bytes(v.free)} free for {', '.join(v.holds)}" for v in volumes)
    tightest = min(volumes, key=lambda volume: volume.free - volume.needed)
    needs = f"What is not there yet needs up to {human_bytes(tightest.needed)}" if tightest.needed else ""
    if tightest.free < tightest.needed:
        commands = (environment("HF_HOME", "/a/larger/disk/huggingface"), environment("K5_HOME", "/a/larger/disk/k5"))
        return Check("disk", "does not work", found, f"{needs}. Free some space, or use another disk.", commands)
    room = tightest.free - tightest.needed
    cache = f"{room // ROW_BYTES:,} images of a cache at 1024x1024" if room < 1000 * ROW_BYTES else ""
    if room < _SPARE:
        left = f"only {human_bytes(room)} then remain, or {cache}" if cache else f"then {human_bytes(room)} remain"
        return Check("disk", "look at this", found, f"{needs}; {left}." if needs else f"Full soon: {left}.")
    rows = f"1,000 images at 1024x1024 need {human_bytes(1000 * ROW_BYTES)} in a cache."
    return Check("disk", "good", found, f"{needs}. {rows}" if needs else rows)


def read_ram() -> tuple[int, int | None]:
    """Bytes of host memory that are free for this process, and that the machine has free if a container gives less."""
    free = free_ram()
    meminfo = Path("/proc/meminfo")
    lines = meminfo.read_text(encoding="ascii").splitlines() if meminfo.exists() else []
    available = next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")), free)
    return free, available if available > free + 2**28 else None


def judge_ram(free: int, outside: int | None) -> Check:
    """Whether a run has enough host memory.

    Args:
        outside: what the machine has free, if a container's limit allows less.
    """
    limit = f", by the limit of a container; the machine has {human_bytes(outside)}" if outside else ""
    found = f"{human_bytes(free)} free{limit}"
    if free < RUN_RAM:
        raised = "Raise the container's limit." if outside else "Close other programs."
        return Check("RAM", "does not work", found, f"A run needs {human_bytes(RUN_RAM)}. {raised}")
    if free < 8 * 2**30:
        meaning = "Enough for a run. A small card also keeps streamed weights here, up to 6 GiB."
        return Check("RAM", "look at this", found, meaning)
    return Check("RAM", "good", found, "Enough for a run, and for weights that a small card streams.")


def judge_open_files(limit: int | None) -> Check:
    """Whether a cache of many shards can be read."""
    if limit is None:
        return Check("open files", "good", "no limit", "Caches of many shards can be read.")
    if limit < _FEW_FILES:
        return Check(
            "open files", "look at this", f"a process may open {limit} files",
            "Too few for a cache of many shards. Raise the limit in this shell:", ("ulimit -n 4096",),
        )  # fmt: skip
    return Check("open files", "good", f"a process may open {limit} files", "Enough.")


def judge_home() -> Check:
    """Whether the folder of int8 weights and compiled code can be written, and only by this user."""
    home = k5_home()
    source = "from $K5_HOME" if os.environ.get("K5_HOME") else "the default; $K5_HOME names another"
    found = f"{home} ({source})"
    commands = (environment("K5_HOME", "/a/folder/of/your/own"),)
    folder = _nearest(home.absolute())
    if not folder.is_dir() or not os.access(folder, os.W_OK | os.X_OK):
        return Check("K5_HOME", "does not work", found, f"{folder} cannot be written.", commands)
    try:
        if folder == home.absolute():
            check_trusted(home)
    except RunError as error:
        return Check("K5_HOME", "does not work", f"{found}: {error.problem}", f"{error.fix}.")
    return Check("K5_HOME", "good", found, "int8 weights and compiled code are kept here and used again.")

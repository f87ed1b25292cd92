"""Which files of a model on the hub are fetched? Only those that are used, and their sizes are said first.

Which weights are used stands in the index of a part, so small files are fetched before it is decided: configs and
indexes, a few hundred kilobytes.
"""

from __future__ import annotations

import glob
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from k5cache.shared import console, hub
from k5cache.shared.console import human_bytes, note
from k5cache.shared.errors import HubError
from k5cache.shared.part_files import needed_files, small_files
from k5cache.shared.preprocessor import FILES

_ALWAYS = ("model_index.json", "transformer/config.json")  # the second says whether the model edits images


@dataclass(frozen=True)
class Remote:
    """A revision of a repository, as the hub lists it."""

    repo: str
    revision: str | None
    commit: str
    num_bytes: Mapping[str, int]
    """Of each file."""
    blobs: Mapping[str, str]
    """The hash by which the hub's client keeps each file."""


def read_remote(repo: str, revision: str | None) -> Remote:
    """Ask the hub once. Raises what ``hub.unreachable`` lists."""
    info = hub.api().model_info(repo, revision=revision, timeout=10, files_metadata=True)
    files = info.siblings or ()
    blobs = {file.rfilename: file.lfs.sha256 if file.lfs else file.blob_id or "" for file in files}
    return Remote(repo, revision, str(info.sha), {file.rfilename: file.size or 0 for file in files}, blobs)


def fetch_small(remote: Remote, parts: Sequence[str]) -> Path:
    """The snapshot, with the configs of ``parts`` and the indexes of their weights in it."""
    names = [*_ALWAYS, *(name for part in parts for name in small_files(remote.num_bytes, part))]
    names += FILES if "tokenizer" in parts else ()  # how the text encoder is shown a picture
    return _fetch(remote, names)


def fetch(remote: Remote, parts: Sequence[str], shows_pictures: Callable[[Path], bool]) -> Path:
    """The snapshot, with all that is used of ``parts`` in it. A note says how much is downloaded.

    Args:
        shows_pictures: whether the vision tower of the text encoder is used, by the configs in a folder.

    Raises:
        HubError: the disk has no room for it.
    """
    folder = fetch_small(remote, parts)
    names = needed(remote, parts, folder, shows_pictures(folder))
    absent = {name: size for name in names if (size := _absent_bytes(remote, name))}
    if absent:
        _check_room(remote, sum(absent.values()))
        note(f"Downloading {sizes(remote, names)} of {remote.repo}")
    # Of an earlier commit, and the same: it costs nothing. The first caches know a text encoder by all of its files.
    kept = [name for name in _weights(remote, parts) if not _absent_bytes(remote, name)]
    with _shown(remote, sum(absent.values())):
        return _fetch(remote, [*_ALWAYS, *names, *kept])


@contextmanager
def _shown(remote: Remote, num_bytes: int) -> Iterator[None]:
    """A line a minute where there is no terminal, on which the hub's client draws bars."""
    if sys.stderr.isatty() or not num_bytes:
        yield
        return
    blobs = hub.home_of(remote.repo) / "blobs"

    def arrived() -> int:
        with suppress(OSError):  # a file gets its name meanwhile
            return sum(path.stat().st_size for path in blobs.iterdir())
        return 0

    with console.progress() as bars:
        task = bars.add_task(f"downloading {remote.repo}", total=num_bytes, unit="byte", note="")
        with hub.counted(arrived, lambda more: bars.advance(task, more)):
            yield


def _weights(remote: Remote, parts: Sequence[str]) -> list[str]:
    return [name for name in remote.num_bytes if name.endswith(".safetensors") and name.partition("/")[0] in parts]


def needed(remote: Remote, parts: Sequence[str], folder: Path, with_vision: bool) -> list[str]:
    """The files of ``parts`` that are used; ``folder`` has the small ones."""
    names = [name for part in parts for name in needed_files(remote.num_bytes, part, folder, with_vision)]
    names += [name for name in FILES if name in remote.num_bytes] if "tokenizer" in parts else []
    return list(dict.fromkeys(names))


def sizes(remote: Remote, names: Sequence[str]) -> str:
    """``27.2 GB (transformer 12.0 GB, text_encoder 15.2 GB; 2.0 GB is on this machine already)``."""
    absent: dict[str, int] = {}
    for name in names:
        if size := _absent_bytes(remote, name):
            part = name.partition("/")[0]
            absent[part] = absent.get(part, 0) + size
    total = sum(absent.values())
    here = sum(remote.num_bytes.get(name, 0) for name in names) - total
    by_part = ", ".join(f"{part} {human_bytes(size)}" for part, size in absent.items() if size >= total / 100)
    details = [
        by_part if len(absent) > 1 else "",
        f"{human_bytes(here)} is on this machine already" if here > total / 100 else "",
    ]
    said = "; ".join(filter(None, details))
    return f"{human_bytes(total)} ({said})" if said else human_bytes(total)


def _fetch(remote: Remote, names: Sequence[str]) -> Path:
    patterns = [glob.escape(name) for name in dict.fromkeys(names)]
    api = hub.api()
    return Path(str(api.snapshot_download(remote.repo, revision=remote.revision, allow_patterns=patterns)))


def _absent_bytes(remote: Remote, name: str) -> int:
    """The bytes of a file that are not on this machine, for this commit or another of the repository."""
    home, size = hub.home_of(remote.repo), remote.num_bytes.get(name, 0)
    blob = remote.blobs.get(name)
    if (home / "snapshots" / remote.commit / name).is_file() or (blob and (home / "blobs" / blob).is_file()):
        return 0
    return size


def _check_room(remote: Remote, num_bytes: int) -> None:
    """Refuse a download for which the disk has no room, before it fills."""
    home = hub.home_of(remote.repo)
    parent = next(folder for folder in (home, *home.absolute().parents) if folder.exists())
    if (free := shutil.disk_usage(parent).free) < num_bytes:
        raise HubError(
            f"{remote.repo} needs {human_bytes(num_bytes)} more, and the disk of {home.parent} has {human_bytes(free)} "
            "free",
            "Free some space, or name a folder on another disk with HF_HOME",
        )

"""May a command write to the path that its user named? Every ``-o`` is checked here, before any work is done."""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Literal

from k5cache.shared import system
from k5cache.shared.errors import OutputError
from k5cache.shared.urls import is_url

Kind = Literal["cache", "run", "sweep", "merged checkpoint"]
"""What a command makes in a folder."""

MERGED: Kind = "merged checkpoint"
MERGED_FILE = "k5_merge.json"
"""In a merged checkpoint: of what it was made."""

HARMLESS = re.compile(
    r"\.DS_Store|\._.*|\.localized|desktop\.ini|[Tt]humbs\.db|\.directory|@eaDir"  # file managers and a NAS
    r"|\.git(keep|ignore|attributes)|\.keep|\.cache|\.huggingface"  # git, and downloads from the hub
    r"|lost\+found|\.Trash(es|-\d+)|\.fseventsd|\.Spotlight-V100|System Volume Information|\$RECYCLE\.BIN"  # a disk
)
"""Names that systems and tools leave in folders that their user calls empty. They stay."""

_SEALED_BEGINS = re.compile(rb'\{\n "sha256": "[0-9a-f]{64}"')  # FORMAT.md: readers rely on this beginning
_SHOWN = 3


def kind_of(folder: Path) -> Kind | None:
    """What of ours a folder is; None if it is nothing of ours, or there is none."""
    if not os.path.isdir(folder):  # noqa: PTH112 (False for a name that the system does not allow; Path raises an error)
        return None
    if (folder / "manifest.json").is_file():
        with (folder / "manifest.json").open("rb") as file:
            is_ours = bool(_SEALED_BEGINS.match(file.read(100)))
        # With a lock beside it, a manifest that begins otherwise is a damaged one, which its reader says better.
        return "cache" if is_ours or (folder / ".lock").is_file() else None
    if (folder / "run.json").is_file() and (folder / "recipe.toml").is_file():
        return "run"
    if (folder / MERGED_FILE).is_file():
        return MERGED
    return "sweep" if _is_sweep(folder) else None


def _is_sweep(folder: Path) -> bool:
    """Whether ``sweep.json`` there is that of a sweep. Other programs, too, have files of that name in a project.

    Earlier versions wrote a list. With a lock beside it, it is a damaged one.
    """
    path = folder / "sweep.json"
    if not path.is_file():
        return False
    with path.open("rb") as file:
        begins = file.read(100)
    return bool(_SEALED_BEGINS.match(begins)) or begins.lstrip()[:1] == b"[" or (folder / ".lock").is_file()


def check_folder(
    path: Path, kind: Kind, is_unfinished: Callable[[Path], bool] = lambda folder: False, reads: Iterable[Path] = ()
) -> None:
    """Refuse a folder in which a new cache, run or sweep would overwrite files or be mixed up with others.

    A folder that is there already as ``kind`` is not refused: whether it may go on is for its command to decide.
    Nothing is written. ``check_writable`` is the other half.

    Args:
        is_unfinished: whether a folder holds only what such a command leaves if it is killed before the folder counts
            as its ``kind``.
        reads: what the command reads. ``path`` may be none of these folders, and a new one may not be inside them.

    Raises:
        OutputError: says what is there instead.
    """
    real = _real_path(path)
    if real.exists() and not real.is_dir():
        raise OutputError(f"{path} cannot be written: it is a file", "Choose a folder with -o")
    is_there = kind_of(real) == kind
    for source in (source.resolve() for source in reads if source.is_dir()):
        if real == source or (source in real.parents and not is_there):
            where = "is the folder that" if real == source else f"is inside {source}, which"
            name = f"{source.name}-{kind.partition(' ')[0]}"
            example = shlex.join(["-o", str(source.with_name(name))])
            raise OutputError(
                f"{path} {where} this command reads, so it cannot be a new {kind}",
                f"Choose a folder outside it, for example {example}",
            )
    if is_there:
        return
    for parent in real.parents:
        parent_kind = kind_of(parent)
        if parent_kind and (kind, parent_kind) != ("run", "sweep"):
            raise OutputError(f"{path} is inside the {parent_kind} {parent}", "Choose a folder outside it with -o")
    if real.is_dir() and not is_unfinished(real):
        _check_contents(path, real, kind)


def _check_contents(path: Path, real: Path, kind: Kind) -> None:
    names = [
        entry.name + "/" * entry.is_dir() for entry in sorted(real.iterdir()) if not HARMLESS.fullmatch(entry.name)
    ]
    if not names:
        return
    its_kind = kind_of(real)
    if its_kind:
        raise OutputError(f"{path} is a {its_kind}, not a {kind}", "Choose another folder with -o")
    for inner in ("cache", "run", "sweep"):
        inside = [name for name in names if kind_of(real / name) == inner]
        if inside:
            example = shlex.join(["-o", str(path / "NAME")])
            raise OutputError(
                f"{path} is not a {kind}: it holds other {inner}s ({_some(inside)})",
                f"Choose a new or an empty folder, for example {example}",
            )
    raise OutputError(
        f"{path} is not empty and not a {kind}: it holds {_some(names)}", "Choose a new or an empty folder with -o"
    )


def check_file(path: Path, suffix: str = "") -> Path:
    """Refuse a file that cannot be written, or that would be mistaken for another format.

    A plain file that is there already is not refused: its user named it, so it is to be replaced.

    Args:
        suffix: such as ``.png``; empty if any name will do.

    Returns:
        where to write, with links followed.

    Raises:
        OutputError: says why, and what to name instead.
    """
    real = _real_path(path)
    if real.is_dir():
        example = shlex.join(["-o", str(path / f"NAME{suffix}")])
        raise OutputError(f"{path} cannot be written: it is a folder", f"Name a file in it: {example}")
    if suffix and path.suffix.lower() != suffix:
        example = shlex.join(["-o", str(path.with_suffix(suffix))])
        raise OutputError(f"{path} does not end in {suffix}, and that is what is written", f"Name it: {example}")
    if real.exists() and not real.is_file():
        raise OutputError(f"{path} cannot be written: it is not a plain file", "Choose another name with -o")
    check_writable(path)
    return real


def check_writable(path: Path) -> None:
    """Refuse a path that this user may not write, or create.

    Raises:
        OutputError: names the folder without permission, or on a read-only file system.
    """
    real = _real_path(path)
    there = next(part for part in (real, *real.parents) if part.exists())
    folders = {there} if there.is_dir() else {there, there.parent}
    for part in folders:
        if not os.access(part, os.W_OK | (os.X_OK if part.is_dir() else 0)):
            if system.is_read_only(part):
                raise OutputError(
                    f"{path} cannot be written: the file system of {part} is read-only", "Choose another place with -o"
                )
            raise OutputError(
                f"{path} cannot be written: there is no permission to write {'in ' if part.is_dir() else ''}{part}",
                "Choose another place with -o, or change the permissions",
            )


def _real_path(path: Path) -> Path:
    """``path`` with links followed.

    Raises:
        OutputError: it is a URL, a link in it leads nowhere, a folder in it is a file, or the system does not allow
            such a name.
    """
    if is_url(path):  # that of a cache is a folder of this machine by now (k5cache/remote/mirror.py)
        raise OutputError(
            f"{path} cannot be written: only a cache may be at a URL, and only where `--help` says so",
            "Name a file or folder of this machine",
        )
    try:
        for part in (path, *path.parents):
            if part.is_symlink() and not part.exists():
                raise OutputError(
                    f"{path} cannot be written: {part} is a link to {part.readlink()}, which does not exist",
                    "Make its target, remove the link, or choose another place with -o",
                )
        real = path.resolve()
        there = next(part for part in (real, *real.parents) if part.exists())
        if there != real and not there.is_dir():
            raise OutputError(f"{path} cannot be written: {there} is a file", "Choose another place with -o")
    except (
        OSError,
        RuntimeError,
    ) as error:  # a name that is too long, a folder that may not be read, a circle of links
        reason = getattr(error, "strerror", None) or "its links lead in a circle"
        raise OutputError(f"{path} cannot be written: {reason}", "Choose another place with -o") from None
    return real


def _some(names: list[str]) -> str:
    """The first few of ``names``, and how many more there are."""
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more

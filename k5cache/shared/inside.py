"""Does a link lead out of a folder that a command owns? Then nothing behind it is read, written or deleted.

The folder itself may be reached through a link, for caches and runs on another disk. Links that stay in it are
followed.
"""

from __future__ import annotations

import os
import re
import stat
import unicodedata
from collections.abc import Iterable
from pathlib import Path

from k5cache.shared.errors import OutputError

MOST_NAME_BYTES = 200  # file systems allow 255, and files in a run have longer names: NAME-best.safetensors
_MOST_CLEANED_BYTES = MOST_NAME_BYTES - 20  # what tells it apart from others, and an ending, come behind it
_NOT_IN_NAMES = re.compile(r'[\x00-\x1f\x7f/\\:*?"<>|]')
_RESERVED = re.compile(r"(con|prn|aux|nul|com[0-9]|lpt[0-9])(\..*)?", re.IGNORECASE | re.DOTALL)  # on Windows


def is_inside(root: Path, path: Path) -> bool:
    """Whether ``path`` is in ``root`` once all links are followed."""
    try:
        return path.resolve().is_relative_to(root.resolve())
    except (OSError, RuntimeError):  # its links lead in a circle
        return False


def check_inside(root: Path, names: Iterable[str] | None = None) -> None:
    """Refuse a folder in which a link leads out of it, or that holds a pipe or a device where files belong.

    A command calls it before it reads, writes or deletes anything in a folder that somebody else may have made.

    Args:
        names: what the command uses in ``root``. Nothing in a folder of this name is looked at. None: everything at any
            depth.

    Raises:
        OutputError: names the link and where it leads.
    """
    if names is None:
        _check_below(root, root)
        return
    for name in names:
        if os.path.lexists(root / name):
            _check_one(root, root / name)


def _check_below(root: Path, folder: Path) -> None:
    if not os.path.isdir(folder):  # noqa: PTH112 (False for a name that the system does not allow; Path raises an error)
        return
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.is_dir(follow_symlinks=False):
                _check_below(root, Path(entry.path))
            elif entry.is_symlink() or not entry.is_file(follow_symlinks=False):
                _check_one(root, Path(entry.path))


def _check_one(root: Path, path: Path) -> None:
    mode = path.lstat().st_mode
    if stat.S_ISLNK(mode) and not is_inside(root, path):
        raise OutputError(
            f"{path} is a link to {path.readlink()}, which is outside {root}",
            "Remove the link, and copy what it leads to if it is needed; the folder itself may be a link",
        )
    if not (stat.S_ISLNK(mode) or stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
        raise OutputError(f"{path} is neither a file nor a folder", "Remove it")


def name_problem(name: str) -> str | None:
    """Why ``name`` cannot be the name of one new folder, here and on other systems; None if it can."""
    if not name.strip():
        return "is empty"
    if any(ord(character) < 32 or ord(character) == 127 for character in name):
        return f"holds a control character, found {name[:80]!r}"
    if _NOT_IN_NAMES.search(name):
        return f'must be the name of one folder, without / \\ : * ? " < > |, found {name[:80]!r}'
    if name[0] in ". " or name[-1] in ". ":
        return f"must not begin or end with a dot or a space, found {name[:80]!r}"
    if _RESERVED.fullmatch(name):
        return f"is a name that Windows keeps for devices, found {name[:80]!r}"
    try:
        num_bytes = len(name.encode())
    except UnicodeEncodeError:
        return f"is not valid text, found {name[:80]!r}"
    return f"has {num_bytes} bytes, at most {MOST_NAME_BYTES} are allowed" if num_bytes > MOST_NAME_BYTES else None


def as_file_names(names: Iterable[str]) -> list[str]:
    """Names that are file names on every system, each another one than those before it, also without capitals.

    What cannot be in one is replaced, and a name that is there already gets a number.
    """
    taken: set[str] = set()
    cleaned = []
    for name in names:
        base, number = _cleaned(name), 2
        candidate = base
        while candidate.casefold() in taken:
            candidate, number = f"{base}-{number}", number + 1
        taken.add(candidate.casefold())
        cleaned.append(candidate)
    return cleaned


def _cleaned(name: str) -> str:
    text = unicodedata.normalize("NFC", name.encode(errors="replace").decode())
    text = _NOT_IN_NAMES.sub("_", text).strip(". ")
    text = text.encode()[:_MOST_CLEANED_BYTES].decode(errors="ignore").strip(". ") or "_"
    return f"_{text}" if _RESERVED.fullmatch(text) else text

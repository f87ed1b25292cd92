"""Where are files that can always be made again, and may they be trusted? Under ``K5_HOME``, or in ``~/.cache/k5``.

Weights and compiled code are used from there without asking anyone. So nothing is that another user could have put
there: a folder may be shared, but then root or this user must own what is in it.
"""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path

from k5cache.shared import system
from k5cache.shared.errors import OutputError, RunError


def k5_home() -> Path:
    """The folder of int8 bases and compiled code: ``$K5_HOME``, by default ``~/.cache/k5``."""
    return Path(os.environ.get("K5_HOME") or Path("~/.cache/k5").expanduser())


def make_home(name: str, mode: int = 0o755) -> Path:
    """Make the folder ``name`` in ``K5_HOME``, if it is not there, and check that both can be trusted.

    Args:
        mode: of the folder, whatever the umask is. A file that others may write in a folder that they may not enter is
            safe, so 0o700 is for what a library writes.

    Raises:
        RunError: as ``check_trusted``.
        OutputError: it cannot be written.
    """
    home = k5_home()
    folder = home / name
    try:
        home.parent.mkdir(parents=True, exist_ok=True)
        for made in (home, folder):
            made.mkdir(mode=0o755, exist_ok=True)
            check_trusted(made)
    except PermissionError:
        raise _not_writable(folder) from None
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EIO):
            raise
        raise OutputError(
            f"{folder} cannot be made: {error.strerror}", "Set K5_HOME to a folder that can be written"
        ) from None
    if not os.access(folder, os.W_OK | os.X_OK):
        raise _not_writable(folder)
    info = folder.stat()
    if stat.S_IMODE(info.st_mode) & ~mode & 0o777 and info.st_uid == system.user_id():
        for path in folder.rglob("*") if mode == 0o700 else ():  # others could have written these until now
            check_trusted(path)
        folder.chmod(mode)
    return folder


def _not_writable(folder: Path) -> OutputError:
    return OutputError(
        f"{folder} cannot be written: there is no permission", "Set K5_HOME to a folder that can be written"
    )


def check_trusted(path: Path) -> None:
    """Refuse a file or folder that another user could have written.

    On Windows this is not known, and nothing is refused: a folder of a user's profile is closed to others there.

    Raises:
        RunError: another user owns it, or others may write it; says which.
    """
    info, user = path.stat(), system.user_id()
    if user is None:
        return
    if info.st_uid not in (0, user):
        raise RunError(
            f"{path} belongs to {system.user_name(info.st_uid)}, and what lies there is used without a further check",
            "Set K5_HOME to a folder of your own",
        )
    who = "every user" if info.st_mode & stat.S_IWOTH else "its group" if info.st_mode & stat.S_IWGRP else ""
    is_sticky = stat.S_ISDIR(info.st_mode) and info.st_mode & stat.S_ISVTX  # nobody can replace what others own
    if who == "its group" and system.is_private_group(info.st_gid):
        who = ""
    if who and not is_sticky:
        raise RunError(
            f"{path} can be written by {who}, and what lies there is used without a further check",
            f"Set K5_HOME to a folder of your own, or, if nobody has changed it: chmod -R go-w {k5_home()}",
        )

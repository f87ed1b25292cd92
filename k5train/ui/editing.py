"""How do two pages, in two tabs or two servers, not write over each other's edits? One writes at a time."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from k5cache.shared.errors import OutputError
from k5cache.shared.lock import Locked, lock_file
from k5train.ui.project import Project

LOCK = "edits.lock"
_SECONDS = 10.0


@contextmanager
def one_at_a_time(project: Project) -> Iterator[None]:
    """Read a file of the project, compare it with what was shown, and write it: nobody else does until the end.

    Raises:
        OutputError: the page's own folder cannot be written, or another process does not come to an end.
    """
    path = project.own / LOCK
    with ExitStack() as stack:
        try:
            project.make_own()
            stack.enter_context(lock_file(path, _SECONDS))
        except Locked as error:
            raise OutputError(
                f"Nothing was saved: {error.owner} is saving", "Try again; if that process hangs, end it"
            ) from None
        except OSError as error:
            raise OutputError(
                f"Nothing was saved: {project.relative(path)} cannot be written: {error.strerror}",
                "Free some space, or change the permissions",
            ) from None
        yield

"""Which folder is the page over? Nothing outside it is read or written, through links either."""

from __future__ import annotations

import os
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from k5cache.shared.errors import OutputError
from k5cache.shared.files import make_folder
from k5cache.shared.inside import is_inside


@dataclass(frozen=True)
class Project:
    """A folder with ``datasets/``, ``cache/``, ``runs/``, ``sweeps/`` and recipes."""

    root: Path
    """Without links, absolute."""
    model: str | None = None
    """Which model new runs and encodes are for, as given with ``--model``. None: what the recipe says."""

    @property
    def own(self) -> Path:
        """The folder of the page itself: its queue, and thumbnails that may be deleted."""
        return self.root / ".k5"

    def make_own(self) -> Path:
        """The same, made if it is not there. git ignores what is in it.

        Raises:
            OutputError: it is a link that leads out of the project.
        """
        own = self.inside(self.own)
        make_folder(own)
        ignore = own / ".gitignore"
        if not os.path.lexists(ignore):
            with suppress(FileExistsError), ignore.open("x", encoding="utf-8") as file:
                file.write("*\n")
        return own

    @property
    def name(self) -> str:
        """What the project is called: as its folder."""
        return self.root.name or str(self.root)

    @property
    def is_writable(self) -> bool:
        """Whether this process may make files in it."""
        return os.access(self.root, os.W_OK | os.X_OK)

    def inside(self, path: Path) -> Path:
        """``path`` without links, relative ones taken from the project.

        Raises:
            OutputError: it leads out of the project.
        """
        path = self.root / path
        if not is_inside(self.root, path):
            raise OutputError(
                f"{path} leads out of {self.root}",
                "Copy it into the project, or start k5train ui with another --folder",
            )
        return path.resolve()

    def relative(self, path: Path) -> str:
        """The way to ``path`` from the project, with ``/``. Links are not followed: a run keeps its name."""
        return path.relative_to(self.root).as_posix()


def open_project(folder: Path, model: str | None = None) -> Project:
    """The project in a folder.

    Raises:
        OutputError: there is no such folder, or it cannot be read.
    """
    if not os.path.isdir(folder):  # noqa: PTH112 (False for a name that the system does not allow; Path raises an error)
        raise OutputError(f"There is no folder {folder}", "Give the folder that has datasets/, cache/ and runs/")
    root = folder.resolve()
    if not os.access(root, os.R_OK | os.X_OK):
        raise OutputError(f"There is no permission to read {folder}", "Change its permissions, or give another folder")
    if model is not None and os.path.isdir(model):  # noqa: PTH112
        model = str(Path(model).absolute())  # jobs run in the project, wherever the page was started
    return Project(root, model)

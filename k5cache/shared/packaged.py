"""Which recipes come with the program, and which file does a name such as ``--recipe style-16gb`` mean?"""

from __future__ import annotations

import difflib
import os
from pathlib import Path

from k5cache.shared.errors import RecipeError
from k5cache.shared.foreign import shown

LISTS = ("which-rate",)
"""Not recipes, but what ``k5train sweep --list`` takes."""
_HERE = Path(__file__).parent


def folder() -> Path:
    """Where the files are: a wheel has them beside this file, a checkout in ``pipelines/``."""
    installed = _HERE / "recipes"
    return installed if installed.is_dir() else _HERE.parent.parent / "pipelines"


def names() -> tuple[str, ...]:
    """The names of all of them, lists too."""
    return tuple(sorted(path.stem for path in folder().glob("*.toml")))


def path(name: str) -> Path:
    """The file of a packaged recipe.

    Raises:
        RecipeError: there is none of that name.
    """
    if name not in names():
        raise RecipeError(f"There is no recipe {shown(name)}", advice(Path(name)))
    return folder() / f"{name}.toml"


def text(name: str) -> str:
    """A packaged recipe, as it is in its file.

    Raises:
        RecipeError: there is none of that name.
    """
    return path(name).read_text(encoding="utf-8")


def located(given: Path) -> tuple[Path, str]:
    """The file that ``--recipe`` or ``--list`` means, and what is to be said of it; usually nothing.

    A file of that name wins over a packaged recipe.
    """
    name = str(given)
    if name not in names():
        return given, ""
    if os.path.isfile(given):  # noqa: PTH113 (False for a name that the system does not allow)
        return given, f"Using the file {name}, not the packaged recipe of that name"
    own = Path(f"{name}.toml")
    said = (
        f"Using the packaged recipe {name}, not the file {own}: give its whole name for that" if own.is_file() else ""
    )
    return folder() / f"{name}.toml", said


def advice(given: Path, option: str = "--recipe") -> str:
    """What to do about a recipe that is not there, or a list with ``option`` ``--list``."""
    known = tuple(name for name in names() if (name in LISTS) == (option == "--list"))
    if given.stem.replace("_", "-") in known:
        return f"There is a packaged one of that name: {option} {given.stem.replace('_', '-')}"
    near = difflib.get_close_matches(given.stem.replace("_", "-").lower(), known, n=3, cutoff=0.5)
    meant = f" (such as {', '.join(near)})" if near else ""
    return f"Give the path of a .toml file, or a name that `k5train recipes` lists{meant}"

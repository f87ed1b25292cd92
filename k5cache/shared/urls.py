"""What is the URL of an object store, and how is one shown? Commands take paths, so ``s3://b/c`` arrives as a path.

A cache at a URL is worked on in a folder of this machine (``k5cache/remote/mirror.py``). Messages name the URL.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

SCHEMES = ("s3", "gs", "hf", "memory")
"""What is supported. ``memory`` lives only as long as the process: tests use it."""
_URL = re.compile(r"([a-zA-Z][a-zA-Z0-9+.-]+):/+(.*)", re.DOTALL)  # one letter is a drive of Windows
_COLLAPSED = re.compile(rf"\b({'|'.join(SCHEMES)}):/(?=[^/\s])")  # as a path has it
_FOLDERS: dict[str, str] = {}


def is_url(path: str | Path) -> bool:
    """Whether a path that a user gave is a URL, of whatever kind."""
    return bool(_URL.fullmatch(path if isinstance(path, str) else path.as_posix()))


def url_of(path: str | Path) -> str:
    """The URL that a path stands for, without a slash at its end: ``s3:/b/c`` is ``s3://b/c``."""
    match = _URL.fullmatch(path if isinstance(path, str) else path.as_posix())
    assert match, f"{path} is no URL"
    return f"{match[1].lower()}://{match[2].rstrip('/')}"


def stands_for(folder: Path, url: str) -> None:
    """From now on, messages name ``url`` where they would name the folder of this machine with its copies."""
    _FOLDERS[str(folder)] = url


def copy_of(path: str) -> tuple[str, str] | None:
    """The URL whose copies lie in a folder of this machine that has ``path``, and where all copies lie."""
    for folder, url in _FOLDERS.items():
        if path == folder or path.startswith(folder + os.sep):
            return url, str(Path(folder).parent.parent)
    return None


def with_urls(text: str) -> str:
    """A message with URLs as a person writes them."""
    if ":/" in text:
        text = _COLLAPSED.sub(r"\1://", text)
    for folder, url in _FOLDERS.items():
        text = text.replace(folder, url)
    return text

"""What are the captions in a file beside an image? Text or JSON, and never a private file that a link leads to."""

from __future__ import annotations

import codecs
import json
import os
from pathlib import Path

from k5cache.options import CacheConfig
from k5cache.shared.inside import is_inside
from k5cache.shared.plain import MOST_TEXT_BYTES, UnfitFile, read_plain
from k5cache.sources.captions import Captions, from_json, from_text
from k5cache.sources.items import printable

SUFFIXES = (".txt", ".caption", ".json")
"""Of caption files without ``cache.caption_extension``, the first that there is."""
OTHER_SUFFIXES = frozenset({".txt", ".caption", ".cap", ".tags"})
"""Of caption files that people have; those that are not read are named."""


class _Unfit(Exception):
    """Why a caption file is not text."""


def read_captions(source: Path, file: str, picture: str, config: CacheConfig) -> Captions | OSError:
    """The captions in a file beside a picture, but not through a link to some other file of this machine.

    A stranger's ``cat.txt`` could be a link to a private file, whose lines would become captions. A link is followed
    within the folder (or the hub's snapshot), and to the caption of the picture that the image itself is a link to.
    """
    name = printable(os.path.basename(file))  # noqa: PTH119 (pathlib takes long for 10,000 files)
    if os.path.islink(file):  # noqa: PTH114
        path, target = Path(file), Path(file).resolve()
        own = Path(picture).resolve().with_suffix(path.suffix)
        if target != own and not is_inside(_reach_of(source), target) and target.exists():
            return f"caption {name} is a link that leads out of the folder: copy the file instead"
    try:
        text = _read(file)
    except _Unfit as error:
        return f"caption {name} {error}"
    except OSError as error:
        return error
    if not name.lower().endswith(".json"):
        return from_text(text, config.caption_lines)
    try:
        captions = from_json(json.loads(text), config.caption_column)
    except (ValueError, RecursionError):  # also a number of more than 4,300 digits
        return f"caption {name} is not JSON"
    return f"caption {name} {captions}" if isinstance(captions, str) and captions.startswith("has ") else captions


def _reach_of(source: Path) -> Path:
    """The folder in which links are followed: ``source``, or the repository that it is a snapshot of in hub's cache."""
    source = source.resolve()
    snapshots = next((parent for parent in source.parents if parent.name == "snapshots"), None)
    return snapshots.parent if snapshots and (snapshots.parent / "blobs").is_dir() else source


def _read(file: str) -> str:
    """The text of a file. Raises ``_Unfit``, ``OSError``."""
    try:
        # An encode with nothing to do reads 10,000 of them: pathlib, a buffer or a BOM codec would double its time.
        data = read_plain(file, MOST_TEXT_BYTES)
    except UnfitFile as error:
        raise _Unfit(f"cannot be read: {error.strerror}") from None
    if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):  # also how UTF-32 begins
        raise _Unfit("is UTF-16, not UTF-8: save it as UTF-8")
    data = data.removeprefix(codecs.BOM_UTF8)
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise _Unfit(f"is not UTF-8 (byte 0x{data[error.start]:02x} in line {line}): save it as UTF-8") from None
    if "\0" in text:  # UTF-16 without a byte order mark decodes like this
        raise _Unfit("is not UTF-8 but perhaps UTF-16: save it as UTF-8")
    return text

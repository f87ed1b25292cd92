"""How do pictures come in? Each is looked at as an encode would, gets a clean and free name, and appears whole."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from k5cache.shared.errors import OutputError
from k5cache.shared.files import make_folder, sync_folder
from k5cache.shared.inside import as_file_names, name_problem
from k5cache.shared.plain import MOST_TEXT_BYTES
from k5cache.shared.units import human_bytes
from k5cache.sources import decode, images
from k5cache.sources.caption_files import SUFFIXES
from k5cache.sources.items import IMAGE_SUFFIXES, NAMED_SUFFIXES, UnreadableImage
from k5train.ui.data import limits
from k5train.ui.listing import Entry, folders
from k5train.ui.project import Project

_PART = 1 << 20
_CAPTIONS = {suffix for suffix in SUFFIXES if suffix != ".json"} | {".json"}
_SOURCE_OR_MASK = re.compile(r"\.(mask|source)$", re.IGNORECASE)


@dataclass(frozen=True)
class Sent:
    """One file that a browser sent."""

    name: str
    """As the browser says: anything."""
    file: BinaryIO


@dataclass(frozen=True)
class Received:
    """What became of one file."""

    name: str
    """Its name in the folder; if it was refused, what it was called."""
    problem: str = ""
    """Why it was refused."""
    renamed_from: str = ""


def new_folder(project: Project, name: str) -> Entry:
    """Make ``datasets/NAME``.

    Raises:
        OutputError: the name cannot be one, or is taken, or there is no permission.
    """
    name = name.strip()
    if problem := name_problem(name):
        raise OutputError(f"The name of the folder {problem}", "Choose a name of letters, digits, - and _")
    path = project.root / "datasets" / name
    project.inside(path)
    if os.path.lexists(path):
        raise OutputError(f"There is a folder datasets/{name} already", "Choose another name, or drop pictures there")
    make_folder(path)
    return next(folder for folder in folders(project) if folder.path == path)


def receive(project: Project, folder: Entry, sent: Iterable[Sent]) -> list[Received]:
    """Put files into a folder. None is overwritten, and each appears whole or not at all.

    A caption file keeps the name of the picture that it came with, also if that got another one.
    """
    root = project.inside(folder.path)
    files = [(sent_file, *_cleaned(sent_file.name)) for sent_file in sent]
    stems = _free_stems(root, [(stem, suffix) for _, stem, suffix in files])
    received = []
    for (sent_file, stem, suffix), free in zip(files, stems, strict=True):
        asked = f"{stem}{suffix}"
        name = f"{free}{suffix}"
        problem = _put(root, name, suffix.lower(), sent_file)
        received.append(Received(asked if problem else name, problem, asked if name != asked and not problem else ""))
    return received


def _cleaned(name: str) -> tuple[str, str]:
    """Stem and suffix of a name without folders, control characters, leading dots and what Windows refuses."""
    base = name.replace("\\", "/").rpartition("/")[2]
    (base,) = as_file_names(["".join(letter for letter in base if letter.isprintable())])
    stem, dot, suffix = base.rpartition(".")
    if not dot or not stem.strip(". "):
        return base.strip(". ") or "_", ""
    return stem.strip().lstrip(".") or "_", f".{suffix}"


def _free_stems(root: Path, names: list[tuple[str, str]]) -> list[str]:
    """For each stem one that is free in the folder. A picture and its caption, which share a stem, go on sharing it."""
    taken = {entry.name.casefold() for entry in os.scandir(root)}
    of_stem: dict[str, list[str]] = {}
    for stem, suffix in names:
        of_stem.setdefault(_main(stem).casefold(), []).append(f"{stem}{suffix}".casefold())
    stems = {name.rpartition(".")[0] or name for name in taken}
    chosen: dict[str, str] = {}
    for key, wanted in of_stem.items():
        number, ending = 1, ""
        while _clashes(key, ending, wanted, taken, stems):
            number += 1
            ending = f"-{number}"
        chosen[key] = ending
        taken |= {_numbered(name, key, ending) for name in wanted}
    return [_with_ending(stem, chosen[_main(stem).casefold()]) for stem, _ in names]


def _clashes(key: str, ending: str, wanted: list[str], taken: set[str], stems: set[str]) -> bool:
    """Whether a file is there already; or, for a new picture, a caption of its stem that would become its own."""
    here = {_numbered(name, key, ending) for name in wanted}
    has_picture = any(f".{name.rpartition('.')[2]}" in IMAGE_SUFFIXES for name in wanted)
    is_beside = has_picture and any(f"{key}{ending}{suffix}" in taken for suffix in _CAPTIONS) and len(wanted) > 1
    return bool(here & taken) or is_beside


def _numbered(name: str, key: str, ending: str) -> str:
    return f"{key}{ending}{name[len(key) :]}"


def _main(stem: str) -> str:
    """``cat`` for ``cat.mask`` and ``cat.source``, which belong to ``cat``."""
    return _SOURCE_OR_MASK.sub("", stem)


def _with_ending(stem: str, ending: str) -> str:
    main = _main(stem)
    return f"{main}{ending}{stem[len(main) :]}"


def _put(root: Path, name: str, suffix: str, sent: Sent) -> str:
    """Write one file; returns why it is refused."""
    if suffix not in IMAGE_SUFFIXES and suffix not in _CAPTIONS:
        return NAMED_SUFFIXES.get(suffix, "is neither a picture nor a caption (.txt)")
    most = MOST_TEXT_BYTES if suffix in _CAPTIONS else limits.MOST_BYTES_A_FILE
    temporary = root / f".tmp-{os.getpid()}-{os.urandom(6).hex()}"
    try:
        if not _copied(sent.file, temporary, most):
            return f"has more than {human_bytes(most)}"
        if problem := _problem_of_text(temporary) if suffix in _CAPTIONS else _problem_of_picture(temporary):
            return problem
        return _named(temporary, root / name)
    except OSError as error:
        return f"cannot be written: {error.strerror}"
    finally:
        temporary.unlink(missing_ok=True)


def _copied(file: BinaryIO, path: Path, most: int) -> bool:
    """Copy what was sent, and make it durable; False if it is larger."""
    with path.open("xb") as out:
        while part := file.read(_PART):
            if out.tell() + len(part) > most:
                return False
            out.write(part)
        out.flush()
        os.fsync(out.fileno())
    return True


def _named(temporary: Path, path: Path) -> str:
    """Give a file its name without overwriting; returns why that cannot be."""
    try:
        os.link(temporary, path)
    except FileExistsError:
        return "came in twice at the same time: send it again"
    except OSError:  # a file system without hard links
        if os.path.lexists(path):
            return "came in twice at the same time: send it again"
        temporary.replace(path)
    sync_folder(path.parent)
    return ""


def _problem_of_picture(path: Path) -> str:
    """Why a file is no picture that an encode takes; it is decoded whole."""
    try:
        width, height = images.image_size(path)
        if width * height > limits.MOST_PIXELS:
            most = f"at most {limits.MOST_PIXELS:,} are taken here"
            return f"has {width}x{height} pixels, and {most}: copy it into the folder"
        with decode.open_image(path) as image:
            decode.load(path, image)
    except UnreadableImage as error:
        return error.reason
    return ""


def _problem_of_text(path: Path) -> str:
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError:
        return "is not UTF-8: save it as UTF-8"
    return "is not text" if "\0" in text else "is empty" if not text.strip() else ""

"""Are a run's pictures of a step still those that it drew? ``drawn.json`` beside them has their checksums."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from k5cache.shared import console
from k5cache.shared.files import make_folder, write_whole
from k5cache.shared.inside import as_file_names
from k5cache.shared.plain import read_plain
from k5cache.shared.sealed import Digest, unseal_if_sealed, write_sealed

if TYPE_CHECKING:
    from PIL import Image

FILE = "drawn.json"
FORMATS = ("PNG",)
"""What a run writes. Other files are not tried: for some, Pillow runs another program."""
NAMES = "names"  # its key for what the pictures are called, by which they are neither the same nor others
UNSEALED = (
    "prompts", "negative_prompt", "width", "height", "num_inference_steps", "guidance_scale", "seed",
)  # fmt: skip
"""All that earlier versions wrote into it, without a checksum."""


def save_pictures(folder: Path, pictures: Sequence[Image.Image], drawn: Mapping[str, Any]) -> None:
    """Write pictures as ``00.png``, ``01.png`` ..., or under their names, and then what they show.

    Args:
        drawn: what was drawn, and how, as JSON.
    """
    make_folder(folder)
    files = {}
    for path, picture in zip(_paths(folder, len(pictures), drawn.get(NAMES)), pictures, strict=True):
        write_whole(path, partial(picture.save, format="PNG"))
        files[path.name] = asdict(Digest.of(path))
    write_sealed(folder / FILE, {**drawn, "files": files})


def read_pictures(folder: Path, drawn: Mapping[str, Any] | None = None) -> list[Image.Image] | None:
    """The pictures of a folder. None if others were drawn there or none, or, after a warning, if a file has changed.

    Args:
        drawn: as it was given to ``save_pictures``. None: any.
    """
    try:
        document = unseal_if_sealed(read_plain(folder / FILE), UNSEALED)
        digests = {name: Digest.read(value) for name, value in document.pop("files", {}).items()}
        paths = _paths(folder, len(document["prompts"]), document.pop(NAMES, None))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (ValueError, KeyError, TypeError, AttributeError):
        _warn(folder / FILE)
        return None
    if drawn is not None and document != {key: value for key, value in drawn.items() if key != NAMES}:
        return None
    pictures = [_read(path, digests.get(path.name)) for path in paths]
    whole = [picture for picture in pictures if picture is not None]
    return whole if len(whole) == len(pictures) else None


def picture_files(folder: Path) -> list[tuple[Path, str]]:
    """The files of a folder's pictures, each with its prompt. Empty if there are none, or if one has changed."""
    if read_pictures(folder) is None:
        return []
    document = unseal_if_sealed(read_plain(folder / FILE), UNSEALED)
    prompts = [str(prompt) for prompt in document["prompts"]]
    return list(zip(_paths(folder, len(prompts), document.get(NAMES)), prompts, strict=True))


def files_of(folder: Path) -> list[Path]:
    """The files of a folder's pictures, by its prompts, of which any may be missing by now. Nothing is decoded.

    Empty if there are none, or if it cannot be read what they show.
    """
    document = read_drawn(folder)
    try:
        return _paths(folder, len(document["prompts"]), document.get(NAMES)) if document else []
    except (ValueError, TypeError):
        return []


def read_drawn(folder: Path) -> dict[str, Any] | None:
    """What the pictures of a folder show and how they were drawn, as ``save_pictures`` was given it.

    None if it has none, or that cannot be read. The pictures are not looked at.
    """
    try:
        document = unseal_if_sealed(read_plain(folder / FILE), UNSEALED)
    except (OSError, ValueError):
        return None
    document.pop("files", None)
    prompts = document.get("prompts")
    is_whole = isinstance(prompts, list) and prompts and all(isinstance(prompt, str) for prompt in prompts)
    return document if is_whole else None


def read_labels(folder: Path) -> list[str]:
    """What heads the columns of the pictures of a folder. Empty if that cannot be read."""
    try:
        document = unseal_if_sealed((folder / FILE).read_bytes(), UNSEALED)
        labels = [str(label) for label in document["prompts"]]
        names = _names(document.get(NAMES), len(labels))
        return [f"{name}\n{label}" if name else label for name, label in zip(names, labels, strict=True)]
    except (FileNotFoundError, NotADirectoryError, ValueError, KeyError, TypeError):
        return []


def _read(path: Path, digest: Digest | None) -> Image.Image | None:
    from PIL import Image  # not before a picture is read: pages ask what a folder has

    if path.is_file() and digest in (None, Digest.of(path)):
        try:
            return Image.open(path, formats=FORMATS).convert("RGB")
        except (
            OSError,
            SyntaxError,
            ValueError,
            Image.DecompressionBombError,
        ) as error:  # as Pillow refuses a picture of a version without digests
            if getattr(error, "errno", None) is not None:
                raise
    _warn(path)
    return None


def _paths(folder: Path, count: int, names: Any) -> list[Path]:
    """The files of some pictures.

    Raises:
        ValueError: there is another number of names.
    """
    stems = as_file_names(name or f"{i:02d}" for i, name in enumerate(_names(names, count)))
    return [folder / f"{stem}.png" for stem in stems]


def _names(names: Any, count: int) -> list[str]:
    if names is None:
        return [""] * count
    if len(names) != count:
        raise ValueError(f"{len(names)} names for {count} pictures")
    return [str(name) for name in names]


def _warn(path: Path) -> None:
    console.warn(f"{path} is not what the run drew: the pictures of its step are left out of the grid")

"""How is a caption edited? Its side file is written again, whole, unless it has changed since it was shown."""

from __future__ import annotations

import codecs
import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from k5cache.shared.errors import K5Error, OutputError
from k5cache.shared.files import new_file
from k5cache.shared.inside import is_inside
from k5cache.shared.plain import MOST_TEXT_BYTES, UnfitFile, read_plain
from k5cache.sources.captions import JSON_FIELDS, from_json, from_text
from k5cache.sources.folder import ImageEntry
from k5train.ui.data.folder_view import OUTSIDE, Listing
from k5train.ui.editing import one_at_a_time

_ELSEWHERE = {
    "filename": "Captions are made of the names of the files: rename the picture to change its caption",
    "instanceprompt": "All pictures have one caption, which is an option of the encode",
    "metadata": "Captions are in a metadata file (metadata.jsonl, .csv or .parquet): edit that file",
}


class NotSaved(K5Error):
    """What was typed is not written. The page shows it again."""


@dataclass(frozen=True)
class Editor:
    """The side file of a picture, to be edited."""

    name: str
    """Of the file, as a person sees it."""
    text: str = ""
    """What is in it; of a JSON file the captions, one a line."""
    digest: str = ""
    """Of the file's bytes; empty if there is none yet."""
    read_only: str = ""
    """Why it cannot be edited."""
    hint: str = ""


def editor_of(listing: Listing, image: ImageEntry) -> Editor:
    """The editor of a picture's captions, as its file is now."""
    if reason := _ELSEWHERE.get(listing.config.caption_strategy):
        return Editor("", read_only=reason)
    path = path_of(listing, image)
    name = path.name
    if not is_inside(listing.project.root, path):
        return Editor(name, read_only=f"{name} {OUTSIDE}")
    read_only = _not_writable(path)
    try:
        data = read_plain(path, MOST_TEXT_BYTES)
        text = shown_text(path, data, listing.config.caption_column)
    except FileNotFoundError:
        return Editor(name, read_only=read_only, hint="There is no such file yet: saving makes it.")
    except UnfitFile as error:
        return Editor(name, read_only=f"{name} cannot be read: {error.strerror}")
    except (OSError, ValueError) as error:
        return Editor(name, read_only=f"{name} cannot be edited here: {error}")
    return Editor(name, text, digest_of(data), read_only, _hint(listing))


def _hint(listing: Listing) -> str:
    return {
        "each": "Each line is a caption of its own, and each step of training draws one.",
        "whole": "The whole file is one caption.",
        "first": "Only the first line is used.",
    }[listing.config.caption_lines]


def path_of(listing: Listing, image: ImageEntry) -> Path:
    """The side file that an encode reads, or would read if it were there. Links are followed."""
    suffix = (listing.config.caption_suffixes or (".txt",))[0]
    path = Path(image.text) if image.text else Path(image.entry.path).with_suffix(suffix)
    return path.resolve() if path.is_symlink() else path


def digest_of(data: bytes) -> str:
    """What tells whether a file is still the one that was shown."""
    return hashlib.sha256(data).hexdigest()[:24]


def save(listing: Listing, image: ImageEntry, typed: str, digest: str) -> Path:
    """Write what was typed, whole or not at all.

    Args:
        typed: with ``\\n`` between its lines.
        digest: of the file as it was when the form was made; empty if there was none.

    Returns:
        the file.

    Raises:
        NotSaved: the file has changed meanwhile, cannot be edited, or what was typed is no caption.
    """
    if reason := _ELSEWHERE.get(listing.config.caption_strategy):
        raise NotSaved("Captions of this folder are not in files beside the pictures", reason)
    path = path_of(listing, image)
    if not is_inside(listing.project.root, path):
        raise NotSaved(f"{path.name} {OUTSIDE}", "Copy the file into the folder")
    try:
        with one_at_a_time(listing.project):
            _save(listing, path, typed, digest)
    except OutputError as error:
        raise NotSaved(error.problem, error.fix) from None
    return path


def _save(listing: Listing, path: Path, typed: str, digest: str) -> None:
    before = _read(path)
    if (digest_of(before) if before is not None else "") != digest:
        raise NotSaved(
            f"{path.name} has changed since this page showed it, so it was not written",
            "What you typed is still in the form. What the file has now is below it: copy what you need, and save",
        )
    data = written(path, before, typed, listing.config.caption_column, listing.config.caption_lines)
    try:
        if before is None:
            _write_new(path, data)
        else:
            with new_file(path) as file:
                file.write(data)
    except OSError as error:
        raise NotSaved(
            f"{path.name} cannot be written: {error.strerror}", "Free some space, or change the permissions"
        ) from None


def _read(path: Path) -> bytes | None:
    try:
        return read_plain(path, MOST_TEXT_BYTES)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise NotSaved(f"{path.name} cannot be read: {error.strerror}", "See what became of the file") from None


def _write_new(path: Path, data: bytes) -> None:
    """A file that is not there yet. One that appears meanwhile stays, and ``FileExistsError`` is raised."""
    temporary = path.with_name(f".tmp-{os.getpid()}-{os.urandom(6).hex()}")
    try:
        temporary.write_bytes(data)
        os.link(temporary, path)
    except FileExistsError:
        raise
    except OSError:  # a file system without hard links
        if path.exists():
            raise
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def shown_text(path: Path, data: bytes, column: str | None) -> str:
    """What stands in the form. Raises ``ValueError``: it is not text, or JSON of another form."""
    if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise ValueError("it is UTF-16: save it as UTF-8")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise ValueError("it is not UTF-8: save it as UTF-8") from None
    if "\0" in text:
        raise ValueError("it is not text")
    if path.suffix.lower() == ".json":
        values = _values(_place(_json(text), column))
        return "\n".join(values)
    return text.replace("\r\n", "\n").replace("\r", "\n")


def written(path: Path, before: bytes | None, typed: str, column: str | None, lines: Any) -> bytes:
    """The bytes of the file with what was typed: its line ends, its mark of UTF-8 and its other fields stay.

    Raises:
        NotSaved: that is no caption.
    """
    fix = "Write a caption. To leave the picture out, move it to another folder"
    if "\0" in typed:
        raise NotSaved("A caption cannot hold a null character", fix)
    try:
        typed.encode()
    except UnicodeEncodeError:
        raise NotSaved("A caption cannot hold half a character", fix) from None
    if path.suffix.lower() == ".json":
        return _written_json(before, typed, column, fix)
    if isinstance(from_text(typed, lines), str):
        raise NotSaved("The caption is empty", fix)
    data = before or b""
    text = typed.replace("\n", "\r\n") if b"\r\n" in data else typed
    mark = codecs.BOM_UTF8 if data.startswith(codecs.BOM_UTF8) else b""
    return mark + text.encode()


def _written_json(before: bytes | None, typed: str, column: str | None, fix: str) -> bytes:
    texts = [line for line in typed.split("\n") if line.strip()]
    if not texts:
        raise NotSaved("The caption is empty", fix)
    now: Any = texts[0] if len(texts) == 1 else texts
    if before is None:
        field = (column or JSON_FIELDS[0]).split(".")
        for name in reversed(field):
            now = {name: now}
        return (json.dumps(now, ensure_ascii=False, indent=2) + "\n").encode()
    text = before.decode("utf-8-sig")
    document = _json(text)
    place = _place(document, column)
    if isinstance(place.value, list):
        now = texts
    if place.holder is None:
        document = now
    else:
        place.holder[place.name] = now
    indent = 2 if "\n" in text.strip() else None
    data = json.dumps(document, ensure_ascii=False, indent=indent) + ("\n" if text.endswith("\n") else "")
    assert not isinstance(from_json(json.loads(data), column), str), "what is written is read again"
    return data.encode()


@dataclass(frozen=True)
class _Place:
    """Where the captions are in a JSON document."""

    value: Any
    holder: dict[str, Any] | None = None
    name: str = ""


def _json(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        raise ValueError("it is not JSON") from None


def _place(document: Any, column: str | None) -> _Place:
    """As ``from_json`` finds them. Raises ``ValueError``."""
    holder, name, value = None, "", document
    for field in column.split(".") if column else ():
        if not isinstance(value, dict) or field not in value:
            raise ValueError(f"it has no field {column}")
        holder, name, value = value, field, value[field]
    if column is None and isinstance(value, dict):
        names = [name for name in JSON_FIELDS if name in value]
        if not names:
            raise ValueError(f"it has no field {JSON_FIELDS[0]}")
        name = next((name for name in names if value[name]), names[0])
        holder, value = value, value[name]
    return _Place(value, holder, name)


def _values(place: _Place) -> list[str]:
    values = place.value if isinstance(place.value, list) else [place.value]
    if not all(isinstance(value, str) and "\n" not in value and "\r" not in value for value in values):
        raise ValueError("its captions are not lines of text: edit the file itself")
    return [value for value in values if value.strip()]


def _not_writable(path: Path) -> str:
    if path.exists() and not os.access(path, os.W_OK):
        return f"There is no permission to write {path.name}"
    if not os.access(path.parent, os.W_OK | os.X_OK):
        return f"There is no permission to write in {path.parent.name}"
    return ""

"""Where are the pictures that a table's cells hold or name? Looked at and located; none is read."""

from __future__ import annotations

import functools
import hashlib
import os
import re
import stat
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from k5cache.sources.captions import Unusable
from k5cache.sources.items import Content, UnreadableImage, stat_numbers
from k5cache.sources.tables import Piece, Table
from k5cache.sources.tars import Tar

_BASE64 = re.compile(r"data:image/|[A-Za-z0-9+/\s]{200}")


@dataclass(frozen=True, slots=True)
class Cell:
    """Where a picture is: a file, or bytes with a way to read them. There may be millions, in each process of Ray."""

    stat: tuple[int, int, int]
    read: Callable[[], Content]


def cells_of(table: Table, column: str) -> list[tuple[Cell | str | None, str]]:
    """Every cell of a column of images, with the file name that the image came from. No image is read."""
    cells: list[tuple[Cell | str | None, str]] = []
    for piece in table.pieces:
        rows = piece.rows
        assert not isinstance(rows, Tar)
        if column not in rows.schema.names:
            cells += [(None, "")] * len(piece.used)
            continue
        names, has_bytes = rows.image_names(column), rows.has_bytes(column)
        read = rows.read  # one bound method for all rows: each would be an object of its own, here and in a pickle
        for row in piece.used:
            cell = _embedded(piece, read, column, row) if has_bytes[row] else _named_by(piece, names[row])
            cells.append((cell, names[row]))
    return cells


def _embedded(piece: Piece, read: Callable[[str, int], Content], column: str, row: int) -> Cell:
    return Cell(row_stat(piece, f"{column} {row}"), functools.partial(read, column, row))


def _named_by(piece: Piece, name: str) -> Cell | str | None:
    """The file that ``{"bytes": null, "path": name}`` means, or why there is none; None if it names none."""
    if not name:
        return None
    name = file_name(name)
    if problem := name_problem(piece, name, name):
        return problem
    file = beside(piece, name)
    stat = file_stat(file)
    if stat is None:
        return f"names {name}, which is not in the folder of {piece.rows.file.name}"
    return Cell(stat, lambda: file)


def file_name(cell: Any) -> str:
    """The name of a file as a table gives it, with forward slashes; "" if it is no text."""
    return _printable(cell).replace("\\", "/") if isinstance(cell, str) else ""


def _printable(text: str) -> str:
    """Without lone surrogates, which JSON can write and which can be neither printed nor stored."""
    return text if text.isascii() else text.encode("utf-8", "replace").decode("utf-8")


def name_problem(piece: Piece, cell: Any, name: str) -> str:
    """Why a name cannot be the name of an image file; "" if it can."""
    if isinstance(cell, Unusable):
        return cell.reason
    if cell is not None and not isinstance(cell, str):
        return f"its image is not the name of a file but {type(cell).__name__}"
    if not name:
        return "names no file"
    if _BASE64.match(name):
        return "its image is base64 text, not the name of a file: decode the images into files, or into Parquet"
    if "://" in name:
        return "is a URL: download the images first"
    if not any(_in_folder(base, name).is_relative_to(base) for base in piece.bases):
        return "lies outside the folder of its table"
    return ""


def beside(piece: Piece, name: str) -> Path:
    """A file that a row names, relative to the folders that it may mean; the first if none of them has it."""
    named = [_in_folder(base, name) for base in piece.bases]
    files = [file for file, base in zip(named, piece.bases, strict=True) if file.is_relative_to(base)]
    return next((file for file in files if file_stat(file) is not None), files[0])


def _in_folder(base: Path, name: str) -> Path:
    """A name in a table as a path. One that leads out of ``base`` is not relative to it."""
    inner = os.path.normpath(name)
    return Path("/") if Path(inner).parts[:1] == ("..",) else base / inner


def path_in(root: Path, file: Path) -> str:
    """The path of a file relative to ``root``; its whole path if it lies elsewhere."""
    return file.relative_to(root).as_posix() if file.is_relative_to(root) else file.as_posix()


def file_stat(file: Path) -> tuple[int, int, int] | None:
    """``stat_numbers`` of a file; None if there is none."""
    try:
        status = file.stat()
    except (OSError, ValueError):  # also a name that is too long or has a NUL
        return None
    return stat_numbers(status) if stat.S_ISREG(status.st_mode) else None


def row_stat(piece: Piece, row: str) -> tuple[int, int, int]:
    """(size, mtime, identity) for one row: those of its file, but with an identity of its own."""
    digest = hashlib.sha256(f"{piece.stat} {row}".encode("utf-8", "surrogatepass")).digest()
    return piece.stat[0], piece.stat[1], int.from_bytes(digest[:8]) >> 1


def places_of(table: Table) -> Iterator[tuple[Piece, int]]:
    """The piece and the number of every row that is used."""
    return ((piece, row) for piece in table.pieces for row in piece.used)


def reader(cells: Mapping[str, Cell]) -> Callable[[str], Content]:
    """What reads a picture by its path."""

    def read(path: str) -> Content:
        content = cells[path].read()
        if not content:
            raise UnreadableImage("is empty (0 bytes)")
        return content

    return read

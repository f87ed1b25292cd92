"""Images in a table, in tars or in a dataset: which rows can be trained on, and how is each read?"""

from __future__ import annotations

import hashlib
import os
import re
import stat
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from k5cache.options import CacheConfig
from k5cache.sources.captions import Captions, Unusable
from k5cache.sources.items import Content, PictureFile, Skipped, SourceItem, UnreadableImage, stat_numbers
from k5cache.sources.rows import FileRows, is_images
from k5cache.sources.table_columns import captions_of_rows, image_column, mask_column
from k5cache.sources.tables import Piece, Table
from k5cache.sources.tars import Member, Tar

Listing = tuple[list[SourceItem], list[Skipped], Callable[[str], Content]]
"""The items, what was skipped, and a function that reads an image or mask by its path."""
_BASE64 = re.compile(r"data:image/|[A-Za-z0-9+/\s]{200}")
_LONGEST_NAME = 300


def find_items(table: Table, config: CacheConfig) -> Listing:
    """Find the rows that have an image and a caption, those that cannot be used, and how to read an image.

    Raises:
        DatasetError: no column has images, or none has captions.
    """
    if isinstance(table.pieces[0].rows, Tar):
        rows = _rows_of_tars(table)
        strays = [
            Skipped(f"{_tar_names(table)[piece.rows.file]}/{skip.path}", skip.reason)
            for piece in table.pieces if isinstance(piece.rows, Tar) for skip in piece.rows.skipped
        ]  # fmt: skip
        return _listing(rows, captions_of_rows(table, config, [row.name for row in rows]), strays)
    column = image_column(table, config.image_column)
    if is_images(table.schema.field(column).type):
        rows = _rows_of_table(table, column)
        return _listing(rows, captions_of_rows(table, config, [row.name for row in rows]), [])
    items, skipped = files_named(table, column, config, table.base)
    base = table.base
    return items, skipped, lambda path: base / path


# --- tables that name files ---


def files_named(
    table: Table, column: str, config: CacheConfig, root: Path, is_strict: bool = False
) -> tuple[list[SourceItem], list[Skipped]]:
    """List the image files that a table names. A file that several rows name gets the captions of all of them.

    Args:
        root: item paths are relative to it.
        is_strict: refuse files outside the table's folder, as `datasets`' imagefolder does.
    """
    cells = table.column(column)
    names = [_file_name(cell) for cell in cells]
    items: dict[str, SourceItem] = {}
    skipped: list[Skipped] = []
    captions = captions_of_rows(table, config, names)
    for number, (piece, row) in enumerate(_places(table)):
        place = table.place(piece, row)
        reason = _name_problem(cells[number], names[number], is_strict)
        if reason:
            is_short = 0 < len(names[number]) < _LONGEST_NAME
            skipped.append(Skipped(names[number] if is_short else f"{table.name}#{number}", f"{reason} ({place})"))
            continue
        file = _beside(piece, names[number])
        path = file.relative_to(root).as_posix() if file.is_relative_to(root) else file.as_posix()
        item = _item_of_file(path, file, captions[number], place)
        if isinstance(item, Skipped):
            skipped.append(item)
        elif path in items:
            items[path] = replace(items[path], captions=items[path].captions + item.captions)
        else:
            items[path] = item
    return sorted(items.values(), key=lambda item: item.path), skipped


def _item_of_file(path: str, file: Path, captions: Captions, place: str) -> SourceItem | Skipped:
    stat = _stat(file)
    if stat is None:
        return Skipped(path, f"is named in {place} but does not exist")
    if isinstance(captions, str):
        return Skipped(path, f"{captions} ({place})")
    return SourceItem(path, *stat, captions=captions, mask=_mask_beside(file, path))


def _file_name(cell: Any) -> str:
    """The name of a file as a table gives it, with forward slashes; "" if it is no text."""
    return _printable(cell).replace("\\", "/") if isinstance(cell, str) else ""


def _printable(text: str) -> str:
    """Without lone surrogates, which JSON can write and which can be neither printed nor stored."""
    return text if text.isascii() else text.encode("utf-8", "replace").decode("utf-8")


def _name_problem(cell: Any, name: str, is_strict: bool) -> str:
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
    if is_strict and (Path(name).is_absolute() or ".." in Path(os.path.normpath(name)).parts):
        return "lies outside the folder of its table"
    return ""


def _beside(piece: Piece, name: str) -> Path:
    """A file that a row names, relative to the folders that it may mean; the first if none of them has it."""
    files = [base / os.path.normpath(name) for base in piece.bases]
    return next((file for file in files if _stat(file) is not None), files[0])


def _mask_beside(file: Path, path: str) -> PictureFile | None:
    for suffix in (".mask.png", ".mask.webp"):
        mask = file.with_name(file.stem + suffix)
        stat = _stat(mask)
        if stat is not None:
            return PictureFile(path[: -len(file.name)] + mask.name, *stat)
    return None


def _stat(file: Path) -> tuple[int, int, int] | None:
    """``stat_numbers`` of a file; None if there is none."""
    try:
        status = file.stat()
    except (OSError, ValueError):  # also a name that is too long or has a NUL
        return None
    return stat_numbers(status) if stat.S_ISREG(status.st_mode) else None


# --- tables and tars that hold images ---


@dataclass(frozen=True)
class _Cell:
    """Where an image or a mask is: a file, or bytes with a way to read them."""

    stat: tuple[int, int, int]
    read: Callable[[], Content]


@dataclass(frozen=True)
class _Row:
    """One row of a table that holds images.

    The paths of an image and its mask name the row, so that they can be read again: ``cats.parquet#12`` in a table,
    ``cats-000.tar/0012.jpg`` in a tar.
    """

    path: str
    name: str
    """The image's file name, if the table has one. Some strategies make it the caption."""
    image: _Cell | str
    """As a string, why there is none."""
    mask_path: str = ""
    mask: _Cell | str | None = None


def _listing(rows: Sequence[_Row], captions: Sequence[Captions], strays: Sequence[Skipped]) -> Listing:
    cells: dict[str, _Cell] = {}
    items: list[SourceItem] = []
    skipped: list[Skipped] = []
    for row, of_row in zip(rows, captions, strict=True):
        problem = next((part for part in (row.image, row.mask, of_row) if isinstance(part, str)), "")
        if row.path in cells and not problem:
            problem = "has the path of an earlier image"
        if problem:
            skipped.append(Skipped(row.path, problem))
            continue
        assert isinstance(row.image, _Cell)
        assert not isinstance(row.mask, str)
        cells[row.path] = row.image
        mask = None
        if row.mask is not None:
            cells[row.mask_path] = row.mask
            mask = PictureFile(row.mask_path, *row.mask.stat)
        items.append(SourceItem(row.path, *row.image.stat, captions=tuple(of_row), mask=mask))

    def read(path: str) -> Content:
        content = cells[path].read()
        if not content:
            raise UnreadableImage("is empty (0 bytes)")
        return content

    return sorted(items, key=lambda item: item.path), [*skipped, *strays], read


def _rows_of_table(table: Table, column: str) -> list[_Row]:
    masks = mask_column(table)
    images = _cells(table, column)
    mask_cells = _cells(table, masks) if masks else [(None, "")] * len(images)
    return [
        _Row(f"{table.name}#{i}", name, image or "holds no image", f"{table.name}#{i}.{masks}", mask)
        for i, ((image, name), (mask, _)) in enumerate(zip(images, mask_cells, strict=True))
    ]


def _cells(table: Table, column: str) -> list[tuple[_Cell | str | None, str]]:
    """Every cell of a column of images, with the file name that the image came from. No image is read."""
    cells: list[tuple[_Cell | str | None, str]] = []
    for piece in table.pieces:
        rows = piece.rows
        assert not isinstance(rows, Tar)
        if column not in rows.schema.names:
            cells += [(None, "")] * len(piece.used)
            continue
        names, has_bytes = rows.image_names(column), rows.has_bytes(column)
        for row in piece.used:
            cell = _embedded(piece, rows, column, row) if has_bytes[row] else _named_by(piece, names[row])
            cells.append((cell, names[row]))
    return cells


def _embedded(piece: Piece, rows: FileRows, column: str, row: int) -> _Cell:
    return _Cell(_row_stat(piece, f"{column} {row}"), lambda: rows.read(column, row))


def _named_by(piece: Piece, name: str) -> _Cell | str | None:
    """The file that ``{"bytes": null, "path": name}`` means, or why there is none; None if it names none."""
    if not name:
        return None
    name = _file_name(name)
    problem = _name_problem(name, name, False)
    file = _beside(piece, name)
    stat = None if problem else _stat(file)
    if stat is None:
        return problem or f"names {name}, which is not in the folder of {piece.rows.file.name}"
    return _Cell(stat, lambda: file)


def _rows_of_tars(table: Table) -> list[_Row]:
    rows: list[_Row] = []
    titles = _tar_names(table)
    for piece in table.pieces:
        tar = piece.rows
        assert isinstance(tar, Tar)
        title = titles[tar.file]
        for number in piece.used:
            row = tar.rows[number]
            image, mask = row.image, row.mask
            rows.append(
                _Row(
                    f"{title}/{image.name}", image.name, _member(piece, tar, image),
                    f"{title}/{mask.name}" if mask else "", _member(piece, tar, mask) if mask else None,
                )
            )  # fmt: skip
    return rows


def _member(piece: Piece, tar: Tar, member: Member) -> _Cell:
    return _Cell(_row_stat(piece, member.name), lambda: tar.content(member))


def _tar_names(table: Table) -> dict[Path, str]:
    """What each tar is called in paths: its name, or its whole path where two have the same name."""
    counts = Counter(file.name for file in set(table.files))
    return {file: file.name if counts[file.name] == 1 else str(file.absolute()) for file in table.files}


def _row_stat(piece: Piece, row: str) -> tuple[int, int, int]:
    """(size, mtime, identity) for one row: those of its file, but with an identity of its own."""
    digest = hashlib.sha256(f"{piece.stat} {row}".encode("utf-8", "surrogatepass")).digest()
    return piece.stat[0], piece.stat[1], int.from_bytes(digest[:8]) >> 1


def _places(table: Table) -> Iterator[tuple[Piece, int]]:
    return ((piece, row) for piece in table.pieces for row in piece.used)

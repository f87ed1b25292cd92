"""Images in a table, in tars or in a dataset: which rows can be trained on, and how is each read?"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from k5cache.options import CacheConfig
from k5cache.sources.captions import Captions, finish, from_cell, from_lines, without_source
from k5cache.sources.items import (
    IMAGE_SUFFIXES,
    PICTURE_DECODER,
    Content,
    MaskFile,
    Skipped,
    SourceItem,
    UnreadableImage,
    stat_numbers,
)
from k5cache.sources.tables import Table

CAPTION_COLUMNS = ("text", "caption", "captions", "prompt", "txt")
PATH_COLUMNS = ("image", "file_name", "image_path", "path", "filename")
MASK_COLUMNS = ("mask", "mask.png", "mask.webp")

Listing = tuple[list[SourceItem], list[Skipped], Callable[[str], Content]]
"""The items, what was skipped, and a function that reads an image or mask by its path."""


def find_items(table: Table, config: CacheConfig) -> Listing:
    """Find the rows that have an image and a caption, those that cannot be used, and how to read an image.

    Raises:
        DatasetError: no column has images, or none has captions.
    """
    column = _image_column(table, config.image_column)
    if not _is_embedded(table.schema.field(column).type):
        if table.base is None:
            raise table.refuse(f"holds names of images in {column}, not images", "cache.image_column")
        items, skipped = files_named(table, column, config, table.base)
        base = table.base
        return items, skipped, lambda path: base / path
    return _embedded_images(table, column, config)


def files_named(
    table: Table, column: str, config: CacheConfig, root: Path, is_strict: bool = False
) -> tuple[list[SourceItem], list[Skipped]]:
    """List the image files that a table names. A file that several rows name gets the captions of all of them.

    Args:
        root: item paths are relative to it.
        is_strict: refuse files outside the table's folder, as `datasets`' imagefolder does.
    """
    assert table.base is not None
    names = [str(value).replace("\\", "/") if value is not None else "" for value in table.column(column).to_pylist()]
    items: dict[str, SourceItem] = {}
    skipped: list[Skipped] = []
    for i, (name, captions) in enumerate(zip(names, _captions(table, config, names), strict=True)):
        file = table.base / os.path.normpath(name)
        path = file.relative_to(root).as_posix() if file.is_relative_to(root) else file.as_posix()
        reason = _file_problem(name, file, table, is_strict)
        if reason or isinstance(captions, str):
            skipped.append(Skipped(path if name else f"{table.name}#{i}", reason or str(captions)))
        elif path in items:
            items[path] = replace(items[path], captions=items[path].captions + tuple(captions))
        else:
            items[path] = SourceItem(path, *_stat(file), captions=captions, mask=_mask_beside(file, path))
    return sorted(items.values(), key=lambda item: item.path), skipped


def _file_problem(name: str, file: Path, table: Table, is_strict: bool) -> str:
    """Why a file that a table names cannot be used; "" if it can."""
    if not name:
        return "names no file"
    if "://" in name:
        return "is a URL: download the images first"
    if is_strict and (Path(name).is_absolute() or ".." in Path(os.path.normpath(name)).parts):
        return f"lies outside the folder of {table.name}"
    return "" if file.is_file() else f"is named in {table.name} but does not exist"


def _mask_beside(file: Path, path: str) -> MaskFile | None:
    for suffix in (".mask.png", ".mask.webp"):
        mask = file.with_name(file.stem + suffix)
        if mask.is_file():
            return MaskFile(path[: -len(file.name)] + mask.name, *_stat(mask))
    return None


def _stat(file: Path) -> tuple[int, int, int]:
    return stat_numbers(file.stat())


def _embedded_images(table: Table, column: str, config: CacheConfig) -> Listing:
    """List the images that a table contains.

    The path of an image names its row, so that it can be read again: ``cats.parquet#12`` in a table,
    ``cats-000.tar/0012.jpg`` in a tar.
    """
    rows = _rows_of_tar(table, column) if _is_tar(table) else _rows_of_table(table, column)
    mask_column = next((name for name in MASK_COLUMNS if _has_images(table, name)), "")
    has_image = _is_filled(table, column)
    has_mask = _is_filled(table, mask_column) if mask_column else [False] * len(rows)
    captions = _captions(table, config, [row.name for row in rows])
    cells: dict[str, tuple[int, str]] = {}
    items: list[SourceItem] = []
    skipped: list[Skipped] = []
    for i, row in enumerate(rows):
        reason = _row_problem(row, captions[i], has_image[i], row.path in cells)
        if reason:
            skipped.append(Skipped(row.path, reason))
            continue
        cells[row.path] = (i, column)
        mask = None
        if has_mask[i]:
            mask_path = f"{row.path.removesuffix('.' + column)}.{mask_column}"
            cells[mask_path] = (i, mask_column)
            mask = MaskFile(mask_path, *_row_stat(row.stamp, mask_path))
        items.append(SourceItem(row.path, *_row_stat(row.stamp, row.path), captions=tuple(captions[i]), mask=mask))
    return sorted(items, key=lambda item: item.path), skipped, _cell_reader(table, cells)


@dataclass(frozen=True)
class _Row:
    """One row of a table that holds images."""

    path: str
    """Its name in the cache and in messages."""
    name: str
    """The image's file name, if the table has one. Some strategies make it the caption."""
    stamp: tuple[int, int, str]
    """What ``_stamp`` says of the file that contains it."""


def _is_tar(table: Table) -> bool:
    return "__url__" in table.schema.names and "__key__" in table.schema.names


def _rows_of_tar(table: Table, column: str) -> list[_Row]:
    urls, keys = (table.column(name).to_pylist() for name in ("__url__", "__key__"))
    tars = {url: Path(url).name for url in urls}
    if len(set(tars.values())) < len(tars):  # tars of one name in several folders
        tars = {url: url for url in tars}
    stamps = {url: _stamp(table, Path(url)) for url in tars}
    return [_Row(f"{tars[url]}/{key}.{column}", key, stamps[url]) for url, key in zip(urls, keys, strict=True)]


def _rows_of_table(table: Table, column: str) -> list[_Row]:
    stamp = _stamp(table)
    return [_Row(f"{table.name}#{i}", name, stamp) for i, name in enumerate(_inner_names(table, column))]


def _row_problem(row: _Row, captions: Captions, has_image: bool, is_known: bool) -> str:
    """Why a row cannot be used; "" if it can."""
    if not has_image:
        return "holds no image"
    if isinstance(captions, str):
        return captions
    return "has the path of an earlier image" if is_known else ""


def _cell_reader(table: Table, cells: Mapping[str, tuple[int, str]]) -> Callable[[str], Content]:
    """A function that reads an image or mask by its path.

    Args:
        cells: the row and column of each path.
    """
    names = {name for _, name in cells.values()}
    columns = {name: table.rows.select_columns([name]).with_format("arrow") for name in names}

    def read(path: str) -> Content:
        row, name = cells[path]
        cell = columns[name][row].column(0)[0].as_py()
        content = cell["bytes"] if isinstance(cell, dict) else cell
        if content is None:
            return Path(cell["path"])
        if not content:
            raise UnreadableImage("is empty (0 bytes)")
        return content

    return read


def _stamp(table: Table, file: Path | None = None) -> tuple[int, int, str]:
    """(size, mtime, everything else) of one file of the table, of all its files, or of a dataset without files.

    All three are the same as long as no file changes.
    """
    files = [file] if file and file.is_file() else table.files
    if not files:
        return 0, 0, str(table.rows._fingerprint)
    stats = [_stat(f) for f in files]
    return sum(s[0] for s in stats), max(s[1] for s in stats), str(stats)


def _row_stat(stamp: tuple[int, int, str], path: str) -> tuple[int, int, int]:
    """(size, mtime, inode) for one row: those of its file, but with a number of its own in place of the inode."""
    digest = hashlib.sha256(f"{stamp[2]} {path} {PICTURE_DECODER}".encode()).digest()
    return stamp[0], stamp[1], int.from_bytes(digest[:8]) >> 1


def _inner_names(table: Table, column: str) -> list[str]:
    """The file name that each image of a table came from; "" if the table does not say."""
    cells = table.column(column)
    if not pa.types.is_struct(cells.type) or "path" not in cells.type.names:
        return [""] * len(cells)
    return [name or "" for name in pc.struct_field(cells, "path").to_pylist()]


def _is_filled(table: Table, column: str) -> list[bool]:
    """Which rows have an image. No image is read."""
    cells = table.column(column)
    if not pa.types.is_struct(cells.type):
        return cells.is_valid().to_pylist()
    fields = [name for name in ("bytes", "path") if name in cells.type.names]
    parts = [pc.struct_field(cells, name).is_valid().to_pylist() for name in fields]
    in_tar = "__url__" in table.schema.names  # where `path` is the name inside the tar and is always filled
    return parts[0] if in_tar else [any(filled) for filled in zip(*parts, strict=True)]


def _has_images(table: Table, name: str) -> bool:
    return name in table.schema.names and _is_embedded(table.schema.field(name).type)


def _is_embedded(kind: pa.DataType) -> bool:
    if pa.types.is_struct(kind):
        return "bytes" in kind.names
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind)


def _image_column(table: Table, option: str | None) -> str:
    """The column with images or their paths: ``cache.image_column`` if it is set, else the one that looks like it."""
    schema = table.schema
    if option is not None:
        if option not in schema.names:
            raise table.refuse(f"has no column {option}", "cache.image_column")
        kind = schema.field(option).type
        if not _is_embedded(kind) and not _is_text(kind):
            raise table.refuse(f"has no images in {option} but {kind}", "cache.image_column")
        return option
    suffixes = {suffix[1:] for suffix in IMAGE_SUFFIXES}
    embedded = [
        name for name in schema.names
        if _is_embedded(schema.field(name).type) and name not in MASK_COLUMNS
        and (pa.types.is_struct(schema.field(name).type) or name.lower() in suffixes | set(PATH_COLUMNS))
    ]  # fmt: skip
    if len(embedded) > 1 and "image" not in embedded:
        raise table.refuse(f"has images in {' and '.join(embedded)}", "cache.image_column to one of them")
    paths = [name for name in PATH_COLUMNS if name in schema.names and _is_text(schema.field(name).type)]
    candidates = (["image"] if "image" in embedded else embedded) or paths
    if not candidates:
        raise table.refuse("has no column of images", "cache.image_column to the one with images or their paths")
    return candidates[0]


def _is_text(kind: pa.DataType) -> bool:
    return pa.types.is_string(kind) or pa.types.is_large_string(kind)


def _captions(table: Table, config: CacheConfig, names: Sequence[str]) -> list[Captions]:
    """The captions of every row. ``names`` are the images' file names, for the strategies that read them."""
    if config.caption_strategy in ("filename", "instanceprompt"):
        from_names = [without_source(name, config) for name in names]
        return [finish(captions or "empty caption", config) for captions in from_names]
    column = _caption_column(table, config.caption_column)
    name, *fields = [column] if column in table.schema.names else column.split(".")
    cells = _caption_cells(table, name, fields)
    if name == "txt":  # of a tar: the text of a caption file, as beside an image in a folder
        return [finish(from_lines(cell) if isinstance(cell, str) else from_cell(cell), config) for cell in cells]
    return [finish(from_cell(cell), config) for cell in cells]


def _caption_column(table: Table, option: str | None) -> str:
    """``cache.caption_column`` if it is set, else the one column that is named like captions."""
    if option is not None:
        return option
    names = [name for name in CAPTION_COLUMNS if name in table.schema.names]
    if len(names) != 1:
        problem = f"has captions in {' and '.join(names)}" if names else "has no column of captions"
        raise table.refuse(problem, "cache.caption_column to the one with captions")
    return names[0]


def _caption_cells(table: Table, name: str, fields: Sequence[str]) -> list[Any]:
    """The cells of column ``name``, or of a field inside it: ``["prompt"]`` in the column ``json``."""
    column = ".".join([name, *fields])
    if name not in table.schema.names:
        raise table.refuse(f"has no column {column}", "cache.caption_column to the one with captions")
    cells = table.column(name).to_pylist()
    for field in fields:
        keys = {key for cell in cells if isinstance(cell, dict) for key in cell}
        if field not in keys:
            content = f"fields {', '.join(sorted(keys))}" if keys else "no fields"
            raise table.refuse(f"has no {column}: {name} has {content}", "cache.caption_column")
        cells = [cell.get(field) if isinstance(cell, dict) else None for cell in cells]
    return cells

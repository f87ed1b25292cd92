"""Which columns of a table have the images, their masks and their captions, and what are the captions of each row?"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pyarrow as pa

from k5cache.options import CacheConfig
from k5cache.sources.captions import Captions, Unusable, from_cell, from_text, without_source
from k5cache.sources.items import IMAGE_SUFFIXES
from k5cache.sources.rows import is_images, is_struct_of_text, is_text
from k5cache.sources.tables import Table
from k5cache.sources.tars import Tar

CAPTION_COLUMNS = ("text", "caption", "captions", "prompt", "txt")
PATH_COLUMNS = ("image", "file_name", "image_path", "path", "filename")
MASK_COLUMNS = ("mask", "mask.png", "mask.webp")
SOURCE_COLUMNS = ("source", "source_image", "source_file_name", "source_img", "input_image", "original_image")
TARGET_COLUMNS = ("target", "target_image", "target_img", "edited_image", "output_image")
"""Columns of images where another column has their sources; ``PATH_COLUMNS`` come first."""
INSTRUCTION_COLUMNS = ("instruction", "edit_prompt")


def image_column(table: Table, option: str | None, source: str | None = None) -> str:
    """The column with images or their paths: ``cache.image_column`` if it is set, else the one that looks like it.

    Args:
        source: for image-to-image, the column with sources.

    Raises:
        DatasetError: there is none, or there are several.
    """
    schema = table.schema
    if option is not None:
        if option not in schema.names:
            raise table.refuse(f"has no column {option}", "cache.image_column")
        kind = schema.field(option).type
        if not is_images(kind) and not is_text(kind):
            raise _no_images(table, option, kind)
        return option
    suffixes = {suffix[1:] for suffix in IMAGE_SUFFIXES}
    columns = PATH_COLUMNS + (TARGET_COLUMNS if source else ())
    embedded = [
        name for name in schema.names
        if is_images(schema.field(name).type) and name not in (*MASK_COLUMNS, source)
        and (pa.types.is_struct(schema.field(name).type) or name.lower() in suffixes | set(columns))
    ]  # fmt: skip
    if len(embedded) > 1 and "image" not in embedded:
        raise table.refuse(f"has images in {' and '.join(embedded)}", "cache.image_column to one of them")
    paths = [name for name in columns if name in schema.names and is_text(schema.field(name).type) and name != source]
    candidates = (["image"] if "image" in embedded else embedded) or paths
    if not candidates:
        for name in schema.names:
            if is_struct_of_text(schema.field(name).type):
                raise _no_images(table, name, schema.field(name).type)
        raise table.refuse("has no column of images", "cache.image_column to the one with images or their paths")
    return candidates[0]


def source_column(table: Table, option: str | None) -> str:
    """The column with sources or their paths: ``cache.source_column`` if it is set, else the one named like it.

    Raises:
        DatasetError: there is none, or there are several, or it has no images.
    """
    schema = table.schema
    fix = "cache.source_column to the one with the pictures before the edit"
    named = [option] if option is not None else [name for name in SOURCE_COLUMNS if name in schema.names]
    if option is not None and option not in schema.names:
        raise table.refuse(f"has no column {option}", fix)
    if not named:
        raise table.refuse("has no column of sources, and an image-to-image model learns from pairs", fix)
    if len(named) > 1:
        raise table.refuse(f"has sources in {' and '.join(named)}", "cache.source_column to one of them")
    kind = schema.field(named[0]).type
    if not is_images(kind) and not is_text(kind) and not pa.types.is_null(kind):
        content = "base64 text" if is_struct_of_text(kind) else str(kind)
        raise table.refuse(f"has no images in {named[0]} but {content}", fix)
    return named[0]


def mask_column(table: Table) -> str | None:
    """The column with masks."""
    schema = table.schema
    return next((name for name in MASK_COLUMNS if name in schema.names and is_images(schema.field(name).type)), None)


def captions_of_rows(
    table: Table, config: CacheConfig, names: Sequence[str], are_instructions: bool = False
) -> list[Captions]:
    """The captions of every row. ``names`` are the images' file names, for the strategies that read them.

    Raises:
        DatasetError: no column has captions, or several have.
    """
    if config.caption_strategy in ("filename", "instanceprompt"):
        return [without_source(name, config) or "empty caption" for name in names]
    column = _caption_column(table, config, are_instructions)
    name, *fields = [column] if column in table.schema.names else column.split(".")
    cells = _caption_cells(table, name, fields)
    if has_lines(table, config, are_instructions):
        return [from_text(cell, config.caption_lines) if isinstance(cell, str) else from_cell(cell) for cell in cells]
    return [from_cell(cell) for cell in cells]


def has_lines(table: Table, config: CacheConfig, are_instructions: bool) -> bool:
    """Whether captions are the text of a tar's caption files, which have lines as those in a folder."""
    if config.caption_strategy in ("filename", "instanceprompt"):
        return False
    column = _caption_column(table, config, are_instructions)
    return column == "txt" or (config.caption_column is None and f".{column}" in (config.caption_suffixes or ()))


def _no_images(table: Table, column: str, kind: pa.DataType) -> Exception:
    content = "base64 text" if is_struct_of_text(kind) else str(kind)
    return table.refuse(f"has no images in {column} but {content}", "cache.image_column to a column of images")


def _caption_column(table: Table, config: CacheConfig, are_instructions: bool) -> str:
    """``cache.caption_column``, or ``caption_extension`` of a tar, or else the one column named like captions."""
    if config.caption_column is not None:
        return config.caption_column
    if config.caption_suffixes is not None and isinstance(table.pieces[0].rows, Tar):
        return config.caption_suffixes[0][1:]
    columns = CAPTION_COLUMNS + (INSTRUCTION_COLUMNS if are_instructions else ())
    names = [name for name in columns if name in table.schema.names]
    if len(names) != 1:
        problem = f"has captions in {' and '.join(names)}" if names else "has no column of captions"
        raise table.refuse(problem, "cache.caption_column to the one with captions")
    return names[0]


def _caption_cells(table: Table, name: str, fields: Sequence[str]) -> list[Any]:
    """The cells of column ``name``, or of a field inside it: ``["prompt"]`` in the column ``json``."""
    column = ".".join([name, *fields])
    if name not in table.schema.names:
        raise table.refuse(f"has no column {column}", "cache.caption_column to the one with captions")
    if is_images(table.schema.field(name).type):
        raise table.refuse(f"has no captions in {column} but images", "cache.caption_column to the one with captions")
    cells = table.column(name)
    for field in fields:
        keys = {key for cell in cells if isinstance(cell, dict) for key in cell}
        if field not in keys:
            content = f"fields {', '.join(sorted(keys))}" if keys else "no fields"
            raise table.refuse(f"has no {column}: {name} has {content}", "cache.caption_column")
        cells = [_field(cell, field) for cell in cells]
    return cells


def _field(cell: Any, field: str) -> Any:
    return cell if isinstance(cell, Unusable) else cell.get(field) if isinstance(cell, dict) else None

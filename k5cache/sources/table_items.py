"""Images in a table, in tars or in a dataset: which rows can be trained on, and how is each read?"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from k5cache.options import CacheConfig
from k5cache.shared.kind import Kind
from k5cache.sources.captions import Captions
from k5cache.sources.items import Content, PictureFile, Skipped, SourceItem
from k5cache.sources.rows import is_images
from k5cache.sources.table_cells import (
    Cell,
    beside,
    cells_of,
    file_name,
    file_stat,
    name_problem,
    path_in,
    places_of,
    reader,
    row_stat,
)
from k5cache.sources.table_columns import captions_of_rows, image_column, mask_column, source_column
from k5cache.sources.table_sources import Located, by_path, file_of, sources_of_rows, sources_of_tar
from k5cache.sources.tables import Piece, Table
from k5cache.sources.tars import Member, Tar

Listing = tuple[list[SourceItem], list[Skipped], Callable[[str], Content], Callable[[str], Content]]
"""The items, what was skipped, a function that reads an image or mask by its path, and one that reads a source."""
_LONGEST_NAME = 300


def find_items(table: Table, config: CacheConfig, kind: Kind = "t2i") -> Listing:
    """Find the rows that have an image and a caption, those that cannot be used, and how to read an image.

    For image-to-image a row needs a source too.

    Raises:
        DatasetError: no column has images, or none has captions, or none has sources.
    """
    in_pairs = kind == "i2i"
    if isinstance(table.pieces[0].rows, Tar):
        rows = _rows_of_tars(table, config.source_column, in_pairs)
        strays = [
            Skipped(f"{_tar_names(table)[piece.rows.file]}/{skip.path}", skip.reason)
            for piece in table.pieces if isinstance(piece.rows, Tar) for skip in piece.rows.skipped
        ]  # fmt: skip
        return _listing(rows, captions_of_rows(table, config, [row.name for row in rows], in_pairs), strays)
    column = image_column(table, config.image_column, source_column(table, config.source_column) if in_pairs else None)
    sources = sources_of_rows(table, config, table.base) if in_pairs else None
    if is_images(table.schema.field(column).type):
        rows = _rows_of_table(table, column, sources)
        return _listing(rows, captions_of_rows(table, config, [row.name for row in rows], in_pairs), [])
    items, skipped = files_named(table, column, config, table.base, sources)
    base = table.base
    return items, skipped, lambda path: base / path, reader(by_path(sources or ()))


# --- tables that name files ---


def files_named(
    table: Table,
    column: str,
    config: CacheConfig,
    root: Path,
    sources: Sequence[Located] | None = None,
) -> tuple[list[SourceItem], list[Skipped]]:
    """List the image files that a table names. A file that several rows name gets the captions of all of them.

    Args:
        root: item paths are relative to it.
        sources: for image-to-image, the source of every row.
    """
    cells = table.column(column)
    names = [file_name(cell) for cell in cells]
    items: dict[str, SourceItem] = {}
    skipped: list[Skipped] = []
    captions = captions_of_rows(table, config, names, sources is not None)
    for number, (piece, row) in enumerate(places_of(table)):
        place = table.place(piece, row)
        reason = name_problem(piece, cells[number], names[number])
        if reason:
            is_short = 0 < len(names[number]) < _LONGEST_NAME
            skipped.append(Skipped(names[number] if is_short else f"{table.name}#{number}", f"{reason} ({place})"))
            continue
        file = beside(piece, names[number])
        path = path_in(root, file)
        item = _item_of_file(path, file, captions[number], sources[number] if sources else None, place)
        if isinstance(item, SourceItem):
            item = joined(items.get(path), item, place)
        if isinstance(item, Skipped):
            skipped.append(item)
        else:
            items[path] = item
    return sorted(items.values(), key=lambda item: item.path), skipped


def joined(before: SourceItem | None, item: SourceItem, place: str) -> SourceItem | Skipped:
    """An image that one more row names, with the captions of all of them."""
    if before is None:
        return item
    if before.source and item.source and before.source != item.source:
        sources = f"{before.source.path}, and here {item.source.path}"
        return Skipped(item.path, f"has two sources: {sources}; copy the image under another name ({place})")
    return replace(before, captions=before.captions + item.captions)


def _item_of_file(
    path: str, file: Path, captions: Captions, source: Located | None, place: str
) -> SourceItem | Skipped:
    stat = file_stat(file)
    if stat is None:
        return Skipped(path, f"is named in {place} but does not exist")
    if isinstance(captions, str):
        return Skipped(path, f"{captions} ({place})")
    picture = file_of(source) if source else None
    if isinstance(picture, str):
        return Skipped(path, f"{picture} ({place})")
    return SourceItem(path, *stat, captions=captions, mask=_mask_beside(file, path), source=picture)


def _mask_beside(file: Path, path: str) -> PictureFile | None:
    for suffix in (".mask.png", ".mask.webp"):
        mask = file.with_name(file.stem + suffix)
        stat = file_stat(mask)
        if stat is not None:
            return PictureFile(path[: -len(file.name)] + mask.name, *stat)
    return None


# --- tables and tars that hold images ---


@dataclass(frozen=True)
class _Row:
    """One row of a table that holds images.

    The paths of an image and its mask name the row, so that they can be read again: ``cats.parquet#12`` in a table,
    ``cats-000.tar/0012.jpg`` in a tar.
    """

    path: str
    name: str
    """The image's file name, if the table has one. Some strategies make it the caption."""
    image: Cell | str
    """As a string, why there is none."""
    mask_path: str = ""
    mask: Cell | str | None = None
    source: Located | None = None
    """For image-to-image."""
    is_only_source: bool = False
    """Whether the image is the source of another row and no target itself."""


def _listing(rows: Sequence[_Row], captions: Sequence[Captions], strays: Sequence[Skipped]) -> Listing:
    cells: dict[str, Cell] = {}
    items: list[SourceItem] = []
    skipped: list[Skipped] = []
    for row, of_row in zip(rows, captions, strict=True):
        if row.is_only_source:
            continue
        source = file_of(row.source) if row.source else None
        problem = next((part for part in (row.image, row.mask, source, of_row) if isinstance(part, str)), "")
        if row.path in cells and not problem:
            problem = "has the path of an earlier image"
        if problem:
            skipped.append(Skipped(row.path, problem))
            continue
        assert isinstance(row.image, Cell)
        assert not isinstance(row.mask, str)
        assert not isinstance(source, str)
        cells[row.path] = row.image
        mask = None
        if row.mask is not None:
            cells[row.mask_path] = row.mask
            mask = PictureFile(row.mask_path, *row.mask.stat)
        items.append(SourceItem(row.path, *row.image.stat, captions=tuple(of_row), mask=mask, source=source))
    sources = by_path(row.source for row in rows if row.source)
    return sorted(items, key=lambda item: item.path), [*skipped, *strays], reader(cells), reader(sources)


def _rows_of_table(table: Table, column: str, sources: Sequence[Located] | None) -> list[_Row]:
    masks = mask_column(table)
    images = cells_of(table, column)
    mask_cells = cells_of(table, masks) if masks else [(None, "")] * len(images)
    name_of = table.name
    of_rows: Sequence[Located | None] = [None] * len(images) if sources is None else sources
    return [
        _Row(f"{name_of}#{i}", name, image or "holds no image", f"{name_of}#{i}.{masks}", mask, source)
        for i, ((image, name), (mask, _), source) in enumerate(zip(images, mask_cells, of_rows, strict=True))
    ]


def _rows_of_tars(table: Table, source_field: str | None, in_pairs: bool) -> list[_Row]:
    rows: list[_Row] = []
    titles = _tar_names(table)
    for piece in table.pieces:
        tar = piece.rows
        assert isinstance(tar, Tar)
        title = titles[tar.file]
        sources = sources_of_tar([tar.rows[number] for number in piece.used], source_field) if in_pairs else {}
        for number in piece.used:
            row = tar.rows[number]
            image, mask, source = row.image, row.mask, sources.get(row.image.name)
            rows.append(
                _Row(
                    f"{title}/{image.name}", image.name, _member(piece, tar, image),
                    f"{title}/{mask.name}" if mask else "", _member(piece, tar, mask) if mask else None,
                    (f"{title}/{source.name}", _member(piece, tar, source)) if isinstance(source, Member)
                    else ("", source) if source else None,
                    is_only_source=in_pairs and source is None,
                )
            )  # fmt: skip
    return rows


def _member(piece: Piece, tar: Tar, member: Member) -> Cell:
    return Cell(row_stat(piece, member.name), functools.partial(tar.content, member))


def _tar_names(table: Table) -> dict[Path, str]:
    """What each tar is called in paths: its name, or its whole path where two have the same name."""
    counts = Counter(file.name for file in set(table.files))
    return {file: file.name if counts[file.name] == 1 else str(file.absolute()) for file in table.files}

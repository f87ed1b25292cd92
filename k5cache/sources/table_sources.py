"""Where is the source of each row of a table or a tar, the picture before the edit? Located; none is read."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from k5cache.options import CacheConfig
from k5cache.sources.items import IMAGE_SUFFIXES, PictureFile
from k5cache.sources.pairs import NO_SOURCE, has_several
from k5cache.sources.rows import is_images
from k5cache.sources.table_cells import Cell, beside, cells_of, file_name, file_stat, name_problem, path_in, places_of
from k5cache.sources.table_columns import source_column
from k5cache.sources.tables import Piece, Table
from k5cache.sources.tars import Member, TarRow

Located = tuple[str, Cell | str]
"""The path of a source, and how to read it; as a string, why there is none."""
_LONGEST_NAME = 100


def sources_of_rows(table: Table, config: CacheConfig, root: Path) -> list[Located]:
    """The source of every row.

    Args:
        root: paths of files are relative to it.

    Raises:
        DatasetError: no column has sources, or several have.
    """
    column = source_column(table, config.source_column)
    empty = f"{NO_SOURCE}: its column {column} is empty"
    if not is_images(table.schema.field(column).type):
        cells = zip(table.column(column), places_of(table), strict=True)
        return [_named(cell, piece, root) or ("", empty) for cell, (piece, _) in cells]
    located: list[Located] = []
    for i, (found, _) in enumerate(cells_of(table, column)):
        cell = f"its source {found}" if isinstance(found, str) else found or empty
        located.append((f"{table.name}#{i}.{column}", cell))
    return located


def sources_of_tar(rows: Sequence[TarRow], option: str | None) -> dict[str, Member | str]:
    """Name of each target in a tar -> its source, or why there is none. What is only a source is no target."""
    sources = {row.image.name: _source_in(row, option or "source") for row in rows}
    used = {source.name for source in sources.values() if isinstance(source, Member)}
    return {name: source for name, source in sources.items() if isinstance(source, Member) or name not in used}


def _source_in(row: TarRow, field: str) -> Member | str:
    """The file that is the source of an image: ``X.source.png``, or for the field ``input`` ``X.input.png``."""
    stems = {f"{of}.{field}" for of in (row.image.stem, row.image.key)}
    found = [member for member in row.companions if member.field == field or member.stem in stems]
    if len(found) > 1:
        return has_several([member.name for member in found])
    if not found and row.image.stem.endswith(f".{field}"):
        target = row.image.stem.removesuffix(f".{field}").rpartition("/")[2]
        return f"is a source without a target: there is no {target}.* beside it"
    ending = field if "." + field.rpartition(".")[2] in IMAGE_SUFFIXES else f"{field}.*"
    return found[0] if found else f"{NO_SOURCE}: there is no {row.image.key.rpartition('/')[2]}.{ending} beside it"


def by_path(sources: Iterable[Located]) -> dict[str, Cell]:
    """The sources that can be read."""
    return {path: cell for path, cell in sources if isinstance(cell, Cell)}


def file_of(source: Located) -> PictureFile | str:
    """A source as an item has it; as a string, why there is none."""
    path, cell = source
    return cell if isinstance(cell, str) else PictureFile(path, *cell.stat)


def _named(cell: Any, piece: Piece, root: Path) -> Located | None:
    """The file that a cell names; None if it is empty."""
    name = file_name(cell)
    if cell is None or cell != cell or (isinstance(cell, str) and not name.strip()):  # NaN, from pandas
        return None
    shown = name if len(name) <= _LONGEST_NAME else f"{name[:_LONGEST_NAME]}..."
    if problem := name_problem(piece, cell, name):
        is_sentence = problem.startswith("its image")
        return name, problem.replace("its image", "its source", 1) if is_sentence else f"its source {shown} {problem}"
    file = beside(piece, name)
    stat = file_stat(file)
    return path_in(root, file), Cell(stat, lambda: file) if stat else f"its source {shown} does not exist"

"""How are tables, tars and datasets opened? Each of their files by its kind; nothing is copied or kept on disk.

``table_items`` finds the images and captions in the rows.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import pyarrow as pa

from k5cache.options import CacheConfig
from k5cache.shared import console, plain
from k5cache.shared.errors import DatasetError
from k5cache.shared.foreign import shown
from k5cache.shared.inside import is_inside
from k5cache.sources.arrow_tables import read_arrow, read_parquet
from k5cache.sources.items import METADATA, stat_numbers
from k5cache.sources.row_groups import GroupReader
from k5cache.sources.rows import FileRows, is_images, is_text
from k5cache.sources.splits import files_of_split, rows_of_split, split_names
from k5cache.sources.tars import Tar, read_tar
from k5cache.sources.text_tables import TextRows, read_csv, read_json

SUFFIXES = (".csv", ".tsv", ".json", ".jsonl", ".parquet", ".arrow", ".tar")
_MOST_NAMES = 20
_PACKED_TAR = re.compile(r"\.(tar\.\w+|tgz|tbz2?|txz|tzst)$", re.IGNORECASE)
Name = TypeVar("Name", Path, str)


@dataclass(frozen=True)
class Piece:
    """Rows of one file that are used."""

    rows: FileRows | Tar
    used: range
    bases: tuple[Path, ...]
    """The folders that its paths may be relative to; the first that has the file counts."""
    stat: tuple[int, int, int]
    """``stat_numbers`` of the file, taken before it was read."""


@dataclass(frozen=True)
class Table:
    """Rows of one file or of several."""

    name: str
    """Used in messages, and before the row number in paths."""
    pieces: tuple[Piece, ...]
    base: Path
    """Paths of images that it names are relative to this folder in the cache."""

    @property
    def files(self) -> tuple[Path, ...]:
        """Its files."""
        return tuple(piece.rows.file for piece in self.pieces)

    @cached_property
    def schema(self) -> pa.Schema:
        """The columns of all files. A column that only some files have is empty in the others.

        Raises:
            DatasetError: a column has images in one file and text in another.
        """
        fields: dict[str, tuple[pa.DataType, Path]] = {}
        for piece in self.pieces:
            for column in piece.rows.schema:
                kind, file = fields.setdefault(column.name, (column.type, piece.rows.file))
                if pa.types.is_null(kind):
                    fields[column.name] = column.type, piece.rows.file
                elif not pa.types.is_null(column.type) and _sort(kind) != _sort(column.type):
                    raise DatasetError(
                        f"{self.name}: the column {column.name} is {kind} in {file.name}, "
                        f"and {column.type} in {piece.rows.file.name}",
                        "Give these files one by one, or make them alike",
                    )
        return pa.schema([(name, kind) for name, (kind, _) in fields.items()])

    def column(self, name: str) -> list[Any]:
        """The values of a column that has no images, in all rows."""
        values: list[Any] = []
        for piece in self.pieces:
            if name in piece.rows.schema.names:
                column = piece.rows.column(name)
                values += [column[row] for row in piece.used]
            else:
                values += [None] * len(piece.used)
        return values

    def place(self, piece: Piece, row: int) -> str:
        """What messages call a row: ``cats.csv line 3``."""
        file = piece.rows.file.name
        name = self.name if self.name.endswith(file) else file
        return name + ("" if isinstance(piece.rows, Tar) else piece.rows.place(row))

    def refuse(self, problem: str, option: str) -> DatasetError:
        """An error that lists the columns of the table."""
        names = self.schema.names
        listed = ", ".join([*names[:_MOST_NAMES], *(["..."] if len(names) > _MOST_NAMES else [])])
        return DatasetError(f"{self.name} {problem}; its columns are {listed}", f"Set {option}, or use another source")


def load_files(name: str, files: Sequence[Path], config: CacheConfig) -> Table:
    """Open ``files``, which are all of one kind, as one table. Any split is theirs; a slice is cut.

    Raises:
        DatasetError: one of them cannot be read, or they are of several kinds.
    """
    [split, *others] = split_names(config.split)
    if others:
        raise DatasetError(f"cache.split is {config.split!r}, and {name} has one split", "Write it as train[10:20]")
    pieces = _open_files(name, files, [(file.parent,) for file in files], config)
    return _cut(name, {split: pieces}, config, files[0].parent)


def load_folder(folder: Path, config: CacheConfig) -> Table:
    """Open a folder of data files as on the hub (``data/train-00000-of-00002.parquet``), or one of ``save_to_disk``."""
    if is_saved(folder):
        return _load_saved(folder, config)
    return load_splits(folder.name, folder, {
        split: files_of_split(folder, _only(config, split)) for split in split_names(config.split)
    }, config)  # fmt: skip


def load_splits(name: str, folder: Path, splits: dict[str, list[Path]], config: CacheConfig) -> Table:
    """Open the files of splits of a dataset in ``folder``: of each, those of the kind that it has most of."""
    opened = {}
    for split, files in splits.items():
        chosen = of_one_kind(files)
        if not chosen:
            raise DatasetError(f"{folder} has no table or tar in split {split}", "Set cache.split to one that has")
        opened[split] = _open_files(name, chosen, [(folder, file.parent) for file in chosen], config)
    return _cut(name, opened, config, folder)


def load_named_files(name: str, folder: Path, splits: dict[str, list[Path]], config: CacheConfig) -> Table:
    """Open the images of splits of a dataset: those that its metadata files name, or all if it has none."""
    opened: dict[str, tuple[Piece, ...]] = {}
    for split, files in splits.items():
        metadata = [file for file in files if file.name in METADATA]
        if metadata:
            opened[split] = _open_files(name, metadata, [(file.parent,) for file in metadata], config)
        else:
            rows = TextRows(folder, {"file_name": [file.relative_to(folder).as_posix() for file in files]}, len(files))
            opened[split] = (Piece(rows, range(len(files)), (folder,), (0, 0, 0)),)
    return _cut(name, opened, config, folder)


def is_saved(folder: Path) -> bool:
    """Whether ``Dataset.save_to_disk`` made this folder."""
    return (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file()


def _load_saved(folder: Path, config: CacheConfig) -> Table:
    """Open what ``save_to_disk`` of a dataset or of a dictionary of datasets wrote."""
    declared = folder / "dataset_dict.json"
    wanted = split_names(config.split)
    if declared.is_file():
        available = _read(declared, "splits")
        for split in wanted:
            if split not in available:
                raise DatasetError(
                    f"{folder} has no split {split}; it has {', '.join(available)}", "Set cache.split to one of them"
                )
        folders = {split: folder / split for split in wanted}
    else:
        folders = dict.fromkeys(wanted, folder)
    pieces = {}
    for split, saved in folders.items():
        files = [saved / name for name in _read(saved / "state.json", "_data_files", "filename")]
        for file in files:
            if not is_inside(folder, file):
                raise DatasetError(
                    f"{saved / 'state.json'} names {shown(str(file), 200)}, which is outside {folder}",
                    "Save the dataset again with save_to_disk",
                )
        pieces[split] = _open_files(folder.name, files, [(folder, file.parent) for file in files], config)
    return _cut(folder.name, pieces, config, folder)


def _read(file: Path, field: str, of_each: str = "") -> list[str]:
    """A list of texts in a file of JSON; or of each object in it, one text."""
    try:
        values = plain.read_json(file)[field]
        texts: list[str] = [value[of_each] for value in values] if of_each else values
    except (OSError, ValueError, KeyError, TypeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise DatasetError(f"{file} cannot be read: {reason}", "Save the dataset again with save_to_disk") from None
    if not isinstance(texts, list) or not texts or not all(isinstance(text, str) for text in texts):
        raise DatasetError(f"{file} has no names in {field}", "Save the dataset again with save_to_disk")
    return texts


def _open_files(
    name: str, files: Sequence[Path], bases: Sequence[tuple[Path, ...]], config: CacheConfig
) -> tuple[Piece, ...]:
    suffixes = sorted({_suffix(file) for file in files})
    packed = next((file for file in files if _PACKED_TAR.search(file.name)), None)
    if packed:
        raise DatasetError(
            f"{packed} is a compressed tar, in which no image can be found without unpacking all before it",
            f"Unpack it once: {console.command('tar', '-xf', packed, '-C', 'DIR')}, and give DIR; or keep the tar, "
            "uncompressed, as .tar",
        )
    if len(suffixes) != 1 or suffixes[0] not in SUFFIXES:
        kinds = " and ".join(suffix or "no suffix" for suffix in suffixes)
        raise DatasetError(f"{name} is not a table: {kinds}", f"Give files of one kind: {' '.join(SUFFIXES)}")
    groups = GroupReader()
    pieces = []
    for file, file_bases in zip(files, bases, strict=True):
        try:
            with plain.open_plain(file) as opened:
                stat = stat_numbers(os.fstat(opened.fileno()))
        except OSError as error:
            raise DatasetError(f"{file} cannot be read: {error.strerror}", "Use another source") from None
        rows = _open_file(file, suffixes[0], groups, config)
        pieces.append(Piece(rows, range(rows.num_rows), file_bases, stat))
    return tuple(pieces)


def _open_file(file: Path, suffix: str, groups: GroupReader, config: CacheConfig) -> FileRows | Tar:
    match suffix:
        case ".csv" | ".tsv":
            return read_csv(file, "\t" if suffix == ".tsv" else ",")
        case ".json" | ".jsonl":
            return read_json(file)
        case ".parquet":
            return read_parquet(file, groups)
        case ".arrow":
            return read_arrow(file)
        case _:
            return read_tar(file, config.image_column)


def _cut(name: str, splits: dict[str, tuple[Piece, ...]], config: CacheConfig, base: Path) -> Table:
    """The rows that ``cache.split`` means.

    Raises:
        DatasetError: there are none.
    """
    numbers = {split: sum(len(piece.used) for piece in pieces) for split, pieces in splits.items()}
    used: list[Piece] = []
    for split, rows in rows_of_split(name, config.split, numbers):
        first = 0
        for piece in splits[split]:
            start, stop = max(rows.start - first, 0), min(rows.stop - first, len(piece.used))
            if start < stop or not any(numbers.values()):
                used.append(Piece(piece.rows, range(start, stop), piece.bases, piece.stat))
            first += len(piece.used)
    if not used or not any(len(piece.used) for piece in used):
        skipped = [skip for piece in used if isinstance(piece.rows, Tar) for skip in piece.rows.skipped]
        examples = f" ({len(skipped)} skipped: {skipped[0].path}: {skipped[0].reason})" if skipped else ""
        raise DatasetError(f"{name} has no rows{examples}", "Use another source, or set cache.split to one with rows")
    return Table(name, tuple(used), base)


def _only(config: CacheConfig, split: str) -> CacheConfig:
    return CacheConfig(split=split, dataset_config=config.dataset_config)


def of_one_kind(files: Sequence[Name]) -> list[Name]:
    """The files of the most frequent kind of table, as `datasets` chooses; of a draw, Parquet."""
    tables = [file for file in files if _suffix(Path(file)) in SUFFIXES and Path(file).name not in METADATA]
    counts = {suffix: sum(_suffix(Path(file)) == suffix for file in tables) for suffix in SUFFIXES}
    best = max(counts, key=lambda suffix: (counts[suffix], suffix == ".parquet", suffix == ".arrow"))
    return [file for file in tables if _suffix(Path(file)) == best]


def _suffix(file: Path) -> str:
    """In lower case; of ``cats.csv.gz``, ``.csv``."""
    name = file.name.lower()
    inner = Path(name.removesuffix(".gz")).suffix
    return inner if inner in (".csv", ".tsv", ".json", ".jsonl") else Path(name).suffix


def _sort(kind: pa.DataType) -> str:
    return "images" if is_images(kind) else "text" if is_text(kind) else "other"

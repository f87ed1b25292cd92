"""Images in a table, in tars or in a dataset: which rows can be trained on, and how is each read? All by `datasets`.

`datasets` is imported by the functions that load, and copies what it loads to its own cache as Arrow; from there single
rows are read.
"""

from __future__ import annotations

import csv
import errno
import hashlib
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from k5cache.options import CacheConfig
from k5cache.shared.errors import DatasetError
from k5cache.sources.captions import Captions, finish, from_cell, from_lines, without_source
from k5cache.sources.items import IMAGE_SUFFIXES, Content, MaskFile, Skipped, SourceItem, UnreadableImage

BUILDERS = {
    ".csv": "csv", ".tsv": "csv", ".json": "json", ".jsonl": "json", ".parquet": "parquet", ".arrow": "arrow",
    ".tar": "webdataset",
}  # fmt: skip
CAPTION_COLUMNS = ("text", "caption", "captions", "prompt", "txt")
PATH_COLUMNS = ("image", "file_name", "image_path", "path", "filename")
MASK_COLUMNS = ("mask", "mask.png", "mask.webp")
_FULL = (errno.ENOSPC, errno.EDQUOT)  # the console says these

Items = tuple[list[SourceItem], list[Skipped], Callable[[str], Content]]


@dataclass(frozen=True)
class Table:
    """Rows as `datasets` has them, and what tells whether they changed."""

    name: str
    """For messages, and before the row numbers in paths."""
    rows: Any
    """A ``datasets.Dataset``."""
    base: Path | None
    """Where paths in it start; None for a dataset that is no file here."""
    files: tuple[Path, ...] = ()
    """Their stats tell whether a row may have changed; the dataset's fingerprint where there are none."""

    @property
    def schema(self) -> pa.Schema:
        """Column names and Arrow types."""
        return self.rows.features.arrow_schema

    def column(self, name: str) -> pa.ChunkedArray:
        """A whole column, mapped from disk."""
        return self.rows.select_columns([name]).with_format("arrow")[:].column(0)

    def refuse(self, problem: str, option: str) -> DatasetError:
        """The error that names the columns there are."""
        names = ", ".join(self.schema.names)
        return DatasetError(f"{self.name} {problem}; its columns are {names}", f"Set {option}, or use another source")


def load_files(name: str, files: Sequence[Path], config: CacheConfig) -> Table:
    """One table of all ``files``, which are of one kind.

    Raises:
        DatasetError: `datasets` cannot read them, or they are of several kinds.
    """
    suffixes = sorted({file.suffix.lower() for file in files})
    if len(suffixes) != 1 or suffixes[0] not in BUILDERS:
        found = " and ".join(suffix or "no suffix" for suffix in suffixes)
        raise DatasetError(f"{name} is no table: {found}", f"Give files of one kind: {' '.join(BUILDERS)}")
    options: dict[str, Any] = {"data_files": {config.split.partition("[")[0]: [str(file) for file in files]}}
    if BUILDERS[suffixes[0]] == "csv":
        options |= _csv_options(name, files[0], "\t" if suffixes[0] == ".tsv" else ",")
    fix = f"Mend {'it' if len(files) == 1 else 'them'}, or use another source"
    if suffixes == [".tar"]:
        fix = "Give every image the same kinds of files, side by side: 0001.jpg and 0001.txt, 0002.jpg and 0002.txt"
    rows = _load(name, fix, BUILDERS[suffixes[0]], split=config.split, **options)
    return Table(name, rows, files[0].parent, tuple(files))


def load_folder(folder: Path, config: CacheConfig) -> Table:
    """A folder of data files as on the hub (``data/train-00000-of-00002.parquet``), or one of ``save_to_disk``."""
    fix = "Mend it, or set cache.split to one that it has"
    files = tuple(sorted(file for file in folder.rglob("*") if file.suffix.lower() in BUILDERS and file.is_file()))
    if not is_saved(folder):
        rows = _load(str(folder), fix, str(folder), name=config.dataset_config, split=config.split)
        return Table(folder.name, rows, folder, files)
    rows = _load(str(folder), fix, folder)
    if isinstance(rows, dict):
        split, _, part = config.split.partition("[")
        if split not in rows or part:
            raise DatasetError(
                f"{folder} has no split {config.split}; it has {', '.join(rows)}", "Set cache.split to one of them"
            )
        rows = rows[split]
    return Table(folder.name, rows, None, files)


def load_hub(name: str, config: CacheConfig) -> Table:
    """A dataset of the hub. Raises ``DatasetError`` when it cannot be reached, or lacks the split or configuration."""
    fix = "Check the path or name, the network, and cache.split and cache.dataset_config"
    problem = f"There is no file or folder {name}, and as a dataset of the hub it"
    return Table(name, _load(problem, fix, name, name=config.dataset_config, split=config.split), None)


def is_saved(folder: Path) -> bool:
    """Whether ``Dataset.save_to_disk`` made this folder."""
    return (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file()


def find_items(table: Table, config: CacheConfig) -> Items:
    """The rows that have an image and a caption, those that cannot be used, and how to read an image.

    Raises:
        DatasetError: no column holds images, or captions.
    """
    column = _image_column(table, config.image_column)
    if not _is_embedded(table.schema.field(column).type):
        if table.base is None:
            raise table.refuse(f"holds names of images in {column}, not images", "cache.image_column")
        items, skipped = files_named(table, column, config, table.base)
        base = table.base
        return items, skipped, lambda path: base / path
    return _embedded(table, column, config)


def files_named(
    table: Table, column: str, config: CacheConfig, root: Path, is_strict: bool = False
) -> tuple[list[SourceItem], list[Skipped]]:
    """Items for a table that names image files. A file that several rows name has the captions of all of them.

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
        reason = _why_not(name, file, table, is_strict)
        if reason or isinstance(captions, str):
            skipped.append(Skipped(path if name else f"{table.name}#{i}", reason or str(captions)))
        elif path in items:
            items[path] = replace(items[path], captions=items[path].captions + tuple(captions))
        else:
            items[path] = SourceItem(path, *_stat(file), captions=captions, mask=_mask_beside(file, path))
    return sorted(items.values(), key=lambda item: item.path), skipped


def _why_not(name: str, file: Path, table: Table, is_strict: bool) -> str:
    if not name:
        return "names no file"
    if "://" in name:
        return "is an address: download the images first"
    if is_strict and (Path(name).is_absolute() or ".." in Path(os.path.normpath(name)).parts):
        return f"lies outside the folder of {table.name}"
    return "" if file.is_file() else f"is named in {table.name}, and is not there"


def _mask_beside(file: Path, path: str) -> MaskFile | None:
    for suffix in (".mask.png", ".mask.webp"):
        mask = file.with_name(file.stem + suffix)
        if mask.is_file():
            return MaskFile(path[: -len(file.name)] + mask.name, *_stat(mask))
    return None


def _stat(file: Path) -> tuple[int, int, int]:
    stat = file.stat()
    return stat.st_size, stat.st_mtime_ns, stat.st_ino & (2**63 - 1)


def _embedded(table: Table, column: str, config: CacheConfig) -> Items:
    """Items for a table that holds the images themselves."""
    is_tar = "__url__" in table.schema.names and "__key__" in table.schema.names
    if is_tar:
        urls, keys = (table.column(name).to_pylist() for name in ("__url__", "__key__"))
        short = {url: Path(url).name for url in urls}
        short = short if len(set(short.values())) == len(short) else {url: url for url in short}
        paths = [f"{short[url]}/{key}.{column}" for url, key in zip(urls, keys, strict=True)]
        names, stamps = keys, {url: _stamp(table, Path(url)) for url in short}
        stamp_of = [stamps[url] for url in urls]
    else:
        paths = [f"{table.name}#{i}" for i in range(len(table.rows))]
        names, stamp_of = _inner_names(table, column), [_stamp(table)] * len(paths)
    mask_column = next((name for name in MASK_COLUMNS if _has_images(table, name)), "")
    has_mask = _is_filled(table, mask_column) if mask_column else [False] * len(paths)
    cells: dict[str, tuple[int, str]] = {}
    items: list[SourceItem] = []
    skipped: list[Skipped] = []
    filled, captions = _is_filled(table, column), _captions(table, config, names)
    for i, path in enumerate(paths):
        found = captions[i]
        if isinstance(found, str) or not filled[i]:
            skipped.append(Skipped(path, str(found) if filled[i] else "holds no image"))
            continue
        if path in cells:
            skipped.append(Skipped(path, "is there a second time"))
            continue
        cells[path] = (i, column)
        mask = None
        if has_mask[i]:
            mask_path = f"{path.removesuffix('.' + column)}.{mask_column}"
            cells[mask_path] = (i, mask_column)
            mask = MaskFile(mask_path, *_at(stamp_of[i], mask_path))
        items.append(SourceItem(path, *_at(stamp_of[i], path), captions=found, mask=mask))
    columns = {name: table.rows.select_columns([name]).with_format("arrow") for name in {column, mask_column} - {""}}

    def read(path: str) -> Content:
        row, name = cells[path]
        cell = columns[name][row].column(0)[0].as_py()
        content = cell["bytes"] if isinstance(cell, dict) else cell
        if content is None:
            return Path(cell["path"])
        if not content:
            raise UnreadableImage("is empty (0 bytes)")
        return content

    return sorted(items, key=lambda item: item.path), skipped, read


def _stamp(table: Table, file: Path | None = None) -> tuple[int, int, str]:
    """(bytes, mtime, the rest) of the file that rows lie in, of all files, or of a dataset that is no file here."""
    files = [file] if file and file.is_file() else table.files
    if not files:
        return 0, 0, str(table.rows._fingerprint)
    stats = [_stat(f) for f in files]
    return sum(s[0] for s in stats), max(s[1] for s in stats), str(stats)


def _at(stamp: tuple[int, int, str], path: str) -> tuple[int, int, int]:
    """A stat for one row: as the file's, and in the place of an inode a number that no other row of it has."""
    digest = hashlib.sha256(f"{stamp[2]} {path}".encode()).digest()
    return stamp[0], stamp[1], int.from_bytes(digest[:8]) >> 1


def _inner_names(table: Table, column: str) -> list[str]:
    """The file names that images in a table came from, where it says."""
    cells = table.column(column)
    if not pa.types.is_struct(cells.type) or "path" not in cells.type.names:
        return [""] * len(cells)
    return [name or "" for name in pc.struct_field(cells, "path").to_pylist()]


def _is_filled(table: Table, column: str) -> list[bool]:
    """Which rows have an image; reads no image."""
    cells = table.column(column)
    if not pa.types.is_struct(cells.type):
        return cells.is_valid().to_pylist()
    fields = [name for name in ("bytes", "path") if name in cells.type.names]
    parts = [pc.struct_field(cells, name).is_valid().to_pylist() for name in fields]
    in_tar = "__url__" in table.schema.names  # there `path` is a name inside the tar, and always there
    return parts[0] if in_tar else [any(found) for found in zip(*parts, strict=True)]


def _has_images(table: Table, name: str) -> bool:
    return name in table.schema.names and _is_embedded(table.schema.field(name).type)


def _is_embedded(kind: pa.DataType) -> bool:
    if pa.types.is_struct(kind):
        return "bytes" in kind.names
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind)


def _image_column(table: Table, wanted: str | None) -> str:
    schema = table.schema
    if wanted is not None:
        if wanted not in schema.names:
            raise table.refuse(f"has no column {wanted}", "cache.image_column")
        kind = schema.field(wanted).type
        if not _is_embedded(kind) and not _is_text(kind):
            raise table.refuse(f"has no images in {wanted} but {kind}", "cache.image_column")
        return wanted
    suffixes = {suffix[1:] for suffix in IMAGE_SUFFIXES}
    embedded = [
        name for name in schema.names
        if _is_embedded(schema.field(name).type) and name not in MASK_COLUMNS
        and (pa.types.is_struct(schema.field(name).type) or name.lower() in suffixes | set(PATH_COLUMNS))
    ]  # fmt: skip
    if len(embedded) > 1 and "image" not in embedded:
        raise table.refuse(f"has images in {' and '.join(embedded)}", "cache.image_column to one of them")
    paths = [name for name in PATH_COLUMNS if name in schema.names and _is_text(schema.field(name).type)]
    found = (["image"] if "image" in embedded else embedded) or paths
    if not found:
        raise table.refuse("has no column of images", "cache.image_column to the one with images or their paths")
    return found[0]


def _is_text(kind: pa.DataType) -> bool:
    return pa.types.is_string(kind) or pa.types.is_large_string(kind)


def _captions(table: Table, config: CacheConfig, names: Sequence[str]) -> list[Captions]:
    """One entry a row. ``names`` are of the images, for the strategies that read them."""
    if config.caption_strategy in ("filename", "instanceprompt"):
        known = [without_source(name, config) for name in names]
        return [finish(captions or "empty caption", config) for captions in known]
    wanted = config.caption_column
    if wanted is None:
        found = [name for name in CAPTION_COLUMNS if name in table.schema.names]
        if len(found) != 1:
            problem = f"has captions in {' and '.join(found)}" if found else "has no column of captions"
            raise table.refuse(problem, "cache.caption_column to the one with captions")
        wanted = found[0]
    name, *fields = [wanted] if wanted in table.schema.names else wanted.split(".")
    if name not in table.schema.names:
        raise table.refuse(f"has no column {wanted}", "cache.caption_column to the one with captions")
    cells = table.column(name).to_pylist()
    for field in fields:
        inside = {key for cell in cells if isinstance(cell, dict) for key in cell}
        if field not in inside:
            held = f"fields {', '.join(sorted(inside))}" if inside else "no fields"
            raise table.refuse(f"has no {wanted}: {name} has {held}", "cache.caption_column")
        cells = [cell.get(field) if isinstance(cell, dict) else None for cell in cells]
    if name == "txt":  # of a tar: a caption file as beside an image in a folder
        return [finish(from_lines(cell) if isinstance(cell, str) else from_cell(cell), config) for cell in cells]
    return [finish(from_cell(cell), config) for cell in cells]


def _csv_options(name: str, file: Path, separator: str) -> dict[str, Any]:
    """Every cell as the text that it is: pandas would make ``007`` a number and ``null`` nothing."""
    import datasets

    try:
        with file.open(encoding="utf-8-sig", newline="") as opened:
            lines = csv.reader(opened, delimiter=separator)
            header, first = next(lines, []), next((line for line in lines if line), [])
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DatasetError(f"{name} cannot be read: {error}", "Mend it; it must be UTF-8") from None
    if not header or len(set(header)) < len(header):
        raise DatasetError(
            f"{name} has {'two columns of one name' if header else 'no header line'}", "Give each column a name"
        )
    if len(first) > len(header):  # of later rows pandas complains; of this one it would take cells for an index
        raise DatasetError(
            f"{name}: its first row has {len(first)} cells, the header {len(header)}",
            "Put captions with commas into quotes",
        )
    features = datasets.Features({column: datasets.Value("string") for column in header})
    return {"sep": separator, "features": features, "keep_default_na": False}


def _load(title: str, fix: str, what: str | Path, **options: Any) -> Any:
    """``datasets.load_dataset``, or ``load_from_disk`` for a ``Path``; its errors as one line."""
    import datasets

    datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # it logs what it then raises
    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
    try:
        return datasets.load_from_disk(what) if isinstance(what, Path) else datasets.load_dataset(what, **options)
    except Exception as error:
        # Builders raise whatever pandas, pyarrow, tarfile, fsspec and the hub's client raise, often wrapped twice.
        root: BaseException = error
        while root.__cause__ is not None and not isinstance(root, OSError):
            root = root.__cause__
        if isinstance(root, OSError) and root.errno in _FULL:
            raise
        reason = " ".join(str(root).split()) or type(root).__name__
        raise DatasetError(f"{title} cannot be loaded: {reason[:300]}", fix) from None

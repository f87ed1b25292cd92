"""How are tables, tars and datasets opened? `datasets` reads them and copies them to its own cache as Arrow.

Only the functions that load import `datasets`. ``table_items`` finds the images and captions in the rows.
"""

from __future__ import annotations

import csv
import errno
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from k5cache.options import CacheConfig
from k5cache.shared.errors import DatasetError

BUILDERS = {
    ".csv": "csv", ".tsv": "csv", ".json": "json", ".jsonl": "json", ".parquet": "parquet", ".arrow": "arrow",
    ".tar": "webdataset",
}  # fmt: skip
_FULL = (errno.ENOSPC, errno.EDQUOT)  # the disk is full; the console explains these


@dataclass(frozen=True)
class Table:
    """Rows that `datasets` opened, and the files that tell whether they changed."""

    name: str
    """Used in messages, and before the row number in paths."""
    rows: Any
    """A ``datasets.Dataset``."""
    base: Path | None
    """Paths in it are relative to this folder; None if the dataset has no files here."""
    files: tuple[Path, ...] = ()
    """Their stats tell whether a row may have changed. If there are none, the dataset's fingerprint does."""

    @property
    def schema(self) -> pa.Schema:
        """Column names and Arrow types."""
        return self.rows.features.arrow_schema

    def column(self, name: str) -> pa.ChunkedArray:
        """A whole column, mapped from disk."""
        return self.rows.select_columns([name]).with_format("arrow")[:].column(0)

    def refuse(self, problem: str, option: str) -> DatasetError:
        """An error that lists the columns of the table."""
        names = ", ".join(self.schema.names)
        return DatasetError(f"{self.name} {problem}; its columns are {names}", f"Set {option}, or use another source")


def load_files(name: str, files: Sequence[Path], config: CacheConfig) -> Table:
    """Open ``files``, which are all of one kind, as one table.

    Raises:
        DatasetError: `datasets` cannot read them, or they are of several kinds.
    """
    suffixes = sorted({file.suffix.lower() for file in files})
    if len(suffixes) != 1 or suffixes[0] not in BUILDERS:
        kinds = " and ".join(suffix or "no suffix" for suffix in suffixes)
        raise DatasetError(f"{name} is not a table: {kinds}", f"Give files of one kind: {' '.join(BUILDERS)}")
    options: dict[str, Any] = {"data_files": {config.split.partition("[")[0]: [str(file) for file in files]}}
    if BUILDERS[suffixes[0]] == "csv":
        options |= _csv_options(name, files[0], "\t" if suffixes[0] == ".tsv" else ",")
    fix = f"Repair {'it' if len(files) == 1 else 'them'}, or use another source"
    if suffixes == [".tar"]:
        fix = "Give every image the same kinds of files, side by side: 0001.jpg and 0001.txt, 0002.jpg and 0002.txt"
    rows = _load(name, fix, BUILDERS[suffixes[0]], split=config.split, **options)
    return Table(name, rows, files[0].parent, tuple(files))


def load_folder(folder: Path, config: CacheConfig) -> Table:
    """Open a folder of data files as on the hub (``data/train-00000-of-00002.parquet``), or one of ``save_to_disk``."""
    fix = "Repair it, or set cache.split to one that it has"
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
    """Open a dataset on the hub.

    Raises:
        DatasetError: it cannot be reached, or lacks the split or configuration.
    """
    fix = "Check the path or name, the network, and cache.split and cache.dataset_config"
    problem = f"There is no file or folder {name}, and as a dataset of the hub it"
    return Table(name, _load(problem, fix, name, name=config.dataset_config, split=config.split), None)


def is_saved(folder: Path) -> bool:
    """Whether ``Dataset.save_to_disk`` made this folder."""
    return (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file()


def _csv_options(name: str, file: Path, separator: str) -> dict[str, Any]:
    """Options that read every cell as text: pandas would turn ``007`` into 7 and ``null`` into nothing."""
    import datasets

    try:
        with file.open(encoding="utf-8-sig", newline="") as text:
            lines = csv.reader(text, delimiter=separator)
            header, first = next(lines, []), next((line for line in lines if line), [])
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DatasetError(f"{name} cannot be read: {error}", "Repair it; it must be UTF-8") from None
    if not header or len(set(header)) < len(header):
        raise DatasetError(
            f"{name} has {'two columns with the same name' if header else 'no header line'}", "Give each column a name"
        )
    if len(first) > len(header):  # pandas refuses this in later rows, but in the first it takes cells as an index
        raise DatasetError(
            f"{name}: its first row has {len(first)} cells, the header {len(header)}",
            "Put captions with commas into quotes",
        )
    features = datasets.Features({column: datasets.Value("string") for column in header})
    return {"sep": separator, "features": features, "keep_default_na": False}


def _load(title: str, fix: str, source: str | Path, **options: Any) -> Any:
    """Call ``datasets.load_dataset``, or ``load_from_disk`` for a ``Path``, and turn errors into one line."""
    import datasets

    datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # it logs errors that it then raises
    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
    try:
        return datasets.load_from_disk(source) if isinstance(source, Path) else datasets.load_dataset(source, **options)
    except Exception as error:
        # Any error of pandas, pyarrow, tarfile, fsspec or the hub's client can come out here, often wrapped twice.
        root: BaseException = error
        while root.__cause__ is not None and not isinstance(root, OSError):
            root = root.__cause__
        if isinstance(root, OSError) and root.errno in _FULL:
            raise
        reason = " ".join(str(root).split()) or type(root).__name__
        raise DatasetError(f"{title} cannot be loaded: {reason[:300]}", fix) from None

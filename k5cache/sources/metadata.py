"""Which images of a folder do its metadata files name, and which of them belong to the split that is asked for?"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from k5cache.options import CacheConfig
from k5cache.shared.errors import DatasetError
from k5cache.sources import folder
from k5cache.sources.items import METADATA, Skipped, SourceItem

if TYPE_CHECKING:
    from k5cache.sources.table_items import Listing

SPLIT_WORDS = {  # datasets.data_files.SPLIT_KEYWORDS
    "train": ("train", "training"),
    "validation": ("validation", "valid", "dev", "val"),
    "test": ("test", "testing", "eval", "evaluation"),
}
_SPLITS = {  # as datasets' KEYWORDS_IN_DIR_NAME_BASE_PATTERNS: ``train``, ``train-1``, ``my_train``, not ``trains``
    split: re.compile(rf"(.*[-._ 0-9])?({'|'.join(words)})([-._ 0-9].*)?", re.DOTALL)
    for split, words in SPLIT_WORDS.items()
}


def metadata_files(source: Path, leave_out: Path | None = None) -> list[Path]:
    """Every metadata file below ``source``, apart from hidden ones and those below ``leave_out``."""
    return sorted(file for file in folder.files(source, leave_out) if file.name in METADATA)


def find_items(
    source: Path, files: Sequence[Path], config: CacheConfig, has_sources: bool = False, leave_out: Path | None = None
) -> Listing:
    """Read metadata files as imagefolder of `datasets` does: each names images relative to its own folder.

    Args:
        has_sources: a column names the source of each image.
        leave_out: a folder that is not entered.

    Raises:
        DatasetError: the files are of several kinds, or ``cache.split`` is not one that the folder has.
    """
    from k5cache.sources import table_items, tables
    from k5cache.sources.table_cells import Cell, reader
    from k5cache.sources.table_sources import by_path, sources_of_rows

    if len({file.name for file in files}) > 1:
        names = ", ".join(file.relative_to(source).as_posix() for file in files[:4])
        raise DatasetError(f"{source} has metadata files of several kinds: {names}", "Keep the files of one kind")
    split = _split_of(source, config)
    files = _files_of(split, source, files, config.split)
    items: dict[str, SourceItem] = {}
    skipped: list[Skipped] = []
    cells: dict[str, Cell] = {}
    for file in files:
        table = tables.load_files(file.relative_to(source).as_posix(), [file], _without_names(config))
        column = config.image_column or "file_name"
        if column not in table.schema.names:
            raise table.refuse(f"has no column {column}", "cache.image_column to the one with file names")
        sources = sources_of_rows(table, config, source) if has_sources else None
        named, refused = table_items.files_named(table, column, config, source, sources)
        for item in named:
            joined = table_items.joined(items.get(item.path), item, table.name)
            if isinstance(joined, Skipped):
                skipped.append(joined)
            else:
                items[item.path] = joined
        skipped += refused
        cells |= by_path(sources or ())
    # A README names metadata files, and their rows name the images; folders named like splits divide the images too.
    why_not = {path: split.why_not(path) for path in items if split.declared is None}
    of_others = {path: reason for path, reason in why_not.items() if reason}
    skipped += [Skipped(path, reason) for path, reason in of_others.items()]
    scanned = folder.scan(source, leave_out)
    known = items.keys() | {skip.path for skip in skipped} | cells.keys()
    for image in scanned.images:
        if image.path not in known:
            skipped.append(Skipped(image.path, split.why_not(image.path) or f"has no row in {files[0].name}"))
    used = [item for path, item in items.items() if path not in of_others]
    unusable = [skip for skip in scanned.skipped if skip.path not in items]
    return sorted(used, key=lambda item: item.path), skipped + unusable, lambda path: source / path, reader(cells)


@dataclass(frozen=True)
class _Split:
    """The split that is asked for, among those of a folder with metadata files."""

    names: tuple[str, ...]
    """``train[:10]+test`` asks for ``train`` and ``test``."""
    declared: frozenset[str] | None
    """The files that the folder's README says belong to it; None if it declares nothing."""

    def why_not(self, path: str) -> str:
        """Why a file does not belong to the split; "" if it does, or if neither README nor folders say."""
        if self.declared is not None:
            return "" if path in self.declared else f"is not in the split {' and '.join(self.names)} of the README"
        others = splits_of(path)
        return "" if not others or others & {*self.names} else f"belongs to the split {' and '.join(sorted(others))}"


def _split_of(source: Path, config: CacheConfig) -> _Split:
    """Raises ``DatasetError`` if the README declares splits and this is not one of them."""
    from k5cache.sources.splits import names_of_split, read_card, split_names

    names = tuple(split_names(config.split))
    card = read_card(source)
    configs = (card.to_dict().get("configs") or []) if card is not None else []
    if not isinstance(configs, list) or not all(isinstance(declared, dict) for declared in configs):
        raise DatasetError(f"The README of {source} declares no list of objects", "Repair its field `configs`")
    if not any(declared.get("data_files") for declared in configs):
        return _Split(names, None)
    every = [file.relative_to(source).as_posix() for file in folder.files(source)]
    return _Split(names, frozenset(names_of_split(str(source), every, card, config)))


def splits_of(path: str) -> set[str]:
    """The splits that the folders in a relative path name: none, one, or several for ``train/test/a.png``."""
    folders = path.split("/")[:-1]
    return {split for split, pattern in _SPLITS.items() if any(map(pattern.fullmatch, folders))}


def _files_of(split: _Split, source: Path, files: Sequence[Path], option: str) -> list[Path]:
    """The metadata files of the split, as `datasets` chooses them: all of them if nothing is named like a split."""
    paths = {file: file.relative_to(source).as_posix() for file in files}
    present = set() if split.declared is not None else set().union(*map(splits_of, paths.values()))
    if present and not present.issuperset(split.names):
        raise DatasetError(
            f"{source} has no split {option}; its folders name {' and '.join(sorted(present))}",
            "Set cache.split to one of them, or rename these folders",
        )
    chosen = [file for file, path in paths.items() if not split.why_not(path) and (splits_of(path) or not present)]
    if not chosen:
        raise DatasetError(
            f"The README of {source} puts none of its metadata files into the split {option}",
            "Add them to its field `configs`, or set cache.split to another",
        )
    if "[" in option and len(chosen) > 1:
        raise DatasetError(
            f"cache.split = {option} is a part of one table, and {source} has {len(chosen)} metadata files",
            "Set cache.split without [ ], or write one metadata file",
        )
    return chosen


def _without_names(config: CacheConfig) -> CacheConfig:
    """The options for one metadata file: all its rows, or the slice of them that ``split`` asks for."""
    return replace(config, split="train" + "".join(config.split.partition("[")[1:]))

"""Which images of a folder do its metadata files name, and which of them belong to the split that is asked for?"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from k5cache.options import CacheConfig
from k5cache.shared.errors import DatasetError
from k5cache.sources import folder
from k5cache.sources.items import Skipped, SourceItem

METADATA = ("metadata.jsonl", "metadata.csv", "metadata.parquet")  # datasets' FolderBasedBuilder.METADATA_FILENAMES
SPLIT_WORDS = {  # datasets.data_files.SPLIT_KEYWORDS
    "train": ("train", "training"),
    "validation": ("validation", "valid", "dev", "val"),
    "test": ("test", "testing", "eval", "evaluation"),
}
_SPLITS = {  # as datasets' KEYWORDS_IN_DIR_NAME_BASE_PATTERNS: ``train``, ``train-1``, ``my_train``, not ``trains``
    split: re.compile(rf"(.*[-._ 0-9])?({'|'.join(words)})([-._ 0-9].*)?", re.DOTALL)
    for split, words in SPLIT_WORDS.items()
}


def metadata_files(source: Path) -> list[Path]:
    """Every metadata file below ``source``, apart from hidden ones."""
    return sorted(file for file in folder.files(source) if file.name in METADATA)


def find_items(source: Path, files: Sequence[Path], config: CacheConfig) -> tuple[list[SourceItem], list[Skipped]]:
    """Read metadata files as imagefolder of `datasets` does: each names images relative to its own folder.

    Raises:
        DatasetError: the files are of several kinds, or ``cache.split`` is not one that the folder has.
    """
    from k5cache.sources import table_items, tables

    if len({file.name for file in files}) > 1:
        names = ", ".join(file.relative_to(source).as_posix() for file in files[:4])
        raise DatasetError(f"{source} has metadata files of several kinds: {names}", "Keep the files of one kind")
    files = _of_split(source, files, config.split)
    items: dict[str, SourceItem] = {}
    skipped: list[Skipped] = []
    for file in files:
        table = tables.load_files(file.relative_to(source).as_posix(), [file], _without_names(config))
        column = config.image_column or "file_name"
        if column not in table.schema.names:
            raise table.refuse(f"has no column {column}", "cache.image_column to the one with file names")
        named, refused = table_items.files_named(table, column, config, source, is_strict=True)
        for item in named:
            before = items[item.path].captions if item.path in items else ()
            items[item.path] = replace(item, captions=before + item.captions)
        skipped += refused
    of_others = {path: reason for path in items if (reason := _other_split(path, config.split))}
    skipped += [Skipped(path, reason) for path, reason in of_others.items()]
    scanned = folder.scan(source)
    known = items.keys() | {skip.path for skip in skipped}
    for image in scanned.images:
        if image.path not in known:
            reason = _other_split(image.path, config.split) or f"has no row in {files[0].name}"
            skipped.append(Skipped(image.path, reason))
    used = [item for path, item in items.items() if path not in of_others]
    return sorted(used, key=lambda item: item.path), skipped + [
        skip for skip in scanned.skipped if skip.path not in items
    ]


def splits_of(path: str) -> set[str]:
    """The splits that the folders in a relative path name: none, one, or several for ``train/test/a.png``."""
    folders = path.split("/")[:-1]
    return {split for split, pattern in _SPLITS.items() if any(map(pattern.fullmatch, folders))}


def _of_split(source: Path, files: Sequence[Path], option: str) -> Sequence[Path]:
    """The files of the split, as `datasets` chooses them: all of them if no folder is named like a split."""
    splits = {file: splits_of(file.relative_to(source).as_posix()) for file in files}
    present, wanted = set().union(*splits.values()), _names(option)
    if present and not wanted <= present:
        raise DatasetError(
            f"{source} has no split {option}; its folders name {' and '.join(sorted(present))}",
            "Set cache.split to one of them, or rename these folders",
        )
    chosen = [file for file, of_file in splits.items() if of_file & wanted] if present else list(files)
    if "[" in option and len(chosen) > 1:
        raise DatasetError(
            f"cache.split = {option} is a part of one table, and {source} has {len(chosen)} metadata files",
            "Set cache.split without [ ], or write one metadata file",
        )
    return chosen


def _other_split(path: str, option: str) -> str:
    """Why an image does not belong to the split; "" if it does, or if its folders name none."""
    splits = splits_of(path)
    return "" if not splits or splits & _names(option) else f"belongs to the split {' and '.join(sorted(splits))}"


def _names(option: str) -> set[str]:
    """``train[:10]+test`` -> ``{"train", "test"}``."""
    return {part.partition("[")[0].strip() for part in option.split("+")}


def _without_names(config: CacheConfig) -> CacheConfig:
    """The options for one metadata file: all its rows, or the slice of them that ``split`` asks for."""
    return replace(config, split="train" + "".join(config.split.partition("[")[1:]))

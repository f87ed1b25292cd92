"""Where do the images come from? One shape for a folder, a table, tars and a dataset: items, and how to read each."""

from __future__ import annotations

import glob
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from k5cache.options import CacheConfig
from k5cache.shared.errors import DatasetError
from k5cache.sources import folder
from k5cache.sources.items import IMAGE_SUFFIXES, Content, Skipped, SourceItem

METADATA = ("metadata.jsonl", "metadata.csv", "metadata.parquet")  # datasets' FolderBasedBuilder.METADATA_FILENAMES
_DATA = (".parquet", ".arrow", ".tar")  # a folder without images that holds these is a dataset
_SUFFIX = re.compile(r"\.(csv|tsv|jsonl?|parquet|arrow|tar)$", re.IGNORECASE)
_HUB_NAME = re.compile(r"\w[\w.-]*/\w[\w.-]*", re.ASCII)


@dataclass(frozen=True)
class Source:
    """The images that a user pointed at."""

    items: list[SourceItem]
    skipped: list[Skipped]
    read: Callable[[str], Content]
    """An image or mask by its ``path``: a file to open, or its bytes. Raises ``UnreadableImage``."""
    is_plain: bool = False
    """Whether it is a folder of images whose captions come from their names, text files beside them or an option."""


def find(source: Path, config: CacheConfig) -> Source:
    """Find the images at ``source`` and their captions. No image is opened.

    Args:
        source: a folder of images, or of tars or Parquet files; a table, a tar, or a pattern of them (``cats-*.tar``);
            a folder of ``Dataset.save_to_disk``; or the name of a dataset on the hub.

    Raises:
        DatasetError: nothing is there, or no image can be used.
    """
    images = _plain_folder(source, config) if source.is_dir() else None
    images = images or _from_tables(source, config)
    if not images.items:
        raise _no_image(source, images.skipped, config)
    return images


def default_name(source: Path) -> str:
    """What a cache of ``source`` is called: ``cats`` for ``data/cats/``, ``cats.csv``, ``cats-*.tar``, ``me/cats``."""
    if source.is_dir():
        return source.resolve().name or "images"
    return re.sub(r"[*?\[\]]+", "", _SUFFIX.sub("", source.name)).strip("-_. ") or "images"


def _plain_folder(source: Path, config: CacheConfig) -> Source | None:
    """A folder of image files; None if it has tables or tars and no image."""
    from_metadata = config.caption_strategy == "metadata"
    if from_metadata and _metadata_files(source):
        items, skipped = _from_metadata(source, config)
    else:
        items, skipped = folder.find_items(source, config)
    if not items and not folder.scan(source)[0] and _has_tables(source):
        return None
    if from_metadata and not _metadata_files(source):
        raise DatasetError(
            f"{source} has none of {', '.join(METADATA)}", "Add one, or set cache.caption_strategy to another"
        )
    return Source(items, skipped, lambda path: source / path, is_plain=not from_metadata)


def _from_metadata(source: Path, config: CacheConfig) -> tuple[list[SourceItem], list[Skipped]]:
    """Read metadata files as imagefolder of `datasets` does: each names images relative to its own folder."""
    from k5cache.sources import table_items, tables

    files = _metadata_files(source)
    if len({file.name for file in files}) > 1:
        names = ", ".join(file.relative_to(source).as_posix() for file in files[:4])
        raise DatasetError(f"{source} has metadata files of several kinds: {names}", "Keep the files of one kind")
    items: dict[str, SourceItem] = {}
    skipped: list[Skipped] = []
    for file in files:
        table = tables.load_files(file.relative_to(source).as_posix(), [file], config)
        column = config.image_column or "file_name"
        if column not in table.schema.names:
            raise table.refuse(f"has no column {column}", "cache.image_column to the one with file names")
        named, refused = table_items.files_named(table, column, config, source, is_strict=True)
        items |= {item.path: item for item in named}
        skipped += refused
    images, unusable = folder.scan(source)
    known = items.keys() | {skip.path for skip in skipped}
    skipped += [Skipped(image.path, f"has no row in {files[0].name}") for image in images if image.path not in known]
    return sorted(items.values(), key=lambda item: item.path), skipped + unusable


def _metadata_files(source: Path) -> list[Path]:
    return sorted(file for file in _visible(source) if file.name in METADATA)


def _has_tables(source: Path) -> bool:
    from k5cache.sources import tables

    return tables.is_saved(source) or any(
        file.suffix.lower() in _DATA and file.name not in METADATA for file in _visible(source)
    )


def _visible(source: Path) -> Iterator[Path]:
    """Every entry below ``source`` that is neither hidden nor in a hidden folder."""
    return (
        path for path in source.rglob("*") if not any(part.startswith(".") for part in path.relative_to(source).parts)
    )


def _from_tables(source: Path, config: CacheConfig) -> Source:
    """Images and captions from a table, tars or a dataset, all of which `datasets` reads."""
    name = str(source)
    files = [source] if source.is_file() else [Path(file) for file in sorted(glob.glob(name, recursive=True))]  # noqa: PTH207 (an absolute pattern too)
    if not files and not _HUB_NAME.fullmatch(name):
        raise DatasetError(
            f"There is no folder {source}",
            "Give a folder of images with .txt captions beside them, a table, a tar, or a dataset's name",
        )
    from k5cache.sources import table_items, tables

    if source.is_dir():
        table = tables.load_folder(source, config)
    elif files:
        table = tables.load_files(source.name, files, config)
    else:
        table = tables.load_hub(name, config)
    return Source(*table_items.find_items(table, config))


def _no_image(source: Path, skipped: list[Skipped], config: CacheConfig) -> DatasetError:
    examples = "; ".join(f"{s.path}: {s.reason}" for s in skipped[:3])
    problem = f"no image with a caption ({len(skipped)} skipped: {examples})" if skipped else "no image"
    suffixes = " ".join(sorted(IMAGE_SUFFIXES))
    fix = f"Put images ({suffixes}) there, each with a .txt caption beside it"
    if not source.is_dir():
        fix = "Correct these rows, or use another source"
    elif config.caption_strategy == "textfile" and (files := _metadata_files(source)):
        fix = (
            f"Set cache.caption_strategy=metadata to use {files[0].relative_to(source).as_posix()}, or write .txt files"
        )
    elif config.caption_strategy != "textfile":
        fix = f"Put images ({suffixes}) there"
    return DatasetError(f"{source} has {problem}", fix)

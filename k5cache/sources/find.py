"""Where do the images come from? One shape for a folder, a table, tars and a dataset: items, and how to read each."""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import reduce
from pathlib import Path

from k5cache.options import CacheConfig
from k5cache.shared.errors import DatasetError
from k5cache.shared.kind import Kind
from k5cache.shared.urls import is_url
from k5cache.sources import folder, metadata, source_folder
from k5cache.sources.finished import finished, notices_of_files
from k5cache.sources.items import IMAGE_SUFFIXES, METADATA, Content, Skipped, SourceItem, UnreadableImage
from k5cache.sources.paired_folder import scan_pairs
from k5cache.sources.pairs import NO_SOURCE

_DATA = (".parquet", ".arrow", ".tar")  # a folder without images that holds these is a dataset
_SUFFIX = re.compile(r"\.(csv|tsv|jsonl?|parquet|arrow|tar)$", re.IGNORECASE)
LAYOUTS = (
    "Give the folder of the sources, with the same names, by --sources DIR; or name pairs X_start.png and X_end.png, "
    "or X.source.png and X.png; or name the sources in a table's column `source`"
)
"""How sources may be given, for messages."""
_HUB_NAME = re.compile(r"\w[\w.-]*/\w[\w.-]*", re.ASCII)


def without_sources(path: str) -> Content:
    """What reads the sources where there are none."""
    raise UnreadableImage(f"{path} is not a source")


@dataclass(frozen=True)
class Source:
    """The images that a user pointed at."""

    items: list[SourceItem]
    skipped: list[Skipped]
    read: Callable[[str], Content]
    """An image or mask by its ``path``: a file to open, or its bytes. Raises ``UnreadableImage``."""
    is_plain: bool = False
    """Whether it is a folder of images whose captions come from their names, text files beside them or an option."""
    num_multiline: int = 0
    """Text files with several lines, each of which is a caption of its own."""
    read_source: Callable[[str], Content] = without_sources
    """For image-to-image, a source by its ``path`` (``SourceItem.source``). Otherwise as ``read``."""
    kind: Kind = "t2i"
    """For image-to-image, every item has a source."""
    notices: tuple[str, ...] = ()
    """What a person should know of how the captions came about, one sentence each."""


def find(source: Path, config: CacheConfig, kind: Kind = "t2i") -> Source:
    """Find the images at ``source`` and their captions, and for image-to-image their sources. No image is opened.

    Args:
        source: a folder of images, or of tars or Parquet files; a table, a tar, or a pattern of them (``cats-*.tar``);
            a folder of ``Dataset.save_to_disk``; or the name of a dataset on the hub.

            Folders, tables, tars and patterns may be at a URL; so may ``cache.source_dir``.

    Raises:
        DatasetError: nothing is there, or no image can be used.
        StoreError: the store of a URL cannot be reached, or refuses.
    """
    if is_url(source) or is_url(config.source_dir or ""):
        return _at_urls(source, config, kind)
    return _find(source, config, kind)


def _at_urls(source: Path, config: CacheConfig, kind: Kind) -> Source:
    """The same where URLs are named: of each there is a folder on this machine. Pictures are read from the store."""
    from k5cache.sources.shadow import Shadow

    shadows = []
    if is_url(source):
        shadows.append(Shadow(source, config))
        source = shadows[-1].path
    if config.source_dir is not None and is_url(config.source_dir):
        shadows.append(Shadow(Path(config.source_dir), config))
        config = replace(config, source_dir=str(shadows[-1].path))
    images = _find(source, config, kind)
    if sum(shadow.look_again(images.skipped) for shadow in shadows):
        images = _find(source, config, kind)

    def from_stores(read: Callable[[str], Content]) -> Callable[[str], Content]:
        return lambda path: reduce(lambda content, shadow: shadow.content(content), shadows, read(path))

    return replace(
        images,
        items=[reduce(lambda item, shadow: shadow.item(item), shadows, item) for item in images.items],
        skipped=[*images.skipped, *(skip for shadow in shadows for skip in shadow.skipped)],
        read=from_stores(images.read),
        read_source=from_stores(images.read_source),
        is_plain=False,  # its stats are not those of files
    )


def _find(source: Path, config: CacheConfig, kind: Kind) -> Source:
    if config.caption_suffixes is not None and not IMAGE_SUFFIXES.isdisjoint(config.caption_suffixes):
        raise DatasetError(
            f"cache.caption_extension = {config.caption_extension} is the suffix of pictures",
            "Set it to that of the caption files, such as txt",
        )
    images = _images_of_folder(source, config, kind) if source.is_dir() else None
    images = images or _from_tables(source, config, kind)
    items, empty, notices = finished(images.items, config, kind)
    images = replace(images, items=items, skipped=[*images.skipped, *empty], notices=(*images.notices, *notices))
    if not images.items and any(skip.reason.startswith(NO_SOURCE) for skip in images.skipped):
        raise _no_pair(source, images.skipped, config)
    if not images.items:
        raise _no_image(source, images.skipped, config)
    return images


def default_name(source: Path) -> str:
    """What a cache of ``source`` is called: ``cats`` for ``data/cats/``, ``cats.csv``, ``cats-*.tar``, ``me/cats``."""
    if source.is_dir():
        return source.resolve().name or "images"
    return re.sub(r"[*?\[\]]+", "", _SUFFIX.sub("", source.name)).strip("-_. ") or "images"


def _images_of_folder(source: Path, config: CacheConfig, kind: Kind) -> Source | None:
    """A folder of image files; None if it has tables or tars and no image."""
    from_metadata = config.caption_strategy == "metadata"
    sources = source_folder.folder_of_sources(config, source)
    files = metadata.metadata_files(source, sources) if from_metadata else []
    scanned = None
    read_source = _reader(sources or source)
    if files:
        has_column = kind == "i2i" and not sources
        items, skipped, _, of_rows = metadata.find_items(source, files, config, has_column, leave_out=sources)
        read_source = of_rows if has_column else read_source
    else:
        is_in_pairs, suffixes = kind == "i2i" and not sources, config.caption_suffixes
        scanned = scan_pairs(source, suffixes) if is_in_pairs else folder.scan(source, sources, suffixes)
        items, skipped = folder.find_items(source, config, scanned)
    if not items and not folder.scan(source).images and _has_tables(source):
        return None
    if from_metadata and not files:
        raise DatasetError(
            f"{source} has none of {', '.join(METADATA)}", "Add one, or set cache.caption_strategy to another"
        )
    if sources:
        items, skipped = source_folder.with_sources(items, skipped, source, sources)
    elif not files and config.source_column is not None:
        raise DatasetError(
            f"cache.source_column = {config.source_column!r} is for tables, and {source} is a folder of images",
            f"Leave it out: {LAYOUTS}",
        )
    notices, num_multiline = notices_of_files(items, scanned.images if scanned else [], config)
    return Source(items, skipped, _reader(source), not from_metadata, num_multiline, read_source, kind, notices)


def _reader(folder: Path) -> Callable[[str], Content]:
    return lambda path: folder / path


def _has_tables(source: Path) -> bool:
    from k5cache.sources import tables

    return tables.is_saved(source) or any(
        file.suffix.lower() in _DATA and file.name not in METADATA for file in folder.files(source)
    )


def _from_tables(source: Path, config: CacheConfig, kind: Kind) -> Source:
    """Images and captions from a table, tars or a dataset."""
    name = str(source)
    files = [source] if source.is_file() else _matching(source)
    if not files and not _HUB_NAME.fullmatch(name):
        raise DatasetError(
            f"There is no folder {source}",
            "Give a folder of images with .txt captions beside them, a table, a tar, or a dataset's name",
        )
    if config.source_dir is not None:
        there_is_none = "is not one" if files or source.is_dir() else "is no folder on this machine"
        raise DatasetError(
            f"--sources is for folders of images, and {source} {there_is_none}",
            "Leave it out, and name the column with the sources: --set cache.source_column=NAME",
        )
    from k5cache.sources import table_columns, table_items, tables

    if source.is_dir():
        table = tables.load_folder(source, config)
    elif files:
        table = tables.load_files(source.name, files, config)
    else:
        from k5cache.sources.hub import load_hub

        table = load_hub(name, config, kind)
    items, skipped, read, read_source = table_items.find_items(table, config, kind)
    has_lines = table_columns.has_lines(table, config, kind == "i2i")
    num_multiline = sum(len(item.captions) > 1 for item in items) if has_lines else 0
    return Source(items, skipped, read, num_multiline=num_multiline, read_source=read_source, kind=kind)


def _matching(pattern: Path) -> list[Path]:
    """The files that a pattern means. What exists under its very name is not part of the pattern."""
    parts = pattern.parts
    exact = next(n for n in range(len(parts), -1, -1) if Path(*parts[:n]).is_dir())
    begin = glob.escape(str(Path(*parts[:exact]))) if exact else ""
    return [Path(file) for file in sorted(glob.glob(os.path.join(begin, *parts[exact:]), recursive=True))]  # noqa: PTH118, PTH207 (an absolute pattern too)


def _no_pair(source: Path, skipped: list[Skipped], config: CacheConfig) -> DatasetError:
    example = next(skip for skip in skipped if skip.reason.startswith(NO_SOURCE))
    return DatasetError(
        f"An image-to-image model learns from pairs, and {source} has none ({example.path}: {example.reason})",
        _use_metadata(source, config) or LAYOUTS,
    )


def _use_metadata(source: Path, config: CacheConfig) -> str:
    """What to do if metadata files were meant to be read; "" if there are none."""
    if not source.is_dir() or config.caption_strategy != "textfile" or not (files := metadata.metadata_files(source)):
        return ""
    return f"Set cache.caption_strategy=metadata to use {files[0].relative_to(source).as_posix()}"


def _no_image(source: Path, skipped: list[Skipped], config: CacheConfig) -> DatasetError:
    examples = "; ".join(f"{s.path}: {s.reason}" for s in skipped[:3])
    problem = f"no image with a caption ({len(skipped)} skipped: {examples})" if skipped else "no image"
    suffixes = " ".join(sorted(IMAGE_SUFFIXES))
    fix = f"Put images ({suffixes}) there, each with a {(config.caption_suffixes or ('.txt',))[0]} caption beside it"
    if not source.is_dir():
        fix = "Correct these rows, or use another source"
    elif use_metadata := _use_metadata(source, config):
        fix = f"{use_metadata}, or write .txt files"
    elif config.caption_strategy != "textfile":
        fix = f"Put images ({suffixes}) there"
    return DatasetError(f"{source} has {problem}", fix)

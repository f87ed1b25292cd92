"""Which images and captions does a plain folder hold? Names and stats only: no image is opened."""

from __future__ import annotations

import codecs
import os
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from k5cache.options import CacheConfig
from k5cache.sources.captions import Captions, finish, from_lines, without_source
from k5cache.sources.items import IMAGE_SUFFIXES, MaskFile, Skipped, SourceItem, stat_numbers

MASK_SUFFIXES = frozenset({".png", ".webp"})


@dataclass(frozen=True)
class ImageEntry:
    """An image as a scan of its folder sees it."""

    path: str
    """Relative to the source, with forward slashes."""
    entry: os.DirEntry[str]
    text: str | None
    """The file of captions beside it."""
    mask: tuple[str, os.DirEntry[str]] | None
    """The mask beside it: its path relative to the source, and its entry."""


def find_items(source: Path, config: CacheConfig) -> tuple[list[SourceItem], list[Skipped]]:
    """List the images under ``source`` that have a caption, and those that cannot be used. No image is opened.

    The captions of ``cat.jpg`` are in ``cat.txt`` beside it, one a line, and ``cat.png`` shares them; other strategies
    need no file. Its mask is ``cat.mask.png`` or ``cat.mask.webp``. Hidden files and folders are skipped. Links are
    followed, but each folder is entered only once.

    Returns:
        both sorted by path.
    """
    items: list[SourceItem] = []
    images, skipped = scan(source)
    texts: dict[str, Captions] = {}
    for image in images:
        captions = without_source(_printable(image.path), config)
        if captions is None:
            stem = image.path.rpartition(".")[0]
            if stem not in texts:
                texts[stem] = _read_captions(image.text, stem.rpartition("/")[2])
            captions = texts[stem]
        item = item_of(image, finish(captions, config))
        if isinstance(item, Skipped):
            skipped.append(item)
        else:
            items.append(item)
    return sorted(items, key=lambda item: item.path), sorted(skipped, key=lambda skip: skip.path)


def scan(source: Path) -> tuple[list[ImageEntry], list[Skipped]]:
    """Every image under ``source``, and what is skipped: unreadable folders, masks without an image. Opens nothing."""
    entries: list[ImageEntry] = []
    skipped: list[Skipped] = []
    for folder, prefix in walk(source, skipped):
        images: list[tuple[str, os.DirEntry[str]]] = []
        texts: dict[str, str] = {}
        masks: dict[str, os.DirEntry[str]] = {}
        for entry in folder:
            stem, dot, suffix = entry.name.rpartition(".")
            suffix = dot + suffix.lower()
            if stem.lower().endswith(".mask") and suffix in MASK_SUFFIXES:
                masks.setdefault(stem[: -len(".mask")], entry)
            elif suffix in IMAGE_SUFFIXES:
                images.append((stem, entry))
            elif suffix == ".txt":
                texts[stem] = entry.path
        for stem, entry in images:
            mask = (prefix + masks[stem].name, masks[stem]) if stem in masks else None
            entries.append(ImageEntry(prefix + entry.name, entry, texts.get(stem), mask))
        stems = {stem for stem, _ in images}
        for stem, entry in masks.items():
            if stem not in stems:
                skipped.append(Skipped(_printable(prefix + entry.name), "is a mask without an image beside it"))
    return entries, skipped


def item_of(image: ImageEntry, captions: Captions) -> SourceItem | Skipped:
    """An image with its captions and the stats of its files, or why it cannot be used."""
    item = _file_item(image.entry, image.path, captions)
    if isinstance(item, Skipped) or image.mask is None:
        return item
    path, entry = image.mask
    mask = _file_item(entry, path, ("a mask",))
    if isinstance(mask, Skipped):
        return Skipped(item.path, f"its mask {mask.path} {mask.reason}")
    return replace(item, mask=MaskFile(mask.path, mask.num_bytes, mask.mtime_ns, mask.inode))


def walk(source: Path, skipped: list[Skipped]) -> Iterator[tuple[list[os.DirEntry[str]], str]]:
    """Every folder's visible entries, with its path relative to ``source`` ("" or "sub/").

    Real folders come before linked ones, so that an image is found under its own path if it has one.
    """
    entered = {_file_id(parent.stat()) for parent in source.resolve().parents}  # a link there would lead back here
    real, linked = deque([(os.fspath(source), "")]), deque[tuple[str, str]]()
    while real or linked:
        folder, prefix = real.popleft() if real else linked.popleft()
        try:
            identity = _file_id(Path(folder).stat())
            if identity in entered:
                continue
            entered.add(identity)
            with os.scandir(folder) as listing:
                entries = sorted((e for e in listing if not e.name.startswith(".")), key=lambda e: e.name)
        except OSError as error:
            skipped.append(Skipped(_printable(prefix) or ".", f"this folder cannot be read ({error.strerror})"))
            continue
        files = []
        for entry in entries:
            if entry.is_dir(follow_symlinks=False):
                real.append((entry.path, f"{prefix}{entry.name}/"))
            elif entry.is_symlink() and Path(entry.path).is_dir():  # DirEntry.is_dir raises on a link to itself
                linked.append((entry.path, f"{prefix}{entry.name}/"))
            else:
                files.append(entry)
        yield files, prefix


def _file_item(entry: os.DirEntry[str], path: str, captions: Captions) -> SourceItem | Skipped:
    """One file as an item, or why it cannot be used; if ``captions`` is a string, that is why."""
    if _printable(path) != path:
        return Skipped(_printable(path), "its name is not valid UTF-8")
    try:
        status = entry.stat()
        if not entry.is_file():  # a pipe would block whoever opens it
            return Skipped(path, "is not a file")
    except OSError:
        return Skipped(path, "is a broken link" if entry.is_symlink() else "is no longer there")
    if isinstance(captions, str):
        return Skipped(path, captions)
    return SourceItem(path, *stat_numbers(status), captions)


def _read_captions(path: str | None, stem: str) -> Captions:
    """The lines of a caption file, stripped and without blank ones; or, as a string, why there is no caption."""
    name = _printable(stem) + ".txt"
    if path is None:
        return f"missing caption {name}"
    try:
        # An encode with nothing to do reads 10,000 of them: pathlib, a buffer or a BOM codec would double its time.
        with open(path, "rb", buffering=0) as file:  # noqa: PTH123
            text = file.readall().removeprefix(codecs.BOM_UTF8).decode()
    except OSError as error:
        return f"caption {name} cannot be read ({error.strerror})"
    except UnicodeDecodeError:
        return f"caption {name} is not UTF-8"
    if "\0" in text:  # UTF-16 without a byte order mark decodes like this
        return f"caption {name} is not UTF-8"
    return from_lines(text)


def _file_id(stat: os.stat_result) -> tuple[int, int]:
    return stat.st_dev, stat.st_ino


def _printable(path: str) -> str:
    """Replace the lone surrogates of a file name that is not UTF-8: they can be neither printed nor stored."""
    return path if path.isascii() else path.encode("utf-8", "surrogateescape").decode("utf-8", "replace")

"""Which images and captions does a plain folder hold? Names and stats only: no image is opened."""

from __future__ import annotations

import os
import re
from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from k5cache.options import CacheConfig
from k5cache.shared.inside import is_inside
from k5cache.sources.caption_files import OTHER_SUFFIXES, SUFFIXES, read_captions
from k5cache.sources.captions import Captions, without_source
from k5cache.sources.items import (
    IMAGE_SUFFIXES,
    NAMED_SUFFIXES,
    PictureFile,
    Skipped,
    SourceItem,
    printable,
    stat_numbers,
)
from k5cache.sources.pairs import MARK

MASK_SUFFIXES = frozenset({".png", ".webp"})
SYSTEM_FOLDERS = frozenset(
    {
        *("@eadir", "#recycle", "#snapshot", "@recycle", "@recently-snapshot", "@tmp"),  # Synology and QNAP
        *("__macosx", "$recycle.bin", "system volume information", "lost+found"),
    }
)
"""Folders that a NAS, an archiver or a file system makes, in lower case: thumbnails and deleted files."""
_ODD_BEGINNINGS = frozenset(letter for name in SYSTEM_FOLDERS for letter in name[0] + name[0].upper()) | {"."}
_OTHER_TRAINERS = re.compile(r"(.+)-(mask|cond)label")  # OneTrainer's names for masks and conditioning images
_NO_MASK = {
    "mask": "is a mask in OneTrainer's name: rename it {0}.mask.png",
    "cond": "is a conditioning image: for image-to-image, rename it {0}.source.png",
}


@dataclass(frozen=True)
class ImageEntry:
    """An image as a scan of its folder sees it."""

    path: str
    """Relative to the source, with forward slashes."""
    entry: os.DirEntry[str]
    text: str | None
    """The file of captions beside it, the first by the order of suffixes."""
    mask: tuple[str, os.DirEntry[str]] | None
    """The mask beside it: its path relative to the source, and its entry."""
    hint: str = ""
    """If there is no file of captions: what may be meant to be one."""
    source: tuple[str, os.DirEntry[str]] | None = None
    """In a folder of pairs, its source: as ``mask``."""
    other_text: str = ""
    """The suffix of another file of captions beside it, which is not read."""
    title: str = ""
    """What captions from file names are made of, if that is not ``path``."""


@dataclass
class Scan:
    """What a folder and the folders below it hold."""

    images: list[ImageEntry] = field(default_factory=list)
    skipped: list[Skipped] = field(default_factory=list)
    """Pictures, masks and folders that cannot be used."""
    lone_texts: list[Skipped] = field(default_factory=list)
    """Caption files without an image."""
    lone_json: list[Skipped] = field(default_factory=list)
    """JSON files without an image, which are many things; not named."""
    suffixes: tuple[str, ...] = SUFFIXES
    """Of caption files, in the order of preference."""


def find_items(
    source: Path, config: CacheConfig, scanned: Scan | None = None
) -> tuple[list[SourceItem], list[Skipped]]:
    """List the images under ``source`` that have a caption, and those that cannot be used. No image is opened.

    The captions of ``cat.jpg`` are in ``cat.txt`` beside it, one a line, and ``cat.png`` shares them; without it in
    ``cat.caption`` or ``cat.json``. Other strategies need no file. Its mask is ``cat.mask.png`` or ``cat.mask.webp``.
    Hidden files and folders are skipped. Links are followed, but each folder is entered only once.

    Args:
        scanned: what ``source`` holds, if it was scanned before.

    Returns:
        both sorted by path.
    """
    items: list[SourceItem] = []
    scanned = scanned or scan(source, suffixes=config.caption_suffixes)
    skipped = scanned.skipped + (scanned.lone_texts if config.caption_strategy == "textfile" else [])
    texts: dict[str, Captions | OSError] = {}
    for image in scanned.images:
        captions: Captions | OSError | None = without_source(printable(image.title or image.path), config)
        if captions is None:
            stem = image.path.rpartition(".")[0]
            if stem not in texts:
                texts[stem] = _captions_of(source, image, scanned.suffixes[0], config)
            captions = texts[stem]
        if isinstance(captions, OSError):
            reason = f"its caption file cannot be read ({captions.strerror})"
            item: SourceItem | Skipped = Skipped(printable(image.path), reason, is_lasting=False)
        else:
            item = item_of(image, captions)
        if isinstance(item, Skipped):
            skipped.append(item)
        else:
            items.append(item)
    return sorted(items, key=lambda item: item.path), sorted(skipped, key=lambda skip: skip.path)


def scan(
    source: Path,
    leave_out: Path | None = None,
    suffixes: tuple[str, ...] | None = None,
    within: Path | None = None,
) -> Scan:
    """Every image under ``source``, and what cannot be used and looks as if it should be. Opens nothing.

    Args:
        leave_out: a folder that is not entered.
        suffixes: of caption files, in the order of preference. None: the usual ones.
        within: as for ``walk``.
    """
    scanned = Scan(suffixes=suffixes or SUFFIXES)
    for entries, prefix in walk(source, scanned.skipped, scanned.skipped, leave_out, within):
        _sort_out(_Folder(prefix, entries, scanned.suffixes), scanned)
    return scanned


def files(source: Path, leave_out: Path | None = None) -> Iterator[Path]:
    """Every visible file below ``source``, but not below ``leave_out``."""
    for entries, prefix in walk(source, [], leave_out=leave_out):
        yield from (source / f"{prefix}{entry.name}" for entry in entries)


class _Folder:
    """The files of one folder by their kinds. A stem is a name without its last suffix."""

    def __init__(self, prefix: str, entries: list[os.DirEntry[str]], suffixes: tuple[str, ...]) -> None:
        self.prefix = prefix
        by_suffix: dict[str, dict[str, os.DirEntry[str]]] = {suffix: {} for suffix in reversed(suffixes)}
        self.images: list[tuple[str, os.DirEntry[str]]] = []
        self.masks: dict[str, list[os.DirEntry[str]]] = {}
        self.other_captions: dict[str, str] = {}
        """Stem -> suffix of a file of captions that is not read."""
        self.others: dict[str, tuple[str, str]] = {}
        """Stem -> name and suffix of a file of another kind."""
        for entry in entries:
            stem, dot, suffix = entry.name.rpartition(".")
            suffix = dot + suffix.lower()
            if stem.lower().endswith(".mask") and suffix in MASK_SUFFIXES:
                self.masks.setdefault(stem[: -len(".mask")], []).append(entry)
            elif suffix in IMAGE_SUFFIXES:
                self.images.append((stem, entry))
            elif suffix in by_suffix:
                by_suffix[suffix][stem] = entry
            elif suffix in OTHER_SUFFIXES:
                self.other_captions[stem] = suffix
            else:
                self.others[stem] = (entry.name, suffix)
        self.texts: dict[str, os.DirEntry[str]] = {}
        """Stem -> the file of captions, of several the one with the suffix that is preferred."""
        for suffix, texts in by_suffix.items():
            if suffix == ".caption":
                self.other_captions |= dict.fromkeys(texts, suffix)
            self.texts |= texts

    def path(self, name: str) -> str:
        return self.prefix + name


def _sort_out(listed: _Folder, scanned: Scan) -> None:
    """Add the images of one folder to ``scanned``, and what cannot be used."""
    stems = {stem for stem, _ in listed.images}
    for stem, entry in listed.images:
        reason = _not_an_image(stem, entry.name, stems, listed.texts)
        if reason:
            scanned.skipped.append(Skipped(printable(listed.path(entry.name)), reason))
            continue
        text, masks = listed.texts.get(stem), listed.masks.get(stem)
        mask = (listed.path(masks[0].name), masks[0]) if masks else None
        hint = "" if text else _hint(stem, entry.name, stems, listed)
        other = listed.other_captions.get(stem, "") if text and not text.name.lower().endswith(".caption") else ""
        path, file = listed.path(entry.name), text.path if text else None
        scanned.images.append(ImageEntry(path, entry, file, mask, hint, other_text=other))
    for stem, masks in listed.masks.items():
        reason = "is a second mask of its image" if stem in stems else "is a mask without an image beside it"
        unused = masks[1:] if stem in stems else masks
        scanned.skipped += [Skipped(printable(listed.path(entry.name)), reason) for entry in unused]
    for name, suffix in listed.others.values():
        if suffix in NAMED_SUFFIXES:
            scanned.skipped.append(Skipped(printable(listed.path(name)), NAMED_SUFFIXES[suffix]))
    for stem in listed.texts.keys() - stems:
        name, suffix = listed.others.get(stem, ("", ""))
        if suffix not in NAMED_SUFFIXES:  # else its picture is named
            reason = f"is beside {printable(name)}, which is not an image" if name else "is a caption without an image"
            text_name = listed.texts[stem].name
            is_any_json = text_name.lower().endswith(".json") and len(scanned.suffixes) > 1
            lone = scanned.lone_json if is_any_json else scanned.lone_texts
            lone.append(Skipped(printable(listed.path(text_name)), reason))


def _not_an_image(stem: str, name: str, stems: set[str], texts: Mapping[str, object]) -> str:
    """Why a picture is not one to be trained on; "" if it is."""
    other = _OTHER_TRAINERS.fullmatch(stem)
    if other and other[1] in stems and stem not in texts:
        return _NO_MASK[other[2]].format(printable(other[1]))
    if stem.lower().endswith(".mask") and stem[: -len(".mask")] in stems and stem not in texts:
        return f"is a mask of a kind that is not read: save it as {printable(stem)}.png"
    return ""


def _hint(stem: str, name: str, stems: set[str], listed: _Folder) -> str:
    """What an image without a caption file may be, or where its caption may be."""
    text = listed.texts.get(name)  # cat.jpg.txt
    if text:
        return f": rename {printable(text.name)}"
    if suffix := listed.other_captions.get(stem):
        return f", and {printable(stem)}{suffix} is not read: set cache.caption_extension to {suffix[1:]}"
    if stem.lower().endswith(MARK) and stem[: -len(MARK)] in stems:
        return ", unless it is the source of a pair for image-to-image"
    other = re.fullmatch(r"(.+)[-_]mask", stem, re.IGNORECASE | re.DOTALL)
    if other and other[1] in stems:
        return f", unless it is a mask: then rename it {printable(other[1])}.mask.png"
    return ""


def item_of(image: ImageEntry, captions: Captions) -> SourceItem | Skipped:
    """An image with its captions and the stats of its files, or why it cannot be used."""
    item = _file_item(image.entry, image.path, captions)
    if isinstance(item, SourceItem) and image.mask:
        mask = _belonging(item, "mask", *image.mask)
        item = mask if isinstance(mask, Skipped) else replace(item, mask=mask)
    return with_source(item, *image.source) if isinstance(item, SourceItem) and image.source else item


def with_source(item: SourceItem, path: str, entry: os.DirEntry[str]) -> SourceItem | Skipped:
    """An item with its source and the stats of that file, or why it cannot be used."""
    source = _belonging(item, "source", path, entry)
    return source if isinstance(source, Skipped) else replace(item, source=source)


def _belonging(item: SourceItem, what: str, path: str, entry: os.DirEntry[str]) -> PictureFile | Skipped:
    file = _file_item(entry, path, ("a picture",))
    if isinstance(file, Skipped):
        return Skipped(item.path, f"its {what} {file.path} {file.reason}")
    return PictureFile(file.path, file.num_bytes, file.mtime_ns, file.inode)


def walk(
    source: Path,
    unreadable: list[Skipped],
    passed_over: list[Skipped] | None = None,
    leave_out: Path | None = None,
    within: Path | None = None,
) -> Iterator[tuple[list[os.DirEntry[str]], str]]:
    """Every folder's visible files, with its path relative to ``source`` ("" or "sub/").

    Real folders come before linked ones, so that an image is found under its own path if it has one.

    Args:
        unreadable: folders that cannot be read are added to it.
        passed_over: folders of systems and hidden pictures are added to it.
        leave_out: a folder that is not entered.
        within: links to folders are followed only in it, and those that lead out are added to ``passed_over``. None:
            anywhere.
    """
    passed_over = [] if passed_over is None else passed_over
    entered = {_file_id(parent.stat()) for parent in source.resolve().parents}  # a link there would lead back here
    entered |= {_file_id(leave_out.stat())} if leave_out else set()
    real, linked = deque([(os.fspath(source), "")]), deque[tuple[str, str]]()
    while real or linked:
        folder, prefix = real.popleft() if real else linked.popleft()
        try:
            identity = _file_id(Path(folder).stat())
            if identity in entered:
                continue
            entered.add(identity)
            with os.scandir(folder) as listing:
                entries = sorted(listing, key=lambda entry: entry.name)
        except OSError as error:
            reason = f"this folder cannot be read ({error.strerror})"
            unreadable.append(Skipped(printable(prefix) or ".", reason, is_lasting=False))
            continue
        visible = []
        for entry in entries:
            if entry.name[0] in _ODD_BEGINNINGS and (reason := _passed_over(entry)):
                passed_over += [Skipped(printable(prefix + entry.name), reason)] if reason != "hidden" else []
            elif entry.is_dir(follow_symlinks=False):
                real.append((entry.path, f"{prefix}{entry.name}/"))
            elif entry.is_symlink() and Path(entry.path).is_dir():  # DirEntry.is_dir raises on a link to itself
                if within and not is_inside(within, Path(entry.path)):
                    passed_over.append(Skipped(printable(prefix + entry.name), f"is a link that leads out of {within}"))
                else:
                    linked.append((entry.path, f"{prefix}{entry.name}/"))
            else:
                visible.append(entry)
        yield visible, prefix


def _passed_over(entry: os.DirEntry[str]) -> str:
    """Why an entry is not looked at, "hidden" if that goes without saying; "" if it is."""
    name = entry.name
    if name.lower() in SYSTEM_FOLDERS and entry.is_dir():
        return "is a folder of a NAS, an archiver or a system"
    if not name.startswith("."):
        return ""
    is_picture = name[name.rfind(".") :].lower() in IMAGE_SUFFIXES and not name.startswith("._")  # macOS writes these
    return "is hidden: its name begins with a dot" if is_picture and entry.is_file() else "hidden"


def _file_item(entry: os.DirEntry[str], path: str, captions: Captions) -> SourceItem | Skipped:
    """One file as an item, or why it cannot be used; if ``captions`` is a string, that is why."""
    if printable(path) != path:
        return Skipped(printable(path), "its name is not valid UTF-8")
    try:
        status = entry.stat()
        if not entry.is_file():  # a pipe would block whoever opens it
            return Skipped(path, "is not a file")
    except OSError:
        return Skipped(path, "is a broken link" if entry.is_symlink() else "is no longer there")
    if isinstance(captions, str):
        return Skipped(path, captions)
    return SourceItem(path, *stat_numbers(status), captions)


def _captions_of(source: Path, image: ImageEntry, suffix: str, config: CacheConfig) -> Captions | OSError:
    """What is in the caption file beside an image; or, as a string, why there is no caption.

    Args:
        suffix: that the file should have.
    """
    missing = f"missing caption {printable(os.path.splitext(image.entry.name)[0])}{suffix}"  # noqa: PTH122
    if image.text is None:
        return f"{missing}{image.hint}"
    captions = read_captions(source, image.text, image.entry.path, config)
    is_instead = isinstance(captions, str) and image.text.lower().endswith(".json") and suffix != ".json"
    return f"{missing}, and {captions}" if is_instead else captions


def _file_id(status: os.stat_result) -> tuple[int, int]:
    return status.st_dev, status.st_ino

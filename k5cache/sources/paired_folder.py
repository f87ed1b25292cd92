"""Which images of a folder are targets, and which are their sources? Both are in it, and their names say which."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path

from k5cache.sources.folder import ImageEntry, Scan, scan
from k5cache.sources.items import Skipped, printable
from k5cache.sources.pairs import Paired, caption_stems, pair, without_ending


def scan_pairs(source: Path, suffixes: tuple[str, ...] | None = None, within: Path | None = None) -> Scan:
    """As ``folder.scan``, but its images are the targets, each with its source. The caption of ``X_end`` may be in
    ``X_end.txt`` or ``X.txt``."""
    scanned = scan(source, suffixes=suffixes, within=within)
    paired = pair((_stem(image.path), image.path) for image in scanned.images)
    entries = {image.path: image for image in scanned.images}
    lone = [*scanned.lone_json, *scanned.lone_texts]
    lone_texts = {_stem(skip.path): os.fspath(source / skip.path) for skip in lone}
    texts = lone_texts | {_stem(image.path): image.text for image in scanned.images if image.text}
    targets = [
        _target(image, entries[paired.sources[_stem(image.path)]], texts, scanned.suffixes)
        for image in scanned.images
        if image.path not in paired.used and image.path not in paired.refused
    ]
    of_sources = [image for image in scanned.images if image.path in paired.used]
    masks = [
        Skipped(printable(image.mask[0]), "is the mask of a source, which is not read")
        for image in of_sources if image.mask
    ]  # fmt: skip
    refused = [Skipped(printable(path), printable(reason)) for path, reason in paired.refused.items()]
    unread = list(_unread(scanned, targets, paired, lone_texts))
    return Scan(targets, [*scanned.skipped, *refused, *masks], unread, suffixes=scanned.suffixes)


def _target(image: ImageEntry, source: ImageEntry, texts: Mapping[str, str], suffixes: tuple[str, ...]) -> ImageEntry:
    stem, suffix = os.path.splitext(image.path)  # noqa: PTH122 (a path in the source)
    stems = caption_stems(stem)
    own = [texts[of] for of in stems if of in texts]
    own.sort(key=lambda text: suffixes.index(_suffix(text)))  # X.txt comes before X_end.json
    return replace(
        image,
        text=own[0] if own else None,
        hint=(f" or {printable(_name(stems[1]))}{suffixes[0]}" if len(stems) > 1 else "") + image.hint,
        source=(source.path, source.entry),
        title=without_ending(stem) + suffix,
    )


def _unread(
    scanned: Scan, targets: list[ImageEntry], paired: Paired, lone_texts: Mapping[str, str]
) -> Iterator[Skipped]:
    """The texts that are no target's caption."""
    read = {image.text for image in targets}
    stems = {of: image.text for image in targets for of in caption_stems(_stem(image.path))[1:]}
    for skip in scanned.lone_texts:
        stem = _stem(skip.path)
        if stem not in stems:
            yield skip
        elif lone_texts[stem] not in read:
            name = printable(os.path.basename(stems[stem] or ""))  # noqa: PTH119
            yield Skipped(skip.path, f"is a second caption: {name} is read")
    for image in scanned.images:
        suffix = _suffix(image.text or "")
        if image.path in paired.used and image.text and (suffix != ".json" or scanned.suffixes == (suffix,)):
            yield Skipped(f"{printable(_stem(image.path))}{suffix}", "is the caption of a source, which is not read")


def _stem(path: str) -> str:
    return path.rpartition(".")[0]


def _suffix(path: str) -> str:
    return path[path.rfind(".") :].lower()


def _name(path: str) -> str:
    return path.rpartition("/")[2]

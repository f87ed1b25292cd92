"""Which picture of a second folder is the source of which target? The one with the same name, whatever its suffix."""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set
from dataclasses import replace
from pathlib import Path

from k5cache.options import CacheConfig
from k5cache.shared.errors import DatasetError
from k5cache.shared.units import count_of
from k5cache.sources import folder
from k5cache.sources.items import Skipped, SourceItem
from k5cache.sources.pairs import NO_SOURCE, has_several, similar_to

_NAME_THEM = "Name a source like its target, cat.jpg for cat.png, in a folder of the same name"


def folder_of_sources(config: CacheConfig, source: Path) -> Path | None:
    """``cache.source_dir``; None if it is not set.

    Raises:
        DatasetError: it is no folder, or the one with the targets.
    """
    if config.source_dir is None:
        return None
    sources = Path(config.source_dir).expanduser()
    if not sources.is_dir():
        what = "is not a folder" if sources.exists() else "does not exist"
        raise DatasetError(
            f"The folder of sources {sources} {what}", "Correct --sources, which is cache.source_dir in a recipe"
        )
    if source.is_dir() and sources.samefile(source):
        raise DatasetError(
            f"{source} is given for the sources and for the targets",
            "Give --sources another folder, or leave it out if pairs are named X_start.png and X_end.png",
        )
    return sources


def with_sources(
    items: Sequence[SourceItem], skipped: Sequence[Skipped], targets: Path, sources: Path
) -> tuple[list[SourceItem], list[Skipped]]:
    """Give each item the source of its name below ``sources``, and name every picture without a partner.

    Raises:
        DatasetError: no item has one.
    """
    scanned = folder.scan(sources, leave_out=targets)
    images = scanned.images
    by_stem: dict[str, list[folder.ImageEntry]] = {}
    for image in images:
        by_stem.setdefault(_stem(image.path), []).append(image)
    found = [_with_source(item, by_stem, sources) for item in items]
    paired = [item for item in found if isinstance(item, SourceItem)]
    lone = [skip for skip in found if isinstance(skip, Skipped)]
    if not items:  # it is said why
        return [], [_with_hint(skip, by_stem, sources) for skip in skipped]
    if not paired:
        raise _no_pair(targets, sources, lone, len(images))
    used = {_stem(item.path): item.source.path for item in paired if item.source}
    known = used.keys() | {_stem(skip.path) for skip in (*skipped, *lone)}  # of these the target is named
    unused = [
        Skipped(image.path, reason) for image in images if (reason := _why_unused(image.path, used, known, targets))
    ]
    unused += [Skipped(image.mask[0], "is the mask of a source, which is not read") for image in images if image.mask]
    of_sources = [replace(skip, path=(sources / skip.path).as_posix()) for skip in (*unused, *scanned.skipped)]
    return paired, [*(_with_hint(skip, by_stem, sources) for skip in skipped), *lone, *of_sources]


def _with_source(
    item: SourceItem, by_stem: Mapping[str, Sequence[folder.ImageEntry]], sources: Path
) -> SourceItem | Skipped:
    stem = _stem(item.path)
    candidates = by_stem.get(stem, ())
    same = [image for image in candidates if image.path == item.path]
    if not candidates:
        other = similar_to(stem, by_stem)
        but = f", but {other}.*, whose letters differ in case or accents" if other else ""
        return Skipped(item.path, f"{NO_SOURCE}: there is no {sources / stem}.*{but}")
    if len(candidates) > 1 and not same:
        return Skipped(item.path, has_several([image.path for image in candidates]))
    image = (same or candidates)[0]
    return folder.with_source(item, image.path, image.entry)


def _why_unused(path: str, used: Mapping[str, str], known: Set[str], targets: Path) -> str:
    """What is said of a picture in the folder of sources; "" if it is a source, or if its target was named."""
    stem = _stem(path)
    if stem in used:
        return "" if used[stem] == path else f"is a second source of its target: {used[stem]} is used"
    return "" if stem in known else f"is a source without a target: there is no {targets / stem}.*"


def _with_hint(skip: Skipped, by_stem: Mapping[str, Sequence[folder.ImageEntry]], sources: Path) -> Skipped:
    """A caption that is missing beside a target may be beside the source."""
    texts = [image for image in by_stem.get(_stem(skip.path), ()) if image.text]
    if not texts or not skip.reason.startswith("missing caption"):
        return skip
    return replace(skip, reason=f"{skip.reason}: move {sources / _stem(skip.path)}.txt, which is beside the source")


def _no_pair(targets: Path, sources: Path, lone: Sequence[Skipped], num_sources: int) -> DatasetError:
    if not num_sources:
        return DatasetError(f"The folder of sources {sources} has no images", _NAME_THEM)
    return DatasetError(
        f"No image in {targets} has a source "
        f"among the {count_of(num_sources, 'image')} in {sources} "
        f"({lone[0].path}: {lone[0].reason})",
        _NAME_THEM,
    )


def _stem(path: str) -> str:
    return path.rpartition(".")[0]

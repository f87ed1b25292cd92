"""Has a source changed since a cache was made of it? The manifest keeps a note of what the encoder saw.

This file imports nothing heavy: an encode with nothing to do ends within a second.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Mapping, Sequence, Set
from pathlib import Path

from k5cache.encode.job import TextJob
from k5cache.options import CacheConfig
from k5cache.shared.errors import DatasetError
from k5cache.shared.template import version
from k5cache.sources import find
from k5cache.sources.items import PICTURE_DECODER, Skipped
from k5cache.sources.unchanged import FolderStats, is_settled, joined, read_stats
from k5cache.store.manifest import LeftOut, SourceNote

_MOST_SHOWN = 80  # characters of a caption that was cut off
MOST_NAMED = 10_000
"""Files in the source that cannot be used and are kept in the manifest: 1 MB. With more, each encode looks at them."""


def take_note(source: Path, config: CacheConfig, listing: find.Source) -> SourceNote:
    """The note of a source from which everything in ``listing`` is encoded by now.

    The captions are read once more, after the stats were taken, so that a file that was being written when it was
    first read does not count as settled.
    """
    note = SourceNote(listing_digest(listing))
    if not listing.is_plain or not all(skip.is_lasting for skip in listing.skipped):
        return note
    stats, read_ns = _stats(source, config), time.time_ns()
    if stats is None or not is_settled(stats, read_ns):
        return note
    try:
        is_same = listing_digest(find.find(source, config, listing.kind)) == note.listing
    except DatasetError:  # it was emptied in the meantime
        return note
    return SourceNote(note.listing, stats.digest) if is_same else note


def note_left_out(
    skipped: Sequence[Skipped], failed: Mapping[str, str], truncated: Sequence[tuple[str, int, str]] = ()
) -> LeftOut:
    """What the manifest keeps of what could not be used."""
    named = tuple((skip.path, skip.reason) for skip in skipped[:MOST_NAMED])
    return LeftOut(named, dict(failed), decoders() if named or failed else "", tuple(truncated[:MOST_NAMED]))


def note_truncated(
    before: LeftOut,
    truncated: Sequence[tuple[str, int]],
    text_jobs: Sequence[TextJob],
    needed: Set[str] | None = None,
) -> tuple[tuple[str, int, str], ...]:
    """``LeftOut.truncated`` after an encode.

    Args:
        truncated: (cleaned caption, how many of its last characters were cut off) of ``text_jobs``.
        needed: the text keys of all items, prompts and pairs to draw. None: those before are still needed.
    """
    cut = dict(truncated)
    now = {job.key: (job.key, cut[job.caption], job.caption[:_MOST_SHOWN]) for job in text_jobs if job.caption in cut}
    known = {entry[0]: entry for entry in before.truncated} | now
    return tuple(entry for key, entry in known.items() if needed is None or key in needed)


def decoders() -> str:
    """The versions of what decodes images. An image that one version refuses may be readable by another."""
    packages = ("pillow", "pillow-heif", "pi-heif", "pillow-jxl-plugin", "kandinsky5-lora")
    versions = [f"{package} {found}" for package in packages if (found := version(package))]
    return ", ".join((f"picture decoder {PICTURE_DECODER}", *versions))


def is_untouched(source: Path, config: CacheConfig, note: SourceNote) -> bool:
    """Whether no file of ``source``, nor of ``cache.source_dir``, was touched since the note was taken. Opens no file;
    False if stats cannot tell."""
    stats = _stats(source, config) if note.stats else None
    return stats is not None and stats.digest == note.stats


def _stats(source: Path, config: CacheConfig) -> FolderStats | None:
    """The stats of all files that a listing depends on."""
    suffixes = config.caption_suffixes or ()
    stats = read_stats(source, suffixes)
    if config.source_dir is None or stats is None:
        return stats
    of_sources = read_stats(Path(config.source_dir).expanduser(), suffixes)
    return of_sources and joined(stats, of_sources)


def listing_digest(listing: find.Source) -> str:
    """One hash over all that was listed: paths, sizes, times, inodes, raw captions, masks, sources, skips."""
    sha256 = hashlib.sha256()
    for entry in (*listing.items, *listing.skipped):
        sha256.update(repr(entry).encode("utf-8", "surrogatepass"))
    for item in listing.items:
        if item.source:
            sha256.update(repr(item.source).encode("utf-8", "surrogatepass"))
    return sha256.hexdigest()[:32]

"""Has a source changed since a cache was made of it? The manifest keeps a note of what the encoder saw.

This file imports nothing heavy: an encode with nothing to do ends within a second.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence, Set
from pathlib import Path

from k5cache.encode.job import TextJob
from k5cache.options import CacheConfig
from k5cache.shared.errors import DatasetError
from k5cache.shared.template import version
from k5cache.sources import find
from k5cache.sources.items import PICTURE_DECODER, Skipped
from k5cache.sources.unchanged import is_settled, listing_digest, stats_of
from k5cache.store.notes import LeftOut, SourceNote

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
    stats, read_ns = stats_of(source, config), time.time_ns()
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
    needed: Callable[[Set[str]], Set[str]] | None = None,
) -> tuple[tuple[str, int, str], ...]:
    """``LeftOut.truncated`` after an encode.

    Args:
        truncated: (cleaned caption, how many of its last characters were cut off) of ``text_jobs``.
        needed: tells which of some text keys an item, a prompt or a pair to draw has. None: those before are still
            needed.
    """
    cut = dict(truncated)
    jobs = text_jobs if cut else ()
    now = {job.key: (job.key, cut[job.caption], job.caption[:_MOST_SHOWN]) for job in jobs if job.caption in cut}
    known = {entry[0]: entry for entry in before.truncated} | now
    kept = needed(known.keys()) if needed else known.keys()
    return tuple(entry for key, entry in known.items() if key in kept)


def decoders() -> str:
    """The versions of what decodes images. An image that one version refuses may be readable by another."""
    packages = ("pillow", "pillow-heif", "pi-heif", "pillow-jxl-plugin", "kandinsky5-lora")
    versions = [f"{package} {found}" for package in packages if (found := version(package))]
    return ", ".join((f"picture decoder {PICTURE_DECODER}", *versions))

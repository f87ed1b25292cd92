"""What does a cache hold, picture by picture? Its items as tiles of a grid, and one of them with all that is known."""

from __future__ import annotations

import csv
import functools
import hashlib
import time
from dataclasses import dataclass
from pathlib import Path

from k5cache.buckets import Geometry
from k5cache.shared.errors import K5Error
from k5cache.shared.inside import is_inside
from k5cache.shared.plain import open_plain
from k5cache.sources.images import hash_content
from k5cache.sources.items import UnreadableImage, stat_numbers
from k5cache.store.geometry import geometry_of, source_of_row
from k5cache.store.index import IndexRow
from k5cache.store.skipped import NAME as SKIPPED
from k5cache.store.skipped import is_ours
from k5train.ui.data.opened import SEARCHED, Opened, captions_of
from k5train.ui.data.origin import is_tame
from k5train.ui.data.query import ONLY, SORTS, Choice, Grid, Query, Tile, slice_of
from k5train.ui.listing import Entry, NotHere
from k5train.ui.project import Project

CHANGED = "has changed since the encode"
_HASH_SECONDS = 0.15
"""How long a page may read files to see whether those that were touched have changed. The rest is seen later."""
_MOST_SKIPPED_BYTES = 64 << 20


@dataclass(frozen=True)
class Shown:
    """A cache as a page shows it, with the folders that its pictures are in."""

    project: Project
    entry: Entry
    opened: Opened
    source: Entry | None
    """The folder it was made of."""
    sources: Entry | None = None
    """For image-to-image: the folder with the sources, if that is another one."""

    @property
    def is_pairs(self) -> bool:
        """Whether it is for image-to-image."""
        return self.opened.cache.kind == "i2i"


@dataclass(frozen=True)
class Picture:
    """A file that an item was made of, as it is now."""

    path: Path | None
    """None if it cannot be shown."""
    problem: str = ""
    is_checked: bool = True
    """Whether its content is known to be what was encoded."""


def picture_of(shown: Shown, row: IndexRow, is_source: bool = False, until: float = float("inf")) -> Picture:
    """Find the file of an item, or of its source, and see whether it is still what was encoded.

    Args:
        until: by the clock of ``time.monotonic``, how long files that were touched are read for that.
    """
    folder = (shown.sources or shown.source) if is_source else shown.source
    name = (row.source_path or "") if is_source else row.path
    if folder is None:
        return Picture(None, "its file is not in a folder of this project")
    path = folder.path / name
    if not is_tame(name) or not is_inside(shown.project.root, path):
        return Picture(None, "lies outside the project, so it is not shown")
    try:
        now = stat_numbers(path.stat())
    except OSError:
        return Picture(None, "is gone: it was deleted, moved or renamed")
    then = (row.source_num_bytes, row.source_mtime_ns, row.source_inode) if is_source else (
        row.num_bytes, row.mtime_ns, row.inode)  # fmt: skip
    if now == then:
        return Picture(path)
    if time.monotonic() > until:
        return Picture(path, is_checked=False)
    expected = row.source_hash if is_source else row.content_hash
    try:
        is_same = _hash_of(str(path), now) == expected
    except UnreadableImage as error:
        return Picture(None, error.reason)
    return Picture(path) if is_same else Picture(None, CHANGED)


@functools.lru_cache(maxsize=20_000)
def _hash_of(path: str, stat: tuple[int, int, int]) -> str:
    """The content hash of a file, read once while its stat is the same."""
    return hash_content(Path(path))


def version_of(row: IndexRow) -> str:
    """What names the pixels of an item in a URL: another one if the picture, the crop, the mask or the source is."""
    parts = (row.content_hash, geometry_of(row), row.mask_key, row.source_hash, row.source_width, row.source_height)
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:12]


def grid(shown: Shown, query: Query) -> Grid:
    """The pictures on a page."""
    skipped = left_out(shown)
    if query.only == "left-out":
        return _grid_of_left_out(shown, query, skipped)
    opened = shown.opened
    numbers, count = opened.page(query)
    tiles = tiles_of(shown, numbers)
    note = ""
    if query.q and not opened.has_captions:
        note = f"In a cache of more than {SEARCHED:,} pictures a search looks at names only."
    return Grid(
        query, tiles, count, len(opened.cache), _choices(shown, query, len(skipped)), _buckets(opened, query),
        tuple(SORTS.items()), note,
    )  # fmt: skip


def tiles_of(shown: Shown, numbers: list[int]) -> tuple[Tile, ...]:
    """Some items as tiles."""
    rows = shown.opened.cache.rows(numbers)
    captions = [()] * len(rows) if shown.opened.is_large else captions_of(shown.opened, rows)
    until = time.monotonic() + _HASH_SECONDS
    return tuple(
        _tile(shown, number, row, texts, until) for number, row, texts in zip(numbers, rows, captions, strict=True)
    )


def _tile(shown: Shown, number: int, row: IndexRow, captions: tuple[str, ...], until: float) -> Tile:
    picture = picture_of(shown, row, until=until)
    source = picture_of(shown, row, is_source=True, until=until) if row.source_path else Picture(None)
    problem = picture.problem or (source.problem and f"its source {source.problem}")
    width = row.bucket_width * (2 if row.source_path else 1)
    base = f"/data/c/{shown.entry.id}/{number}"
    return Tile(
        href=base,
        picture=f"{base}/picture?v={version_of(row)}",
        name=row.path,
        shape=(width, row.bucket_height),
        captions=captions,
        facts=f"{row.bucket_width}x{row.bucket_height} of {row.width}x{row.height}",
        badges=badges_of(row),
        problem=problem,
    )


def badges_of(row: IndexRow) -> tuple[str, ...]:
    """What is special about an item, in a word each."""
    words = {
        "flipped": row.flipped,
        "mask": row.mask_key is not None,
        "enlarged": geometry_of(row).upscaled,
        "source stretched": row.source_path is not None and source_of_row(row).stretched,
        f"{len(row.caption_keys)} captions": len(row.caption_keys) > 1,
    }
    return tuple(word for word, is_so in words.items() if is_so)


def left_out(shown: Shown) -> list[tuple[str, str]]:
    """(path, reason) of all that the last encode could not use."""
    root = shown.opened.cache.root
    if is_ours(root) and is_inside(root, root / SKIPPED):
        return list(_read_skipped(root / SKIPPED, _stamp(root / SKIPPED)))
    return list(shown.opened.cache.manifest.left_out.skipped)


def _stamp(path: Path) -> tuple[int, ...]:
    status = path.stat()
    return status.st_mtime_ns, status.st_size, status.st_ino


@functools.lru_cache(maxsize=4)
def _read_skipped(path: Path, stamp: tuple[int, ...]) -> tuple[tuple[str, str], ...]:
    try:
        with open_plain(path, _MOST_SKIPPED_BYTES) as file:
            lines = file.read().decode("utf-8", "replace").splitlines(keepends=True)
    except OSError:
        return ()
    return tuple((row[0], row[1]) for row in list(csv.reader(lines))[1:] if len(row) == 2)


def _grid_of_left_out(shown: Shown, query: Query, skipped: list[tuple[str, str]]) -> Grid:
    wanted = query.q.lower()
    found = [pair for pair in skipped if wanted in pair[0].lower() or wanted in pair[1].lower()]
    here = found[slice_of(query, len(found))]
    return Grid(
        query, tuple(_left_out_tile(shown, path, reason) for path, reason in here), len(found),
        len(shown.opened.cache), _choices(shown, query, len(skipped)),
    )  # fmt: skip


def _left_out_tile(shown: Shown, path: str, reason: str) -> Tile:
    from k5train.ui.ids import id_of

    folder, href, picture = shown.source, "", ""
    if folder and is_tame(path):
        href = f"/data/f/{folder.id}/{id_of(path)}"
        picture = f"{href}/picture?what=whole"
    return Tile(href=href, picture=picture, name=path, problem=reason, badges=("left out",))


def _choices(shown: Shown, query: Query, num_left_out: int) -> tuple[Choice, ...]:
    opened = shown.opened
    counts: dict[str, int | None] = {
        "": len(opened.cache), "left-out": num_left_out, "truncated": len(opened.cache.manifest.left_out.truncated)
    }  # fmt: skip
    counts |= {"mask": opened.num_masks, "several": opened.num_several}
    if counts["truncated"]:
        counts["truncated"] = opened.num_truncated
    return tuple(
        Choice(ONLY[only], query.url(only=only), query.only == only, count)
        for only, count in counts.items()
        if count or not only or query.only == only
    )


def _buckets(opened: Opened, query: Query) -> tuple[Choice, ...]:
    if len(opened.buckets) < 2:
        return ()
    every = Choice("All sizes", query.url(bucket=""), not query.bucket)
    return (every, *(Choice(name, query.url(bucket=name), query.bucket == name, n) for name, n in opened.buckets[:60]))


@dataclass(frozen=True)
class Fact:
    """One line about an item."""

    name: str
    value: str


@dataclass(frozen=True)
class Item:
    """One item of a cache, with all that a page says of it."""

    number: int
    row: IndexRow
    captions: tuple[str, ...]
    cut: tuple[str, ...]
    """What of its captions was cut off, one sentence each."""
    facts: tuple[Fact, ...]
    problem: str
    geometry: Geometry
    url: str
    """Of its pictures, up to the query."""
    version: str
    previous: int | None
    next: int | None


def read_item(shown: Shown, number: int) -> Item:
    """One item of a cache.

    Raises:
        NotHere: there is none of this number.
    """
    row = row_of(shown, number)
    opened = shown.opened
    (captions,) = captions_of(opened, [row])
    picture = picture_of(shown, row)
    problem = picture.problem
    if row.source_path and not problem:
        source = picture_of(shown, row, is_source=True)
        problem = source.problem and f"its source {source.problem}"
    cut = {key: count for key, count, _ in opened.cache.manifest.left_out.truncated}
    return Item(
        number,
        row,
        captions,
        tuple(f"The last {cut[key]} characters of caption {n + 1} do not fit and were cut off"
              for n, key in enumerate(row.caption_keys) if key in cut),
        tuple(_facts(row)),
        problem,
        geometry_of(row),
        f"/data/c/{shown.entry.id}/{number}/picture",
        version_of(row),
        number - 1 if number else None,
        number + 1 if number + 1 < len(opened.cache) else None,
    )  # fmt: skip


def row_of(shown: Shown, number: int) -> IndexRow:
    """The row of an item. Raises ``NotHere``."""
    if not 0 <= number < len(shown.opened.cache):
        raise NotHere("The cache has no such picture, or no longer has it", "Go back to the cache and choose another")
    return shown.opened.cache.rows([number])[0]


def _facts(row: IndexRow) -> list[Fact]:
    geometry = geometry_of(row)
    facts = [
        Fact("Bucket", geometry.bucket.name),
        Fact("Picture", f"{row.width}x{row.height}"),
        Fact("Resized to", f"{row.resized_width}x{row.resized_height}"),
        Fact("Kept", f"{kept_share(geometry):.0%} of the picture"),
        Fact("Tokens", ", ".join(map(str, row.caption_lengths)) or "0"),
    ]
    if row.source_path:
        how = "stretched to the bucket" if source_of_row(row).stretched else "cropped as its target"
        facts += [
            Fact("Source", row.source_path),
            Fact("Source size", f"{row.source_width}x{row.source_height}, {how}"),
        ]
    if badges := badges_of(row):
        facts.append(Fact("Notes", ", ".join(badges)))
    return facts


def kept_share(geometry: Geometry) -> float:
    """Which part of the picture is in the crop, from 0 to 1."""
    return geometry.bucket.width * geometry.bucket.height / (geometry.resized_width * geometry.resized_height)


def as_text(error: K5Error | OSError) -> str:
    """An error in one line, for a table."""
    return error.problem if isinstance(error, K5Error) else error.strerror or str(error)

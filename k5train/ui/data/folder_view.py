"""What does a folder of pictures hold, and what would an encode make of it? By the same code as an encode."""

from __future__ import annotations

import functools
import os
import threading
import time
from collections import Counter, OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from k5cache.buckets import Geometry, source_geometry
from k5cache.options import CacheConfig
from k5cache.shared.errors import DatasetError
from k5cache.shared.inside import is_inside
from k5cache.shared.kind import Kind
from k5cache.sources import folder, images, masks, source_folder
from k5cache.sources.find import Source
from k5cache.sources.finished import finished
from k5cache.sources.folder import ImageEntry, Scan
from k5cache.sources.items import METADATA, Skipped, SourceItem, UnreadableImage, printable, stat_numbers
from k5cache.sources.paired_folder import scan_pairs
from k5cache.sources.pairs import MARK
from k5train.ui.data.query import ONLY, Choice, Grid, Query, Tile, slice_of
from k5train.ui.ids import id_of
from k5train.ui.listing import Entry, NotHere
from k5train.ui.project import Project

READ_AT_MOST = 20_000
"""Pictures whose captions are read for a search or a filter: 0.1 ms each. With more, only names are searched."""
SIZED_AT_MOST = 500
"""Pictures that are opened for the list of buckets: 0.2 ms each."""
_TABLES = (".parquet", ".arrow", ".tar", ".csv", ".tsv", ".jsonl")
_FRESH_SECONDS = 20.0
"""How long the pictures of a page are looked up in the listing that the page was made of."""
OUTSIDE = "lies outside the project, so it is not looked at"
_listings: OrderedDict[tuple[object, ...], tuple[float, Listing]] = OrderedDict()
_lock = threading.Lock()


@dataclass(frozen=True)
class Listing:
    """What a folder holds. Captions are read when they are asked for."""

    project: Project
    entry: Entry
    config: CacheConfig
    kind: Kind
    images: tuple[ImageEntry, ...]
    """By name. For image-to-image, the targets."""
    skipped: tuple[Skipped, ...]
    """What is beside them and not used."""
    scanned: Scan = field(repr=False)
    from_metadata: Source | None = field(default=None, repr=False)
    """If the captions are in a metadata file: what an encode finds."""
    problem: DatasetError | None = None
    """Why a metadata file cannot be used."""

    @functools.cached_property
    def has_tables(self) -> bool:
        """Whether there are tables or archives, which an encode reads and the page does not open."""
        with os.scandir(self.entry.path) as entries:  # makes no paths, of which there may be thousands
            names = [entry.name.lower() for entry in entries]
        return any(name.endswith(_TABLES) and name not in METADATA for name in names)

    @functools.cached_property
    def by_id(self) -> dict[str, ImageEntry]:
        """Each picture by its id in URLs."""
        return {id_of(image.path): image for image in self.images}

    def read(self, path: str) -> Path:
        """A file of the folder. Raises ``UnreadableImage`` if it lies outside the project."""
        return _inside(self.project, self.entry.path / path)

    def read_source(self, path: str) -> Path:
        """A source, of image-to-image."""
        base = self.config.source_dir
        return _inside(self.project, (self.entry.path if base is None else Path(base)) / path)

    @functools.cached_property
    def captioned(self) -> dict[str, SourceItem | Skipped]:
        """All pictures with their captions, or the reason why there is none."""
        return items_of(self, self.images)


def _inside(project: Project, path: Path) -> Path:
    if not is_inside(project.root, path):
        raise UnreadableImage(OUTSIDE)
    return path


def list_folder(
    project: Project, entry: Entry, config: CacheConfig, kind: Kind | None = None, is_fresh: bool = True
) -> Listing:
    """Look at a folder. No picture and no caption is opened.

    Args:
        kind: None tells it by the names: pairs are named ``cat.source.png`` and ``cat.png``.
        is_fresh: False takes what a page was made of a moment ago.
    """
    key = (project.root, entry.relative, config, kind)
    with _lock:
        known = _listings.get(key)
    if not is_fresh and known and time.monotonic() - known[0] < _FRESH_SECONDS:
        return known[1]
    listing = _look(project, entry, config, kind)
    with _lock:
        _listings[key] = (time.monotonic(), listing)
        _listings.move_to_end(key)
        while len(_listings) > 4:
            _listings.popitem(last=False)
    return listing


def _look(project: Project, entry: Entry, config: CacheConfig, kind: Kind | None) -> Listing:
    source, suffixes = entry.path, config.caption_suffixes
    leave_out = Path(config.source_dir) if config.source_dir else None
    scanned = folder.scan(source, leave_out, suffixes, within=project.root)
    if kind is None:
        kind = "i2i" if any(_stem(image.path).lower().endswith(MARK) for image in scanned.images) else "t2i"
    from_metadata, problem = None, None
    if config.caption_strategy == "metadata":
        try:
            from_metadata = _find_in_metadata(project, source, config, kind)
        except DatasetError as error:
            problem = error
    elif kind == "i2i" and leave_out is None:
        scanned = scan_pairs(source, suffixes, within=project.root)
    skipped = [*scanned.skipped, *(scanned.lone_texts if config.caption_strategy == "textfile" else ())]
    ordered = sorted(scanned.images, key=lambda image: image.path)
    if from_metadata:
        here = {image.path for image in ordered} | {skip.path for skip in skipped}
        skipped += [skip for skip in from_metadata.skipped if skip.path not in here]
    return Listing(
        project, entry, config, kind, tuple(ordered), tuple(sorted(skipped, key=lambda skip: skip.path)), scanned,
        from_metadata, problem,
    )  # fmt: skip


def _find_in_metadata(project: Project, source: Path, config: CacheConfig, kind: Kind) -> Source | None:
    """What an encode finds in metadata files, unless these or what they name may lie outside the project."""
    from k5cache.sources import find

    for file in folder.files(source):
        if not is_inside(project.root, file):
            return None
    return find.find(source, config, kind)


def items_of(listing: Listing, entries: Sequence[ImageEntry]) -> dict[str, SourceItem | Skipped]:
    """Some pictures with the captions that are encoded, or why they are left out, by path."""
    root = listing.project.root
    if listing.config.caption_strategy == "metadata":
        return _from_metadata(listing, entries)
    found: dict[str, SourceItem | Skipped] = {}
    inside = []
    for entry in entries:
        files = (entry.entry.path, entry.text, entry.mask and entry.mask[1].path, entry.source and entry.source[1].path)
        if all(file is None or is_inside(root, Path(file)) for file in files):
            inside.append(entry)
        else:
            found[entry.path] = Skipped(printable(entry.path), OUTSIDE)
    scan = Scan(images=inside, suffixes=listing.scanned.suffixes)
    items, skipped = folder.find_items(listing.entry.path, listing.config, scan)
    items, empty, _ = finished(items, listing.config, listing.kind)
    skipped = [*skipped, *empty]
    if listing.config.source_dir and items:
        items, lone = source_folder.with_sources(items, [], listing.entry.path, Path(listing.config.source_dir))
        wanted = {entry.path for entry in inside}
        skipped += [skip for skip in lone if skip.path in wanted]
    by_name = {printable(entry.path): entry.path for entry in inside}
    found |= {by_name.get(skip.path, skip.path): skip for skip in skipped}
    return found | {item.path: item for item in items}


def _from_metadata(listing: Listing, entries: Sequence[ImageEntry]) -> dict[str, SourceItem | Skipped]:
    known: dict[str, SourceItem | Skipped] = {}
    if listing.from_metadata:
        known |= {skip.path: skip for skip in listing.from_metadata.skipped}
        known |= {item.path: item for item in listing.from_metadata.items}
    missing = listing.problem.problem if listing.problem else "is not named in the metadata file"
    return {entry.path: known.get(entry.path, Skipped(printable(entry.path), missing)) for entry in entries}


@dataclass(frozen=True)
class Framed:
    """A picture as an encode would take it."""

    entry: ImageEntry
    item: SourceItem | None
    """None if it is left out for its caption or its partner."""
    geometry: Geometry | None
    """None if it cannot be opened."""
    source: Geometry | None = None
    problem: str = ""
    """Why it would be left out."""

    @property
    def captions(self) -> tuple[str, ...]:
        """As they would be encoded."""
        return self.item.captions if self.item else ()


def frame(listing: Listing, entry: ImageEntry, item: SourceItem | Skipped) -> Framed:
    """What an encode would make of one picture. Its header is read; a random crop needs its bytes too."""
    if isinstance(item, Skipped) and item.reason == OUTSIDE:
        return Framed(entry, None, None, problem=OUTSIDE)
    try:
        file = listing.read(entry.path)
        width, height, content_hash = _examined(file, listing.config.crop == "random")
        geometry = listing.config.framing.frame(width, height, content_hash)[0]
        if isinstance(item, Skipped):
            return Framed(entry, None, geometry, problem=item.reason)
        problem = listing.config.framing.refusal(geometry)
        if item.mask and not problem:
            masks.check(listing.read, item, width, height)
        return Framed(entry, item, geometry, _source_of(listing, item, geometry), problem)
    except (UnreadableImage, OSError) as error:
        reason = error.reason if isinstance(error, UnreadableImage) else error.strerror or "cannot be read"
        if isinstance(item, Skipped):  # the picture first: a caption would not help it
            return Framed(entry, None, None, problem=f"{reason}; {item.reason}")
        return Framed(entry, item, None, problem=reason)


def _source_of(listing: Listing, item: SourceItem, geometry: Geometry) -> Geometry | None:
    if not item.source or listing.kind != "i2i":
        return None
    try:
        width, height, _ = _examined(listing.read_source(item.source.path), False)
    except (UnreadableImage, OSError) as error:
        reason = error.reason if isinstance(error, UnreadableImage) else error.strerror
        raise UnreadableImage(f"its source {item.source.path} {reason}") from error
    return source_geometry(geometry, width, height)


def _examined(path: Path, with_hash: bool) -> tuple[int, int, str]:
    """Width, height and, if it is asked for, the content hash."""
    return _examined_once(path, stat_numbers(path.stat()), with_hash)


@functools.lru_cache(maxsize=20_000)
def _examined_once(path: Path, stat: tuple[int, int, int], with_hash: bool) -> tuple[int, int, str]:
    width, height = images.image_size(path)
    return width, height, images.hash_content(path) if with_hash else ""


def find_picture(listing: Listing, id: str) -> ImageEntry:
    """The picture that a URL names. Raises ``NotHere``."""
    entry = listing.by_id.get(id)
    if entry is None:
        raise NotHere("This picture is no longer in the folder", "Go back to the folder and choose another one")
    return entry


def grid(listing: Listing, query: Query, extra: str = "") -> Grid:
    """The pictures on a page.

    Args:
        extra: query of the pictures' URLs: the options that are tried.
    """
    can_read = len(listing.images) <= READ_AT_MOST
    loose = [skip for skip in listing.skipped if query.q.lower() in f"{skip.path} {skip.reason}".lower()]
    entries = _sorted(listing, _filtered(listing, query, can_read), query.sort, can_read)
    beside = loose if query.only == "left-out" else []
    here = slice_of(query, len(entries) + len(beside))
    page = entries[here]
    known = items_of(listing, page)
    tiles = [tile_of(listing, frame(listing, entry, known[entry.path]), extra) for entry in page]
    rest = beside[max(0, here.start - len(entries)) : max(0, here.stop - len(entries))]
    tiles += [Tile(href="", picture="", name=skip.path, problem=skip.reason, badges=("left out",)) for skip in rest]
    note = "" if can_read or not query.q else f"In a folder of more than {READ_AT_MOST:,} pictures names are searched."
    return Grid(
        query, tuple(tiles), len(entries) + len(beside), len(listing.images), _choices(listing, query),
        _buckets(listing, query), (("", "Name"), ("size", "Largest file first"), ("long", "Longest caption"),
        ("newest", "Newest first")), note,
    )  # fmt: skip


def _filtered(listing: Listing, query: Query, can_read: bool) -> list[ImageEntry]:
    needs_file = listing.config.caption_strategy == "textfile"
    tests: list[Callable[[ImageEntry], bool]] = []
    if query.only == "mask":
        tests.append(lambda image: image.mask is not None)
    elif query.only in ("left-out", "no-caption") and (can_read and needs_file):
        tests.append(lambda image: isinstance(listing.captioned[image.path], Skipped))
    elif query.only in ("left-out", "no-caption"):
        tests.append(lambda image: needs_file and image.text is None)
    elif query.only == "several" and can_read:
        tests.append(lambda image: len(_captions(listing, image)) > 1)
    if query.q:
        wanted = query.q.lower()
        tests.append(lambda image: wanted in image.path.lower() or (
            can_read and any(wanted in caption.lower() for caption in _captions(listing, image))))  # fmt: skip
    if query.bucket:
        tests.append(lambda image: bucket_of(listing, image) == query.bucket)
    return [image for image in listing.images if all(test(image) for test in tests)]


def _captions(listing: Listing, image: ImageEntry) -> tuple[str, ...]:
    item = listing.captioned[image.path]
    return item.captions if isinstance(item, SourceItem) else ()


def bucket_of(listing: Listing, image: ImageEntry) -> str:
    """The name of the bucket that an encode would choose; empty for a picture that cannot be opened."""
    try:
        width, height, _ = _examined(listing.read(image.path), False)
    except (UnreadableImage, OSError):
        return ""
    return listing.config.framing.frame(width, height, "")[0].bucket.name


def _sorted(listing: Listing, entries: list[ImageEntry], sort: str, can_read: bool) -> list[ImageEntry]:
    def stat(image: ImageEntry, name: str) -> int:
        try:
            return int(getattr(image.entry.stat(), name))
        except OSError:
            return 0

    if sort == "size":
        return sorted(entries, key=lambda image: -stat(image, "st_size"))
    if sort == "newest":
        return sorted(entries, key=lambda image: -stat(image, "st_mtime_ns"))
    if sort == "long" and can_read:
        return sorted(entries, key=lambda image: -max(map(len, _captions(listing, image)), default=0))
    return entries


def tile_of(listing: Listing, framed: Framed, extra: str = "") -> Tile:
    """One picture as a tile."""
    entry, geometry = framed.entry, framed.geometry
    base = f"/data/f/{listing.entry.id}/{id_of(entry.path)}"
    query = f"?v={version_of(framed)}{extra}" if geometry else "?what=whole"
    shape = (geometry.bucket.width * (2 if framed.source else 1), geometry.bucket.height) if geometry else (1, 1)
    words = {
        "left out": bool(framed.problem),
        "mask": entry.mask is not None,
        "enlarged": geometry is not None and geometry.upscaled,
        "source stretched": framed.source is not None and framed.source.stretched,
        f"{len(framed.captions)} captions": len(framed.captions) > 1,
    }
    facts = f"{geometry.bucket.name} of {geometry.width}x{geometry.height}" if geometry else ""
    badges = tuple(word for word, is_so in words.items() if is_so)
    href = f"{base}?{extra[1:]}" if extra else base
    return Tile(
        href, f"{base}/picture{query}", printable(entry.path), shape, framed.captions, facts, badges, framed.problem
    )


def version_of(framed: Framed) -> str:
    """What names the pixels of a picture in a URL, by the stats of its files."""
    entry, parts = framed.entry, list[object]()
    for file in (entry.entry, entry.mask and entry.mask[1], entry.source and entry.source[1]):
        try:
            parts.append(stat_numbers(file.stat(follow_symlinks=True)) if file else None)
        except OSError:
            parts.append("gone")
    return id_of(repr((parts, framed.geometry, framed.source)))


def _choices(listing: Listing, query: Query) -> tuple[Choice, ...]:
    lacking = 0
    if listing.config.caption_strategy == "textfile":
        lacking = sum(image.text is None for image in listing.images)
    counts = {
        "": len(listing.images),
        "left-out": lacking + len(listing.skipped),
        "no-caption": lacking,
        "mask": sum(image.mask is not None for image in listing.images),
    }
    found = [
        Choice(ONLY[only], query.url(only=only), query.only == only, count)
        for only, count in counts.items()
        if count or not only or query.only == only
    ]
    return (*found, Choice(ONLY["several"], query.url(only="several"), query.only == "several"))


def _buckets(listing: Listing, query: Query) -> tuple[Choice, ...]:
    if len(listing.images) > SIZED_AT_MOST and not query.bucket:
        return ()
    names = Counter(bucket_of(listing, image) for image in listing.images)
    names.pop("", None)
    if len(names) < 2:
        return ()
    every = Choice("All sizes", query.url(bucket=""), not query.bucket)
    chosen = [Choice(name, query.url(bucket=name), query.bucket == name, n) for name, n in names.most_common(60)]
    return (every, *chosen)


def _stem(path: str) -> str:
    return path.rpartition(".")[0]

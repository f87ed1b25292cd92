"""What does the page of one picture show? The same for a picture of a folder and for an item of a cache."""

from __future__ import annotations

from dataclasses import dataclass

from k5cache.buckets import Geometry
from k5cache.sources.folder import ImageEntry
from k5cache.sources.items import SourceItem, printable
from k5train.ui.data.cache_view import Fact, Item, Shown, kept_share
from k5train.ui.data.captions import Editor, editor_of
from k5train.ui.data.crops import box_of
from k5train.ui.data.folder_view import Framed, Listing, items_of, tile_of, version_of
from k5train.ui.ids import id_of


@dataclass(frozen=True)
class Picture:
    """One picture on the page."""

    label: str
    url: str
    width: int
    height: int


@dataclass(frozen=True)
class ItemView:
    """Everything on the page of one picture."""

    name: str
    problem: str
    badges: tuple[str, ...]
    pictures: tuple[Picture, ...]
    """The crop, for image-to-image behind the one of its source."""
    whole: Picture | None
    """In pixels of the file, for the frame."""
    frame: tuple[float, float, float, float] | None
    """Left, top, width and height of the crop, in pixels of the file."""
    captions: tuple[str, ...]
    """As they are encoded."""
    notes: tuple[str, ...]
    facts: tuple[Fact, ...]
    editor: Editor
    save: str
    """Where the editor is sent."""
    up: str
    previous: str | None
    next: str | None
    place: str
    """``3 of 120``."""


def view_of_cache(shown: Shown, item: Item, listing: Listing | None) -> ItemView:
    """An item of a cache.

    Args:
        listing: of its folder; None if that is not in the project, or too large to be listed for one picture.
    """
    row = item.row
    image = None if listing is None else listing.by_id.get(id_of(row.path))
    if listing is None or image is None:
        where = "is not a file of a folder in this project" if listing else "is not edited here"
        editor, save = Editor("", read_only=f"The caption {where}: edit it where it is"), ""
    else:
        editor, save = editor_of(listing, image), f"/data/f/{listing.entry.id}/{id_of(row.path)}/caption"
    base = f"/data/c/{shown.entry.id}"
    url = f"{item.url}?v={item.version}"
    notes = (*item.cut, *_changed(listing, image, item))
    pictures = []
    if row.source_path:
        pictures.append(Picture("Source", f"{url}&what=source", row.bucket_width, row.bucket_height))
    label = "Target" if row.source_path else "What is trained on"
    pictures.append(Picture(label, f"{url}&what=crop", row.bucket_width, row.bucket_height))
    return ItemView(
        row.path, item.problem, (), tuple(pictures), Picture("The whole picture", f"{url}&what=whole", row.width,
        row.height), _frame(item.geometry), item.captions, notes, item.facts, editor, save, base,
        None if item.previous is None else f"{base}/{item.previous}",
        None if item.next is None else f"{base}/{item.next}",
        f"{item.number + 1:,} of {len(shown.opened.cache):,}",
    )  # fmt: skip


def _changed(listing: Listing | None, image: ImageEntry | None, item: Item) -> tuple[str, ...]:
    """That the captions of a folder are others than those of the cache. The encode folds white space."""
    if listing is None or image is None:
        return ()
    now = items_of(listing, [image])[image.path]
    if not isinstance(now, SourceItem):
        return (f"The next encode leaves it out: {now.reason}",)
    was, will = ({" ".join(caption.split()) for caption in captions} for captions in (item.captions, now.captions))
    return () if was == will or "&" in "".join(will) else ("It is another one now. Encode again to train on it",)


def view_of_folder(listing: Listing, image: ImageEntry, framed: Framed, extra: str = "") -> ItemView:
    """A picture of a folder, as an encode would take it.

    Args:
        extra: query of the options that are tried.
    """
    base = f"/data/f/{listing.entry.id}"
    own = f"{base}/{id_of(image.path)}"
    tail = f"?{extra[1:]}" if extra else ""
    place = listing.images.index(image)
    geometry = framed.geometry
    url = f"{own}/picture?v={version_of(framed)}{extra}"
    pictures: list[Picture] = []
    whole = None
    if geometry:
        size = geometry.bucket.width, geometry.bucket.height
        pictures += [Picture("Source", f"{url}&what=source", *size)] if framed.source else []
        label = "What would be trained on" if not framed.problem else "The crop it would have"
        pictures.append(Picture("Target" if framed.source else label, f"{url}&what=crop", *size))
        whole = Picture("The whole picture", f"{url}&what=whole", geometry.width, geometry.height)
    neighbours = [listing.images[n] if 0 <= n < len(listing.images) else None for n in (place - 1, place + 1)]
    previous, following = (f"{base}/{id_of(other.path)}{tail}" if other else None for other in neighbours)
    return ItemView(
        printable(image.path), framed.problem, tile_of(listing, framed).badges, tuple(pictures), whole,
        _frame(geometry) if geometry else None, framed.captions, (), tuple(_facts(framed)), editor_of(listing, image),
        f"{own}/caption", base + tail, previous, following, f"{place + 1:,} of {len(listing.images):,}",
    )  # fmt: skip


def _facts(framed: Framed) -> list[Fact]:
    geometry = framed.geometry
    if geometry is None:
        return []
    facts = [
        Fact("Bucket", geometry.bucket.name),
        Fact("Picture", f"{geometry.width}x{geometry.height}"),
        Fact("Resized to", f"{geometry.resized_width}x{geometry.resized_height}"),
        Fact("Kept", f"{kept_share(geometry):.0%} of the picture"),
    ]
    if framed.source and framed.item and framed.item.source:
        how = "stretched to the bucket" if framed.source.stretched else "cropped as its target"
        facts.append(Fact("Source", f"{framed.item.source.path}, {framed.source.width}x{framed.source.height}, {how}"))
    return facts


def _frame(geometry: Geometry) -> tuple[float, float, float, float]:
    left, top, right, bottom = box_of(geometry)
    return tuple(round(value, 1) for value in (left, top, right - left, bottom - top))  # type: ignore[return-value]

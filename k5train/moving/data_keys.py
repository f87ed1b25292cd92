"""What becomes of keys about images: sizes in pixels or megapixels, crops, captions? For every trainer."""

from __future__ import annotations

from math import sqrt
from typing import Any

from k5train.moving.draft import Draft, Entry, flag, number, wrong_type

_FEWEST_PIXELS = 16  # a smaller number of pixels is one of megapixels


def take_side(draft: Draft, entry: Entry, pixels: float, note: str = "") -> None:
    """The side of the square bucket, as a multiple of 16."""
    side = round(pixels / 16) * 16
    if side != pixels and not note:
        note = "the nearest multiple of 16"
    draft.take(entry, "cache.resolution", side, note, is_of_cache=True)


def side_of_megapixels(megapixels: float) -> int:
    """The side of a square of about this many: 1024 for 1.0 and 1.05, 512 for 0.25. A multiple of 64."""
    return round(sqrt(megapixels * 1e6) / 64) * 64


def take_area(draft: Draft, entry: Entry, kind: str) -> None:
    """A resolution by SimpleTuner's ``resolution_type``."""
    value = number(entry)
    if not 0 < value < 1e6:
        raise wrong_type(entry, "above 0")
    if kind == "area" or value < _FEWEST_PIXELS:
        take_side(draft, entry, side_of_megapixels(value), f"{value:g} megapixels")
    elif kind == "pixel":
        take_side(draft, entry, value, "the side of the square bucket; other buckets have the same area")
    else:
        take_side(draft, entry, value)


def take_rectangle(draft: Draft, entry: Entry) -> None:
    """``1024``, ``[960, 544]`` or ``960,544``: the square of the same area."""
    given = entry.value.split(",") if isinstance(entry.value, str) else entry.value
    sides: list[Any] = given if isinstance(given, list) else [given]
    numbers = [number(Entry(entry.where, entry.key, side)) for side in sides]
    if len(numbers) not in (1, 2) or not all(0 < side < 1e5 for side in numbers):
        raise wrong_type(entry, "a side or [width, height]")
    side = sqrt(numbers[0] * numbers[-1])
    take_side(draft, entry, side, "a square of the same area" if numbers[0] != numbers[-1] else "")


def take_flip(draft: Draft, entry: Entry) -> None:
    """Mirrored copies."""
    draft.take(entry, "cache.flip", flag(entry), is_of_cache=True)


def take_random_crop(draft: Draft, entry: Entry) -> None:
    """Whether crops are random."""
    draft.take(entry, "cache.crop", "random" if flag(entry) else "center", is_of_cache=True)


def take_regularisation(draft: Draft, entry: Entry) -> None:
    """Whether images show the class and not the subject."""
    draft.cache.is_regularisation_data = flag(entry)
    if draft.cache.is_regularisation_data:
        draft.say(entry, "taken over", "train.data: is_regularisation_data, weighted by prior_loss_weight")
    else:
        draft.say(entry, "not needed", "it is off")


def take_repeats(draft: Draft, entry: Entry, more: int = 0) -> None:
    """How often images are used in an epoch.

    Args:
        more: what is to be added to a trainer's number.
    """
    value = number(entry)
    if value < 0 or not value.is_integer() or value + more < 1 or value > 1e6:
        raise wrong_type(entry, f"a whole number of at least {1 - more}")
    draft.cache.repeats = int(value) + more
    note = f", because {int(value)} there is {draft.cache.repeats} passes" if more else ""
    draft.say(entry, "taken over", f"repeats = {draft.cache.repeats}{note}")

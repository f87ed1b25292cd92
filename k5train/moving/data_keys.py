"""What becomes of keys about images: sizes in pixels or megapixels, crops, captions? For every trainer."""

from __future__ import annotations

from math import sqrt
from typing import Any

from k5train.moving.draft import Draft, Entry, flag, number, text, wrong_type

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


def take_extension(draft: Draft, entry: Entry) -> None:
    """The suffix of caption files; ``.txt`` is read anyway."""
    suffix = text(entry).lstrip(".").lower()
    if suffix == "txt":
        draft.say(entry, "not needed", "this is what happens here anyway")
    else:
        draft.take(entry, "cache.caption_extension", suffix, is_of_cache=True)


def take_prefix(draft: Draft, entry: Entry) -> None:
    """Text before captions, which kohya's trainers follow with a space."""
    draft.take(entry, "cache.caption_prefix", f"{text(entry).rstrip()} ", "with a space behind it", is_of_cache=True)


def take_suffix(draft: Draft, entry: Entry) -> None:
    """Text behind captions, which kohya's trainers put a space before."""
    draft.take(entry, "cache.caption_suffix", f" {text(entry).lstrip()}", "with a space before it", is_of_cache=True)


def take_shuffle(draft: Draft, entry: Entry) -> None:
    """Whether tags are shuffled."""
    if flag(entry):
        most = draft.cache.options.get("caption_variants", 4)
        note = f"a caption is encoded in up to {most} orders, cache.caption_variants"
        draft.take(entry, "cache.shuffle_tags", True, note, is_of_cache=True)
    else:
        draft.say(entry, "not needed", "it is off")


def take_keep(draft: Draft, entry: Entry, shuffles: Any) -> None:
    """How many tags stay in place.

    Args:
        shuffles: the value of the key that shuffles tags.
    """
    if number(entry) == 0 or shuffles is None or not flag(Entry(entry.where, "shuffling", shuffles)):
        draft.say(entry, "not needed", "no tags are shuffled")
    else:
        draft.take(entry, "cache.keep_tokens", entry.value, is_of_cache=True)


def take_wildcards(draft: Draft, entry: Entry) -> None:
    """Whether ``{a|b}`` is drawn, and a line of a file."""
    if flag(entry):
        draft.take(entry, "cache.wildcards", True, "and each line is a caption of its own", is_of_cache=True)
    else:
        draft.say(entry, "not needed", "it is off")

"""Which rows of a run's caches are not trained on, and on which does it measure what it has learned?"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from k5cache.shared.errors import RecipeError
from k5cache.shared.units import count_of
from k5train.data.mixture import Mixture, Source


@dataclass(frozen=True)
class Measured:
    """What a run measured its LoRAs on."""

    data: Mixture
    """Without what the run holds out."""
    rows: Sequence[int]
    num_sigmas: int
    scaling_factor: float


def split_off(data: Mixture, share: float) -> Mixture:
    """The same mixture with a validation split: rows of every cache that are not trained on.

    Each cache gives its own share of images. An image that is chosen in one cache is held out in all of them, at every
    resolution, mirrored or not, regularisation data included.

    Raises:
        RecipeError: the split of a cache would be empty, or would be the whole of it; names the cache.
    """
    if not share:
        return data
    hashes = [_content_hashes(source) for source in data.sources]
    own = [split_rows(contents, share) for contents in hashes]
    chosen = {contents[item] for contents, items in zip(hashes, own, strict=True) for item in items}
    sources = []
    for source, contents, items in zip(data.sources, hashes, own, strict=True):
        split = frozenset(item for item, content in enumerate(contents) if content in chosen)
        if (contents or source is data.sources[0]) and not 0 < len(split) < len(contents):
            raise _leaves_nothing(data, source, share, len(split), is_own=len(items) == len(split))
        sources.append(replace(source, split=split))
    return Mixture(sources)


def _leaves_nothing(data: Mixture, source: Source, share: float, num_rows: int, is_own: bool) -> RecipeError:
    size = len(source.cache)
    of = count_of(size, "row") if len(data.sources) == 1 else f"the {count_of(size, 'row')} of {source.cache.root}"
    reason = "" if is_own else ", because its images are held out of other caches of the run too"
    fix = "Set train.validation.split=0, or encode more images"
    if len(data.sources) > 1:
        fix += " into it, or leave this cache out"
    return RecipeError(f"train.validation.split of {share} holds out {num_rows} of {of}{reason}", fix)


def split_rows(content_hashes: Sequence[str], share: float) -> frozenset[int]:
    """The rows of one cache's validation split, chosen by the bytes of their images alone.

    All rows of an image are on the same side, because a flip is the same image. If images are added to the
    cache, few rows change sides; the seed of a run has no influence.
    """
    images = _in_hash_order("held out", content_hashes)
    count = max(1, round(share * len(images))) if share else 0
    chosen = set(images[:count])
    return frozenset(i for i, h in enumerate(content_hashes) if h in chosen)


def held_out_rows(data: Mixture) -> tuple[list[int], list[int]]:
    """The held-out rows of a mixture from ``split_off``: those of the subject, and those of regularisation data."""
    of_subject: list[int] = []
    of_prior: list[int] = []
    for first, source, is_prior in _by_kind(data):
        (of_prior if is_prior else of_subject).extend(first + item for item in sorted(source.split))
    return of_subject, of_prior


def probe_rows(data: Mixture, num_images: int) -> list[int]:
    """Rows of up to ``num_images`` images that are trained on and are not regularisation data: one row an image.

    As in the split, the bytes of the images alone decide which.
    """
    row_of: dict[str, int] = {}
    for first, source, is_prior in _by_kind(data):
        for item, content in enumerate([] if is_prior else _content_hashes(source)):
            if item not in source.split:
                row_of.setdefault(content, first + item)
    return [row_of[image] for image in _in_hash_order("probe", row_of)[:num_images]]


def _by_kind(data: Mixture) -> list[tuple[int, Source, bool]]:
    """(first row, source, whether it is regularisation data) of each source. If all are, none is beside the others."""
    with_rows = [source for source in data.sources if len(source.cache)]
    are_all = all(source.is_regularisation_data for source in with_rows)
    return [
        (first, source, source.is_regularisation_data and not are_all)
        for first, source in zip(data.first_rows, data.sources, strict=True)
    ]


def _content_hashes(source: Source) -> list[str]:
    hashes: list[str] = source.cache.columns("content_hash").column(0).to_pylist()
    return hashes


def _in_hash_order(purpose: str, content_hashes: Iterable[str]) -> list[str]:
    return sorted(set(content_hashes), key=lambda h: hashlib.sha256(f"{purpose}/{h}".encode()).digest())

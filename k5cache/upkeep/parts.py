"""Do these caches belong together, and do the parts among them make up a whole? What a merge refuses, by name."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa

from k5cache.encode.differences import Difference, differences
from k5cache.shared.command_line import command
from k5cache.shared.errors import CacheError, CacheStale
from k5cache.shared.kind import LONG_NAMES
from k5cache.shared.units import count_of
from k5cache.store import columns
from k5cache.store.manifest import Manifest
from k5cache.store.notes import Part, arguments_of, numbered
from k5cache.store.split import columns_of, path_hashes, read_split

_MERGE_ANYWAY = "merge what is there with --incomplete"


@dataclass(frozen=True)
class Whole:
    """What the caches of a merge are together."""

    part: Part | None = None
    """The parts that the merged cache holds, if some are missing."""
    split: pa.Table | None = None
    """Of their source, if all caches are parts of one source that was the same for all."""

    def order(self, paths: pa.Array) -> pa.Array | None:
        """The numbers of rows in the order of the source, given their paths. None if the order is not known."""
        if self.split is None:
            return None
        of_source = columns_of(self.split)[0]
        by_hash = np.argsort(of_source)
        places = np.minimum(
            np.searchsorted(of_source, path_hashes(columns.values(paths)), sorter=by_hash), len(by_hash) - 1
        )
        return pa.array(np.argsort(by_hash[places], kind="stable"))


def require_one_recipe(roots: Sequence[Path], manifests: Sequence[Manifest]) -> None:
    """Refuse caches that differ in their recipes or encoders.

    Raises:
        CacheStale: names the fields, and what to do.
    """
    for root, manifest in zip(roots[1:], manifests[1:], strict=True):
        if manifest.kind != manifests[0].kind:
            first, other = LONG_NAMES[manifests[0].kind], LONG_NAMES[manifest.kind]
            raise CacheStale(
                f"{roots[0]} was encoded for {first} and {root} for {other}", "Merge caches of one kind of model"
            )
        differing = differences(manifests[0].recipe, manifest.recipe)
        if differing:
            sentences = "; ".join(difference.between(roots[0], root) for difference in differing)
            versions = _other_versions(roots[0], manifests[0], root, manifest)
            raise CacheStale(
                f"{roots[0]} and {root} have different recipes: {sentences}{versions}",
                _one_recipe(roots[0], manifests[0], root, manifest, differing),
            )


def require_whole(roots: Sequence[Path], manifests: Sequence[Manifest], is_incomplete: bool) -> Whole:
    """Check that the parts among some caches are all parts of one source, each once, and saw the same images.

    Args:
        is_incomplete: parts may be missing, and may have been encoded when the source had other images.

    Raises:
        CacheStale: says which part is missing, doubled, of another split or of another state of the source.
    """
    parts = [(root, m, m.part) for root, m in zip(roots, manifests, strict=True) if m.part]
    if not parts:
        return Whole()
    first_root, _, first = parts[0]
    holders: dict[int, Path] = {}
    for root, _, part in parts:
        if part.of != first.of:
            raise CacheStale(
                f"{first_root} holds {first.name}, and {root} {part.name}",
                f"Merge parts of one split: encode the others again with --part I/{first.of} into other caches",
            )
        for number in part.numbers:
            if number in holders:
                raise CacheStale(
                    f"Part {number} of {part.of} is in {holders[number]} and in {root}",
                    "Name each part once, and merge the parts of one source first: what comes of it merges with others",
                )
            holders[number] = root
    merged = Part(tuple(sorted(holders)), first.of)
    missing = [number for number in range(1, first.of + 1) if number not in holders]
    if missing and not is_incomplete:
        raise _missing(merged, missing)
    split = _common_split(parts, is_incomplete)
    return Whole(merged if missing else None, split if len(parts) == len(roots) else None)


def _missing(merged: Part, missing: Sequence[int]) -> CacheStale:
    shown = tuple(missing[:16])
    are = f"{numbered(shown)} {'is' if len(missing) == 1 else 'are'} missing"
    if len(missing) > len(shown):
        are = f"{len(missing)} parts are missing, the first of them {', '.join(map(str, shown))}"
    there = merged.name if len(merged.numbers) <= 16 else f"{len(merged.numbers)} parts of {merged.of}"
    encode = command("k5cache", "encode", "SOURCE", "--part", f"{missing[0]}/{merged.of}")
    return CacheStale(
        f"{there[0].upper()}{there[1:]}: {are}",
        f"Encode what is missing ({encode}) and name it too, or {_MERGE_ANYWAY}",
    )


def _common_split(parts: Sequence[tuple[Path, Manifest, Part]], is_incomplete: bool) -> pa.Table | None:
    """The split that all parts have; None if they differ, which is refused unless ``is_incomplete``."""
    split: pa.Table | None = None
    of_images: dict[str, list[int]] = {}
    for root, manifest, part in parts:
        if manifest.split is None:
            return None
        table = read_split(root, manifest.split)
        split = table if split is None else split
        images = hashlib.sha256(b"".join(column.tobytes() for column in columns_of(table)[::2])).hexdigest()
        of_images.setdefault(images, []).extend(part.numbers)
    if len(of_images) == 1:
        return split
    if is_incomplete:
        return None
    groups = sorted((tuple(sorted(numbers)) for numbers in of_images.values()), key=len, reverse=True)
    seen = " saw other images than ".join(map(numbered, groups))
    raise CacheStale(
        f"The source has changed between the encodes of its parts: {seen}",
        f"Encode every part again, which encodes only what is new, or {_MERGE_ANYWAY}",
    )


def _one_recipe(
    first: Path, first_manifest: Manifest, other: Path, manifest: Manifest, differing: Sequence[Difference]
) -> str:
    """What to do about two caches of different recipes."""
    if {(difference.table, difference.key) for difference in differing} == {("text", "text_encoder")}:
        anew = command("k5cache", "encode", "SOURCE", "-o", "OTHER")
        return (
            "Encode the source of one of them again with the model of the other. If both have the same model, one is of"
            f" an early version, whose fingerprint covers weights that are not used: encode its source anew: {anew}"
        )
    lacking = {
        root
        for root, recipe in ((first, first_manifest.recipe), (other, manifest.recipe))
        for difference in differing
        if difference.key not in recipe.get(difference.table, {})
    }
    if len(lacking) == 1:
        older = lacking.pop()
        part = first_manifest.part if older == first else manifest.part
        update = command("k5cache", "encode", "SOURCE", *arguments_of(part), "-o", older, "--update")
        return f"{older} is of an earlier version, which did not note this. Bring it up to date: {update}"
    return "Encode one of them again with the recipe of the other, and --update"


def _other_versions(first: Path, first_manifest: Manifest, other: Path, manifest: Manifest) -> str:
    """The versions that differ, in parentheses; empty if the same packages made both."""
    names = ("kandinsky5-lora", "diffusers", "transformers", "ftfy")
    pairs = [(name, first_manifest.created_by.get(name), manifest.created_by.get(name)) for name in names]
    differing = [pair for pair in pairs if pair[1] != pair[2]]
    if not differing:
        return ""
    by_first = ", ".join(f"{name} {version or 'unknown'}" for name, version, _ in differing)
    by_other = ", ".join(f"{name} {version or 'unknown'}" for name, _, version in differing)
    return f" ({first} was made with {by_first}; {other} with {by_other})"


def require_rows(num_rows: int, roots: Sequence[Path]) -> None:
    """Refuse to make a cache of nothing.

    Raises:
        CacheError: all parts are empty.
    """
    if not num_rows:
        raise CacheError(
            f"None of the {count_of(len(roots), 'cache')} holds an image",
            "k5cache info says of each what was skipped and why; correct the source and encode again",
        )

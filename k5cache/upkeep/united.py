"""What does the manifest of a merged cache note of how its caches were made, and of what they left out?"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from k5cache.encode.source_note import MOST_NAMED
from k5cache.store.manifest import Manifest
from k5cache.store.notes import LeftOut, SourceNote
from k5cache.upkeep.parts import Whole


def merge_recipe(manifests: Sequence[Manifest]) -> dict[str, Any]:
    """The recipe of caches that ``require_one_recipe`` has passed.

    If their captions were cleaned by different versions it does not say by which, so the next encode cleans all again.
    """
    recipe = dict(manifests[0].recipe)
    if any(manifest.recipe.get("cleaning") != recipe.get("cleaning") for manifest in manifests):
        recipe.pop("cleaning", None)
    return recipe


def merge_versions(manifests: Sequence[Manifest]) -> dict[str, str]:
    """Package -> version, or the versions if several made the caches: ``2.12.0 and 2.13.0``."""
    packages = dict.fromkeys(package for manifest in manifests for package in manifest.created_by)
    return {
        package: " and ".join(dict.fromkeys(m.created_by[package] for m in manifests if package in m.created_by))
        for package in packages
    }


def merge_left_out(manifests: Sequence[Manifest]) -> LeftOut:
    """What several caches could not use, each once. Every part names what its source has besides images."""
    named = dict.fromkeys(entry for manifest in manifests for entry in manifest.left_out.skipped)
    failed = {key: reason for manifest in manifests for key, reason in manifest.left_out.failed.items()}
    cut = {entry[0]: entry for manifest in manifests for entry in manifest.left_out.truncated}
    decoders = {manifest.left_out.decoders for manifest in manifests} - {""}
    return LeftOut(
        tuple(named)[:MOST_NAMED],
        failed,
        " and ".join(sorted(decoders)),  # several: the next encode tries again what one of them could not decode
        tuple(cut.values())[:MOST_NAMED],
    )


def merge_source(whole: Whole, manifests: Sequence[Manifest]) -> SourceNote:
    """The note of the source, if all parts of one source are there and say the same of it."""
    listings = {manifest.source.listing for manifest in manifests}
    if whole.split is None or whole.part is not None or len(listings) > 1:
        return SourceNote()
    stats = {manifest.source.stats for manifest in manifests} - {""}  # a part has none if its files were still fresh
    return SourceNote(listings.pop(), stats.pop() if len(stats) == 1 else "")

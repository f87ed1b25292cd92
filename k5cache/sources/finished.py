"""What is encoded of the captions that a source has, and what should a person know of how they came about? Pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

from k5cache.options import CacheConfig
from k5cache.shared.kind import Kind
from k5cache.shared.units import count_of
from k5cache.sources.captions import finish
from k5cache.sources.class_captions import notice
from k5cache.sources.folder import ImageEntry
from k5cache.sources.items import Skipped, SourceItem

_NEEDS = {
    "keep_tokens": ("shuffle_tags",),
    "caption_variants": ("shuffle_tags", "wildcards"),
    "class_replaces": ("class_word",),
}
"""Options that do nothing without others."""


def finished(
    items: list[SourceItem], config: CacheConfig, kind: Kind
) -> tuple[list[SourceItem], list[Skipped], list[str]]:
    """Items with the captions that are encoded: variants, prefix, suffix and trigger.

    Returns:
        the items; those without a caption, which an empty part of a wildcard may leave; and what should be known.
    """
    is_varied = config.shuffle_tags or config.wildcards
    notices = [
        f"cache.{name} does nothing without cache.{' or cache.'.join(needs)}"
        for name, needs in _NEEDS.items()
        if getattr(config, name) != getattr(CacheConfig, name) and not any(getattr(config, need) for need in needs)
    ]
    if not (is_varied or config.caption_prefix or config.caption_suffix or config.trigger):
        return items, [], [*notices, *notice((c for item in items for c in item.captions), config)]
    known: dict[tuple[str, ...], tuple[str, ...]] = {}
    for item in items:  # an instance prompt is the caption of all
        if item.captions not in known:
            known[item.captions] = finish(item.captions, config, kind)
    if is_varied:
        notices.append(_of_variants(known, config))
    notices += notice((caption for captions in known.values() for caption in captions), config)
    done = [replace(item, captions=known[item.captions]) for item in items if known[item.captions]]
    return done, [Skipped(item.path, "empty caption") for item in items if not known[item.captions]], notices


def _of_variants(known: dict[tuple[str, ...], tuple[str, ...]], config: CacheConfig) -> str:
    before = len({caption for captions in known for caption in captions})
    after = len({caption for captions in known.values() for caption in captions})
    options = " and ".join(f"cache.{name}" for name in ("shuffle_tags", "wildcards") if getattr(config, name))
    return (
        f"{options}: {count_of(before, 'caption becomes', 'captions become')} {after}, "
        f"at most {config.caption_variants} each (cache.caption_variants),"
        " and each step draws one; the same captions always become the same ones"
    )


def notices_of_files(
    items: Sequence[SourceItem], images: Sequence[ImageEntry], config: CacheConfig
) -> tuple[tuple[str, ...], int]:
    """What should be known of the caption files beside images.

    Returns:
        a sentence each; and how many text files have several lines that are captions of their own.
    """
    if config.caption_strategy != "textfile":
        return (), 0
    used = {item.path: item for item in items}
    entries = [image for image in images if image.path in used]
    several = {
        image.text for image in entries
        if len(used[image.path].captions) > 1 and image.text and not image.text.lower().endswith(".json")
    }  # fmt: skip
    if config.caption_suffixes is not None:
        return (), len(several)
    suffixes = Counter(text[text.rfind(".") :].lower() for image in entries if (text := image.text))
    notices = [
        f"{_counted(suffixes[suffix])} no .txt: captions are read from {suffix} files"
        for suffix in (".caption", ".json") if suffixes[suffix]
    ]  # fmt: skip
    for suffix, count in sorted(Counter(image.other_text for image in entries if image.other_text).items()):
        instead = f"cache.caption_extension = {suffix[1:]} reads it instead"
        notices.append(f"{_counted(count)} a {suffix} file that is not read: {instead}")
    return tuple(notices), len(several)


def _counted(count: int) -> str:
    return count_of(count, "image has", "images have")

"""Which text row has each caption? Raw captions become keys and texts to encode. No torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from k5cache.buckets import Geometry
from k5cache.encode.job import SourceView
from k5cache.encode.keys import canonical, source_of, text_key_of
from k5cache.encode.planned_jobs import TextColumns
from k5cache.encode.previous_index import PreviousIndex
from k5cache.encode.wanted import Picture, Stored
from k5cache.sources.items import SourceItem

_MOST_KNOWN = 100_000  # captions whose keys are remembered: 40 MB


@dataclass(frozen=True)
class Seen:
    """The source that Qwen sees together with a caption; for text-to-image there is none."""

    view: SourceView | None = None
    canonical: str = ""
    """Its part of the text's key."""
    latent_key: str | None = None
    """Of the source's latents: the same bytes and crop, and so the same text keys."""

    @classmethod
    def of(cls, path: str, picture: Picture, geometry: Geometry, source_view: str, latent_key: str) -> Seen:
        """A source under a crop."""
        view = SourceView(path, picture.content_hash, geometry)
        return cls(view, source_of(picture.content_hash, geometry, source_view), latent_key)


class TextKeys:
    """Raw captions to text keys. ``texts`` collects what their rows would be made of."""

    def __init__(
        self, recipe: Mapping[str, Any], clean: Callable[[str], str], stored: Stored, previous: PreviousIndex
    ) -> None:
        self._recipe, self._clean = canonical(recipe), clean
        self._stored, self._previous = stored, previous
        self._prompts: dict[str, str] = {}
        self._cleaned: dict[str, str] = {}
        self._keys: dict[tuple[str, str], str] = {}
        self.texts = TextColumns()
        """What has a key now, in the order of first use."""

    def of_prompt(self, prompt: str) -> str:
        """The key of a prompt without a source."""
        key = self._prompts.get(prompt)
        if key is None:
            key = (self._stored.prompts or {}).get(prompt)
            key = self._prompts[prompt] = key if key is not None and key in self._stored.texts else self.of(prompt)
        return key

    def of_captions(self, item: SourceItem, seen: Seen, captions: str) -> tuple[str, ...]:
        """The keys of the item's captions, in their order. ``captions``: their ``captions_hash``."""
        keys = () if self._stored.prompts is None else self._previous.caption_keys(item.path, captions, seen.latent_key)
        return keys or tuple(self.of(caption, seen) for caption in item.captions)

    def of_classes(
        self, item: SourceItem, seen: Seen, keys: tuple[str, ...], class_of: Callable[[str], str | None]
    ) -> dict[str, str]:
        """The keys of the item's class captions, by those of its captions.

        Args:
            keys: of its captions.
        """
        known = {key: self._stored.classes[key] for key in keys if key in self._stored.classes}
        if len(known) == len(keys) and self._stored.texts >= {*known.values()}:
            return known
        pairs = ((self.of(caption, seen), class_of(caption)) for caption in item.captions)
        return {key: self.of(text, seen) for key, text in pairs if text is not None and key in keys}

    def of_empty(self, seen: Seen) -> str:
        """The key of the empty instruction with this source, or of the empty prompt."""
        return self._of_cleaned("", seen) if seen.view else self.of_prompt("")

    def of(self, raw: str, seen: Seen = Seen()) -> str:
        """The key of a raw caption."""
        cleaned = self._cleaned.get(raw)
        if cleaned is None:
            _make_room(self._cleaned)
            cleaned = self._cleaned[raw] = self._clean(raw)
        return self._of_cleaned(cleaned, seen)

    def _of_cleaned(self, cleaned: str, seen: Seen) -> str:
        key = self._keys.get((cleaned, seen.canonical))
        if key is None:
            _make_room(self._keys)
            key = self._keys[cleaned, seen.canonical] = text_key_of(cleaned, self._recipe, seen.canonical)
            self.texts.add(key, cleaned, seen.view)
        return key


def _make_room(known: dict[Any, str]) -> None:
    if len(known) == _MOST_KNOWN:
        known.clear()

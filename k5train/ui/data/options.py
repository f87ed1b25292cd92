"""With which options is a folder shown or encoded again? Those of its cache, or the usual ones, and a form's."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace

from k5cache.options import CacheConfig, config_of
from k5cache.shared.errors import CacheError, RecipeError
from k5cache.shared.kind import Kind
from k5cache.shared.recipe import toml_value
from k5cache.store.manifest import read_manifest
from k5train.ui.listing import Entry

OFFERED = ("trigger", "resolution", "crop", "flip", "caption_strategy", "instance_prompt")
"""The options that a form on the page has, in its order; all others stay as they are."""
CHOICES = {
    "crop": ("center", "random", "none"),
    "flip": ("false", "true"),
    "caption_strategy": ("textfile", "filename", "instanceprompt", "metadata"),
}
LABELS = {
    "trigger": "Trigger",
    "resolution": "Resolution",
    "crop": "Crop",
    "flip": "Mirrored copies",
    "caption_strategy": "Captions from",
    "instance_prompt": "One caption for all",
}
HELP = {
    "trigger": "Text before every caption, such as sks. The caption files stay as they are.",
    "resolution": "Pixels on the side of the square bucket.",
    "instance_prompt": "For captions from: instanceprompt.",
}


@dataclass(frozen=True)
class Field:
    """One option of the form."""

    name: str
    label: str
    value: str
    choices: tuple[str, ...]
    help: str


def base_of(cache: Entry | None) -> tuple[CacheConfig, Kind | None]:
    """The options and the kind that a cache was made with; the usual ones without a cache.

    Raises:
        CacheError: its recipe is of another program.
    """
    if cache is None or not (cache.path / "manifest.json").is_file():
        return CacheConfig(), None
    manifest = read_manifest(cache.path)
    return config_of(manifest.recipe), manifest.kind


def with_values(base: CacheConfig, values: Mapping[str, str]) -> CacheConfig:
    """``base`` with what a form or a URL says of the options that are offered.

    Raises:
        RecipeError: a value is not one that the option takes.
    """
    given = {name: values[name] for name in OFFERED if name in values}
    changed: dict[str, object] = {}
    for name, text in given.items():
        if name in ("trigger", "instance_prompt"):
            changed[name] = text if text.strip() else None
        elif name == "resolution":
            changed[name] = int(text) if text.isascii() and text.isdigit() and len(text) < 6 else -1
        elif text in CHOICES[name]:
            changed[name] = text == "true" if name == "flip" else text
    config = replace(base, **changed)  # type: ignore[arg-type]
    if problems := config.check():
        raise RecipeError(f"cache.{problems[0]}", "Correct it in the form")
    return config


def changes(base: CacheConfig, config: CacheConfig) -> dict[str, str]:
    """The offered options in which ``config`` differs, as a URL has them."""
    return {
        name: _text(getattr(config, name)) for name in OFFERED if getattr(config, name) != getattr(base, name)
    }  # fmt: skip


def sets(config: CacheConfig) -> list[str]:
    """All options that are not the usual ones, as ``cache.key=value`` for a command line."""
    usual = CacheConfig()
    names = [f.name for f in fields(CacheConfig) if getattr(config, f.name) != getattr(usual, f.name)]
    return [f"cache.{name}={toml_value(getattr(config, name))}" for name in names]


def form_fields(config: CacheConfig) -> tuple[Field, ...]:
    """The form, filled in."""
    return tuple(
        Field(name, LABELS[name], _text(getattr(config, name)), CHOICES.get(name, ()), HELP.get(name, ""))
        for name in OFFERED
    )


def safe_base(cache: Entry | None) -> tuple[CacheConfig, Kind | None]:
    """As ``base_of``; of a cache that cannot be read, the usual ones."""
    try:
        return base_of(cache)
    except (CacheError, OSError):
        return CacheConfig(), None


def _text(value: object) -> str:
    return "" if value is None else str(value).lower() if isinstance(value, bool) else str(value)

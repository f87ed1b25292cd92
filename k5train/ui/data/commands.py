"""Which command encodes a folder, or says what an encode would do? With the options and the model of its cache."""

from __future__ import annotations

from typing import Literal

from k5cache.options import CacheConfig
from k5cache.shared.errors import CacheError
from k5cache.shared.inside import is_inside
from k5cache.shared.model import ModelConfig, model_of
from k5cache.store.manifest import Manifest, read_manifest
from k5cache.store.notes import arguments_of
from k5train.ui.data.options import sets
from k5train.ui.data.origin import sources_of
from k5train.ui.listing import Entry
from k5train.ui.project import Project


def argv(
    what: Literal["encode", "diff", "plan"],
    project: Project,
    source: Entry,
    cache: Entry | None,
    config: CacheConfig,
    is_changed: bool = False,
) -> list[str]:
    """The command line, with paths from the project.

    Args:
        cache: that is brought up to date. None makes ``cache/NAME``.
        config: all options of the encode.
        is_changed: whether they are others than those of the cache, which an encode has to be told.
    """
    manifest = _manifest(cache)
    target = cache.relative if cache else f"cache/{source.name}"
    words = ["k5cache", what, source.relative, "-o", target]
    apart = sources_of(project, cache, source) if cache and manifest and manifest.kind == "i2i" else None
    words += ["--sources", apart.relative] if apart else []
    words += arguments_of(manifest.part) if manifest else ()
    words += _model_words(project, manifest)
    for option in sets(config):
        words += [] if option.startswith("cache.source_dir=") else ["--set", option]
    return [*words, "--update"] if is_changed and manifest and what == "encode" else words


def _manifest(cache: Entry | None) -> Manifest | None:
    if cache is None:
        return None
    try:
        return read_manifest(cache.path)
    except (CacheError, OSError):
        return None


def _model_words(project: Project, manifest: Manifest | None) -> list[str]:
    """The model of the cache; for a new one, that of ``k5train ui --model``."""
    if manifest is None:
        return ["--model", project.model] if project.model else []
    model = model_of(manifest.recipe)
    words = ["--model", model.path] if model.path else []
    if model.path is None and model.flavour != ModelConfig.flavour:
        words += ["--set", f"model.flavour={model.flavour}"]
    return words + (["--set", f"model.revision={model.revision}"] if model.revision else [])


def is_safe(project: Project, cache: Entry) -> bool:
    """Whether nothing of the cache's folder leads out of the project."""
    return is_inside(project.root, cache.path)

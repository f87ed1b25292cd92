"""Which prompts would a run draw that its cache does not hold? They are encoded first, as a job of their own."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from k5cache.shared.errors import K5Error
from k5cache.shared.kind import Kind
from k5cache.shared.model import model_of, named_prompts
from k5cache.shared.units import count_of
from k5cache.store.manifest import read_manifest
from k5train.options.train import TrainConfig
from k5train.ui.project import Project


@dataclass(frozen=True)
class Held:
    """What a cache says of itself, as far as a new run needs it."""

    model: str
    """What it was encoded for: a folder or a repository."""
    kind: Kind
    prompts: frozenset[str]
    edits: frozenset[tuple[str, str]]
    """(source, instruction) of each pair to draw."""


def held_by(project: Project, cache: Path) -> Held | None:
    """What a cache says of itself; None if that cannot be read, as while it is encoded for the first time."""
    try:
        root = project.inside(cache)
        stat = (root / "manifest.json").stat()
        return _held(root, stat.st_mtime_ns, stat.st_size)
    except (K5Error, OSError):
        return None


@functools.lru_cache(maxsize=16)
def _held(root: Path, changed: int, num_bytes: int) -> Held:
    """Read again once the manifest has changed."""
    manifest = read_manifest(root)
    edits = frozenset((edit.source, edit.prompt) for edit in manifest.edits)
    return Held(model_of(manifest.recipe).source, manifest.kind, frozenset(manifest.prompts), edits)


def commands(project: Project, config: TrainConfig, cache: str) -> list[list[str]]:
    """The commands that put into a cache what a run draws and the cache lacks. None if nothing is missing.

    Args:
        cache: the first of the run, which is the one that is drawn from; as a path from the project.
    """
    held = held_by(project, Path(cache))
    if held is None:
        held = Held("", "i2i" if config.validation.edits else "t2i", frozenset([""]), frozenset())
    add = ["k5cache", "prompts", "add", cache]
    if held.kind == "t2i":
        missing = [prompt for prompt in prompts_of(project, config) if prompt not in held.prompts]
        return [[*add, "--", *missing]] if missing else []
    by_source: dict[str, list[str]] = {}
    for edit in config.validation.edits:
        if (edit.source, edit.prompt) not in held.edits:
            by_source.setdefault(edit.source, []).append(edit.prompt)
    return [[*add, "--source", source, "--", *prompts] for source, prompts in by_source.items()]


def prompts_of(project: Project, config: TrainConfig) -> Sequence[str]:
    """Everything that a run for text-to-image draws, each once. The library is read from the project's folder."""
    validation = config.validation
    library = validation.prompt_library
    named = named_prompts(project.inside(Path(library))) if library else ()
    drawn = [*validation.prompts, *(prompt for _, prompt in named)]
    return tuple(dict.fromkeys([*drawn, validation.negative_prompt] if drawn else []))


def note(project: Project, config: TrainConfig, cache: str) -> str:
    """A sentence about what is encoded first; empty if nothing is."""
    missing = commands(project, config, cache)
    count = sum(len(words) - words.index("--") - 1 for words in missing)
    if not count:
        return ""
    what = count_of(count, "prompt is", "prompts are")
    return f"{what} not in {cache} yet: {'it is' if count == 1 else 'they are'} encoded before the run starts"

"""The arguments that several commands of ``k5cache`` share, and what becomes of them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from k5cache.shared import console

if TYPE_CHECKING:
    from k5cache.options import CacheConfig
    from k5cache.shared.model import ModelConfig
    from k5cache.store.manifest import Manifest


Recipe = Annotated[Path | None, typer.Option("--recipe", "-r", help="A TOML recipe, for example one in pipelines/.")]


Model = Annotated[str | None, typer.Option("--model", help="A folder in the diffusers layout, or a hub repository.")]


Set = Annotated[list[str] | None, typer.Option("--set", help="Override one option: table.key=value. May be repeated.")]


Device = Annotated[str, typer.Option(help="auto, cuda, cuda:1 or cpu.")]


Json = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of tables.")]


Source = Annotated[
    Path,
    typer.Argument(help="A folder of images with .txt captions; or a table, tars, or a dataset's name (see options)."),
]


Out = Annotated[Path | None, typer.Option("--out", "-o", help="The cache. Default: cache/<name of SOURCE>.")]


Rehash = Annotated[bool, typer.Option("--rehash", help="Read every image; do not trust size, mtime, inode.")]


Wait = Annotated[float, typer.Option(help="Seconds to wait for another process that writes this cache.")]


Vram = Annotated[str | None, typer.Option(help="Plan for a card of this size, for example 4GB, whatever there is.")]


CachePath = Annotated[Path, typer.Argument(help="A cache made by `k5cache encode`.")]


def _vram(text: str | None) -> int | None:
    """Bytes of ``--vram``."""
    from k5cache.shared.errors import K5Error

    try:
        return console.parse_bytes(text) if text is not None else None
    except ValueError:
        raise K5Error(f"--vram {text} is not an amount of memory", "Write it like 4GB or 3500MB") from None


def _configs(
    recipe: Path | None, model: str | None, options: list[str] | None
) -> tuple[ModelConfig, CacheConfig, tuple[str, ...]]:
    """[model], [cache] and the validation prompts of a recipe with its overrides."""
    from k5cache.options import CacheConfig
    from k5cache.shared.model import ModelConfig, validation_prompts
    from k5cache.shared.recipe import parse, read

    document = read(recipe, options or [])
    if model is not None:
        document.setdefault("model", {})["path"] = model
    model_config, cache_config = parse(document, {"model": ModelConfig, "cache": CacheConfig}, recipe)
    return model_config, cache_config, validation_prompts(document)


def _model_of(manifest: Manifest, model: str | None) -> ModelConfig:
    """The model that made a cache, or the folder that it is in now."""
    from dataclasses import replace

    from k5cache.shared.model import model_of

    made_by = model_of(manifest.recipe)
    return replace(made_by, path=model, revision=None) if model else made_by


def _then_train(cache: Path, manifest: Manifest) -> None:
    """The next command, with the model that made the cache written out."""
    made_by = _model_of(manifest, None)
    # Without a path nothing is named, and the run takes flavour and revision from the cache.
    pinned = f"model.revision={made_by.revision}" if made_by.path and made_by.revision else None
    console.next_step("Next, train a LoRA", console.command("k5train", "run", cache, model=made_by.path, set=pinned))

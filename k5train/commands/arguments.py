"""Which arguments do several commands of ``k5train`` share, and how is each turned into a value?"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from k5cache.shared import console
from k5cache.shared.errors import CacheError, RecipeError

if TYPE_CHECKING:
    from k5cache.shared.model import ModelConfig
    from k5cache.shared.origins import Document
    from k5train.options.train import TrainConfig

Recipe = Annotated[
    Path | None,
    typer.Option("--recipe", "-r", help="A TOML recipe: a file, or one of the names that `k5train recipes` lists."),
]
Model = Annotated[str | None, typer.Option("--model", help="A folder in the diffusers layout, or a hub repository.")]
Set = Annotated[list[str] | None, typer.Option("--set", help="Override one option: table.key=value. May be repeated.")]
Vram = Annotated[
    str | None,
    typer.Option(
        "--vram", help="Plan for a card of this size, such as 12GB, whichever card is there: train.memory.vram."
    ),
]
Gpus = Annotated[
    int | None,
    typer.Option("--gpus", help="Train on this many GPUs of this machine together. Several machines: torchrun."),
]
RunPath = Annotated[Path, typer.Argument(help="A folder made by `k5train run`.")]


def with_vram(options: list[str] | None, vram: str | None) -> list[str]:
    """``--set`` with ``--vram`` in it, so that a run's recipe keeps it.

    Raises:
        RecipeError: it is not an amount of memory.
    """
    if vram is None:
        return options or []
    check_vram(vram)
    return [*(options or []), f"train.memory.vram={json.dumps(vram)}"]


def check_vram(vram: str) -> None:
    """Refuse a ``--vram`` that is not an amount of memory.

    Raises:
        RecipeError: says how to write one.
    """
    try:
        console.parse_bytes(vram)
    except ValueError:
        raise RecipeError(f"--vram {vram} is not an amount of memory", "Give one such as --vram 12GB") from None


def read_document(recipe: Path | None, model: str | None, options: list[str] | None) -> Document:
    """A recipe with ``--model`` and ``--set`` applied."""
    from k5cache.shared.recipe import read

    document = read(recipe, options or [])
    if model is not None:
        document.give("model.path", model, f"--model {model}")
    return document


def parse_document(document: Document) -> tuple[ModelConfig | None, TrainConfig]:
    """[model] and [train] of a recipe, whose [cache] is checked too. None if the recipe does not say which model."""
    from k5cache.options import CacheConfig
    from k5cache.shared.model import ModelConfig
    from k5cache.shared.recipe import parse
    from k5train.options.train import TrainConfig

    schemas = {"model": ModelConfig, "cache": CacheConfig, "train": TrainConfig}
    model_config, _, config = parse(document, schemas)
    return model_config if document.get("model") else None, config


def read_recipe(
    recipe: Path | None, model: str | None, options: list[str] | None
) -> tuple[ModelConfig | None, TrainConfig]:
    """[model] and [train] of a recipe with ``--model`` and ``--set`` applied. None if nothing says which model."""
    return parse_document(read_document(recipe, model, options))


def find_cache(parent: Path) -> Path:
    """The only cache under ``parent``. If there are several, a person at a terminal is asked which one.

    Raises:
        CacheError: there is none, or there are several and nobody to ask.
    """
    caches = sorted(path.parent for path in parent.glob("*/manifest.json"))
    if len(caches) == 1:
        return caches[0]
    if not caches:
        raise CacheError(f"There is no cache under {parent}/", "Make one first: k5cache encode datasets/my_images")
    fix = f"Say which one: {console.this_command(caches[0])}"
    if not (sys.stdin.isatty() and sys.stderr.isatty()):
        names = ", ".join(map(str, caches))
        raise CacheError(f"There are {len(caches)} caches: {names}", fix)
    for number, path in enumerate(caches, 1):
        console.err.print(f"  {number}  {path}", markup=False)
    number = typer.prompt("Which cache", type=int, err=True)
    if not 1 <= number <= len(caches):
        raise CacheError(f"There is no cache number {number}", fix)
    return caches[number - 1]


def model_of_cache(cache: Path) -> ModelConfig:
    """The model that a cache was encoded with, for a recipe that names none; its flavour if that folder is gone.

    Raises:
        ModelError: it is a repository that this machine does not know, and only the cache names it.
    """
    from k5cache.shared.checkpoint import check_known
    from k5cache.shared.model import ModelConfig, model_of
    from k5cache.shared.places import model_near
    from k5cache.store.manifest import read_manifest

    model = model_near(model_of(read_manifest(cache).recipe), cache)
    is_repository = model.path is None or model.path.count("/") == 1
    if not (is_repository or Path(str(model.path)).is_dir()):
        model = ModelConfig(model.flavour)
    pinned = f"model.revision={model.revision}" if model.revision else None
    check_known(model, cache, f"If you trust it: {console.this_command(model=model.source, set=pinned)}")
    return model

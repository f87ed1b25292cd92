"""The arguments that several commands of ``k5train`` share, and what becomes of them."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from k5cache.shared import console
from k5cache.shared.errors import CacheError

if TYPE_CHECKING:
    from k5cache.shared.model import ModelConfig
    from k5train.options.train import TrainConfig


Recipe = Annotated[Path | None, typer.Option("--recipe", "-r", help="A TOML recipe, for example one in pipelines/.")]
Model = Annotated[str | None, typer.Option("--model", help="A folder in the diffusers layout, or a hub repository.")]
Set = Annotated[list[str] | None, typer.Option("--set", help="Override one option: table.key=value. May be repeated.")]
RunPath = Annotated[Path, typer.Argument(help="A folder made by `k5train run`.")]


def find_cache(parent: Path) -> Path:
    """The only cache under ``parent``; a person at a terminal is asked which one, where there are several.

    Raises:
        CacheError: there is none, or there are several and nobody to ask.
    """
    found = sorted(p.parent for p in parent.glob("*/manifest.json"))
    if len(found) == 1:
        return found[0]
    if not found:
        raise CacheError(f"There is no cache under {parent}/", "Make one first: k5cache encode datasets/my_images")
    names = ", ".join(str(p) for p in found)
    if not (sys.stdin.isatty() and sys.stderr.isatty()):
        raise CacheError(f"There are {len(found)} caches: {names}", f"Say which one: k5train run {found[0]}")
    for number, path in enumerate(found, 1):
        console.err.print(f"  {number}  {path}", markup=False)
    number = typer.prompt("Which cache", type=int, err=True)
    if not 1 <= number <= len(found):
        raise CacheError(f"There is no cache number {number}", f"Say which one: k5train run {found[0]}")
    return found[number - 1]


def read_recipe(
    recipe: Path | None, model: str | None, options: list[str] | None
) -> tuple[ModelConfig | None, TrainConfig]:
    """[model], None where nothing is said of it, and [train] of a recipe with its overrides."""
    from k5cache.shared.model import ModelConfig
    from k5cache.shared.recipe import parse, read
    from k5train.options.train import TrainConfig

    document = read(recipe, options or [])
    if model is not None:
        document.setdefault("model", {})["path"] = model
    model_config, config = parse(document, {"model": ModelConfig, "train": TrainConfig}, recipe)
    return model_config if document.get("model") else None, config


def made_with(cache: Path) -> ModelConfig:
    """The model that a cache was encoded with, for a recipe that names none; its flavour where the folder is gone."""
    from k5cache.shared.model import ModelConfig, model_of
    from k5cache.store.manifest import read_manifest

    made = model_of(read_manifest(cache).recipe)
    is_repository = made.path is None or made.path.count("/") == 1
    return made if is_repository or Path(str(made.path)).is_dir() else ModelConfig(made.flavour)

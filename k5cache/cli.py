"""The command line of stage 1. A command parses, calls one function and prints its result."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from k5cache import console

if TYPE_CHECKING:
    from k5cache.config import CacheConfig, ModelConfig

app = typer.Typer(
    help="Encode images and captions once, for as many Kandinsky 5 LoRAs as you like.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

Recipe = Annotated[Path | None, typer.Option("--recipe", "-r", help="A TOML recipe, for example one in pipelines/.")]
Model = Annotated[str | None, typer.Option("--model", help="A folder in the diffusers layout, or a hub repository.")]
Set = Annotated[list[str] | None, typer.Option("--set", help="Override one option: table.key=value. May be repeated.")]
Device = Annotated[str, typer.Option(help="auto, cuda, cuda:1 or cpu.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of tables.")]
Source = Annotated[
    Path,
    typer.Argument(help="A folder of images with .txt captions; or a table, tars, or a dataset's name (see options)."),
]
CachePath = Annotated[Path, typer.Argument(help="A cache made by `k5cache encode`.")]


@app.callback()
def _root() -> None:
    pass


@app.command()
def encode(
    source: Source,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="The cache. Default: cache/<name of SOURCE>.")] = None,
    recipe: Recipe = None,
    model: Model = None,
    options: Set = None,
    device: Device = "auto",
    update: Annotated[
        bool, typer.Option("--update", help="Where the recipe differs, encode again what it changes.")
    ] = False,
    rehash: Annotated[
        bool, typer.Option("--rehash", help="Read every image; do not trust size, mtime, inode.")
    ] = False,
    repair: Annotated[bool, typer.Option("--repair", help="Check every byte; encode damaged shards again.")] = False,
    wait: Annotated[float, typer.Option(help="Seconds to wait for another encode of this cache.")] = 0,
    as_json: Json = False,
) -> None:
    """Encode images and captions into a cache, or bring one up to date.

    SOURCE is a folder of images with captions beside them; a .csv, .jsonl, .parquet or .tar, or a pattern of them
    ("cats-*.tar"); a folder of such files; or a dataset of the hub (owner/name). A greyscale cat.mask.png
    beside cat.jpg is its mask. Captions, crops, flips and size guards are options of [cache]: see `k5cache options`.
    """
    from k5cache.device import check_name
    from k5cache.encode import EncodeOptions
    from k5cache.encode import encode as run
    from k5cache.info import print_report
    from k5cache.sources import default_name

    model_config, cache_config, prompts = _configs(recipe, model, options)
    root = out or Path("cache") / default_name(source)
    chosen = EncodeOptions(update, rehash, repair, wait, check_name(device))
    with console.progress() as bars:
        report = run(source, root, model_config, cache_config, prompts, bars, chosen)
    if as_json:
        console.print_json(report)
        return
    print_report(report, root)
    given = f" --recipe {recipe}" if recipe else f" --model {model}" if model else ""
    console.next_step("Next, train a LoRA", f"k5train run {root}{given}")


@app.command()
def info(cache: CachePath) -> None:
    """Show what a cache holds: items, buckets, caption lengths, sizes, model and recipe."""
    from k5cache.info import print_info
    from k5cache.store.reader import open_cache

    print_info(open_cache(cache))
    console.next_step("Next, train a LoRA", f"k5train run {cache}")


@app.command()
def options() -> None:
    """List every option of [model] and [cache] with its default, as a recipe to copy from."""
    from k5cache.config import CacheConfig, ModelConfig
    from k5cache.recipe import document_options

    console.out.print(document_options({"model": ModelConfig, "cache": CacheConfig}), markup=False)


def _configs(
    recipe: Path | None, model: str | None, options: list[str] | None
) -> tuple[ModelConfig, CacheConfig, tuple[str, ...]]:
    """[model], [cache] and the validation prompts of a recipe with its overrides."""
    from k5cache.config import CacheConfig, ModelConfig, validation_prompts
    from k5cache.recipe import parse, read

    document = read(recipe, options or [])
    if model is not None:
        document.setdefault("model", {})["path"] = model
    model_config, cache_config = parse(document, {"model": ModelConfig, "cache": CacheConfig}, recipe)
    return model_config, cache_config, validation_prompts(document)


def main() -> None:
    """Entry point of ``k5cache``."""
    console.run(app)

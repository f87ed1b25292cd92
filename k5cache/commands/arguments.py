"""Which arguments do several commands of ``k5cache`` share, and how is each turned into a value?"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from k5cache.shared import console
from k5cache.shared.urls import is_url

if TYPE_CHECKING:
    from k5cache.options import CacheConfig
    from k5cache.shared.model import Drawn, ModelConfig
    from k5cache.store.manifest import Manifest
    from k5cache.store.notes import Part


def _here(path: Path | None) -> Path | None:
    """The folder of this machine that stands for the cache at a URL; any other path as it is."""
    return _folder_of(path, is_new=False)


def _here_or_new(path: Path | None) -> Path | None:
    """The same for a cache that may not be there yet."""
    return _folder_of(path, is_new=True)


def _all_here(paths: list[Path]) -> list[Path]:
    return [_folder_of(path, is_new=False) or path for path in paths]


def _folder_of(path: Path | None, is_new: bool) -> Path | None:
    if path is None or not is_url(path):
        return path
    from k5cache.remote.mirror import folder_of

    return folder_of(path, is_new)


Recipe = Annotated[
    Path | None,
    typer.Option("--recipe", "-r", help="A TOML recipe: a file, or one of the names that `k5train recipes` lists."),
]
Model = Annotated[str | None, typer.Option("--model", help="A folder in the diffusers layout, or a hub repository.")]
Set = Annotated[list[str] | None, typer.Option("--set", help="Override one option: table.key=value. May be repeated.")]
Device = Annotated[str, typer.Option(help="auto, cuda, cuda:1 or cpu.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of tables.")]
Source = Annotated[
    Path,
    typer.Argument(
        help="A folder of images with .txt captions, a table, tars, a URL of these, or the name of a dataset (see "
        "`k5cache options`)."
    ),
]
Sources = Annotated[
    Path | None,
    typer.Option(
        "--sources",
        help="For image-to-image: the folder with the pictures before the edit, named like those in SOURCE.",
    ),
]
Out = Annotated[
    Path | None,
    typer.Option(
        "--out", "-o", callback=_here_or_new,
        help="The cache, a folder or a URL such as s3://bucket/cats. Default: cache/<name of SOURCE>.",
    ),
]  # fmt: skip
Rehash = Annotated[
    bool, typer.Option("--rehash", help="Read every image instead of trusting its size, mtime and inode.")
]
Wait = Annotated[float, typer.Option(help="Seconds to wait for another process that is writing this cache.")]
Vram = Annotated[
    str | None, typer.Option(help="Plan for a card of this size, for example 4GB, instead of the card that is there.")
]
PartOption = Annotated[
    str | None,
    typer.Option(
        "--part",
        metavar="I/N",
        help="Encode only part I of N, for example 3/8, into a cache of its own; `k5cache merge` joins them.",
    ),
]
CachePath = Annotated[
    Path,
    typer.Argument(callback=_here, help="A cache made by `k5cache encode`: a folder, or a URL (s3://bucket/cats)."),
]
CachePaths = Annotated[list[Path], typer.Argument(callback=_all_here, help="Two or more caches with the same recipe.")]
NewCache = Annotated[
    Path, typer.Option("--out", "-o", callback=_here_or_new, help="The merged cache: a new folder, or a URL.")
]


def vram_bytes(text: str | None) -> int | None:
    """Bytes of ``--vram``; None if it was not given.

    Raises:
        K5Error: ``text`` is not an amount of memory.
    """
    from k5cache.shared.errors import K5Error

    try:
        return console.parse_bytes(text) if text is not None else None
    except ValueError:
        raise K5Error(f"--vram {text} is not an amount of memory", "Write it like 4GB or 3500MB") from None


def read_part(text: str | None) -> Part | None:
    """``--part``; None if it was not given.

    Raises:
        K5Error: ``text`` is not a part.
    """
    import re

    from k5cache.shared.errors import K5Error
    from k5cache.store.notes import MOST_PARTS, Part

    if text is None:
        return None
    numbers = re.fullmatch(r"(\d{1,7})/(\d{1,7})", text, re.ASCII)
    if not numbers:
        raise K5Error(
            f"--part {text} is not a part of a whole", "Write it as I/N, for example 3/8: the third of 8 parts"
        )
    number, of = map(int, numbers.groups())
    if not 1 <= of <= MOST_PARTS:
        raise K5Error(f"--part {text}: there can be 1 to {MOST_PARTS:,} parts", "Write it as I/N, for example 3/8")
    if number == 0:
        add = f"For a scheduler that counts from 0, add 1: --part $((INDEX + 1))/{of}"
        raise K5Error(f"--part {text}: parts are counted from 1", f"Write --part 1/{of} to --part {of}/{of}. {add}")
    if number > of:
        raise K5Error(f"--part {text}: there is no part {number} of {of}", f"Write --part 1/{of} to --part {of}/{of}")
    return Part((number,), of)


def default_root(source: Path, part: Part | None) -> Path:
    """The cache of an encode without ``--out``; each part has its own."""
    from k5cache.sources.find import default_name

    name = default_name(source)
    return Path("cache") / (f"{name}-{part.numbers[0]}-of-{part.of}" if part else name)


def read_configs(
    recipe: Path | None, model: str | None, options: list[str] | None, sources: Path | None = None
) -> tuple[ModelConfig, CacheConfig, Drawn, bool]:
    """[model], [cache] and what a recipe draws for validation, and whether it names the caches that it trains on.

    ``--model``, ``--set`` and ``--sources`` are applied.

    [train] is checked too: what is wrong there is said now, and not after the images are encoded.
    """
    from k5cache.options import CacheConfig
    from k5cache.shared.model import ModelConfig, drawn_by
    from k5cache.shared.recipe import parse, read
    from k5train.options.train import TrainConfig

    document = read(recipe, options or [])
    if model is not None:
        document.give("model.path", model, f"--model {model}")
    if sources is not None:
        document.give("cache.source_dir", str(sources), f"--sources {sources}")
    schemas = {"model": ModelConfig, "cache": CacheConfig, "train": TrainConfig}
    model_config, cache_config, train_config = parse(document, schemas)
    return model_config, cache_config, drawn_by(document), bool(train_config.data)


def model_of_cache(cache: Path, manifest: Manifest, model: str | None) -> ModelConfig:
    """The model that encoded a cache; ``model`` names the folder or repository where it is now, if it has moved.

    Raises:
        ModelError: it is a repository that this machine does not know, and only the cache names it.
    """
    from dataclasses import replace

    from k5cache.shared.checkpoint import check_known
    from k5cache.shared.model import model_of
    from k5cache.shared.places import model_near

    encoder_model = model_near(model_of(manifest.recipe), cache)
    if model:
        return replace(encoder_model, path=model, revision=None)
    check_known(encoder_model, cache, f"If you trust it: {console.this_command(model=encoder_model.source)}")
    return encoder_model


def suggest_training(cache: Path, manifest: Manifest) -> None:
    """Print the command that trains on ``cache``, with the model that encoded it written out."""
    from dataclasses import replace

    from k5cache.shared.model import model_of
    from k5cache.shared.places import model_near

    model = model_near(model_of(manifest.recipe), cache)
    if model.path and model.path.count("/") != 1 and not Path(model.path).is_dir():
        model = replace(model, path=None)  # it has moved: the run says what it needs
    # Without a path nothing is named: the run takes flavour and revision from the cache.
    pinned = f"model.revision={model.revision}" if model.path and model.revision else None
    console.next_step("Next, train a LoRA", console.command("k5train", "run", cache, model=model.path, set=pinned))

"""``k5train options``: list every option with its default."""

from __future__ import annotations

from typing import Annotated

import typer

from k5cache.shared import console
from k5cache.shared.errors import RecipeError
from k5cache.shared.help import Words


def options(
    words: Words = None,
    markdown: Annotated[bool, typer.Option("--markdown", help="As a page with tables: docs/options.md.")] = False,
) -> None:
    """List every option with its default, as a recipe to copy from: [model], [cache] and [train].

    With words, list the options whose names have one of them.
    """
    from k5cache.options import CacheConfig
    from k5cache.shared import option_list
    from k5cache.shared.model import ModelConfig
    from k5train.options.train import TrainConfig

    schemas = {"model": ModelConfig, "cache": CacheConfig, "train": TrainConfig}
    if markdown and words:
        raise RecipeError("--markdown lists every option", "Leave out --markdown or the words")
    text = PAGE + option_list.as_markdown(schemas) if markdown else option_list.as_toml(schemas, words or ())
    console.out.print(text, markup=False, soft_wrap=True)


PAGE = """# Options

<!-- Written by `k5train options --markdown > docs/options.md`. Edit the docstrings under the options instead. -->

Every option of a recipe, with its default. A recipe is a TOML file for both stages: `[model]` says which model,
`[cache]` how `k5cache encode` makes a cache, `[train]` and the tables under it how `k5train run` trains. All are
optional, and `--set train.lora.rank=16` sets one on the command line. `k5train options` prints the same as a recipe to
copy from. [Training](training.md) and [images and captions](data.md) say when to use which.

"""

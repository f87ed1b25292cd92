"""``k5cache options``: every option with its default."""

from __future__ import annotations

from k5cache.shared import console
from k5cache.shared.help import Words


def options(words: Words = None) -> None:
    """List every option of [model] and [cache] with its default, as a recipe to copy from.

    With words, list the options whose names have one of them.
    """
    from k5cache.options import CacheConfig
    from k5cache.shared import option_list
    from k5cache.shared.model import ModelConfig

    schemas = {"model": ModelConfig, "cache": CacheConfig}
    console.out.print(option_list.as_toml(schemas, words or ()), markup=False, soft_wrap=True)

"""``k5cache options``: every option with its default."""

from __future__ import annotations

from k5cache.shared import console


def options() -> None:
    """List every option of [model] and [cache] with its default, as a recipe to copy from."""
    from k5cache.options import CacheConfig
    from k5cache.shared import option_list
    from k5cache.shared.model import ModelConfig

    console.out.print(option_list.as_toml({"model": ModelConfig, "cache": CacheConfig}), markup=False, soft_wrap=True)

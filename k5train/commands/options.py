"""``k5train options``: list every option with its default."""

from __future__ import annotations

from k5cache.shared import console


def options() -> None:
    """List every option with its default, as a recipe to copy from: [model], [cache] and [train]."""
    from k5cache.options import CacheConfig
    from k5cache.shared.model import ModelConfig
    from k5cache.shared.recipe import document_options
    from k5train.options.train import TrainConfig

    text = document_options({"model": ModelConfig, "cache": CacheConfig, "train": TrainConfig})
    console.out.print(text, markup=False)

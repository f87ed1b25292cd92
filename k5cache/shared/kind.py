"""Does a model draw from text (T2I) or edit a picture (I2I)? And a cache: for which of the two was it encoded?"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, get_args

from k5cache.shared.errors import ModelError
from k5cache.shared.model import FLAVOURS, ModelConfig

Kind = Literal["t2i", "i2i"]
KINDS: tuple[Kind, ...] = get_args(Kind)
LONG_NAMES: Mapping[Kind, str] = {"t2i": "text-to-image (T2I)", "i2i": "image-to-image (I2I)"}


def kind_of_model(model: ModelConfig, folder: Path) -> Kind:
    """What the checkpoint in ``folder`` is. Its transformer's config says so; without one, the flavour's name does.

    Raises:
        ModelError: a flavour was asked for, and the transformer is of the other kind.
    """
    from k5cache.shared.checkpoint import read_config  # with rich, which a reader of caches does without

    asked = kind_of_flavour(model)
    if not (folder / "transformer" / "config.json").is_file():
        return asked or "t2i"
    kind: Kind = "i2i" if read_config(folder, "transformer").get("visual_cond") else "t2i"
    if asked not in (None, kind):
        raise ModelError(
            f'The model in {folder} is {LONG_NAMES[kind]}, and model.flavour = "{model.flavour}" is not',
            f'Set model.flavour = "{kind}-lite-{model.flavour.rpartition("-")[2]}", or give another model with --model',
        )
    return kind


def kind_at_hand(model: ModelConfig) -> Kind:
    """As ``kind_of_model``, from what is on this machine; nothing is downloaded.

    Raises:
        ModelError: as ``kind_of_model``.
    """
    from k5cache.shared.checkpoint import folder_on_disk

    folder = folder_on_disk(model, ())
    return kind_of_model(model, folder) if folder else kind_of_flavour(model) or "t2i"


def kind_of_recipe(recipe: Mapping[str, Any]) -> Kind:
    """For what a cache was encoded. Recipes of T2I do not say it, so that their keys are those of earlier versions."""
    text = recipe.get("text")
    return "i2i" if isinstance(text, Mapping) and text.get("pipeline") == "i2i" else "t2i"


def kind_of_flavour(model: ModelConfig) -> Kind | None:
    """The kind that was asked for; None for a path of one's own with the default flavour, which nobody chose."""
    published = next((name for name, repo in FLAVOURS.items() if repo == model.source), None)
    if published is None and model.flavour == ModelConfig.flavour:
        return None
    return "i2i" if (published or model.flavour).startswith("i2i") else "t2i"

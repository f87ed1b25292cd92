"""Which Kandinsky 5 Image: the options of ``[model]``, its published names, and the prompts both stages need."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from k5cache.shared.errors import RecipeError

Flavour = Literal["t2i-lite-sft", "t2i-lite-pretrain", "i2i-lite-sft", "i2i-lite-pretrain"]
FLAVOURS: dict[str, str] = {
    "t2i-lite-sft": "kandinskylab/Kandinsky-5.0-T2I-Lite-sft-Diffusers",
    "t2i-lite-pretrain": "kandinskylab/Kandinsky-5.0-T2I-Lite-pretrain-Diffusers",
    "i2i-lite-sft": "kandinskylab/Kandinsky-5.0-I2I-Lite-sft-Diffusers",
    "i2i-lite-pretrain": "kandinskylab/Kandinsky-5.0-I2I-Lite-pretrain-Diffusers",
}


@dataclass(frozen=True)
class ModelConfig:
    """``[model]``: which Kandinsky 5 Image, for both stages."""

    flavour: Flavour = "t2i-lite-sft"
    """Which published checkpoint. T2I and its pretrain share their encoders, so one cache serves both."""
    path: str | None = None
    """A folder in the diffusers layout, or another hub repository, instead of the flavour's own."""
    revision: str | None = None
    """Branch, tag or commit of the hub repository. A cache notes it, for runs that name no model."""

    @property
    def source(self) -> str:
        """The folder or hub repository to load from."""
        return self.path or FLAVOURS[self.flavour]


def model_of(recipe: Mapping[str, Any]) -> ModelConfig:
    """The model that a cache was made with, from the recipe in its manifest."""
    made_by = recipe.get("model", {})
    path, flavour, revision = str(made_by.get("source", "")), made_by.get("flavour"), made_by.get("revision")
    return ModelConfig(
        flavour if flavour in FLAVOURS else "t2i-lite-sft",
        path if path not in FLAVOURS.values() else None,
        revision if isinstance(revision, str) and revision else None,
    )


def model_name(recipe: Mapping[str, Any]) -> str:
    """The same in words: where it came from, and at which revision if that was pinned."""
    source, revision = str(recipe.get("model", {}).get("source", "unknown")), model_of(recipe).revision
    return f"{source} at {revision}" if revision else source


def validation_prompts(document: dict[str, Any]) -> tuple[str, ...]:
    """Prompts that stage 2 will sample, read off ``[train.validation]`` so that stage 1 encodes them.

    Returns:
        ``prompts``, ``negative_prompt`` and the ``prompt_library``'s in order, without repeats; the empty prompt always
        among them.

    Raises:
        RecipeError: they are not strings. The other keys of ``[train]`` are stage 2's to check.
    """
    train = document.get("train", {})
    validation = train.get("validation", {}) if isinstance(train, dict) else {}
    validation = validation if isinstance(validation, dict) else {}
    prompts = validation.get("prompts", [])
    negative = validation.get("negative_prompt", "")
    library = validation.get("prompt_library")
    if not isinstance(prompts, list) or not all(isinstance(p, str) for p in [*prompts, negative]):
        raise RecipeError(
            "train.validation.prompts must be a list of strings and negative_prompt a string",
            'Write it like prompts = ["a red bicycle", "a lighthouse at dusk"]',
        )
    named = prompt_library(Path(library)) if isinstance(library, str) else ()
    return tuple(dict.fromkeys(["", negative, *prompts, *named]))


def prompt_library(path: Path) -> tuple[str, ...]:
    """The prompts of a JSON file: a list of strings, or an object of names to prompts.

    Raises:
        RecipeError: there is no such file, or it holds something else.
    """
    fix = 'Write it like ["a red bicycle"] or {"bicycle": "a red bicycle"}'
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise RecipeError(f"train.validation.prompt_library: {path} cannot be read: {error.strerror}", fix) from error
    except ValueError as error:
        raise RecipeError(f"train.validation.prompt_library: {path} is not JSON: {error}", fix) from error
    prompts = list(document.values()) if isinstance(document, dict) else document
    if not isinstance(prompts, list) or not all(isinstance(p, str) for p in prompts):
        raise RecipeError(f"train.validation.prompt_library: {path} holds something other than prompts", fix)
    return tuple(prompts)

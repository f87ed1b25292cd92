"""Which Kandinsky 5 Image is used, and which prompts do both stages need? The options of ``[model]`` are here."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from k5cache.shared.errors import RecipeError
from k5cache.shared.plain import parse_json, read_text

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
    """The published checkpoint. ``t2i-lite-sft`` and ``t2i-lite-pretrain`` have the same encoders, so one cache serves
    both."""
    path: str | None = None
    """A folder in the diffusers layout, or another hub repository, instead of the flavour's."""
    revision: str | None = None
    """Branch, tag or commit of the hub repository. A cache stores it for runs that name no model."""

    def check(self) -> list[str]:
        """What cannot be a model."""
        problems = [] if self.path is None else path_problems("path", self.path)
        if self.revision is not None and not self.revision.strip():
            problems.append("revision is empty: give a branch, tag or commit, or leave it out")
        return problems

    @property
    def source(self) -> str:
        """The folder or hub repository to load from."""
        return self.path or FLAVOURS[self.flavour]


def path_problems(name: str, path: str) -> list[str]:
    """What is wrong with a path of a recipe, whether or not there is anything at it."""
    if not path.strip():
        return [f"{name} is empty"]
    if any(ord(character) < 32 for character in path):  # "C:\\new" in double quotes holds a line break
        return [
            f"{name} holds a tab, a line break or the like, found {path!r}: in double quotes a backslash begins a "
            "special character; write the path in single quotes, or with slashes"
        ]
    return []


def model_of(recipe: Mapping[str, Any]) -> ModelConfig:
    """The model that a cache was made with, from the recipe in its manifest."""
    model = recipe.get("model", {})
    path, flavour, revision = str(model.get("source", "")), model.get("flavour"), model.get("revision")
    return ModelConfig(
        flavour if flavour in FLAVOURS else "t2i-lite-sft",
        path if path not in FLAVOURS.values() else None,
        revision if isinstance(revision, str) and revision else None,
    )


def model_name(recipe: Mapping[str, Any]) -> str:
    """The model that a cache was made with, for a message: its source, and its revision if that was pinned."""
    source, revision = str(recipe.get("model", {}).get("source", "unknown")), model_of(recipe).revision
    return f"{source} at {revision}" if revision else source


def validation_prompts(document: dict[str, Any]) -> tuple[str, ...]:
    """The prompts that stage 2 draws, read from ``[train.validation]`` so that stage 1 encodes them.

    Returns:
        The empty prompt, ``negative_prompt``, ``prompts`` and those of ``prompt_library``, without repeats.

    Raises:
        RecipeError: they are not strings. Stage 2 checks the other keys of ``[train]``.
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


@dataclass(frozen=True)
class WantedEdit:
    """A pair to draw: a source and an instruction."""

    source: str
    """The path of a picture, relative to the folder of the command."""
    prompt: str


@dataclass(frozen=True)
class Drawn:
    """What stage 2 draws, so that stage 1 encodes it."""

    prompts: tuple[str, ...] = ()
    """For text-to-image."""
    edits: tuple[WantedEdit, ...] = ()
    """For image-to-image."""

    def check(self, kind: str) -> None:
        """Refuse what a model of this kind does not draw.

        Raises:
            RecipeError: there is something to draw for the other kind.
        """
        if kind == "t2i" and self.edits:
            raise RecipeError(
                "train.validation.edits are for image-to-image models, and this model is for text-to-image",
                "Write prompts instead: train.validation.prompts",
            )
        if kind == "i2i" and any(self.prompts):
            raise RecipeError(
                "train.validation.prompts, prompt_library and negative_prompt are for text-to-image models, and this "
                "model is for image-to-image, where every instruction has a picture",
                'Write [[train.validation.edits]] with source = "photo.png" and prompt = "make it night"',
            )


def drawn_by(document: dict[str, Any]) -> Drawn:
    """What the ``[train.validation]`` of a recipe asks for.

    Raises:
        RecipeError: it is not what stage 2 takes.
    """
    return Drawn(validation_prompts(document), validation_edits(document))


def validation_edits(document: dict[str, Any]) -> tuple[WantedEdit, ...]:
    """The pairs that stage 2 draws, read from ``[[train.validation.edits]]`` so that stage 1 encodes them.

    Raises:
        RecipeError: they are not tables of a source and a prompt. Stage 2 checks their other keys.
    """
    train = document.get("train", {})
    validation = train.get("validation", {}) if isinstance(train, dict) else {}
    edits = validation.get("edits", []) if isinstance(validation, dict) else []
    pairs = []
    for edit in edits if isinstance(edits, list) else [edits]:
        match edit:
            case {"source": str(source), "prompt": str(prompt)}:
                pairs.append(WantedEdit(source, prompt))
            case _:
                raise RecipeError(
                    "train.validation.edits must be tables with a source and a prompt",
                    'Write [[train.validation.edits]] and below it source = "photo.png" and prompt = "make it night"',
                )
    return tuple(dict.fromkeys(pairs))


def prompt_library(path: Path) -> tuple[str, ...]:
    """The prompts of a JSON file. Raises as ``named_prompts``."""
    return tuple(prompt for _, prompt in named_prompts(path))


def named_prompts(path: Path) -> tuple[tuple[str, str], ...]:
    """(name, prompt) of a JSON file: a list of strings, whose names are empty, or an object of names to prompts.

    Raises:
        RecipeError: there is no such file, or it contains something else.
    """
    fix = 'Write it like ["a red bicycle"] or {"bicycle": "a red bicycle"}'
    try:
        document = parse_json(read_text(path), tuple)  # an object as pairs: a dictionary would hide equal names
    except OSError as error:
        raise RecipeError(f"train.validation.prompt_library: {path} cannot be read: {error.strerror}", fix) from error
    except ValueError as error:
        raise RecipeError(f"train.validation.prompt_library: {path} is not JSON: {error}", fix) from error
    entries = [("", prompt) for prompt in document] if isinstance(document, list) else None
    entries = [*document] if isinstance(document, tuple) else entries
    if entries is None or not all(isinstance(prompt, str) for _, prompt in entries):
        raise RecipeError(f"train.validation.prompt_library: {path} is not a list of prompts", fix)
    often = Counter(name for name, _ in entries if name)
    if twice := [name for name, count in often.items() if count > 1]:
        raise RecipeError(
            f"train.validation.prompt_library: {path} has {often[twice[0]]} prompts named {twice[0]!r}",
            "Give each a name of its own",
        )
    return tuple(entries)

"""Do the options of a recipe belong to its caches: to their kind, text-to-image or image-to-image, and their masks?"""

from __future__ import annotations

from operator import attrgetter

from k5cache.shared.command_line import command
from k5cache.shared.errors import RecipeError
from k5cache.shared.kind import LONG_NAMES, Kind
from k5cache.store.notes import arguments_of
from k5train.data.mixture import Mixture
from k5train.options.train import TrainConfig

_CAPTIONS_ALONE = "Draw pairs: [[train.validation.edits]] with source and prompt, or train.validation.pairs"
_OF_THE_PAIR = "Leave it out: a pair is drawn at the size of its source"
_NO_SOURCE = "Leave it out: this cache has no sources"

# Options that only one kind has, and what to do with the other.
ONLY: dict[Kind, dict[str, str]] = {
    "t2i": {
        "validation.prompts": _CAPTIONS_ALONE,
        "validation.prompt_library": _CAPTIONS_ALONE,
        "validation.prompt_names": _CAPTIONS_ALONE,
        "validation.negative_prompt": "Leave it out: guidance leads away from the empty instruction with the source",
        "validation.width": _OF_THE_PAIR,
        "validation.height": _OF_THE_PAIR,
    },
    "i2i": {
        "validation.edits": "Draw prompts: train.validation.prompts",
        "validation.pairs": "Draw prompts: train.validation.prompts",
        "source_dropout_probability": _NO_SOURCE,
    },
}


def check_options(data: Mixture, config: TrainConfig) -> None:
    """Refuse options of the other kind, and caption dropout where the cache has nothing to put in a caption's place.

    Raises:
        RecipeError: names the option and what to do.
    """
    kind, default = data.first.kind, TrainConfig()
    other: Kind = "t2i" if kind == "i2i" else "i2i"
    for name, fix in ONLY[other].items():
        if attrgetter(name)(config) != attrgetter(name)(default):
            raise RecipeError(
                f"train.{name} is only for {LONG_NAMES[other]}, and {data.first.root} is for {LONG_NAMES[kind]}", fix
            )
    if kind == "i2i" and config.caption_dropout_probability:
        for source in data.sources:
            if source.cache.columns("empty_key").column(0).null_count:
                again = command("k5cache", "encode", "TARGETS", "--sources", "SOURCES",
                                *arguments_of(source.cache.manifest.part), "-o", source.cache.root,
                                "--set", "cache.empty_instruction=true")  # fmt: skip
                raise RecipeError(
                    f"train.caption_dropout_probability is {config.caption_dropout_probability:g}, and "
                    f"{source.cache.root} was encoded without the empty instruction of each source",
                    f"Set train.caption_dropout_probability=0, or encode it too: {again}",
                )


def check_classes(data: Mixture, config: TrainConfig) -> None:
    """Refuse differential output preservation where a cache has no class captions. Regularisation data need none.

    Raises:
        RecipeError: names the cache and what to do.
    """
    if not config.objective.preservation_weight:
        return
    trained_on = [source for source in data.sources if not source.is_regularisation_data]
    for source in trained_on:
        if not source.cache.manifest.classes:
            again = command("k5cache", "encode", "SOURCE", *arguments_of(source.cache.manifest.part),
                            "-o", source.cache.root, "--set", "cache.trigger=WORD",
                            "--set", "cache.class_word=CLASS", "--update")  # fmt: skip
            raise RecipeError(
                f"train.objective.preservation_weight is set, and {source.cache.root} holds no class captions",
                f"Encode them: {again}",
            )
    if not trained_on:
        raise RecipeError(
            "train.objective.preservation_weight is set, and all caches are regularisation data, of which nothing is"
            " preserved",
            "Leave it out, or add a cache of what is to be learned",
        )


def class_warnings(data: Mixture, config: TrainConfig) -> list[str]:
    """A line if class captions were encoded and nothing is preserved by them, or if preserving makes steps longer."""
    if config.objective.preservation_weight:
        return [
            "train.objective.preservation_weight takes two forward passes and a backward pass more for each row: a step"
            " takes about 2.2 times as long, in the memory of the plan"
        ]
    unused = [source.cache.root.name for source in data.sources if source.cache.manifest.classes]
    return [
        f"The class captions of {name} do nothing here: train.objective.preservation_weight is not set"
        for name in dict.fromkeys(unused)
    ]


def check_masks(data: Mixture, config: TrainConfig) -> None:
    """Refuse options that need masks where no row has one.

    Raises:
        RecipeError: names the option and what to do.
    """
    for name, is_set in (
        ("objective.masked_loss", config.objective.masked_loss),
        ("tread.keep_masked", bool(config.tread.routes) and config.tread.keep_masked),
    ):
        if is_set and not data.has_masks():
            raise RecipeError(
                f"train.{name} is set, and the cache holds no masks",
                "Put cat.mask.png beside cat.png, white in the area that counts, and encode again",
            )

"""Which recipes are packaged, and of which answers is each composed?"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from k5train.recipes.answers import Answers, Goal
from k5train.recipes.compose import compose, values_of
from k5train.recipes.needs import peak_of
from k5train.recipes.values import Value

FEW, MANY = 300, 3000
"""Images of the packaged recipes: a few hundred, a few thousand."""
CARDS = ("8GB", "12GB", "16GB", "24GB")
CARDS_OF_MANY = ("16GB", "24GB")
_UNRELATED = "a red bicycle leaning against a brick wall"
_PROMPTS: Mapping[Goal, tuple[str, ...]] = {
    "style": ("a lighthouse on a cliff at dusk", "a portrait of an old fisherman", _UNRELATED),
    "character": ("ohwx person, riding a bicycle through a city", "ohwx person, a portrait, smiling", _UNRELATED),
    "object": ("ohwx object, on a wooden table by a window", "ohwx object, on the beach at sunset", _UNRELATED),
    "edit": (),
}
_TRIGGERS: Mapping[Goal, str] = {"style": "", "character": "ohwx person", "object": "ohwx object", "edit": ""}


@dataclass(frozen=True)
class Packaged:
    """A packaged recipe."""

    answers: Answers
    preset: str | None = None

    @property
    def text(self) -> str:
        """The whole file."""
        return compose(self.answers, self.preset)

    def as_file(self, path: str) -> str:
        """The same as a file of the user's own, which its commands name."""
        return compose(replace(self.answers, recipe=path), self.preset)

    @property
    def values(self) -> list[Value]:
        """Every option that it sets."""
        return values_of(self.answers, self.preset)


def _answers(name: str, goal: Goal, card: str, num_images: int = FEW) -> Answers:
    is_edit = goal == "edit"
    return Answers(
        goal=goal,
        flavour="i2i-lite-sft" if is_edit else "t2i-lite-sft",
        vram=card,
        num_images=num_images,
        trigger=_TRIGGERS[goal],
        prompts=_PROMPTS[goal],
        source="datasets/after" if is_edit else "datasets/my_images",
        sources="datasets/before" if is_edit else None,
        cache="cache/my_edit" if is_edit else "cache/my_images",
        recipe=name,
    )


def _packaged() -> dict[str, Packaged]:
    goals: tuple[Goal, ...] = ("style", "character", "object", "edit")
    recipes = {}
    for goal in goals:
        for card in CARDS:
            name = f"{goal}-{card.lower()}"
            recipes[name] = Packaged(_answers(name, goal, card))
        for card in CARDS_OF_MANY:
            name = f"{goal}-{card.lower()}-many"
            recipes[name] = Packaged(_answers(name, goal, card, MANY))
    recipes["official"] = Packaged(_answers("official", "style", "24GB"), "official")
    recipes["simpletuner"] = Packaged(_answers("simpletuner", "style", "16GB"), "simpletuner")
    recipes["quick-512"] = Packaged(_answers("quick-512", "style", "8GB", 40), "quick")
    return recipes


PACKAGED = _packaged()
"""The name of each, without ``.toml`` -> what it is made of."""


_TEACHES = {
    "official": "anything, with the official trainer's settings",
    "simpletuner": "anything, with those of SimpleTuner's quickstart",
    "quick": "a first try at 512 pixels",
}


def row_of(name: str) -> list[str]:
    """A packaged recipe as a row of a table: name, what it teaches, images, steps, peak of VRAM."""
    recipe = PACKAGED[name]
    steps = next(value.value for value in recipe.values if value.option == "train.steps")
    teaches = _TEACHES[recipe.preset] if recipe.preset else f"{_ARTICLES[recipe.answers.goal]} {recipe.answers.goal}"
    return [name, teaches, f"{recipe.answers.num_images:,}", f"{steps:,}", peak_of(recipe.values)]


_ARTICLES: Mapping[Goal, str] = {"style": "a", "character": "a", "object": "an", "edit": "an"}

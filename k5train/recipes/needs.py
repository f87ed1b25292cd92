"""What does a recipe need? Measured where it was, else predicted; ``needs.json`` has both."""

from __future__ import annotations

import json
from collections.abc import Iterable
from functools import cache
from importlib import resources
from typing import Any

from k5train.recipes.values import Value

_OF_MEMORY = {
    "model.flavour": "t2i-lite-sft", "cache.resolution": 1024, "train.base_model_precision": "auto",
    "train.lora.rank": 32, "train.lora.targets": ["official"], "train.memory.vram": None,
    "train.memory.enable_group_offload": False, "train.tread.routes": [],
}  # fmt: skip
"""The options of a recipe that decide what a step needs, and what they are without a line."""
_AUTO = "int8-dynamic"  # what ``auto`` becomes on the cards of the recipes
TEXT_TOKENS = {"t2i": 512, "i2i": 836}
"""Of the longest caption that the pipeline takes, and for ``i2i`` the same with a source at 1024x1024."""


def kind_of_work(values: Iterable[Value]) -> str:
    """What recipes have in common that need the same memory and the same time a step."""
    given = {value.option: value.value for value in values}
    parts = {option: given.get(option, other) for option, other in _OF_MEMORY.items()}
    precision = parts["train.base_model_precision"]
    precision = _AUTO if precision == "auto" else precision
    offload = " offload" if parts["train.memory.enable_group_offload"] else ""
    tread = " tread" if parts["train.tread.routes"] else ""
    return (
        f"{parts['model.flavour'][:3]} {parts['cache.resolution']} px {precision} "
        f"r{parts['train.lora.rank']} {'+'.join(parts['train.lora.targets'])} on {parts['train.memory.vram']}"
        f"{offload}{tread}"
    )


@cache
def known() -> dict[str, dict[str, Any]]:
    """The numbers of each kind of work."""
    text = resources.files("k5train.recipes").joinpath("needs.json").read_text(encoding="utf-8")
    document: dict[str, dict[str, Any]] = json.loads(text)
    return document


def peak_of(values: Iterable[Value]) -> str:
    """The most VRAM that torch reserved, or will."""
    numbers = known().get(kind_of_work(values), {})
    if measured := numbers.get("measured"):
        return f"{measured['reserved']}, measured"
    return f"{numbers['predicted']}, predicted" if numbers else ""


def measured_on(measured: dict[str, Any]) -> str:
    """The card, and the precision if it was another one than the recipe's."""
    return f"{measured['card']} ({measured['precision']})" if "precision" in measured else str(measured["card"])


def needs_of(values: Iterable[Value]) -> str:
    """A paragraph on memory and time."""
    values = list(values)
    numbers = known().get(kind_of_work(values))
    kind = next((str(value.value)[:3] for value in values if value.option == "model.flavour"), "t2i")
    if numbers is None:
        return "What it needs: `k5train plan` says it for your cache and card, before anything is loaded."
    text_of = "an instruction and its source" if kind == "i2i" else "a caption"
    predicted = f"a peak of {numbers['predicted']} with {text_of} of {TEXT_TOKENS[kind]} tokens; {numbers['blocks']}"
    text = f"What it needs, as `k5train plan` predicts it: {predicted}."
    if measured := numbers.get("measured"):
        return (
            f"{text} Measured on one {measured_on(measured)} with random weights, where torch was not allowed more "
            f"than a card of this size gives it: {measured['reserved']}, {measured['milliseconds']} ms a step of one "
            f"row. A smaller card takes longer; `k5train bench` times yours. {_ENCODING}"
        )
    return f"{text} That was not measured with this recipe; `k5train bench` times steps on your card. {_ENCODING}"


_ENCODING = "Encoding adapts to the card too: `k5cache plan` says how."

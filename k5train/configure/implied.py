"""What does a recipe imply: which plan, how many passes over the images, how much time? Loads no model."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from k5cache.options import CacheConfig
from k5cache.shared.console import human_seconds
from k5cache.shared.kind import Kind
from k5cache.shared.model import ModelConfig
from k5cache.shared.units import count_of
from k5train.configure.written import answers_from
from k5train.forward.precision import decided_for_plan
from k5train.options.train import TrainConfig
from k5train.planning.without_loading import PlanText, plan_without_loading
from k5train.recipes.needs import kind_of_work, known, measured_on
from k5train.recipes.values import values_for

_LETTERS_OF_TOKEN = 3  # of English captions one token has 4 to 5 letters, of Russian ones about 3
_LEAST_TOKENS, _MOST_TOKENS = 64, 512
_TOKENS_OF_SOURCE = 324  # what Qwen sees of a source at 1024x1024, as docs/architecture.md has it


def implied(answers: Mapping[str, Any], model: ModelConfig, cache: CacheConfig, train: TrainConfig) -> PlanText:
    """The plan of a run on the largest bucket, with rows about its length.

    Raises:
        DoesNotFit: no plan fits the card.
    """
    kind: Kind = "i2i" if answers["goal"] == "edit" else "t2i"
    num_tokens = max((bucket.width // 16) * (bucket.height // 16) for bucket in cache.framing.table)
    num_text_tokens = text_tokens(answers["captions"], kind, cache.resolution)
    own = model if model.path else None  # the shapes of a published one are known
    plan = plan_without_loading(None, train, own, num_tokens, num_text_tokens, kind, decide=decided_for_plan)
    rows = [*plan.rows, ("length", length(train, int(answers["num_images"]))), ("time", time(answers, train))]
    return PlanText(plan.title, rows, plan.timed)


def text_tokens(captions: Iterable[str], kind: Kind, resolution: int) -> int:
    """About how many tokens the longest caption has; a tokenizer is not at hand."""
    longest = max((len(caption) for caption in captions), default=_MOST_TOKENS * _LETTERS_OF_TOKEN)
    tokens = min(max(longest // _LETTERS_OF_TOKEN, _LEAST_TOKENS), _MOST_TOKENS)
    return tokens + (round(_TOKENS_OF_SOURCE * (resolution / 1024) ** 2) if kind == "i2i" else 0)


def length(train: TrainConfig, num_images: int) -> str:
    """How many steps, and how often each image is seen."""
    rows_of_step = train.batch_size * train.gradient_accumulation_steps
    passes = train.steps * rows_of_step / (num_images * train.repeats)
    of = count_of(rows_of_step, "row")
    return f"{count_of(train.steps, 'step')} of {of}: each of {count_of(num_images, 'image')} {passes:.3g} times"


def time(answers: Mapping[str, Any], train: TrainConfig) -> str:
    """How long the steps take, from what was measured of such a recipe on a known card."""
    numbers = known().get(kind_of_work(values_for(answers_from(answers))), {}).get("measured")
    if not numbers:
        return "not known: `k5train plan` times a step on a machine with a GPU"
    rows = train.steps * train.batch_size * train.gradient_accumulation_steps
    return (
        f"{human_seconds(rows * numbers['milliseconds'] / 1000)} for the steps on one {measured_on(numbers)}; "
        "smaller cards take longer, and `k5train plan` times a step on a machine with a GPU"
    )

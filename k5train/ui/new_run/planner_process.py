"""What would this run need, and how long would it take? Answered line by line by a process of its own, which has torch.

    python -m k5train.ui.new_run.planner_process SECONDS

reads one JSON question a line and writes one JSON answer a line. It ends after SECONDS without a question, or when the
page ends. It never asks the hub: a repository that is being typed is no reason for that.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import tomllib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TextIO

from k5cache.shared.errors import DoesNotFit, K5Error
from k5cache.shared.kind import Kind, kind_of_flavour
from k5cache.shared.model import ModelConfig, model_of
from k5cache.shared.places import model_near
from k5cache.shared.recipe import parse
from k5train.forward.precision import decided_for_plan
from k5train.options.data import DataConfig
from k5train.options.extremes import extreme_values
from k5train.options.rate import rate_warnings
from k5train.options.train import TrainConfig
from k5train.options.without_effect import options_without_effect

_TOKENS, _TEXT_TOKENS = 64 * 64, 512
"""Of a picture of 1024x1024 and of the longest caption, as `k5train plan` plans without a cache."""


@dataclass(frozen=True)
class Question:
    """A recipe that is known to be without problems, and where it would run."""

    recipe: str
    """As TOML, with paths from the working directory."""
    caches: tuple[str, ...]
    card: str | None = None
    """The size of a card to plan for that a run is using now, such as ``24GB``, if the recipe names none."""
    is_timed: bool = False
    """Whether blocks may be timed on the GPU."""


def answer(question: Question) -> dict[str, Any]:
    """The plan as a table's rows, the cautions that need a cache, how much is trained, and the time of a step."""
    document = tomllib.loads(question.recipe)
    model, config = parse(document, {"model": ModelConfig, "train": TrainConfig})
    own = model if document.get("model") else None
    entries = config.data or tuple(_entry(cache, config) for cache in question.caches)
    reply: dict[str, Any] = {}
    try:
        if entries:
            reply |= _about_data(entries, config, own)
        reply |= _about_memory(question, entries, config, own)
    except DoesNotFit as error:
        return {**reply, "does_not_fit": [error.problem, error.fix]}
    except K5Error as error:
        return {**reply, "problem": [error.problem, error.fix]}
    return reply


def _entry(cache: str, config: TrainConfig) -> DataConfig:
    return DataConfig(cache=cache, repeats=config.repeats, repeats_by_folder=config.repeats_by_folder)


def _about_data(entries: Sequence[DataConfig], config: TrainConfig, model: ModelConfig | None) -> dict[str, Any]:
    """What a run would warn of before its start, and how often it goes through the images."""
    from k5train.data.kind import check_classes, check_masks, check_options
    from k5train.data.mixture import num_batches, num_micro_batches, open_mixture
    from k5train.data.split import split_off
    from k5train.training.cautions import cautions

    data = open_mixture(entries)
    check_options(data, config)
    check_masks(data, config)
    check_classes(data, config)
    chosen = model or model_near(model_of(data.first.manifest.recipe), data.first.root)
    known = {*options_without_effect(config), *rate_warnings(config), *extreme_values(config)}
    lines = [line for line in cautions(config, data, chosen) if line not in known]
    trained_on = split_off(data, config.validation.split)
    epoch = num_batches(trained_on.pools, config.batch_size, 0)
    steps = config.steps
    if config.epochs is not None:
        steps = -(
            -num_micro_batches(trained_on, config.batch_size, config.epochs) // config.gradient_accumulation_steps
        )
    images = len(data) - sum(len(source.split) for source in trained_on.sources)
    passes = steps * config.gradient_accumulation_steps / epoch if epoch else 0.0
    return {"cautions": lines, "steps": steps, "images": images, "passes": passes}


def _about_memory(
    question: Question, entries: Sequence[DataConfig], config: TrainConfig, model: ModelConfig | None
) -> dict[str, Any]:
    from k5train.planning.without_loading import plan_without_loading

    if question.card and config.memory.vram is None:
        config = replace(config, memory=replace(config.memory, vram=question.card))
    kind: Kind = "i2i" if model and kind_of_flavour(model) == "i2i" else "t2i"
    named = model if model and model.path else None  # the shapes of a published one are known
    caches = [Path(entry.cache) for entry in entries]
    first = caches[0] if caches else None
    plan = plan_without_loading(first, config, named, _TOKENS, _TEXT_TOKENS, kind, caches[1:], decided_for_plan)
    reply: dict[str, Any] = {"title": plan.title, "rows": plan.rows}
    if question.is_timed and plan.timed:
        import torch

        from k5train.bench.probe import estimate

        step = estimate(*plan.timed, torch.device("cuda"))
        reply["time"] = step.describe(config) if step else ""
    return reply


def answers(lines: Iterator[str], seconds: float) -> Iterator[str]:
    """An answer to each question, as JSON. The process ends if none comes for so long."""
    timer = _end_in(seconds)
    for line in lines:
        timer.cancel()
        try:
            question = json.loads(line)
            reply = answer(Question(**{**question, "caches": tuple(question["caches"])}))
        except Exception as error:  # whatever it is, the page says it in a line, and the next question is answered
            reply = {"problem": [f"The plan failed with {type(error).__name__}: {error}"[:500], "Try k5train plan"]}
        yield json.dumps(reply)
        timer = _end_in(seconds)
    timer.cancel()


def _end_in(seconds: float) -> threading.Timer:
    timer = threading.Timer(seconds, os._exit, (0,))  # nothing is half written: answers are flushed
    timer.daemon = True
    timer.start()
    return timer


def _only_answers() -> TextIO:
    """Where answers go. Whatever else a library prints goes to where errors go."""
    out = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    return out


if __name__ == "__main__":
    pipe = _only_answers()
    for text in answers(sys.stdin, float(sys.argv[1])):
        pipe.write(f"{text}\n")
        pipe.flush()

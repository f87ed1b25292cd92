"""How is the setup of another trainer turned into a recipe? Which trainer it is, is told by its content."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any, Literal

from k5cache.shared.errors import RecipeError
from k5cache.shared.model import named_prompts
from k5train.moving import ai_toolkit, kohya, simpletuner
from k5train.moving.draft import Draft, Entry, Schemas
from k5train.moving.read import locate, read
from k5train.moving.rules import apply
from k5train.moving.simpletuner_data import GLOBAL, take_backends
from k5train.moving.target import Moved, moved
from k5train.options.train import TrainConfig

Trainer = Literal["simpletuner", "kohya", "ai-toolkit"]
TRAINERS: dict[Trainer, str] = {"simpletuner": "SimpleTuner", "kohya": "kohya", "ai-toolkit": "ai-toolkit"}
_LATE = ("use_ema", "lora_type", "lycoris_config", "use_dora", "lr_end", "validation_disable")
"""Keys that change what others say, in this order."""


def move(
    config: Path, data: Path | None, prompts: Path | None, trainer: Trainer | None, recipe: Path, schemas: Schemas
) -> Moved:
    """Turn a setup into a recipe. Nothing is written.

    Args:
        config: the trainer's config file, or a file with its command line.
        data: the file about its data; None if ``config`` names it, or has it.
        prompts: a file with validation prompts; None as for ``data``.
        trainer: None: told by the content.
        recipe: where the recipe will be.
        schemas: the tables of a recipe.

    Raises:
        RecipeError: a file is missing, is none of the formats, or has values of the wrong type.
    """
    values = read(config)
    if isinstance(values, list):
        raise RecipeError(
            f"{config} is a list, not a config: it looks like SimpleTuner's data backends",
            f"Give the config first, and this file with --data {config}",
        )
    if not isinstance(values, dict) or not values:
        raise RecipeError(f"{config} is no config: it has no keys", "Give the config file of another trainer")
    draft = Draft(schemas, config)
    chosen = trainer or recognised(config, values)
    if chosen == "simpletuner":
        _from_simpletuner(draft, config, values, data, prompts)
    elif chosen == "kohya":
        kohya.take(draft, config, values, data, prompts)
    else:
        ai_toolkit.take(draft, config, values)
        if prompts:
            take_prompt_file(draft, prompts, Entry("--prompts", "--prompts", str(prompts)))
    return moved(draft, TRAINERS[chosen], config, recipe)


def recognised(config: Path, values: Mapping[str, Any]) -> Trainer:
    """Whose config it is.

    Raises:
        RecipeError: nobody's that is known.
    """
    inner = values.get("config")
    ours = values.get("train")
    options = {field.name for field in fields(TrainConfig)}  # kohya's files may have a table of that name too
    if values.keys() <= {"model", "cache", "train"} and isinstance(ours, dict) and ours.keys() <= options:
        raise RecipeError(f"{config} is a recipe of k5train already", f"Use it: --recipe {config}")
    if "job" in values or (isinstance(inner, dict) and "process" in inner):
        return "ai-toolkit"
    if isinstance(values.get("datasets"), list) or isinstance(values.get("general"), dict):
        return "kohya"
    names = {key.lstrip("-").lower().replace("-", "_") for key in values}
    names |= {inner.lower() for table in values.values() if isinstance(table, dict) for inner in table}
    names = {simpletuner.ENV.get(name, name) for name in names}
    if names & {"model_family", "model_flavour", "data_backend_config"}:
        return "simpletuner"
    scores: dict[Trainer, int] = {
        "simpletuner": len(names & simpletuner.RULES.keys()),
        "kohya": len(names & kohya.RULES.keys()),
    }
    if not any(scores.values()):
        raise RecipeError(
            f"{config} has no key of SimpleTuner, kohya or ai-toolkit",
            "Give the trainer's config file, and say whose it is with --from",
        )
    return "kohya" if scores["kohya"] > scores["simpletuner"] else "simpletuner"


def _from_simpletuner(
    draft: Draft, config: Path, values: dict[str, Any], data: Path | None, prompts: Path | None
) -> None:
    values = simpletuner.normal(values, str(config))
    late = {key: values[key] for key in _LATE if key in values}
    own = {key: value for key, value in values.items() if key not in (*_LATE, *GLOBAL)}
    apply(draft, simpletuner.RULES, str(config), own)
    library = values.get("user_prompt_library")
    entry = Entry(str(config), "user_prompt_library", library)
    if prompts:
        take_prompt_file(draft, prompts, entry if library else Entry("--prompts", "--prompts", str(prompts)))
    elif library:
        take_prompt_file(draft, _named(config, entry, "--prompts"), entry)
    apply(draft, simpletuner.RULES, str(config), late)
    take_default_targets(draft)
    _take_data(draft, config, values, data)


def take_default_targets(draft: Draft) -> None:
    """What every run of SimpleTuner has and no key says: a LoRA on q, k and v."""
    if "train.lora.targets" not in draft.taken and draft.value("train.lora.algo") != "lokr":
        entry = Entry(str(draft.config), "(no key)", "q, k and v")
        draft.take(entry, "train.lora.targets", ["qkv"], "what SimpleTuner adapts of this model")


def _take_data(draft: Draft, config: Path, values: Mapping[str, Any], data: Path | None) -> None:
    entry = Entry(str(config), "data_backend_config", values.get("data_backend_config"))
    defaults = {key: values[key] for key in GLOBAL if values.get(key) is not None}
    sampling = values.get("data_backend_sampling")
    if entry.value:
        draft.say(entry, "taken over", f"instead of it, --data {data}" if data else "read: see its rows")
    if not (data or entry.value):
        for key, value in defaults.items():
            draft.say(Entry(str(config), key, value), "not supported", "it is about data: give that with --data")
        return
    path = data or _named(config, entry, "--data")
    draft.is_uniform = sampling == "uniform"
    take_backends(draft, path, read(path), defaults)
    if sampling is not None:
        said = "train.data: weight" if draft.is_uniform else "rows in proportion to the sizes of the caches"
        draft.say(Entry(str(config), "data_backend_sampling", sampling), "taken over", said)
    if draft.is_uniform:
        for cache in draft.caches:
            cache.weight = cache.weight or 1.0


def _named(config: Path, entry: Entry, option: str) -> Path:
    """A file that the config names.

    Raises:
        RecipeError: it is not there.
    """
    path = locate(str(entry.value), config)
    if path is None or not path.is_file():
        raise RecipeError(
            f"{entry.where}: {entry.key} names {str(entry.value)!r:.200}, and there is no such file",
            f"Say where it is: {option} FILE",
        )
    return path


def take_prompt_file(draft: Draft, path: Path, entry: Entry) -> None:
    """Validation prompts of a JSON file: by its path where our own reader takes it, else one by one.

    Raises:
        RecipeError: it is not a file of prompts.
    """
    prompts = read(path)
    pairs = (
        prompts.items()
        if isinstance(prompts, dict)
        else [("", p) for p in prompts]
        if isinstance(prompts, list)
        else []
    )
    plain = [(str(name), p.get("prompt") if isinstance(p, dict) else p) for name, p in pairs]
    if not plain or not all(isinstance(prompt, str) for _, prompt in plain):
        raise RecipeError(f"{path} is not a file of prompts", 'It must be like {"bicycle": "a red bicycle"}')
    if all(isinstance(prompt, str) for _, prompt in pairs):
        named_prompts(path)
        draft.take(entry, "train.validation.prompt_library", str(path))
        return
    before = draft.value("train.validation.prompts") or []
    draft.take(entry, "train.validation.prompts", [*before, *(prompt for _, prompt in plain)], "only the prompts of it")

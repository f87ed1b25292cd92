"""Recipes: strict, all problems at once, the nearest name, overrides, and round trips."""

from __future__ import annotations

import itertools
import re
import tomllib
from pathlib import Path

import pytest

from k5cache.options import CacheConfig
from k5cache.shared.errors import RecipeError
from k5cache.shared.model import ModelConfig, validation_prompts
from k5cache.shared.recipe import document_options, parse, read, to_dict, to_toml
from k5train.options.train import TrainConfig

SCHEMAS = {"model": ModelConfig, "cache": CacheConfig, "train": TrainConfig}


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def test_without_a_recipe_everything_is_default():
    assert parse(read(None, []), SCHEMAS) == [ModelConfig(), CacheConfig(), TrainConfig()]


def test_a_recipe_sets_nested_options_and_an_override_wins(tmp_path):
    path = write(tmp_path / "r.toml", "[train]\nsteps = 7\n[train.lora]\nrank = 4\n")
    _, _, train = parse(read(path, ["train.lora.rank=8", "train.name=try 2", "train.optim.lr=1"]), SCHEMAS)
    assert (train.steps, train.lora.rank, train.name, train.optim.lr) == (7, 8, "try 2", 1.0)


def test_every_problem_is_named_at_once_with_the_nearest_name(tmp_path):
    path = write(
        tmp_path / "r.toml",
        '[cache]\nresolutoin = 512\n[train]\nsteps = "many"\nbatch_size = 0\n[train.lora]\nrnak = 4\n',
    )
    with pytest.raises(RecipeError) as caught:
        parse(read(path, []), SCHEMAS, path)
    assert caught.value.problem == (
        f"{path}: [cache] unknown key 'resolutoin'; did you mean 'resolution'?; "
        "train.steps must be a whole number, found 'many'; "
        "[train.lora] unknown key 'rnak'; did you mean 'rank'?; train.batch_size must be at least 1, found 0"
    )


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        (["steps=3"], "--set steps=3 is not table.key=value"),
        (["trian.steps=3"], "unknown table 'trian'; did you mean 'train'?"),
        (["train.steps.more=3", "train.steps=1"], "train.steps must be a whole number"),
        (["train.seed=true"], "train.seed must be a whole number, found True"),
        (["train.base_model_precision=int8"], "did you mean 'int8-quanto'?"),
        (["model.flavour=t2i"], "model.flavour must be one of"),
        (["train.optim.betas=[0.9]"], "train.optim.betas must have 2 values, found 1"),
        (["train.lora=4"], "[train.lora] must be a table, found 4"),
        (["train.lora.alpha=0"], "train.lora.alpha must be above 0, found 0.0"),
        (["train.lora.decompose_factor=0"], "train.lora.decompose_factor must be -1 or at least 1, found 0"),
        (["train.optim.lr=nan"], "train.optim.lr must be above 0, found nan"),
        (["train.optim.eps=-1"], "train.optim.eps must be above 0, found -1.0"),
        (["train.optim.betas=[0.9, 1.5]"], "train.optim.betas must be at least 0 and below 1, found [0.9, 1.5]"),
        (["train.optim.weight_decay=-1"], "train.optim.weight_decay must be 0 or more, found -1.0"),
        (["train.optim.max_grad_norm=-1"], "train.optim.max_grad_norm must be 0 or more, found -1.0"),
        (["train.flow_schedule_shift=nan"], "train.flow_schedule_shift must be above 0, found nan"),
        (["train.objective.huber_c=inf"], "train.objective.huber_c must be above 0, found inf"),
        (["train.objective.logit_mean=nan"], "train.objective.logit_mean must be a number, found nan"),
        (["train.validation={split = 0.1, patience = 3, held_out_every = 0}"], "held_out_every must be above 0"),
        (
            ["train.validation.width=2064"],
            "train.validation.width must be a multiple of 16 from 16 to 2048, found 2064",
        ),
        (["train.validation.height=1000"], "train.validation.height must be a multiple of 16 from 16 to 2048"),
        (["train.validation.guidance_scale=-3"], "train.validation.guidance_scale must be 0 or more, found -3.0"),
    ],
)
def test_a_wrong_override_is_refused_in_words(options, problem):
    with pytest.raises(RecipeError) as caught:
        parse(read(None, options[:1]), SCHEMAS)
    assert problem in caught.value.problem


def test_a_resolved_recipe_reads_back_to_the_same_options(tmp_path):
    options = [
        'train.validation.prompts=["a \\"red\\" [cube]", "два\\nслова"]',
        "train.lora.alpha=0.5",
        "model.path=some where",
    ]
    parsed = parse(read(None, options), SCHEMAS)
    text = to_toml(dict(zip(SCHEMAS, map(to_dict, parsed), strict=True)))
    assert parse(read(write(tmp_path / "r.toml", text), []), SCHEMAS) == parsed


def test_the_option_list_is_a_recipe_of_the_defaults_and_every_option_has_help():
    text = document_options(SCHEMAS)
    assert parse(tomllib.loads(text), SCHEMAS) == [ModelConfig(), CacheConfig(), TrainConfig()]
    lines = text.splitlines()
    for above, line in itertools.pairwise(lines):
        if re.match(r"(# )?\w+ =", line):
            assert re.match(r"# (?!\w+ =)", above), f"{line} has no help"


def test_validation_prompts_hold_the_empty_and_the_negative_prompt_once():
    document = {"train": {"validation": {"prompts": ["a cat", "", "a cat"], "negative_prompt": "blurry"}}}
    assert validation_prompts(document) == ("", "blurry", "a cat")
    assert validation_prompts({}) == ("",)
    with pytest.raises(RecipeError):
        validation_prompts({"train": {"validation": {"prompts": "a cat"}}})

"""Regular expressions of recipes and LoRA files: the answers of ``re``, in bounded time."""

import json
import random
import re
import time
import warnings
from contextlib import suppress

import pytest
import torch
from safetensors.torch import save_file

from k5cache.shared.errors import RecipeError, RunError
from k5cache.shared.patterns import Pattern, PatternProblem, Steps
from k5train.adapter.pairs import read_pairs
from k5train.adapter.targets import linear_sizes, match_targets
from k5train.adapter.who_loads import check_lora
from k5train.base.quantize import empty_transformer
from k5train.cli import app
from tests.cli import Cli

CATASTROPHIC = [
    r"((([a-z_.0-9])+)+)+!", r"((([a-z_.0-9])+)+!)", "(a|a|.)*!", "(.*)*!", ".*.*.*.*.*.*.*.*.*!", "(.?){60}.{70}",
    "((((((((((.+)+)+)+)+)+)+)+)+)+)+!", "(.|.){1000000}!", "(?:(?:(?:.{1,9}){1,9}){1,9}){1,9}!", "(.*_)*(?=.*!)",
    "(?=(?=(?=.*).*).*)+!" * 20, "a{4294967294}", "(?:a?){99999999}b", "(" * 900 + "a" + ")" * 900, "(" * 1999,
    "(?:" * 400 + "." + ")+" * 400 + "!", "a" * 5000, r"(.)\1", "(?>a)",
]  # fmt: skip
MODULE = "visual_transformer_blocks.0.self_attention.to_query"


@pytest.fixture(scope="module")
def empty(toy_model):
    return empty_transformer(toy_model)


@pytest.fixture
def cli(tmp_path):
    return Cli(tmp_path)


def random_expression(rng: random.Random, depth: int) -> str:
    if depth == 0 or rng.random() < 0.3:
        return rng.choice([
            *("a", "b", ".", r"\d", r"\w", "[ab]", "[^a]", "[a-c_]", "^", "$", r"\b", r"\B", r"\W", r"\D", r"\Z"),
            *("(?=a)", "(?!b)", "(?<=a)", "(?<!b.)", "(?i:A)", r"[^\d]"),
        ])  # fmt: skip
    one, other = (random_expression(rng, depth - 1) for _ in "12")
    ending = rng.choice(["*", "+", "?", "{1,2}", "{2}", "*?", "{2,}", "{0}"])
    return rng.choice([one + other, f"({one}|{other})", f"(?:{one}){ending}", f"(?:{one})", f"{one}|{other}"])


def test_the_answers_are_those_of_re():
    rng = random.Random(0)
    answers = []
    while len(answers) < 4000:
        text, name = random_expression(rng, 4), "".join(rng.choice("abA.1_-") for _ in range(rng.randrange(1, 7)))
        with warnings.catch_warnings(action="ignore"):
            try:
                expected = re.compile(text).fullmatch(name) is not None
            except re.error:
                with pytest.raises(PatternProblem, match="not a regular expression"):
                    Pattern(text)
                continue
        answers.append(expected)
        assert Pattern(text).fullmatch(name) == expected, (text, name)
    assert 200 < sum(answers) < 2000


@pytest.mark.parametrize("text", CATASTROPHIC, ids=lambda text: text[:30])
def test_an_expression_that_could_take_years_ends_at_once(text, empty):
    names = [f"visual_transformer_blocks.{i}.self_attention.to_{part}" for i in range(50) for part in ("query", "key")]
    start = time.process_time()
    with suppress(PatternProblem):
        assert not any(map(Pattern(text).fullmatch, names))
    with pytest.raises(RecipeError, match=r"train.lora.targets: .* \S+") as error:
        match_targets(empty, [text])
    assert error.value.fix
    assert time.process_time() - start < 2  # on a busy machine; 0.4 s at most on an idle one


def test_expressions_that_come_together_share_their_steps():
    steps = Steps(250)
    assert not Pattern("(a|a|.)*!", steps).fullmatch("a" * 30)  # takes about 200
    with pytest.raises(PatternProblem, match="takes too long"):
        Pattern("(a|a|.)*!", steps).fullmatch("a" * 30)


def test_a_catastrophic_target_of_a_recipe_is_a_sentence(cli, toy_model):
    done = cli(app, "plan", "--model", str(toy_model), "--set", 'train.lora.targets=["((.+)+)+!"]')
    assert done.code == 2
    assert "train.lora.targets: '((.+)+)+!'" in done.err
    assert "matches no module" in done.err  # after all its steps, not after years


@pytest.mark.parametrize(
    ("metadata", "words"),
    [
        ({"alpha_pattern": {"((([a-z_.0-9])+)+)+!": 4}}, "alpha_pattern"),
        ({"rank_pattern": {"(a|a|.)*!": 4}}, "rank_pattern"),
        ({"target_modules": "((.+)+)+!"}, "target_modules"),
        ({"r": 10**9}, "r = 1000000000"),
        ({"rank_pattern": {"to_query": 10**9}}, "rank_pattern"),
        ({"megatron_config": {"a": 1}, "megatron_core": "this_module_is_imported"}, "megatron_config"),
        ({"megatron_core": "this_module_is_imported"}, "megatron_core"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights"),
        ({"layers_pattern": "((.+)+)+!", "layers_to_transform": [1]}, "layers_pattern"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_metadata_of_a_lora_that_is_more_than_a_description_never_reaches_peft(tmp_path, empty, metadata, words):
    path = tmp_path / "a.safetensors"
    state = {f"transformer.{MODULE}.lora_{p}.weight": torch.ones(s) for p, s in sizes(empty).items()}
    facts = {f"transformer.{key}": value for key, value in {"r": 2, "lora_alpha": 2, **metadata}.items()}
    save_file(state, path, metadata={"lora_adapter_metadata": json.dumps(facts)})
    start = time.process_time()
    with pytest.raises(RunError, match=words):
        check_lora(path, empty)
    assert time.process_time() - start < 2


def test_a_key_that_is_an_expression_never_reaches_peft(tmp_path, empty):
    path = tmp_path / "a.safetensors"
    state = {f"transformer.((.+)+)+!.lora_{p}.weight": torch.ones(s) for p, s in sizes(empty).items()}
    save_file(state, path)
    with pytest.raises(RunError, match="a key that no program writes"):
        check_lora(path, empty)


def test_patterns_of_a_lora_that_could_take_years_are_answered_or_refused(tmp_path, empty):
    path = tmp_path / "a.safetensors"
    state = {f"transformer.{MODULE}.lora_{p}.weight": torch.ones(s) for p, s in sizes(empty).items()}
    for pattern in ("((((((((((.+)+)+)+)+)+)+)+)+)+)+!", "(a|a|.)*!"):
        facts = {"transformer.r": 2, "transformer.alpha_pattern": {pattern: 4}}
        save_file(state, path, metadata={"lora_adapter_metadata": json.dumps(facts)})
        assert list(read_pairs(path, linear_sizes(empty))) == [MODULE]
    facts = {"transformer.r": 2, "transformer.alpha_pattern": {r"(.)\1": 4}}
    save_file(state, path, metadata={"lora_adapter_metadata": json.dumps(facts)})
    with pytest.raises(RunError, match="reference to a group"):
        read_pairs(path, linear_sizes(empty))


def sizes(empty) -> dict[str, tuple[int, int]]:
    outputs, inputs = linear_sizes(empty)[MODULE]
    return {"A": (2, inputs), "B": (outputs, 2)}

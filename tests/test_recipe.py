"""Recipes: strict, all problems at once, the nearest name, overrides, and round trips."""

from __future__ import annotations

import itertools
import re
import tomllib
from copy import deepcopy
from pathlib import Path

import pytest

from k5cache.cli import app as cache_app
from k5cache.options import CacheConfig
from k5cache.shared import option_list
from k5cache.shared.console import print_error
from k5cache.shared.errors import RecipeError
from k5cache.shared.model import ModelConfig, prompt_library, validation_prompts
from k5cache.shared.origins import line_of
from k5cache.shared.other_words import WORDS
from k5cache.shared.recipe import parse, read, to_dict, to_toml
from k5train.cli import app as train_app
from k5train.options.train import TrainConfig
from tests.cli import Cli

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


def test_every_problem_is_named_at_once_with_its_line_and_the_nearest_name(tmp_path):
    path = write(
        tmp_path / "r.toml",
        '[cache]\nresolutoin = 512\n[train]\n# how many\nsteps = "many"\nbatch_size = 0\n'
        "[train.lora]\nrnak = 4\n[tarin]\n",
    )
    with pytest.raises(RecipeError) as caught:
        parse(read(path, ["train.optim.lr=-1", "train.seed=x"]), SCHEMAS)
    assert caught.value.problem == (
        f"{path}, line 9: unknown table 'tarin'; did you mean 'train'?; "
        "line 2: [cache] unknown key 'resolutoin'; did you mean 'resolution'?; "
        "line 5: train.steps must be a whole number, found 'many'; "
        "line 8: [train.lora] unknown key 'rnak'; did you mean 'rank'?; "
        "--set train.optim.lr=-1: train.optim.lr must be above 0, found -1.0; "
        "--set train.seed=x: train.seed must be a whole number, found 'x'; "
        f"{path}, line 6: train.batch_size must be at least 1, found 0"
    )


# What somebody writes, and the name that it is answered with; None where no name is like it.
MEANT = {
    "train.user_prompt_library='p.json'": "train.validation.prompt_library",
    "train.optim.learning_rate=1": "train.optim.lr", "train.learning_rat=1": "train.optim.lr",
    "learning_rate=1": "train.optim.lr", "train.lr=1": "train.optim.lr", "optim.learning_rate=1": "train.optim",
    "train.lora_rank=8": "train.lora.rank", "lora_rank=8": "train.lora.rank", "network_dim=8": "train.lora.rank",
    "rank=8": "train.lora.rank", "train.rank=8": "train.lora.rank", "train.lora.rnak=8": "rank",
    "lora.rank=8": "train.lora", "train.lorra.rank=8": "lora", "train.rollout.seed=1": "train.seed",
    "train.enable_group_offload=true": "train.memory.enable_group_offload", "train.xyzzy=1": None,
    "resolution=512": "cache.resolution", "train.resolution=512": "cache.resolution", "flavour=x": "model.flavour",
    "cache.steps=3": "train.steps", "train.validation.steps=3": "train.steps",
    "prompts=['a']": "train.validation.prompts", "train.batchsize=2": "batch_size",
    "train.train_batch_size=1": "train.batch_size",
    "validation_guidance=3": "train.validation.guidance_scale",
    "train.validation_prompts=['a']": "train.validation.prompts",
    "[/red]=1": None, "train.xyzzy[b]=1": None, "train.lora.rnak[0]=1": "rank",  # brackets that are no place in a list
    "num_inference_steps=3": "train.rollout.num_inference_steps' or 'train.validation.num_inference_steps",
}  # fmt: skip


def test_a_name_that_is_none_is_answered_with_the_full_name_of_the_option_that_was_meant():
    answers = {}
    for option in MEANT:
        with pytest.raises(RecipeError) as caught:
            parse(read(None, [option]), SCHEMAS)
        before, _, meant = caught.value.problem.partition("; did you mean ")
        assert before.startswith(f"--set {option}: "), before
        answers[option] = meant.removesuffix("?").strip("'") or None
    assert answers == MEANT


# SimpleTuner's quickstart for Kandinsky 5 Image, the values that ask for what happens here anyway.
NOTHING_TO_SAY = """
model_type = "lora"
model_family = "kandinsky5-image"
text_encoder_1_precision = "no_change"
base_model_default_dtype = "bf16"
group_offload_type = "block_level"
offload_during_startup = "true"
gradient_checkpointing = true
[cache]
crop = true
text_encoder_2_precision = "no_change"
id = "my images"
type = "local"
dataset_type = "image"
disabled = false
[train]
lora_type = "standard"
[train.optim]
lr_scheduler = "constant_with_warmup"
"""

# What else it has, and what is said of it.
SAID = {
    "output_dir='out'": "output_dir is an option of the command here: k5train run -o RUN",
    "cache.instance_data_dir='in'": "cache.instance_data_dir is an argument here: k5cache encode FOLDER",
    "cache.cache_dir='in'": "k5cache encode FOLDER -o CACHE",
    "cache.crop_aspect='square'": 'cache.crop_aspect is cache.buckets here: "square"',
    "model_type='full'": 'model_type must be "lora"',
    "model_flavour='t2i-lite-sft'": "did you mean 'model.flavour'?",
    "validation_resolution='1024x1024'": "is train.validation.width and train.validation.height here",
    "train.tread_config={routes=[]}": "did you mean 'train.tread.routes'?",
    "train.group_offload_type='leaf_level'": "train.group_offload_type does not exist: one block is the smallest group",
    "text_encoder_1_precision='int8'": "did you mean 'cache.text_encoder_1_precision'?",
    "disabled=true": "disabled does not exist: leave the data out",
    "train.optim.type='adamw'": "[train.optim] unknown key 'type'",
    "cache.crop='square'": "cache.crop must be one of",
}


def test_words_of_simpletuner_that_need_nothing_here_are_accepted_and_others_are_answered(tmp_path):
    path = write(tmp_path / "r.toml", NOTHING_TO_SAY)
    assert parse(read(path, []), SCHEMAS) == [ModelConfig(), CacheConfig(), TrainConfig()]
    assert parse(read(None, ["cache.crop=false"]), SCHEMAS)[1].crop == "none"
    for option, words in SAID.items():
        with pytest.raises(RecipeError) as caught:
            parse(read(None, [option]), SCHEMAS)
        assert words in caught.value.problem


def test_options_are_found_by_their_names_or_else_by_what_is_said_of_them():
    found = option_list.as_toml(SCHEMAS, ["RANK", "memory.graph"])
    assert re.findall(r"^\[[\w.]+\]|^(?:# )?\w+ =", found, re.M) == [
        "[train.lora]", "rank =", "ranks =", "[train.memory]", "graph ="
    ]  # fmt: skip
    assert tomllib.loads(found)["train"]["lora"]["rank"] == TrainConfig().lora.rank
    assert re.findall(r"^\w+ =", option_list.as_toml(SCHEMAS, ["mirrored"]), re.M) == ["flip ="]
    with pytest.raises(RecipeError, match=r"unknown option 'network_dim'; did you mean 'train\.lora\.rank'\?"):
        option_list.as_toml(SCHEMAS, ["rank", "network_dim"])


def test_every_option_that_another_trainers_word_names_is_one():
    text = option_list.as_toml(SCHEMAS)
    tables = {table: re.findall(r"^(?:# )?(\w+) =", part, re.M) for table, part in
              re.findall(r"^\[([\w.]+)\]\n(.*?)(?=^\[|\Z)", text, re.M | re.S)}  # fmt: skip
    for name, word in WORDS.items():
        assert word.option or word.why or word.harmless, name
        assert name not in ("train", "cache", "model"), name
        if word.option:
            table, _, key = word.option.rpartition(".")
            assert key in tables[table], word.option


def test_the_line_is_where_a_value_begins_however_it_is_written():
    text = (
        'model.path = "x"\n\n[train]\nlora = {rank = 0}\n# text with [train.optim]\nname = """\nsteps = 3\n"""\n'
        'steps = 5\n[train.validation]\nprompts = [\n  "a",\n  "b",\n]\n'
        'every = 7\n[[train.data]]\ncache = "a"\n[[train.data]]\ncache = "b"\nweight = -1\n'
    )
    for keys, line in (
        (("model", "path"), 1), (("train",), 3), (("train", "lora", "rank"), 4), (("train", "name"), 6),
        (("train", "steps"), 9), (("train", "validation", "prompts"), 11), (("train", "validation", "prompts", 1), 11),
        (("train", "validation", "every"), 15), (("train", "data", 1), 18), (("train", "data", 1, "weight"), 20),
        (("train", "optim"), None),
    ):  # fmt: skip
        assert line_of(text, keys) == line, keys


def test_a_later_option_takes_the_blame_from_the_file(tmp_path):
    path = write(tmp_path / "r.toml", "[train]\nsteps = 5\n[[train.data]]\ncache = 'a'\nweight = 1\n")
    document = read(path, ["train.steps=0"])
    document.give("model.path", "", "--model ''")
    with pytest.raises(RecipeError) as caught:
        parse(document, SCHEMAS)
    assert caught.value.problem == (
        "--model '': model.path is empty; --set train.steps=0: train.steps must be at least 1, found 0"
    )
    assert document.origin("train.data[0].weight") == (str(path), 5)
    assert document.origin("train.data[0].repeats") == (str(path), 3)  # not there: its table
    assert deepcopy(document).origin("train.steps") == ("--set train.steps=0", None)


def test_a_mark_before_the_text_is_no_part_of_it(tmp_path):
    (tmp_path / "r.toml").write_bytes(b"\xef\xbb\xbf[train]\r\nsteps = 7\r\n")
    assert parse(read(tmp_path / "r.toml", []), SCHEMAS)[2].steps == 7
    (tmp_path / "p.json").write_bytes(b'\xef\xbb\xbf["a red fox"]')
    assert prompt_library(tmp_path / "p.json") == ("a red fox",)


def test_a_windows_path_in_double_quotes_is_told_how_to_be_written(tmp_path):
    path = write(tmp_path / "r.toml", '[model]\npath = "C:\\Users\\me\\k5"\n')
    with pytest.raises(RecipeError, match="is not valid TOML") as caught:
        read(path, [])
    assert caught.value.fix.endswith("""with slashes: 'C:\\Users\\me\\k5' or "C:/Users/me/k5\"""")
    write(path, '[model]\npath = "C:\\new"\n')  # valid TOML: a line break and "ew"
    with pytest.raises(RecipeError, match=r"line 2: model.path holds a tab, a line break or the like") as caught:
        parse(read(path, []), SCHEMAS)
    assert "single quotes" in caught.value.problem
    write(path, "[train")
    with pytest.raises(RecipeError) as caught:
        read(path, [])
    assert caught.value.fix == "Correct that line; see https://toml.io"


def test_a_file_in_another_encoding_is_told_so(tmp_path):
    (tmp_path / "r.toml").write_bytes("[train]".encode("utf-16"))
    with pytest.raises(RecipeError, match="is not UTF-8") as caught:
        read(tmp_path / "r.toml", [])
    assert caught.value.fix == "Save it as UTF-8"


@pytest.mark.parametrize(
    ("problem", "note"),
    [
        ("There is no folder C:\\my pics", "C:\\ begins a Windows path: in WSL, drive C: is /mnt/c"),
        ("There is no folder d:/pics", "d:/ begins a Windows path: in WSL, drive D: is /mnt/d"),
        ("see https://toml.io and /a/b:/c", None),
    ],
)
def test_a_windows_path_where_there_is_no_windows_is_noted(problem, note, capsys):
    print_error(problem, "do")
    lines = [f"error: {problem}", "  fix: do", *([f" note: {note}"] if note else [])]
    assert capsys.readouterr().err.splitlines() == lines


def test_both_command_lines_check_every_table(tmp_path):
    write(tmp_path / "r.toml", "[train.validation]\npropmts = ['a fox']\n[cache]\nresolution = 1000\n")
    for app, arguments in (
        (cache_app, ("encode", "pictures")), (cache_app, ("plan", "pictures")), (cache_app, ("diff", "pictures")),
        (train_app, ("run", "cache")), (train_app, ("sweep", "cache", "--grid", "train.steps=1,2")),
        (train_app, ("plan",)), (train_app, ("selftest",)),
    ):  # fmt: skip
        done = Cli(tmp_path)(app, *arguments, "-r", "r.toml")
        assert done.code == 2, arguments
        assert "[train.validation] unknown key 'propmts'; did you mean 'prompts'?" in done.err
        assert "line 4: cache.resolution must be a multiple of 16" in done.err


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        (["steps"], "--set steps is not table.key=value"),
        (["=3"], "--set =3 is not table.key=value"),
        (["train..steps=3"], "--set train..steps=3 is not table.key=value"),
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
    text = option_list.as_toml(SCHEMAS)
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


def test_an_entry_of_a_list_that_lacks_what_is_required_is_named_and_nothing_else_fails():
    with pytest.raises(RecipeError) as error:
        parse({"train": {"data": [{"weight": 1.0}]}}, {"train": TrainConfig})
    assert error.value.problem == "train.data[0].cache is required"

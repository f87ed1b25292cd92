"""The recipe of a new run as a form and as text: what fields show and mean, and how one value changes in the text."""

from __future__ import annotations

import tomllib

import pytest

from k5cache.shared import packaged
from k5train.ui.new_run.edited import with_value
from k5train.ui.new_run.fields import FIRST, LEFT_OUT, fields, groups

RECIPE = """\
# mine

[train]
steps = 500  # enough
[train.lora]
# as before
rank = 8
targets = [
    "attention",  # fast
    "qkv",
]

# --- how it learns
[train.optim]
lr = 1e-4
"""


def change(text: str, name: str, typed: str) -> str:
    field = fields()[name]
    return with_value(text, field, field.value_of(typed))


def test_a_changed_value_leaves_all_other_lines_as_they_are():
    assert change(RECIPE, "train.steps", "800") == RECIPE.replace("500", "800")
    assert change(RECIPE, "train.lora.rank", "16") == RECIPE.replace("rank = 8", "rank = 16")
    both = change(RECIPE, "train.lora.targets", "qkv\nre:.*x")
    assert both == RECIPE.replace('[\n    "attention",  # fast\n    "qkv",\n]', '["qkv", "re:.*x"]')


def test_a_value_that_is_left_out_becomes_a_comment_and_comes_back_in_its_place():
    without = change(RECIPE, "train.lora.rank", "")
    assert without == RECIPE.replace("rank = 8", "# rank = 8")
    assert change(without, "train.lora.rank", "4") == RECIPE.replace("rank = 8", "rank = 4")


def test_a_new_value_comes_behind_those_of_its_table_with_its_help():
    help_text = "# Strength: the adapter is scaled by alpha / rank. Not set: alpha = rank, as in the official trainer."
    assert change(RECIPE, "train.lora.alpha", "16") == RECIPE.replace(
        "]\n\n# ---", f"]\n{help_text}\nalpha = 16\n\n# ---"
    )


def test_a_new_table_comes_before_those_that_follow_it_in_a_recipe():
    text = change("[train.optim]\nlr = 1e-4\n", "train.steps", "9")
    assert text.index("[train]") < text.index("steps = 9") < text.index("[train.optim]")
    assert tomllib.loads(text) == {"train": {"steps": 9, "optim": {"lr": 1e-4}}}
    assert tomllib.loads(change("", "train.memory.vram", "12GB")) == {"train": {"memory": {"vram": "12GB"}}}


@pytest.mark.parametrize(
    "text",
    [
        "train = {lora = {rank = 8}}", "[train]\nlora.rank = 8", "[train]\nlora = {rank = 8, alpha = 4}",
        '[train."lora"]\n"rank" = 8', 'train = 5\nx = "[train.lora]\\nrank = 8"',
        '[train]\nname = """\n[train.lora]\n"""',
        "[[train.data]]\ncache = 'a'\n[train.lora]\nrank = 1", "[train.lora]\nrank = 8 # rank = 9", "#[train.lora]",
    ],
)  # fmt: skip
def test_however_a_recipe_is_written_the_text_says_the_new_value_and_all_others(text):
    for typed, value in (("16", 16), ('x"]\n[model', 'x"]\n[model')):
        wanted = tomllib.loads(text)
        train = wanted["train"] = wanted["train"] if isinstance(wanted.get("train"), dict) else {}
        train.setdefault("lora", {})["rank"] = value
        assert tomllib.loads(change(text, "train.lora.rank", typed)) == wanted
    without = tomllib.loads(change(text, "train.lora.rank", "")).get("train", {})
    assert "rank" not in (without.get("lora", {}) if isinstance(without, dict) else {})


def test_every_option_of_every_packaged_recipe_goes_through_its_field_unchanged():
    for name in packaged.names():
        document = tomllib.loads(packaged.text(name))
        for field in fields().values():
            text = field.text_in(document)
            value = field.value_of(text)
            given = document
            for key in field.name.split("."):
                given = given.get(key, {}) if isinstance(given, dict) else {}
            if given != {}:
                assert value == given, (name, field.name)


@pytest.mark.parametrize(
    ("name", "typed", "value"),
    [
        ("train.optim.lr", "1e-4", 1e-4), ("train.optim.lr", "1,5", "1,5"), ("train.steps", " 10 ", 10),
        ("train.steps", "1\nx = 2", "1\nx = 2"), ("train.steps", "9" * 5000, "9" * 5000),
        ("train.steps", "", LEFT_OUT),
        ("train.steps", "1979-05-27", "1979-05-27"), ("train.optim.betas", "0.9, 0.99", [0.9, 0.99]),
        ("train.lora.init_lora", "", LEFT_OUT), ("train.lora.init_lora", '""', ""),
        ("train.deterministic", "true", True),
        ("train.validation.prompts", "a cat\n\n\"two\\nlines\"\n\"\"", ["a cat", "two\nlines", ""]),
        ("train.validation.negative_prompt", '"quoted" word', '"quoted" word'),
        ("train.trackers.use", "", []), ("train.trackers.use", "wandb\ntrackio", ["wandb", "trackio"]),
    ],
)  # fmt: skip
def test_what_is_typed_into_a_field_becomes_a_value_or_stays_a_text(name, typed, value):
    assert fields()[name].value_of(typed) == value


@pytest.mark.parametrize("prompt", ["", " a", 'say "x"', '"', "two\nlines", "\x1b[31m", "</textarea>", "é ‮x", "\\"])
def test_a_text_is_shown_in_a_field_so_that_it_can_be_given_back(prompt):
    field = fields()["train.validation.prompts"]
    assert field.value_of(field.text_in({"train": {"validation": {"prompts": [prompt]}}})) == [prompt]


def test_twenty_options_come_first_and_every_other_one_is_in_the_group_of_its_table():
    grouped = [field.name for group in groups() for field in group.fields]
    assert len(FIRST) == 20
    assert sorted([*FIRST, *grouped]) == sorted(fields())
    entries = [entry.name for group in groups() for entry in group.entries]
    assert entries == ["train.data", "train.lora.ranks", "train.tread.routes", "train.validation.edits"]

"""Does ``pipelines.measure.recipes`` measure what the packaged recipes need, and do they say what the planner says?"""

from __future__ import annotations

import dataclasses
import json

import torch

from k5train.recipes import needs
from k5train.recipes.listed import PACKAGED
from pipelines.measure import recipes
from tests.test_measure_gradients import SMALL
from tests.test_readme import table_under


def test_the_recipes_say_what_the_planner_predicts_now():
    works = recipes.works()
    assert {name for work in works for name in work.recipes} == set(PACKAGED)
    stored = json.loads(recipes.NEEDS.read_text(encoding="utf-8"))
    assert {work.name for work in works} == set(stored), "Run: python -m pipelines.measure.recipes --predict"
    for work in works[::4]:  # 8 GB, 64 ranks, both kinds, another trainer's: a plan takes a third of a second
        predicted = recipes.predict(work)
        assert {key: stored[work.name][key] for key in predicted} == predicted, work.name


def test_steps_of_each_kind_of_work_are_timed_as_its_recipes_train():
    by_name = {work.name: work for work in recipes.works()}
    wanted = [work for name, work in by_name.items() if name.endswith(("r16 official on 8GB", "tread"))]
    assert [work.kind for work in wanted] == ["t2i", "i2i", "t2i"]
    small = []
    for work in wanted:
        lora = dataclasses.replace(work.config.lora, rank=4)
        memory = dataclasses.replace(work.config.memory, execution="eager", enable_group_offload=False)
        config = dataclasses.replace(work.config, lora=lora, memory=memory)
        small.append(dataclasses.replace(work, config=config, resolution=64))
    deep = {**SMALL, "num_visual_blocks": 6}  # the quickstart's route leaves out the first two blocks and the last
    timed = list(recipes.measure(small, torch.device("cpu"), 600, deep, num_steps=1))
    assert [work.name for work, _ in timed] == [work.name for work in wanted]
    assert all(measured.milliseconds > 0 for _, measured in timed)
    assert list(recipes.measure(small, torch.device("cpu"), -1, deep)) == []


def test_measured_numbers_stand_beside_the_predicted_ones_and_old_works_go():
    known = {"a": {"predicted": "1 GiB", "measured": {"milliseconds": 5}}, "gone": {"predicted": "2 GiB"}}
    predicted = {"a": {"predicted": "3 GiB"}, "b": {"predicted": "4 GiB"}}
    assert recipes.merged(known, predicted, {"b": {"milliseconds": 7}}) == {
        "a": {"predicted": "3 GiB", "measured": {"milliseconds": 5}},
        "b": {"predicted": "4 GiB", "measured": {"milliseconds": 7}},
    }


def test_a_recipe_says_what_was_measured(monkeypatch):
    values = PACKAGED["style-16gb"].values
    numbers = {"card": "NVIDIA H100", "reserved": "14.9 GiB", "milliseconds": 333}
    known = {needs.kind_of_work(values): {"predicted": "14.8 GiB", "blocks": "all", "measured": numbers}}
    monkeypatch.setattr(needs, "known", lambda: known)
    text = needs.needs_of(values)
    assert "Measured on one NVIDIA H100" in text
    assert "14.9 GiB, 333 ms a step of one row" in text
    numbers["precision"] = "int8-quanto"
    assert "Measured on one NVIDIA H100 (int8-quanto) with random weights" in needs.needs_of(values)


def test_the_page_of_measurements_has_the_numbers_that_the_recipes_have():
    rows = table_under(recipes.ROOT / "docs" / "measurements.md", "What the packaged recipes need")[1:]
    stored = json.loads(recipes.NEEDS.read_text(encoding="utf-8"))
    measured = {work: (numbers["predicted"], numbers["measured"]) for work, numbers in stored.items()
                if "measured" in numbers}  # fmt: skip
    # A row of another precision has the prediction for that one.
    assert [[work, "" if "(" in work else predicted, *row] for work, predicted, *row in rows] == [
        [
            work.replace(" int8-dynamic ", f" ({numbers['precision']}) ") if "precision" in numbers else work,
            "" if "precision" in numbers else predicted,
            numbers["reserved"],
            str(numbers["milliseconds"]),
            str(numbers["busy"]),
        ]
        for work, (predicted, numbers) in measured.items()
    ]

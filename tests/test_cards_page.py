"""The page on memory and cards shows what the planners say today."""

from __future__ import annotations

import re

from k5train.base.architecture import FULL_SIZE
from pipelines.measure import cards
from tests.test_readme import ROOT

PAGE = (ROOT / "docs" / "memory_and_cards.md").read_text(encoding="utf-8")


def rows_under(heading: str, table: str) -> list[list[str]]:
    """The cells of a table, found by the first word of its head."""
    section = PAGE.split(f"\n## {heading}\n")[1].split("\n## ")[0]
    rows = section.split(f"\n| {table} |")[1].split("\n\n")[0].splitlines()[2:]
    return [row.strip("| ").split(" | ") for row in rows]


def test_the_cards_are_those_of_the_planners():
    encode = rows_under("Encoding: what fits", "card")
    assert encode == [[card, *cards.encode_row(card)] for card in ("4 GB", "6 GB", *cards.CARDS)]
    train = rows_under("Training: what fits", "card")
    assert [row[0] for row in train] == [*cards.CARDS]
    assert [len(row) for row in train] == [1 + len(cards.SIZES)] * len(cards.CARDS)
    for card, size in (("8 GB", 512), ("10 GB", 768), ("12 GB", 1024), ("24 GB", 1280)):
        assert train[cards.CARDS.index(card)][1 + cards.SIZES.index(size)] == cards.train_cell(card, size)


def test_the_levers_are_those_of_the_planner_on_8_gb():
    rows = rows_under("8 GB, with care", "change")
    assert [row[0] for row in rows] == [*cards.LEVERS]
    for row in (rows[4], rows[5], rows[-1]):
        assert row[1:] == [*cards.lever_row(row[0])], row


def test_the_plan_that_is_explained_is_the_one_of_the_first_lever():
    plan = cards.plan_on("8 GB", *cards.LEVERS["no change"])
    assert plan
    assert f"predicted peak, torch reserved  {plan.peak / cards.GIB:.1f} GiB" in PAGE
    assert f"{plan.streaming.num_blocks} blocks streamed" in PAGE
    assert f"{FULL_SIZE['num_visual_blocks']} blocks: nothing" in PAGE
    assert len(re.findall(r"^- \*\*", PAGE.split("## How to read the plan")[1].split("\n## ")[0], re.MULTILINE)) == 6

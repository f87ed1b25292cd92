"""Is a user told of values that spoil pictures, and of no others?"""

from __future__ import annotations

import re

import pytest

from k5cache.shared.recipe import parse, read
from k5train.options.extremes import HIGH_GUIDANCE, HIGH_SHIFT, LOW_SHIFT, extreme_values, strength_warnings
from k5train.options.train import TrainConfig
from tests.test_readme import ROOT, table_under

PAGE = ROOT / "docs" / "troubleshooting.md"


def lines(*options: str) -> list[str]:
    (config,) = parse(read(None, [f"train.{option}" for option in options]), {"train": TrainConfig})
    return extreme_values(config)


@pytest.mark.parametrize(
    ("option", "said"),
    [
        ("validation.guidance_scale=7", "is 7: from 7 on pictures tend to look burnt, with or without the LoRA. "),
        ("validation.guidance_scale=12.5", "is 12.5: from 7 on pictures"),
        ("flow_schedule_shift=6.5", "is 6.5: nearly every step trains on very noisy inputs"),
        ("flow_schedule_shift=0.25", "is 0.25: nearly every step trains on almost clean inputs"),
    ],
)
def test_a_value_that_spoils_pictures_is_named_with_one_that_does_not(option, said):
    (line,) = lines(option)
    assert line.startswith(f"train.{option.partition('=')[0]} {said}")
    advised = re.search(r"--set train\.(\S+=\d)", line)[1]
    assert lines(advised) == []


def test_nothing_is_said_of_usual_values_up_to_the_limits():
    usual = ("validation.guidance_scale=6.9", "validation.guidance_scale=1", "flow_schedule_shift=6",
             "flow_schedule_shift=0.3", "flow_schedule_shift=3", "objective.flow_schedule_auto_shift=true")  # fmt: skip
    assert [lines(option) for option in ("seed=1", *usual)] == [[]] * 7


def test_strengths_above_one_and_a_half_are_named_once():
    assert strength_warnings([1.0, 1.5, -2.0]) == []
    (line,) = strength_warnings([2.0, 0.7, 1.6, 2.0, 10.0])
    assert line.startswith("A strength of 1.6, 2, 10 changes the model more than training did")


def test_the_page_on_what_looks_wrong_has_the_limits_of_the_warnings():
    text = PAGE.read_text(encoding="utf-8")
    for phrase in (f"guidance of {HIGH_GUIDANCE:g} or more", f"above {HIGH_SHIFT:g} a run warns",
                   f"below {LOW_SHIFT:g} a run warns"):  # fmt: skip
        assert phrase in text


def test_every_message_that_the_page_quotes_is_one_of_the_programs():
    sources = [path.read_text(encoding="utf-8") for path in sorted(ROOT.glob("k5*/**/*.py"))]
    code = re.sub(r'"\s*f?"', "", "\n".join(sources))  # strings that go on in the next line
    quoted = [span for row in table_under(PAGE, "Refusals")[1:] for span in re.findall(r"`([^`]+)`", row[0])]
    quoted = [span for span in quoted if not span.startswith("[")]
    assert len(quoted) >= 5
    for message in quoted:
        pattern = r"\{[^{}]+\}".join(re.escape(part) for part in re.split(r"CACHE|RUN", message))
        assert re.search(pattern, code), message

"""A failing disk: whichever call fails, a command says so in a sentence, loses nothing, and goes on afterwards."""

from __future__ import annotations

import shutil

import pytest

from tests.failing_calls import ERRORS, build, walk

pytestmark = pytest.mark.skipif(shutil.which("cc") is None, reason="needs a C compiler")


@pytest.mark.parametrize(
    ("every", "errors_of_each"),
    [pytest.param(997, 1, marks=pytest.mark.long), pytest.param(31, len(ERRORS), marks=pytest.mark.long)],
)
def test_whichever_call_fails_nothing_is_lost_and_the_command_goes_on(tmp_path, toy_model, every, errors_of_each):
    counts = walk(build(tmp_path), tmp_path, toy_model, every, errors_of_each)
    assert counts.keys() >= {"encode", "encode again", "gc", "run", "resume", "prepare", "export"}, counts

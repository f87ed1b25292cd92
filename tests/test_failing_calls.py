"""A failing disk: whichever call fails, a command says so in a sentence, loses nothing, and goes on afterwards."""

from __future__ import annotations

import errno
import shutil

import pytest

from tests.failing_calls import ERRORS, build, walk

pytestmark = pytest.mark.skipif(shutil.which("cc") is None, reason="needs a C compiler")


@pytest.mark.parametrize(
    ("every", "errors"),
    [(199, (errno.EIO,)), pytest.param(31, ERRORS, marks=pytest.mark.slow)],
)
def test_whichever_call_fails_nothing_is_lost_and_the_command_goes_on(tmp_path, toy_model, every, errors):
    counts = walk(build(tmp_path), tmp_path, toy_model, every, errors)
    assert counts.keys() >= {"encode", "encode again", "gc", "run", "resume", "prepare", "export"}, counts

"""Is a flipped bit of any file of ours named before the file is used: cache, run, LoRA and prepared base?"""

from __future__ import annotations

import random
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from k5train.base.prepared import prepare
from pipelines.measure.trust import flips
from tests.runs import CONFIG, start_run
from tests.store_samples import flip

CASES = [(row, name) for row in (flips.CACHES, flips.STATES, flips.LORAS, flips.BASES) for name in flips.cases(row)]


@pytest.fixture(scope="module")
def whole(tmp_path_factory, toy_cache, toy_model) -> Path:
    """A folder as ``flips.cases`` expects it."""
    root = tmp_path_factory.mktemp("whole")
    shutil.copytree(toy_cache("fp32"), root / "cache" / "whole")
    config = replace(CONFIG, steps=4, checkpoint_every=2, optim=replace(CONFIG.optim, warmup_steps=1))
    start_run(root / "runs" / "four", root / "cache" / "whole", toy_model, config)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("K5_HOME", str(root / "home"))
        prepare(toy_model, torch.bfloat16, torch.device("cpu"))
    return root


def test_every_file_with_data_of_ours_is_among_them(whole):
    files = {path for row, name in CASES for path in whole.glob(flips.cases(row)[name].pattern)}
    run = whole / "runs" / "four"
    for_people = {run / "loss.png", run / ".lock", whole / "cache" / "whole" / ".lock"}
    for_people |= {*(whole / "home" / "base").glob(".lock-*")}
    older = {*(run / "state" / "step-000002").iterdir(), run / "checkpoints" / "step-000002.safetensors"}
    assert {path for path in whole.rglob("*") if path.is_file()} - files - for_people - older == set()


@pytest.mark.parametrize("row", [flips.CACHES, flips.STATES, flips.LORAS, flips.BASES])
@pytest.mark.parametrize("count", [20, pytest.param(1000, marks=pytest.mark.long)])
def test_a_flipped_bit_of_any_file_is_named_before_the_file_is_used(whole, row, count):
    chance = random.Random(count)
    tried = 0
    for name, case in flips.cases(row).items():
        paths = sorted(whole.glob(case.pattern))
        for number in range(count):
            path = chance.choice(paths)
            bit = flips._bit(path, chance, number)
            flip(path, bit)
            try:
                flips._check(case, whole, path, bit)
            finally:
                flip(path, bit)
            tried += 1
        assert (case.problem(whole, paths[0]) or flips._HARMLESS).endswith(flips._HARMLESS), name  # all are back
    assert tried == count * len(flips.cases(row))

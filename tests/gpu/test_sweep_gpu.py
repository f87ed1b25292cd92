"""A sweep on two GPUs: each process sees its own, and in deterministic mode each LoRA has the bits of one GPU's sweep.

python -m pytest tests/gpu/test_sweep_gpu.py
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from safetensors.torch import load_file

from k5cache.shared.gpus import NVIDIA, visible_slots
from k5train.runs.outcomes import read_outcomes
from tests.runs import same

pytestmark = pytest.mark.skipif(len(visible_slots()) < 2, reason="needs two GPUs")

RECIPE = """
[train]
steps = 12
batch_size = 2
deterministic = true
base_model_precision = "int8-quanto"
[train.lora]
rank = 4
targets = ["qkv"]
[train.optim]
warmup_steps = 0
[train.validation]
every = 0
split = 0.2
"""
WHICH = (
    "import json, torch; print(json.dumps([torch.cuda.device_count(), str(torch.cuda.get_device_properties(0).uuid)]))"
)


def test_each_of_two_gpus_is_seen_by_one_process():
    seen = []
    for slot in visible_slots()[:2]:
        assert slot.variable == NVIDIA
        seen.append(json.loads(_python("-c", WHICH, env=slot.env)))
    assert [count for count, _ in seen] == [1, 1]
    assert seen[0][1] != seen[1][1]


def test_a_sweep_on_two_gpus_has_the_bits_of_one(tmp_path, toy_model, toy_cache):
    (tmp_path / "recipe.toml").write_text(RECIPE)
    for count in (1, 2):
        _python("-m", "k5train", "sweep", str(toy_cache("bf16")), "--model", str(toy_model), "-r",
                str(tmp_path / "recipe.toml"), "--grid", "train.optim.lr=1e-2,2e-2,3e-2,4e-2", "--gpus", str(count),
                "-o", str(tmp_path / f"on-{count}"))  # fmt: skip
    one, two = ([replace(outcome, seconds=None, seconds_to_start=None) for outcome in read_outcomes(tmp_path / out)]
                for out in ("on-1", "on-2"))  # fmt: skip
    assert len(one) == 4
    assert one == two
    for outcome in one:
        assert same(*(load_file(tmp_path / out / outcome.lora) for out in ("on-1", "on-2")))


def _python(*arguments: str, env: dict[str, str] | None = None) -> str:
    done = subprocess.run([sys.executable, *arguments], env={**os.environ, **(env or {})}, capture_output=True,
                          text=True, check=False, cwd=Path(__file__).parents[2])  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout

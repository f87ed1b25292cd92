"""On GPUs: two processes train what one does that accumulates, through NCCL, captured; and a dead one ends the run.

python -m pytest tests/gpu/test_parallel_gpu.py, on a machine with two GPUs; with one, gloo is tried.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import psutil
import pytest
import torch

from k5train.runs.folder import Run
from k5train.runs.resume_state import latest_state
from tests.ranks import free_port
from tests.runs import lora_of, metrics_of, numbers, same, state_of

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
needs_two = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
ROOT = Path(__file__).parent.parent.parent
RECIPE = """
[model]
path = "{model}"
[train]
steps = 10
batch_size = 2
checkpoint_every = 100
base_model_precision = "int8-quanto"
deterministic = true
[train.memory]
execution = "compiled"
[train.lora]
rank = 4
targets = ["official"]
[train.optim]
lr = 1e-3
warmup_steps = 5
ema_decay = 0.9
[train.validation]
split = 0.2
held_out_every = 5
prompts = ["a red fox in the snow", "blurry"]
num_inference_steps = 2
width = 64
height = 64
"""


@pytest.fixture(autouse=True)
def _home(tmp_path_factory, monkeypatch):
    """One K5_HOME for all processes, so that the next one finds what was quantised and compiled."""
    monkeypatch.setenv("K5_HOME", str(tmp_path_factory.getbasetemp() / "k5"))


@pytest.fixture
def words(tmp_path, toy_model, toy_cache):
    """``words(folder, word...)``: the command line of a run."""
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(RECIPE.format(model=toy_model), encoding="utf-8")
    return lambda root, *more: ["run", str(toy_cache("bf16")), "-r", str(recipe), "-o", str(root), *more]


def start(words: Sequence[object], env: Mapping[str, str] | None = None) -> subprocess.Popen[str]:
    command = [sys.executable, "-W", "ignore", "-m", "k5train", *map(str, words)]
    return subprocess.Popen(command, cwd=ROOT, env={**os.environ, "COLUMNS": "300", **(env or {})}, text=True,
                            stderr=subprocess.PIPE, stdout=subprocess.PIPE)  # fmt: skip


def run(words: Sequence[object]) -> str:
    process = start(words)
    out, err = process.communicate(timeout=500)
    assert process.returncode == 0, err
    return out + err


def comparable(root: Path) -> list[dict]:
    """Lines of metrics without what depends on the process."""
    return [{k: v for k, v in row.items() if not k.startswith("peak_")} for row in numbers(metrics_of(root))]


@needs_two
def test_two_gpus_train_bit_for_bit_what_one_does_that_accumulates_two_batches(tmp_path, words):
    one, two, again = (tmp_path / name / "run" for name in ("one", "two", "again"))
    run(words(one, "--set", "train.gradient_accumulation_steps=2"))
    for root in (two, again):
        said = run(words(root, "--gpus", "2"))
        assert "not captured" not in said
    assert same(state_of(two), state_of(again))
    assert same(lora_of(two), lora_of(again))
    assert comparable(two) == comparable(again)
    assert same(lora_of(two), lora_of(one))
    assert comparable(two) == comparable(one)


@needs_two
def test_a_process_that_is_killed_ends_the_run_within_a_minute_and_the_run_goes_on(tmp_path, words):
    whole, cut = tmp_path / "whole" / "run", tmp_path / "cut" / "run"
    options = ("--gpus", "2", "--set", "train.steps=200", "--set", "train.validation.held_out_every=100")
    run(words(whole, *options))
    process = start(words(cut, *options))
    while process.poll() is None and not (Run(cut).metrics.exists() and len(metrics_of(cut)) > 20):
        time.sleep(0.02)
    children = psutil.Process(process.pid).children()
    (second,) = [child for child in children if child.environ().get("RANK") == "1"]
    second.kill()
    began = time.monotonic()
    _, err = process.communicate(timeout=120)
    assert process.returncode == 2, err
    assert time.monotonic() - began < 60
    assert "Rank 1 (process " in err
    assert "ended without a word" in err
    assert "saved at step" in err
    saved = latest_state(Run(cut).state)
    assert saved is not None
    assert 0 < saved.progress.step < 200
    run(["resume", cut, "--gpus", "2"])
    assert same(lora_of(cut), lora_of(whole))
    assert comparable(cut) == comparable(whole)


def test_two_processes_on_one_gpu_take_turns_through_gloo(tmp_path, words):
    one, two = tmp_path / "one" / "run", tmp_path / "two" / "run"
    run(words(one, "--set", "train.gradient_accumulation_steps=2"))
    world = {"WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1",
             "MASTER_PORT": str(free_port())}  # fmt: skip
    processes = [start(words(two), {**world, "RANK": str(rank)}) for rank in (0, 1)]
    said = [process.communicate(timeout=500)[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], said
    assert "Several processes train on one GPU" in said[0]
    assert same(lora_of(two), lora_of(one))


@needs_two
def test_a_third_gpu_that_is_not_there_is_refused_at_once(tmp_path, words):
    process = start(words(tmp_path / "run", "--gpus", str(torch.cuda.device_count() + 1)))
    _, err = process.communicate(timeout=60)
    assert process.returncode == 2
    assert f"this machine has {torch.cuda.device_count()} GPUs" in err
    assert not (tmp_path / "run").exists()

"""Exact resume on a GPU: with ``train.deterministic``, 20 steps are 10, a kill, and 10 more, bit for bit.

Each attempt is a process of its own, as after a real kill. python -m pytest tests/gpu/test_resume_gpu.py
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from k5cache.shared.model import ModelConfig
from k5train.options.adapter import LoraConfig
from k5train.options.memory import MemoryConfig
from k5train.options.objective import ObjectiveConfig, RolloutConfig, RouteConfig, TreadConfig
from k5train.options.optimizer import OptimConfig
from k5train.options.train import TrainConfig
from k5train.runs.folder import Run, create_run
from k5train.runs.resume_state import latest_state
from tests.runs import lora_of, metrics_of, numbers, same, state_of

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

# The toy has 3 visual blocks and three buckets; all that could carry state from step to step is on.
PLAIN = TrainConfig(
    steps=20,
    batch_size=2,
    checkpoint_every=10,
    base_model_precision="no_change",
    device="cuda",
    deterministic=True,
    lora=LoraConfig(rank=4, targets=("official",), dropout=0.1),
    optim=OptimConfig(lr=1e-2, warmup_steps=5, lr_scheduler="cosine", ema_decay=0.9),
)
COMPILED = replace(PLAIN, base_model_precision="int8-quanto", memory=MemoryConfig(execution="compiled"))
CONFIGS = {
    "16 bits, as diffusers' modules": replace(PLAIN, memory=MemoryConfig(execution="diffusers")),
    "int8-quanto, eager": replace(COMPILED, memory=MemoryConfig(execution="eager")),
    "int8-quanto, compiled": COMPILED,
    "int8-quanto, compiled, recomputing": replace(
        COMPILED, memory=MemoryConfig(execution="compiled", activations="selective")
    ),
    "int8-quanto, captured": replace(COMPILED, lora=replace(COMPILED.lora, dropout=0.0)),
    "int8-quanto, captured, TREAD, masks over captions": replace(
        COMPILED,
        lora=replace(COMPILED.lora, dropout=0.0),
        unequal_captions="mask",
        tread=TreadConfig(routes=(RouteConfig(0.5, 1, -1),)),
    ),
    "int8-dynamic, compiled": replace(COMPILED, base_model_precision="int8-dynamic"),
    "TREAD, rollout, huber, masks over captions": replace(
        COMPILED,
        unequal_captions="mask",
        objective=ObjectiveConfig(loss_type="huber"),
        tread=TreadConfig(routes=(RouteConfig(0.5, 1, -1),)),
        rollout=RolloutConfig(probability=0.5),
    ),
}
# An exception would not end it: blocks would run eagerly instead.
ATTEMPT = """
import os, sys
from pathlib import Path
from torch._inductor.runtime.triton_heuristics import CachingAutotuner
from tests.runs import go_on

def refuse(kernel, *arguments, **options):
    print("a kernel is chosen by timing:", kernel.inductor_meta.get("kernel_name"), file=sys.stderr, flush=True)
    os._exit(7)

CachingAutotuner.benchmark_all_configs = refuse
go_on(Path(sys.argv[1]))
"""


# The toy takes megabytes: if that is all the VRAM, and libraries take none, its plans differ as full-size ones do.
PRETEND = """
import sys
from k5train.planning import memory, vram
memory._ALLOCATOR_BYTES, vram.budget = 0, lambda *_: int(sys.argv[2])
"""


def attempt(root: Path, free_bytes: int | None = None) -> subprocess.Popen[bytes]:
    """Train what is left of a run in a process of its own, as if only this much VRAM were free."""
    repository = Path(__file__).parent.parent.parent
    code = ATTEMPT if free_bytes is None else PRETEND + ATTEMPT
    return subprocess.Popen([sys.executable, "-W", "ignore", "-c", code, str(root), str(free_bytes)], cwd=repository)


def finish(process: subprocess.Popen[bytes]) -> None:
    assert process.wait(timeout=300) == 0


def comparable(root: Path) -> list[dict]:
    """Lines of metrics without what depends on the process."""
    return [{k: v for k, v in row.items() if not k.startswith("peak_")} for row in numbers(metrics_of(root))]


def steps_done(run: Run) -> int:
    return run.metrics.read_text(encoding="utf-8").count("\n") if run.metrics.exists() else 0


@pytest.fixture(autouse=True)
def _home(tmp_path_factory, monkeypatch):
    """One K5_HOME for all attempts, so that the next one finds what was quantised and compiled."""
    monkeypatch.setenv("K5_HOME", str(tmp_path_factory.getbasetemp() / "k5"))


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_twenty_steps_are_ten_a_kill_and_ten_bit_for_bit(tmp_path, toy_model, toy_cache, config):
    compare(tmp_path, toy_cache("bf16"), toy_model, config, None, None)


def test_they_are_where_other_vram_is_free_after_the_kill(tmp_path, toy_model, toy_cache):
    compare(tmp_path, toy_cache("bf16"), toy_model, COMPILED, 3_538_944, 6_000_000)
    plan = latest_state(Run(tmp_path / "cut").state).facts["plan"]
    assert plan["levels"] == ["attention", "attention", "selective"]  # with 6 MB: all, in all blocks


def compare(
    tmp_path: Path, cache: Path, toy_model: Path, config: TrainConfig, free_bytes: int | None, free_later: int | None
) -> None:
    """Twenty steps beside ten, a kill and ten."""
    runs = [create_run(tmp_path / name, cache, ModelConfig(path=str(toy_model)), config) for name in ("whole", "cut")]
    whole, cut = (run.root for run in runs)
    finish(attempt(whole, free_bytes))
    killed = attempt(cut, free_bytes)
    # The state of step 10 is there and some steps after it are done, which the next attempt does again.
    while killed.poll() is None and not (runs[1].state / "step-000010" / "step.json").exists():
        time.sleep(0.005)
    os.kill(killed.pid, signal.SIGKILL)
    killed.wait()
    assert not runs[1].is_finished
    assert 10 <= steps_done(runs[1]) < 20
    finish(attempt(cut, free_later))
    # First what says most if it fails: with which kernels, and from which step on.
    kernels = [latest_state(run.state).facts["computed_by"] for run in runs]
    assert kernels[0] == kernels[1]
    steps = zip(comparable(cut), comparable(whole), strict=True)
    assert [pair for pair in steps if pair[0] != pair[1]][:2] == []
    states = state_of(cut), state_of(whole)
    assert [name for name in states[1] if not same({name: states[0][name]}, {name: states[1][name]})][:4] == []
    assert same(*states)
    assert same(lora_of(cut), lora_of(whole))
    assert json.loads(runs[1].result.read_text())["steps"] == 20

"""What the tests of runs share: training the toy in this process, and reading what a run leaves as tensors."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from unittest import mock

import pytest
import torch
from safetensors.torch import load_file

from k5cache.shared.model import ModelConfig
from k5train.adapter.who_loads import compare_saved
from k5train.forward.execute import Execution
from k5train.options.adapter import LoraConfig
from k5train.options.optimizer import OptimConfig
from k5train.options.train import TrainConfig
from k5train.planning.memory import Plan
from k5train.runs.folder import Run, create_run, open_run
from k5train.runs.resume_state import latest_state
from k5train.training import carry_out
from k5train.training.result import Result
from k5train.training.start import open_data
from k5train.training.train import train
from k5train.training.validation import Validation

# Three buckets, four lengths of caption (tests/parity.py); everything that could carry state from step to step is on.
CONFIG = TrainConfig(
    steps=20,
    batch_size=2,
    checkpoint_every=3,
    base_model_precision="no_change",
    mixed_precision="fp32",
    device="cpu",
    lora=LoraConfig(rank=2, targets=("qkv",), dropout=0.1),
    optim=OptimConfig(lr=1e-2, warmup_steps=5, lr_scheduler="cosine", ema_decay=0.9),
)


def start_run(root: Path, cache: Path | None, model: Path, config: TrainConfig, is_whole: bool = False) -> Result:
    """Train in a new run at ``root``, on the caches of the recipe if none is given.

    Args:
        is_whole: as the command line does it; else ``only_training``.
    """
    config = replace(config, name=root.name)
    run = create_run(root, cache, ModelConfig(path=str(model)), config)
    with nullcontext() if is_whole else only_training():
        return train(open_data(cache, config), model, config, run)


def go_on(root: Path, **changes: object) -> Result:
    """Resume the run at ``root``."""
    run, model, config, cache = open_run(root)
    config = replace(config, **changes)
    with only_training():
        return train(open_data(cache, config), Path(str(model.path)), config, run)


@contextmanager
def only_training() -> Iterator[None]:
    """Without what a run does beside it and changes nothing: loading its LoRA back into diffusers, and ``loss.png``.

    That is a fifth of the time of a run on the toy. Runs by command line do both; what comes of it is looked at in
    test_export.py, test_lora_files.py and test_loss_curve.py.
    """
    is_patched = carry_out.compare_saved is not compare_saved  # by the test itself
    instead = carry_out.compare_saved if is_patched else lambda *arguments: None
    with (
        mock.patch.object(carry_out, "compare_saved", instead),
        mock.patch.object(Validation, "_draw_curve"),
    ):
        yield


def note_plans(monkeypatch: pytest.MonkeyPatch) -> list[Plan]:
    """A list to which every memory plan is added that a run sets its blocks up by from now on."""
    seen: list[Plan] = []
    original = Execution.__init__

    def noting(self, transformer, plan, *args, **kwargs):
        seen.append(plan)
        original(self, transformer, plan, *args, **kwargs)

    monkeypatch.setattr(Execution, "__init__", noting)
    return seen


def state_of(root: Path) -> dict[str, torch.Tensor]:
    """Every tensor of the newest saved state: adapter, optimizer and average."""
    saved = latest_state(Run(root).state)
    assert saved is not None
    return {f"{part}/{name}": t for part in saved.facts["parts"] for name, t in saved.tensors(part).items()}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    """Whether two sets of tensors are equal in names and bits."""
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def lora_of(root: Path) -> dict[str, torch.Tensor]:
    """The finished LoRA."""
    return load_file(Run(root).lora)


def metrics_of(root: Path) -> list[dict]:
    """Every line of ``metrics.jsonl``, which must all be whole."""
    return [json.loads(line) for line in Run(root).metrics.read_text(encoding="utf-8").splitlines()]


def numbers(rows: list[dict]) -> list[dict]:
    """Lines without the values that depend on the clock."""
    return [{k: v for k, v in row.items() if "second" not in k} for row in rows]

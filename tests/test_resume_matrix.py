"""Exact resume where features meet: every adapter, optimizer, average, number of caches and split with each other."""

from __future__ import annotations

import itertools
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from safetensors.torch import load_file

from k5cache.shared.model import ModelConfig
from k5train.options.adapter import LoraConfig
from k5train.options.data import DataConfig
from k5train.options.optimizer import OptimConfig
from k5train.options.train import TrainConfig
from k5train.options.validation import ValidationConfig
from k5train.planning.plan import largest_sizes, plan_training
from k5train.runs.folder import Run, create_run, open_run
from k5train.runs.resume_state import latest_state
from k5train.training import loop
from k5train.training.base import Base, load_base
from k5train.training.device import pick_device
from k5train.training.start import open_data
from k5train.training.train import train
from tests.runs import CONFIG, metrics_of, numbers, only_training, same, state_of

# adapter, optimizer, average, two caches, split
CASES = [
    ("lora", "adafactor", False, False, False),
    ("lora", "adamw", True, True, True),
    ("rslora", "schedulefree", False, False, True),
    ("rslora", "muon", True, True, False),
    ("dora", "adamw8bit", False, True, False),
    ("dora", "lion", True, False, True),
    ("lokr", "prodigy", False, True, True),
    ("lokr", "adamw", True, False, False),
]
EXTRAS = {"schedulefree": "schedulefree", "prodigy": "prodigyopt", "lion": "lion_pytorch", "adamw8bit": "bitsandbytes"}


def config_of(algo: str, optimizer: str, averages: bool, split: bool, caches: list[Path]) -> TrainConfig:
    return replace(
        CONFIG,
        steps=3,
        checkpoint_every=2,
        lora=LoraConfig(algo=algo, rank=2, targets=("qkv",), dropout=0.1 if algo != "lokr" else 0.0),
        optim=OptimConfig(optimizer=optimizer, warmup_steps=2, weight_decay=0.1, ema_decay=0.9 if averages else 0.0),
        validation=ValidationConfig(split=0.2 if split else 0.0, held_out_every=1, held_out_sigmas=1, probe_images=1),
        data=tuple(DataConfig(cache=str(cache), weight=1.0 + i) for i, cache in enumerate(caches)),
    )


@pytest.fixture(scope="module")
def caches(tmp_path_factory, toy_cache) -> list[Path]:
    """A cache, and another of the same images."""
    return [toy_cache("fp32"), Path(shutil.copytree(toy_cache("fp32"), tmp_path_factory.mktemp("caches") / "second"))]


@pytest.fixture(scope="module")
def base(caches, toy_model) -> Base:
    """The transformer, loaded once for all runs."""
    config = config_of("dora", "adamw", averages=True, split=False, caches=caches[:1])
    device = pick_device("cpu", toy_model)
    sizes = largest_sizes(open_data(None, config).first)
    return load_base(toy_model, config, device, plan_training(toy_model, config, device, sizes))


@pytest.mark.parametrize(("algo", "optimizer", "averages", "two_caches", "split"), CASES)
def test_a_run_that_was_stopped_ends_with_the_same_bits(
    tmp_path, caches, base, toy_model, monkeypatch, algo, optimizer, averages, two_caches, split
):
    pytest.importorskip(EXTRAS.get(optimizer, "torch"))
    config = config_of(algo, optimizer, averages, split, caches if two_caches else caches[:1])
    data = open_data(None, config)

    def begin(parent: str) -> Path:
        root = tmp_path / parent / "run"
        run = create_run(root, data.first.root, ModelConfig(path=str(toy_model)), replace(config, name="run"))
        with only_training():
            train(data, toy_model, replace(config, name="run"), run, base)
        return root

    whole = begin("whole")
    seen, accumulate = [], loop.accumulate

    def stop(*args, **kwargs):
        seen.append(1)
        if len(seen) == 3:
            raise KeyboardInterrupt
        return accumulate(*args, **kwargs)

    with monkeypatch.context() as stopping:
        stopping.setattr(loop, "accumulate", stop)
        with pytest.raises(KeyboardInterrupt, match="saved at step 2"):
            begin("stopped")
    stopped = tmp_path / "stopped" / "run"
    assert latest_state(Run(stopped).state).progress.step == 2
    run, _, its_config, _ = open_run(stopped)
    with only_training():
        train(open_data(None, its_config), toy_model, its_config, run, base)
    assert same(state_of(stopped), state_of(whole))
    files = sorted(str(path.relative_to(whole)) for path in whole.rglob("*.safetensors") if "state" not in path.parts)
    assert len(files) == 3 + averages + split, files  # the finished one, two checkpoints, the average, the best
    for name in files:
        assert same(load_file(stopped / name), load_file(whole / name)), name
    assert numbers(metrics_of(stopped)) == numbers(metrics_of(whole))


def test_every_two_features_meet_in_one_of_the_runs():
    switches = [(0, 2), (0, 3), (0, 4), (2, 3), (2, 4), (3, 4)]  # columns of CASES without the optimizer
    for a, b in switches:
        values = [sorted({case[column] for case in CASES}) for column in (a, b)]
        assert {(case[a], case[b]) for case in CASES} == set(itertools.product(*values))
    assert {case[1] for case in CASES} == {
        "adamw", "adamw8bit", "adafactor", "lion", "muon", "prodigy", "schedulefree"}  # fmt: skip

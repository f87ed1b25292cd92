"""Does ``pipelines.measure.start`` time what it says? Processes of its kind, and the checkpoint that it writes."""

from __future__ import annotations

import json

import pytest
import torch

from k5cache.shared.errors import RunError
from k5train.base.architecture import FULL_SIZE
from k5train.base.quantize import load_transformer
from pipelines.measure import random_inputs, start

TINY = {
    **FULL_SIZE, "num_visual_blocks": 2, "num_text_blocks": 1, "model_dim": 64, "ff_dim": 128, "time_dim": 32,
    "in_text_dim": 32, "in_text_dim2": 16, "axes_dims": [4, 6, 6],
}  # fmt: skip
STEPS = """
import sys, time
held = bytearray(64 * 2**20)
for line in ('{"note": 1}', '{"loss": 0.5}'):
    time.sleep(0.4)
    with open(sys.argv[1], "a") as file:
        print(line, file=file, flush=True)
time.sleep(60)
"""


def test_a_run_is_timed_to_its_first_step_and_stopped_there(tmp_path):
    metrics = tmp_path / "metrics.jsonl"
    measured = start.watch("a start", [STEPS, str(metrics)], tmp_path, metrics)
    assert 0.8 <= measured.seconds < 20
    assert 64 * 2**20 < measured.own_bytes <= measured.resident_bytes < 300 * 2**20
    assert start.table_rows([measured])[0][0] == "a start"


def test_a_process_without_steps_is_timed_to_its_end_or_by_its_own_clock(tmp_path, monkeypatch):
    assert 0.3 <= start.watch("a sleep", ["import time; time.sleep(0.3)"], tmp_path).seconds < 20
    monkeypatch.setattr(start, "_LOAD", "print(1234.5)")
    assert start.watch("loading", [start._LOAD], tmp_path).seconds == 1234.5


@pytest.mark.parametrize(("program", "metrics"), [("raise SystemExit('no room')", None), ("print('no room')", "rows")])
def test_a_process_that_fails_or_makes_no_step_is_named_with_what_it_said(tmp_path, program, metrics):
    with pytest.raises(RunError, match=r"a start: exit code .*no room"):
        start.watch("a start", [program], tmp_path, metrics and tmp_path / metrics)


def test_the_checkpoint_is_the_hubs_layout_in_shards(tmp_path, monkeypatch):
    monkeypatch.setattr(random_inputs, "SHARD_BYTES", 200_000)
    folder = random_inputs.model_folder(tmp_path / "model", TINY)
    random_inputs.write_checkpoint(folder)
    index = json.loads((folder / "transformer" / "diffusion_pytorch_model.safetensors.index.json").read_text())
    files = sorted(path.name for path in (folder / "transformer").glob("*.safetensors"))
    assert len(files) > 1
    assert set(index["weight_map"].values()) == set(files)
    loaded = load_transformer(folder, "no_change", torch.bfloat16, torch.device("cpu")).state_dict()
    assert loaded.keys() == index["weight_map"].keys()
    assert all(0.01 < tensor.float().std() < 0.03 for tensor in loaded.values() if tensor.numel() > 100)

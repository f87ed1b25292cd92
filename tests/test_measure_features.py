"""Does ``pipelines.measure.features`` time what it says: real runs, one after another, on one base and a cache?"""

from __future__ import annotations

import pytest
import torch

from k5train.base import architecture
from k5train.options.adapter import LoraConfig
from k5train.options.optimizer import OptimConfig
from k5train.options.train import TrainConfig
from pipelines.measure import features
from pipelines.measure.features import SETTLING

SMALL = {
    **architecture.FULL_SIZE, "in_text_dim": 12, "in_text_dim2": 5, "model_dim": 32, "ff_dim": 64, "time_dim": 32,
    "num_visual_blocks": 6, "num_text_blocks": 1, "axes_dims": [4, 6, 6],
}  # fmt: skip


@pytest.mark.parametrize(
    "kinds", [pytest.param(("plain", "rollout"), marks=pytest.mark.long), pytest.param(None, marks=pytest.mark.long)]
)
def test_every_feature_is_a_run_of_its_own_on_one_base(monkeypatch, kinds):
    config = TrainConfig(lora=LoraConfig(rank=2, targets=("qkv",)), optim=OptimConfig(warmup_steps=0))
    every = features.variants

    def some(config: TrainConfig) -> dict[str, tuple[TrainConfig, str]]:
        return {name: run for name, run in every(config).items() if kinds is None or name.startswith(kinds)}

    monkeypatch.setattr(features, "variants", some)
    lines: list[str] = []
    results = features.time_features(
        torch.device("cpu"), model=SMALL, side=64, config=config, num_steps=SETTLING + 2, report=lines.append
    )
    assert [f.name for f in results] == ["bare step, fixed inputs", *some(config)]
    assert len(lines) == len(results)
    assert all(f.milliseconds > 0 for f in results)
    assert all(f.waited is not None and 0 <= f.waited < 1 for f in results[1:])
    assert all(f.seconds_to_start is not None and f.seconds_to_start > 0 for f in results[1:])
    rows = {row[0]: row for row in features.table_rows(results)}
    assert rows["plain"][2] == "1.00x"
    assert "ms a pass without gradient" in rows["rollout of every row, 1 step"][-1]


def test_the_route_that_is_timed_is_one_that_the_full_size_has():
    (route,) = features.TREAD.routes
    assert route.selection_ratio == 0.5
    assert route.end_layer_idx % architecture.FULL_SIZE["num_visual_blocks"] == 47

"""Do trials judge a LoRA by the held-out loss that a run reports, over all rows of a cache?"""

from __future__ import annotations

from functools import partial

import pytest
import torch

import k5cache
from k5cache.shared.checkpoint import read_config
from k5train.data.mixture import Mixture, Source
from k5train.data.split import split_off
from k5train.forward.predict_velocity import predict_velocity
from k5train.runs.folder import Run
from k5train.runs.metrics import read_metrics
from k5train.training.held_out_loss import HeldOutLoss
from pipelines.measure import judged
from tests import micro


@pytest.mark.long
def test_a_run_is_judged_by_the_held_out_loss_that_it_reports_itself_but_over_all_rows(once, tmp_path):
    cache = micro.cache(once, "held_out")
    options = ["train.steps=1", "train.device=cpu", "train.checkpoint_every=0", "train.validation.prompts=[]"]
    options += ["train.validation.split=0.5", "train.validation.held_out_sigmas=2", "train.optim.warmup_steps=0"]
    recipe = judged.read_recipe(micro.DEMO / "demo.toml", f"model.path={micro.MODEL}", *options)
    lora = judged.train_lora(tmp_path / "run", cache, recipe)
    assert lora == Run(tmp_path / "run").lora
    written = lora.stat().st_mtime_ns
    assert judged.train_lora(tmp_path / "run", cache, recipe).stat().st_mtime_ns == written  # finished: not again

    rows = read_metrics(Run(tmp_path / "run").metrics)
    reported = [row["held_out_by_sigma"] for row in rows if "held_out_loss" in row]
    scaling_factor = read_config(micro.MODEL, "vae")["scaling_factor"]
    (source,) = split_off(Mixture([Source(k5cache.open(cache))]), 0.5).sources
    trained_on = Mixture([Source(source.cache, split=frozenset(range(12)) - source.split)])
    for weights, half in zip((None, lora), reported, strict=True):
        predict = partial(predict_velocity, judged.with_lora(micro.MODEL, weights))
        other = HeldOutLoss(trained_on, 2, scaling_factor).measure(predict, torch.device("cpu"))
        expected = [(a + b) / 2 for a, b in zip(half, other, strict=True)]
        assert judged.held_out_loss(micro.MODEL, weights, cache, 2) == pytest.approx(expected, rel=1e-5)
    assert reported[0] != pytest.approx(reported[1], rel=1e-4)

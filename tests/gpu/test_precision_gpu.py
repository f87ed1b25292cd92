"""Does ``auto`` become int8-dynamic on a GPU with int8 tensor cores, and do the kernels of a step say so?"""

from __future__ import annotations

import pytest
import torch

from k5train.forward import precision
from k5train.options.train import TrainConfig
from pipelines.measure.precision import trial

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available() or torch.version.hip is not None or torch.cuda.get_device_capability() < (8, 0),
    reason="needs an NVIDIA GPU with int8 tensor cores",
)


def test_auto_is_int8_dynamic_and_each_precision_runs_its_own_kernels(tmp_path):
    assert precision.decided(TrainConfig(base_model_precision="auto")).base_model_precision == "int8-dynamic"
    place = trial.prepare(tmp_path, ("lines",))
    quanto, dynamic, bf16 = (trial.count_kernels(place, arm, "cuda") for arm in trial.ARMS)
    # Seven linears of six visual blocks and four of a text block, forward and backward, and the text block's again as
    # it is recomputed: 96. A pass that is captured, or that compiles, comes on top.
    assert 96 <= quanto["_scale_rows"] < 200
    assert 96 <= dynamic["_int8_matmul"] < 200
    assert quanto["_int8_matmul"] == dynamic["_scale_rows"] == bf16["_scale_rows"] == bf16["_int8_matmul"] == 0

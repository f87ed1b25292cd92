"""Does ``pipelines.measure.gradients`` measure what int8 costs?"""

from __future__ import annotations

import pytest
import torch

from k5train.base import random_weights
from k5train.base.architecture import FULL_SIZE
from k5train.base.quantize import INT8_MODULES
from k5train.bench import case
from k5train.forward.predict_velocity import predict_velocity
from pipelines.measure import gradients

SMALL = {**FULL_SIZE, "model_dim": 64, "ff_dim": 128, "in_text_dim": 32, "in_text_dim2": 16, "time_dim": 32,
         "num_visual_blocks": 2, "num_text_blocks": 1, "axes_dims": [8, 12, 12]}  # fmt: skip
CASE = case.Case("no_change", None, side=64, num_text_tokens=6, rank=4)
CPU = torch.device("cpu")


def test_gradients_in_int8_point_where_bf16_gradients_point():
    errors = gradients.compare(gradients.gradients_by_layer(SMALL, CPU, CASE, "eager"))
    whole = [error for error in errors if error.layer == "all"]
    assert [error.precision for error in whole] == ["int8-quanto", "int8-dynamic"]
    assert all(0.99 < error.cosine < 1 for error in whole)  # 8 bits of weight: 0.4 % each
    assert len(gradients.gradient_rows(errors)[0]) == 3


def test_the_error_of_a_part_is_that_of_its_weights_alone_and_they_come_back():
    transformer = random_weights.random_transformer(SMALL, "no_change", CPU)
    before = {name: tensor.clone() for name, tensor in transformer.state_dict().items()}
    inputs = [case.inputs_for(CASE, SMALL, CPU)]
    errors = {row.part: row for row in gradients.error_by_part(transformer, inputs)}
    assert all(torch.equal(tensor, before[name]) for name, tensor in transformer.state_dict().items())

    plain = predict_velocity(transformer, *inputs[0]).float()
    head = transformer.out_layer.out_layer
    scale = head.weight.data.abs().amax(dim=1, keepdim=True) / 127
    head.weight.data = (head.weight.data / scale).round() * scale
    changed = predict_velocity(transformer, *inputs[0]).float()
    expected = ((changed - plain).norm() / plain.norm()).item()
    assert errors["output head"].error == pytest.approx(expected, rel=0.2)  # bf16 weights and scales


def test_every_linear_belongs_to_one_part():
    transformer = random_weights.random_transformer(SMALL, "no_change", CPU)
    linears = [n for n, m in transformer.named_modules() if isinstance(m, torch.nn.Linear)]
    for name in linears:
        assert sum(bool(pattern.fullmatch(name)) for pattern in gradients.PARTS.values()) == 1, name
    int8 = {
        part
        for name in linears
        for part, p in gradients.PARTS.items()
        if INT8_MODULES.fullmatch(name) and p.fullmatch(name)
    }
    assert int8 == {"self attention", "cross attention", "feed-forward", "text blocks"}

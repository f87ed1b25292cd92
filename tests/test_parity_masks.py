"""Batch parity: rows of one bucket with captions of different lengths train as the same rows one by one."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest
import torch

from k5cache.shared.checkpoint import read_config
from k5cache.store.reader import open_cache
from k5train.adapter import attach
from k5train.base.quantize import load_transformer
from k5train.data.batch import Batch, Group, pad
from k5train.data.loader import Loader
from k5train.forward.masked import Padding
from k5train.forward.predict_velocity import predict_velocity
from k5train.options.adapter import LoraConfig
from k5train.options.train import TrainConfig
from k5train.training.step import accumulate
from tests.parity import as_the_pipeline_calls_it, reference_transformer, with_strength

DTYPES = [torch.float32, torch.bfloat16]
LENGTHS = (3, 19, 11, 19)
# Matrix products of another height add in another order. float32 is no closer than this, because diffusers rounds
# rotated queries and keys to bfloat16 in any dtype: one that is rounded the other way moves by 2**-8 of itself.
VELOCITY = {torch.float32: 5e-4, torch.bfloat16: 2**-5}  # velocities up to 2; 8e-5 and 2**-7 seen
GRADIENTS = {torch.float32: 5e-4, torch.bfloat16: 2e-2}  # all as one vector, relative; 5e-5 and 6e-3 seen


@pytest.fixture(scope="module", params=["no_change", "int8-quanto"])
def precision(request):
    return request.param


@pytest.fixture(scope="module", params=DTYPES, ids=str)
def transformer(request, toy_model, precision):
    loaded = load_transformer(toy_model, precision, request.param, "cpu")
    attach.add_lora(loaded, LoraConfig(rank=4), seed=1)
    with_strength(loaded, 0.05)
    return loaded.train()


def rows(lengths=LENGTHS) -> list[Group]:
    """Rows of 64x32 pixels as the loader draws them, with the toy's widths."""
    generator = torch.Generator().manual_seed(2)
    draw = partial(torch.randn, generator=generator)
    return [
        Group(draw(1, 1, 4, 8, 16), draw(1, 1, 4, 8, 16), torch.rand(1, generator=generator),
              draw(1, length, 64).bfloat16(), draw(1, 48).bfloat16())
        for length in lengths
    ]  # fmt: skip


def velocity(transformer, group: Group, **options) -> torch.Tensor:
    inputs = (group.latents, group.sigma, group.prompt_embeds, group.pooled_projections)
    return predict_velocity(transformer, *inputs, text_lengths=group.text_lengths, **options)


def loss_and_gradients(transformer, groups: list[Group], device="cpu", **options) -> tuple[float, torch.Tensor]:
    parameters = attach.lora_parameters(transformer)
    batch = Batch(tuple(range(sum(len(g.sigma) for g in groups))), tuple(groups))
    predict = partial(predict_velocity, transformer, **options)
    loss = accumulate(predict, [batch], None, torch.device(device)).mean  # type: ignore[arg-type]
    gradients = torch.cat([p.grad.flatten() for p in parameters])
    for parameter in parameters:
        parameter.grad = None
    return loss, gradients


def test_lengths_in_a_tensor_are_those_in_a_tuple_bit_for_bit_with_room_to_spare(transformer):
    group = pad(rows())
    assert group.text_lengths is not None
    lengths = torch.tensor(group.text_lengths, dtype=torch.int32)
    loss, gradients = loss_and_gradients(transformer, [group])
    again, same = loss_and_gradients(transformer, [replace(group, text_lengths=lengths)])
    assert (again, torch.equal(same, gradients)) == (loss, True)
    wide = replace(group, prompt_embeds=torch.nn.functional.pad(group.prompt_embeds, (0, 0, 0, 13)))
    with_room, near = loss_and_gradients(transformer, [replace(wide, text_lengths=lengths)])
    assert with_room == pytest.approx(loss, rel=1e-3)
    assert (near - gradients).norm() <= GRADIENTS[transformer.dtype] * gradients.norm()


def test_a_masked_batch_predicts_what_diffusers_predicts_for_each_row_alone(toy_model, transformer, precision):
    dtype = transformer.dtype
    plain = load_transformer(toy_model, "no_change", dtype, "cpu") if precision == "no_change" else transformer
    with torch.no_grad():
        together = velocity(plain, pad(rows()))
        reference = reference_transformer(toy_model, dtype) if precision == "no_change" else plain
        for i, row in enumerate(rows()):
            inputs = (row.latents, row.sigma, row.prompt_embeds, row.pooled_projections)
            alone = as_the_pipeline_calls_it(reference, *inputs)
            torch.testing.assert_close(together[i : i + 1], alone, rtol=0, atol=VELOCITY[dtype])


@pytest.mark.parametrize("recompute", [False, True])
def test_loss_and_gradients_of_a_masked_batch_are_those_of_its_rows_one_by_one(transformer, recompute):
    loss, gradients = loss_and_gradients(transformer, [pad(rows())], gradient_checkpointing=recompute)
    alone_loss, alone = loss_and_gradients(transformer, rows(), gradient_checkpointing=recompute)
    assert loss == pytest.approx(alone_loss, rel=GRADIENTS[transformer.dtype])
    assert (gradients - alone).norm() < GRADIENTS[transformer.dtype] * alone.norm()
    assert alone.norm() > 1e-3


def test_what_stands_in_the_padding_changes_no_bit(transformer):
    group = pad(rows())
    noise = torch.randn(group.prompt_embeds.shape, generator=torch.Generator().manual_seed(9)).bfloat16()
    padding = ~Padding(LENGTHS, max(LENGTHS), torch.device("cpu")).mask.reshape(len(LENGTHS), -1, 1)
    filled = replace(group, prompt_embeds=torch.where(padding, 100 * noise, group.prompt_embeds))
    assert not torch.equal(filled.prompt_embeds, group.prompt_embeds)
    loss, gradients = loss_and_gradients(transformer, [group])
    filled_loss, filled_gradients = loss_and_gradients(transformer, [filled])
    assert loss == filled_loss
    assert torch.equal(gradients, filled_gradients)


def test_without_the_mask_the_same_padding_is_far_outside_these_tolerances(transformer):
    group = pad(rows())
    with torch.no_grad():
        difference = (velocity(transformer, group) - velocity(transformer, replace(group, text_lengths=None))).abs()
    assert difference[1].max() <= VELOCITY[transformer.dtype]  # not padded
    assert difference[0].max() > 4 * VELOCITY[transformer.dtype]


def test_captions_of_one_length_need_no_mask_and_give_the_bits_of_a_batch_without(transformer):
    group = pad(rows((7, 7, 7)))
    assert group.text_lengths is None
    with torch.no_grad():
        stated = velocity(transformer, replace(group, text_lengths=(7, 7, 7)))
        assert torch.equal(stated, velocity(transformer, group))


def test_the_loader_splits_or_pads_the_same_rows_to_the_same_update(toy_model, toy_cache, transformer):
    cache = open_cache(toy_cache("bf16"))
    scaling_factor = read_config(toy_model, "vae")["scaling_factor"]
    config = TrainConfig(batch_size=3, seed=4)
    split, masked = (
        Loader(cache, replace(config, unequal_captions=choice), scaling_factor) for choice in ("split", "mask")
    )
    micro = next(i for i in range(9) if len(split.batch(i).groups) > 1 and split.batch(i).num_rows == 3)
    assert split.batch(micro).rows == masked.batch(micro).rows
    assert masked.batch(micro).groups[0].text_lengths is not None
    loss, gradients = loss_and_gradients(transformer, list(split.batch(micro).groups))
    masked_loss, masked_gradients = loss_and_gradients(transformer, list(masked.batch(micro).groups))
    assert loss == pytest.approx(masked_loss, rel=GRADIENTS[transformer.dtype])
    assert (gradients - masked_gradients).norm() < GRADIENTS[transformer.dtype] * gradients.norm()


@pytest.mark.parametrize("lengths", [(3, 19, 11, 20), (0, 19, 11, 19), (3, 19, 11)])
def test_lengths_that_cannot_be_are_refused(transformer, lengths):
    with pytest.raises(ValueError, match=r"text_lengths must|one length each"):
        velocity(transformer, replace(pad(rows()), text_lengths=lengths))

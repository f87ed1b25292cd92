"""Editing parity: forward passes, drawings and training are those of ``Kandinsky5I2IPipeline`` and a plain loop."""

from __future__ import annotations

import pytest
import torch

from k5cache.shared.checkpoint import read_config
from k5train.base.linear import Int8Linear
from k5train.base.quantize import load_transformer
from k5train.forward.predict_velocity import predict_velocity
from k5train.pictures.sample import load_scheduler
from tests.edit_training import pipeline_around, rows
from tests.parity import as_the_pipeline_calls_it, reference_transformer

DTYPES = [torch.float32, torch.bfloat16]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("size", "batch"), [((64, 64), 1), ((32, 96), 3)])
def test_the_velocity_is_diffusers_own_bit_for_bit(toy_edit_model, dtype, size, batch):
    r = rows(size, batch)
    theirs = reference_transformer(toy_edit_model, dtype)
    whole = torch.cat([r.latents, r.condition], dim=-1)
    ours = load_transformer(toy_edit_model, "no_change", dtype, "cpu")
    with torch.no_grad():
        expected = as_the_pipeline_calls_it(theirs, whole, r.sigma, r.embeds, r.pooled)
        velocity = predict_velocity(ours, r.latents, r.sigma, r.embeds, r.pooled, condition=r.condition)
        other = predict_velocity(ours, r.latents, r.sigma, r.embeds, r.pooled, condition=r.condition * 0)
    assert velocity.shape == r.latents.shape
    assert torch.equal(velocity, expected)
    assert (velocity - other).abs().max() > 0.01  # the source matters


def test_a_step_of_the_whole_pipeline_calls_the_transformer_with_what_we_compute(toy_edit_model):
    """The pipeline gets noisy latents of 33 channels, as its ``prepare_latents`` makes them of an image."""
    r = rows((96, 64))
    dtype = torch.bfloat16
    theirs = reference_transformer(toy_edit_model, dtype)
    pipeline = pipeline_around(theirs, load_scheduler(toy_edit_model), None, (64, 96))
    calls = []
    theirs.register_forward_hook(  # a copy: the pipeline writes the next latents into the same tensor
        lambda m, a, kwargs, out: calls.append((kwargs["hidden_states"].clone(), out.sample)), with_kwargs=True
    )
    latents = torch.cat([r.latents, r.condition], dim=-1).to(dtype)
    lengths = torch.tensor([0, r.embeds.shape[1]])
    pipeline(image=object(), prompt_embeds_qwen=r.embeds, prompt_embeds_clip=r.pooled, prompt_cu_seqlens=lengths,
             latents=latents.clone(), height=96, width=64, num_inference_steps=3, guidance_scale=1.0,
             output_type="latent")  # fmt: skip
    ours = load_transformer(toy_edit_model, "no_change", dtype, "cpu")
    assert len(calls) == 3
    for (seen, velocity), sigma in zip(calls, pipeline.scheduler.sigmas, strict=False):
        noisy, condition = seen.split([16, 17], dim=-1)
        with torch.no_grad():
            again = predict_velocity(ours, noisy, sigma.reshape(1), r.embeds, r.pooled, condition=condition)
        assert torch.equal(condition, latents[..., 16:])
        assert torch.equal(again, velocity)


def test_a_transformer_that_edits_needs_a_source_and_another_takes_none(toy_edit_model, toy_model):
    r, whole = rows((32, 32)), torch.zeros(1, 1, 4, 4, 33)
    editing, plain = (
        load_transformer(folder, "no_change", torch.float32, "cpu") for folder in (toy_edit_model, toy_model)
    )
    for transformer, latents, condition, words in (
        (editing, r.latents, None, r"a condition \[1, 1, 4, 4, 17\], found 16 channels and no condition"),
        (editing, whole, None, "found 33 channels and no condition"),
        (editing, r.latents, r.condition[:, :, :2], r"found 16 channels and a condition \[1, 1, 2, 4, 17\]"),
        (plain, r.latents, r.condition, "takes 16 channels of latents and no condition"),
    ):
        with pytest.raises(ValueError, match=words):
            predict_velocity(transformer, latents, r.sigma, r.embeds, r.pooled, condition=condition)


def test_the_input_of_132_numbers_a_patch_stays_in_16_bits_and_everything_else_is_int8_as_for_pictures(toy_edit_model):
    """(2 * 16 + 1) * 4 numbers of a patch of 2 x 2 latents: no multiple of what int8 kernels take."""
    transformer = load_transformer(toy_edit_model, "int8-dynamic", torch.bfloat16, "cpu")
    embedding = transformer.visual_embeddings.in_layer
    assert (type(embedding), embedding.weight.dtype) == (torch.nn.Linear, torch.bfloat16)
    assert tuple(embedding.weight.shape) == (
        128,
        (2 * read_config(toy_edit_model, "transformer")["in_visual_dim"] + 1) * 4,
    )
    assert sum(isinstance(m, Int8Linear) for m in transformer.modules()) == 2 * 6 + 3 * 10

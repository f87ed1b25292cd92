"""The specification of one forward pass: our walk over the blocks is diffusers' model as its pipeline calls it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, Kandinsky5T2IPipeline, Kandinsky5Transformer3DModel
from optimum.quanto import freeze, qint8, quantize
from torch.utils.checkpoint import checkpoint

from k5train.base.quantize import load_transformer
from k5train.forward.predict_velocity import ROPE_SCALE, compute_dtype, keep, predict_velocity, recompute, rotary

DTYPES = [torch.float32, torch.bfloat16]
SIZES = [(64, 64), (32, 96), (96, 48)]  # (height, width) in pixels
QUANTO_INCLUDE = [
    "*_transformer_blocks.*.self_attention.*",
    "*_transformer_blocks.*.cross_attention.*",
    "*.feed_forward.*",
]


@pytest.fixture(scope="module")
def model(toy_model):
    """``load_transformer`` on the CPU, each combination once."""
    loaded: dict[tuple[str, torch.dtype], Kandinsky5Transformer3DModel] = {}

    def load(precision: str, dtype: torch.dtype) -> Kandinsky5Transformer3DModel:
        if (precision, dtype) not in loaded:
            loaded[precision, dtype] = load_transformer(toy_model, precision, dtype, "cpu")
        return loaded[precision, dtype]

    return load


def reference(folder: Path, dtype: torch.dtype) -> Kandinsky5Transformer3DModel:
    return Kandinsky5Transformer3DModel.from_pretrained(folder, subfolder="transformer", torch_dtype=dtype)


def a_batch(size: tuple[int, int], batch: int = 1, num_tokens: int = 11) -> tuple[torch.Tensor, ...]:
    """latents, sigma, prompt_embeds, pooled_projections; widths are the toy's."""
    generator = torch.Generator().manual_seed(5)
    latents = torch.randn(batch, 1, size[0] // 8, size[1] // 8, 16, generator=generator)
    sigma = torch.rand(batch, generator=generator)
    embeds = torch.randn(batch, num_tokens, 64, generator=generator).bfloat16()
    return latents, sigma, embeds, torch.randn(batch, 48, generator=generator).bfloat16()


def as_the_pipeline_calls_it(transformer, latents, sigma, prompt_embeds, pooled_projections):
    """``Kandinsky5T2IPipeline.__call__``, sections 6 to 9, for one step."""
    dtype, (height, width) = transformer.dtype, (latents.shape[2] * 8, latents.shape[3] * 8)
    visual_rope_pos = [torch.arange(1), torch.arange(height // 8 // 2), torch.arange(width // 8 // 2)]
    return transformer(
        hidden_states=latents.to(dtype),
        encoder_hidden_states=prompt_embeds.to(dtype),
        pooled_projections=pooled_projections.to(dtype),
        timestep=(sigma * 1000).to(dtype),
        visual_rope_pos=visual_rope_pos,
        text_rope_pos=torch.arange(prompt_embeds.shape[1]),
        scale_factor=[1.0, 1.0, 1.0],
        sparse_params=None,
        return_dict=True,
    ).sample


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("batch", [1, 3])
def test_the_velocity_is_diffusers_own_bit_for_bit(toy_model, model, dtype, size, batch):
    rows = a_batch(size, batch)
    with torch.no_grad():
        theirs = as_the_pipeline_calls_it(reference(toy_model, dtype), *rows)
        ours = predict_velocity(model("no_change", dtype), *rows)
    assert ours.shape == (batch, 1, size[0] // 8, size[1] // 8, 16)
    assert ours.dtype == dtype
    assert torch.equal(ours, theirs)


def test_a_step_of_the_whole_pipeline_calls_the_transformer_with_what_we_compute(toy_model, model):
    pipeline = Kandinsky5T2IPipeline.from_pretrained(toy_model, dtype=torch.bfloat16)
    pipeline.resolutions = [(64, 96)]  # the toy's RoPE is the real one; a native size would take minutes
    pipeline.set_progress_bar_config(disable=True)
    calls = []
    pipeline.transformer.register_forward_hook(
        lambda m, a, kwargs, out: calls.append((kwargs, out.sample)), with_kwargs=True
    )
    pipeline("a red fox", height=96, width=64, num_inference_steps=3, guidance_scale=1.0, output_type="latent",
             generator=torch.Generator().manual_seed(0))  # fmt: skip
    assert len(calls) == 3
    for (called, velocity), sigma in zip(calls, pipeline.scheduler.sigmas, strict=False):
        ours = predict_velocity(model("no_change", torch.bfloat16), called["hidden_states"], sigma.reshape(1),
                                called["encoder_hidden_states"], called["pooled_projections"])  # fmt: skip
        assert torch.equal(ours, velocity)


def test_the_timestep_of_every_sigma_is_the_schedulers():
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(50)
    for dtype in DTYPES:
        assert torch.equal((1000 * scheduler.sigmas[:-1]).to(dtype), scheduler.timesteps.to(dtype))


def test_int8_is_quantos_own_execution(toy_model, model):
    rows = a_batch((64, 96), 2)
    for dtype in DTYPES:
        theirs = reference(toy_model, dtype)
        quantize(theirs, weights=qint8, include=QUANTO_INCLUDE)
        freeze(theirs)
        with torch.no_grad():
            ours, expected = (
                predict_velocity(model("int8-quanto", dtype), *rows),
                as_the_pipeline_calls_it(theirs, *rows),
            )
            unquantised = predict_velocity(model("no_change", dtype), *rows)
        if dtype == torch.float32:
            assert torch.equal(ours, expected)
        else:  # on a CPU quanto's bfloat16 kernel scales the product, not the weight: 1 ulp of 2 to 4
            torch.testing.assert_close(ours, expected, rtol=0, atol=2**-6)
        assert not torch.equal(ours, unquantised)


def test_rows_of_a_batch_do_not_see_each_other(model):
    latents, sigma, embeds, pooled = a_batch((64, 64), 3)
    transformer = model("no_change", torch.float32)
    with torch.no_grad():
        together = predict_velocity(transformer, latents, sigma, embeds, pooled)
        alone = [
            predict_velocity(transformer, latents[i : i + 1], sigma[i : i + 1], embeds[i : i + 1], pooled[i : i + 1])
            for i in range(3)
        ]
    # float32 matmuls of another height, and what diffusers rounds to bfloat16 after them: 2.01e-5 on a Xeon, of about 2
    torch.testing.assert_close(together, torch.cat(alone), rtol=0, atol=8e-5)


@pytest.mark.parametrize("precision", ["no_change", "int8-quanto"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_gradients_are_the_same_with_recompute_without_and_mixed(model, precision, dtype):
    transformer = model(precision, dtype)
    rows = a_batch((64, 32), 2)
    mixed = [recompute, keep, keep, recompute, keep]

    def gradients(**options):
        latents, embeds = rows[0].clone().requires_grad_(), rows[2].float().requires_grad_()
        velocity = predict_velocity(transformer, latents, rows[1], embeds, rows[3], **options)
        velocity.float().square().mean().backward()
        return latents.grad, embeds.grad

    plain = gradients()
    assert all(g.abs().max() > 0 for g in plain)
    for options in ({"gradient_checkpointing": True}, {"block_policies": mixed}):
        assert all(torch.equal(a, b) for a, b in zip(gradients(**options), plain, strict=True)), options


def test_gradients_are_diffusers_own(toy_model, model):
    rows = a_batch((64, 32), 2)
    grads = []
    for run in (
        lambda *r: predict_velocity(model("no_change", torch.float32), *r, gradient_checkpointing=True),
        lambda *r: as_the_pipeline_calls_it(reference(toy_model, torch.float32), *r),
    ):
        latents = rows[0].clone().requires_grad_()
        run(latents, *rows[1:]).square().mean().backward()
        grads.append(latents.grad)
    assert torch.equal(*grads)


def test_recompute_keeps_the_inputs_of_blocks_and_nothing_inside_them(model):
    latents, *rest = a_batch((64, 64))

    def kept(**options) -> int:
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.nbytes) or t, lambda t: t):
            predict_velocity(model("int8-quanto", torch.float32), latents.requires_grad_(), *rest, **options)
        return sum(sizes)

    assert kept(gradient_checkpointing=True) < kept() / 4


def test_policies_run_each_block_once_text_blocks_first(model):
    transformer, seen = model("no_change", torch.float32), []

    def spy(block, *args):
        seen.append(block)
        return keep(block, *args)

    with torch.no_grad():
        predict_velocity(transformer, *a_batch((32, 32)), block_policies=[spy] * 5)
    assert seen == [*transformer.text_transformer_blocks, *transformer.visual_transformer_blocks]
    with pytest.raises(ValueError, match="4 entries, the transformer 5 blocks"):
        predict_velocity(transformer, *a_batch((32, 32)), block_policies=[keep] * 4)


def test_positions_computed_while_sampling_serve_training(toy_model):
    transformer = load_transformer(toy_model, "int8-quanto", torch.float32, "cpu")
    rows = a_batch((48, 64))
    with torch.inference_mode():
        predict_velocity(transformer, *rows)
    predict_velocity(transformer, rows[0].clone().requires_grad_(), *rows[1:]).sum().backward()
    device = torch.device("cpu")
    assert rotary(transformer, 11, (1, 3, 4), device) is rotary(transformer, 11, (1, 3, 4), device)
    assert rotary(transformer, 11, (1, 4, 3), device) is not rotary(transformer, 11, (1, 3, 4), device)


def test_the_rope_scale_of_images_is_not_that_of_videos(model):
    assert ROPE_SCALE == (1.0, 1.0, 1.0)
    transformer = model("no_change", torch.float32)
    positions = [torch.arange(n) for n in (1, 4, 6)]
    ours = rotary(transformer, 5, (1, 4, 6), torch.device("cpu")).visual
    assert torch.equal(ours, transformer.visual_rope_embeddings((1, 1, 4, 6), positions, [1.0, 1.0, 1.0]))
    assert not torch.equal(ours, transformer.visual_rope_embeddings((1, 1, 4, 6), positions, [1.0, 2.0, 2.0]))


def test_a_padded_caption_would_change_the_output(model):
    latents, sigma, embeds, pooled = a_batch((32, 32))
    padded = torch.cat([embeds, torch.zeros_like(embeds[:, :3])], dim=1)
    with torch.no_grad():
        velocity, wrong = (
            predict_velocity(model("no_change", torch.float32), latents, sigma, e, pooled) for e in (embeds, padded)
        )
    assert (velocity - wrong).norm() / velocity.norm() > 1e-3


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({0: torch.zeros(1, 4, 4, 16)}, "expected latents"),
        ({0: torch.zeros(1, 1, 5, 4, 16)}, "do not divide"),
        ({0: torch.zeros(1, 1, 4, 300, 16)}, "within"),
        ({1: torch.zeros(2)}, "a batch has one size, found 1 latents, 2 sigmas"),
        ({2: torch.zeros(1, 0, 64)}, "1 to 1024 tokens, found 0"),
        ({2: torch.zeros(1, 1025, 64)}, "found 1025"),
        ({2: torch.zeros(3, 11, 64)}, "3 captions"),
    ],
)
def test_shapes_that_do_not_belong_together_are_named(model, change, words):
    rows = list(a_batch((32, 32)))
    for index, tensor in change.items():
        rows[index] = tensor
    with pytest.raises(ValueError, match=words):
        predict_velocity(model("no_change", torch.float32), *rows)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_compute_dtype_is_the_one_the_pipeline_reads(model, dtype):
    for precision in ("no_change", "int8-quanto"):
        assert compute_dtype(model(precision, dtype)) == model(precision, dtype).dtype == dtype


def test_recompute_is_torchs_non_reentrant_checkpoint_and_plain_without_gradients(model):
    block = torch.nn.Linear(3, 3)
    x = torch.ones(1, 3, requires_grad=True)
    assert torch.equal(recompute(block, x), checkpoint(block, x, use_reentrant=False))
    with torch.no_grad():
        assert recompute(block, x).grad_fn is None

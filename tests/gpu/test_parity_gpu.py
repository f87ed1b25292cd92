"""Parity on a GPU: the comparisons of tests/test_parity*.py where other kernels run, and both selftests.

python -m pytest tests/gpu/test_parity_gpu.py tests/test_parity_text.py tests/test_parity_latents.py
"""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

from k5cache.store.reader import open_cache
from k5train.adapter import attach
from k5train.base.quantize import load_transformer
from k5train.data.batch import pad
from k5train.exact import selftest
from k5train.forward.predict_velocity import predict_velocity
from k5train.options.adapter import LoraConfig
from k5train.options.train import TrainConfig
from k5train.pictures import sample
from tests.cli import Cli
from tests.parity import PROMPTS, as_the_pipeline_calls_it, pipeline_of, reference_transformer, with_strength
from tests.test_parity_masks import GRADIENTS, VELOCITY, loss_and_gradients, rows
from tests.test_parity_training import CONFIG, our_steps, plain_steps

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
DTYPES = [torch.float32, torch.bfloat16]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [(64, 64), (32, 96), (96, 48)])
def test_the_velocity_is_diffusers_own_bit_for_bit(toy_model, dtype, size):
    generator = torch.Generator().manual_seed(5)
    draw = [
        torch.randn(s, generator=generator).cuda()
        for s in ((2, 1, size[0] // 8, size[1] // 8, 16), (2, 11, 64), (2, 48))
    ]
    inputs = (draw[0], torch.tensor([0.3, 0.9], device="cuda"), draw[1].bfloat16(), draw[2].bfloat16())
    with torch.no_grad():
        theirs = as_the_pipeline_calls_it(reference_transformer(toy_model, dtype, "cuda"), *inputs)
        ours = predict_velocity(load_transformer(toy_model, "no_change", dtype, "cuda"), *inputs)
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_latents_drawn_from_cached_prompts_are_the_pipelines(toy_model, toy_cache, precision):
    """The cache was encoded on the CPU, so the pipeline is given its embeddings: drawing alone is compared."""
    dtype, size = {"fp32": torch.float32, "bf16": torch.bfloat16}[precision], (96, 64)
    cache, pipeline = open_cache(toy_cache(precision)), pipeline_of(toy_model, dtype, size, "cuda")
    prompt, negative = cache.prompt(PROMPTS[0]), cache.prompt("")
    given = {}
    for prefix, row in (("", prompt), ("negative_", negative)):
        given[f"{prefix}prompt_embeds_qwen"] = row.prompt_embeds[None].cuda()
        given[f"{prefix}prompt_embeds_clip"] = row.pooled[None].cuda()
        given[f"{prefix}prompt_cu_seqlens"] = torch.tensor([0, row.n_tokens], dtype=torch.int32, device="cuda")
    theirs = pipeline(**given, width=size[0], height=size[1], num_inference_steps=4, guidance_scale=3.5,
                      generator=torch.Generator().manual_seed(11), output_type="latent").image  # fmt: skip
    transformer = load_transformer(toy_model, "no_change", dtype, "cuda")
    settings = sample.SampleSettings(*size, 4, 3.5, 11)
    ours = sample.sample_latents(transformer, sample.load_scheduler(toy_model), prompt, negative, settings)
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_twenty_training_steps_are_a_plain_loops(toy_model, toy_cache, dtype):
    cache, config = open_cache(toy_cache("bf16")), replace(CONFIG, gradient_accumulation_steps=2)
    losses, _, ours, start, seen = our_steps(toy_model, cache, "no_change", dtype, 20, config, "cuda")
    start = {name: tensor.cuda() for name, tensor in start.items()}
    their_losses, _, theirs = plain_steps(toy_model, "no_change", dtype, start, seen, "cuda")
    # Attention's backward adds in no fixed order on a GPU, and Adam turns a gradient near zero into a step of lr.
    assert losses == pytest.approx(their_losses, rel={torch.float32: 1e-4, torch.bfloat16: 1e-2}[dtype])
    moved = torch.cat([(theirs[n] - start[n]).flatten() for n in ours])
    apart = torch.cat([(theirs[n] - ours[n]).flatten() for n in ours])
    assert apart.norm() < {torch.float32: 0.02, torch.bfloat16: 0.2}[dtype] * moved.norm()


@pytest.mark.parametrize("precision", ["no_change", "int8-quanto"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_masked_batch_is_its_rows_one_by_one(toy_model, precision, dtype):
    transformer = load_transformer(toy_model, precision, dtype, "cuda")
    attach.add_lora(transformer, LoraConfig(rank=4), seed=1)
    with_strength(transformer, 0.05)
    alone = [row.to(torch.device("cuda")) for row in rows()]
    together = pad(alone)
    with torch.no_grad():
        velocity = predict_velocity(
            transformer, together.latents, together.sigma, together.prompt_embeds, together.pooled_projections,
            text_lengths=together.text_lengths,
        )  # fmt: skip
        for i, row in enumerate(alone):
            by_itself = predict_velocity(transformer, row.latents, row.sigma, row.prompt_embeds, row.pooled_projections)
            torch.testing.assert_close(velocity[i : i + 1], by_itself, rtol=0, atol=2 * VELOCITY[dtype])
    loss, gradients = loss_and_gradients(transformer.train(), [together], device="cuda")
    alone_loss, alone_gradients = loss_and_gradients(transformer, alone, device="cuda")
    assert loss == pytest.approx(alone_loss, rel=GRADIENTS[dtype])
    assert (gradients - alone_gradients).norm() < 2 * GRADIENTS[dtype] * alone_gradients.norm()


@pytest.mark.parametrize("command", ["k5cache", "k5train"])
def test_both_selftests_pass_on_the_gpu(toy_cache, command):
    """The cache is the CPU's: what is encoded now must be the GPU's bits, what is stored may round otherwise."""
    from k5cache.cli import app as cache_app
    from k5train.cli import app as train_app

    cache = toy_cache("bf16")
    app, options = (cache_app, ["--device", "cuda"]) if command == "k5cache" else (train_app, [])
    done = Cli(cache.parent.parent)(app, "selftest", "cache/pictures", *options, "--json")
    print(done.out, done.err)
    rows = json.loads(done.out)
    assert [row["what"] for row in rows if row["result"] == "DIFFERS"] == []
    assert done.code == 0


def test_a_transformer_that_does_not_fit_the_gpu_is_compared_module_by_module(toy_model, monkeypatch):
    monkeypatch.setattr(selftest, "fits", lambda num_bytes, device: False)
    rows = {row.what: row for row in selftest.selftest(None, toy_model, TrainConfig(), torch.device("cuda"))}
    assert rows["velocity, bfloat16"].result == "same bits"
    assert not any(row.is_failed for row in rows.values())
    assert rows["2 drawing steps, guided, int8"].result in ("same bits", "rounding")

"""Sampling parity: pictures drawn from a cache end in the latents that ``Kandinsky5T2IPipeline`` ends in."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL

from k5cache.store.reader import open_cache
from k5train.adapter import attach, files
from k5train.base.quantize import load_transformer
from k5train.options.adapter import LoraConfig
from k5train.pictures import sample
from tests.parity import PROMPTS, pipeline_of, with_strength

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16}
SIZE = (96, 64)  # width, height
STEPS = 4


@pytest.fixture(scope="module")
def pipelines(toy_model):
    return {precision: pipeline_of(toy_model, dtype, SIZE) for precision, dtype in PRECISIONS.items()}


def drawn_by_the_pipeline(pipeline, prompt: str, guidance: float, seed: int, negative: str | None = None):
    return pipeline(
        prompt, negative_prompt=negative, width=SIZE[0], height=SIZE[1], num_inference_steps=STEPS,
        guidance_scale=guidance, generator=torch.Generator().manual_seed(seed), output_type="latent",
    ).image  # fmt: skip


def drawn_by_us(transformer, model, cache, prompt: str, guidance: float, seed: int, negative: str = ""):
    settings = sample.SampleSettings(*SIZE, STEPS, guidance, seed)
    scheduler = sample.load_scheduler(model)
    return sample.sample_latents(transformer, scheduler, cache.prompt(prompt), cache.prompt(negative), settings)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize(
    ("guidance", "negative"), [(1.0, ""), (3.5, ""), (5.0, "blurry")], ids=["unguided", "guided", "negative"]
)
def test_latents_drawn_from_cached_prompts_are_the_pipelines_bit_for_bit(
    toy_model, toy_cache, pipelines, precision, guidance, negative
):
    pipeline, cache = pipelines[precision], open_cache(toy_cache(precision))
    transformer = load_transformer(toy_model, "no_change", PRECISIONS[precision], "cpu")
    for prompt in PROMPTS[:2]:
        theirs = drawn_by_the_pipeline(pipeline, prompt, guidance, 11, negative or None)
        ours = drawn_by_us(transformer, toy_model, cache, prompt, guidance, 11, negative)
        assert ours.dtype == theirs.dtype
        assert torch.equal(ours, theirs), (ours - theirs).abs().max()


def test_guidance_prompt_and_seed_all_matter(toy_model, toy_cache):
    """If they were ignored, the test above would pass for the wrong reason."""
    transformer = load_transformer(toy_model, "no_change", torch.float32, "cpu")
    cache = open_cache(toy_cache("fp32"))
    base = drawn_by_us(transformer, toy_model, cache, PROMPTS[0], 3.5, 11)
    for other in ((PROMPTS[1], 3.5, 11), (PROMPTS[0], 5.0, 11), (PROMPTS[0], 3.5, 12), (PROMPTS[0], 3.5, 11, "blurry")):
        assert (drawn_by_us(transformer, toy_model, cache, *other) - base).abs().max() > 1e-3, other


@pytest.mark.parametrize("precision", PRECISIONS)
def test_with_a_lora_the_latents_are_those_of_the_pipeline_that_loaded_the_same_file(
    toy_model, toy_cache, pipelines, tmp_path, precision
):
    dtype = PRECISIONS[precision]
    path = tmp_path / "a.safetensors"
    trained = load_transformer(toy_model, "no_change", dtype, "cpu")
    attach.add_lora(trained, LoraConfig(rank=4), seed=1)
    with_strength(trained)
    files.save_lora(path, trained)

    pipeline, cache = pipelines[precision], open_cache(toy_cache(precision))
    without = drawn_by_the_pipeline(pipeline, PROMPTS[0], 3.5, 11)
    pipeline.load_lora_weights(path, adapter_name="mine")
    theirs = drawn_by_the_pipeline(pipeline, PROMPTS[0], 3.5, 11)
    pipeline.unload_lora_weights()
    assert (theirs - without).abs().max() > 0.05

    ours = load_transformer(toy_model, "no_change", dtype, "cpu")
    files.load_lora(ours, path)
    latents = drawn_by_us(ours, toy_model, cache, PROMPTS[0], 3.5, 11)
    if dtype == torch.float32:
        assert torch.equal(latents, theirs)
    else:  # the pipeline casts the adapter to bfloat16 when it loads it, we keep the float32 that was trained
        torch.testing.assert_close(latents, theirs, rtol=0, atol=0.1)  # 4 steps, latents up to 4; 0.047 seen
        for parameter in attach.lora_parameters(ours):
            parameter.data = parameter.data.to(dtype)
        assert torch.equal(drawn_by_us(ours, toy_model, cache, PROMPTS[0], 3.5, 11), theirs)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_the_picture_is_the_pipelines_too(toy_model, toy_cache, pipelines, precision, monkeypatch):
    """From a cached prompt to pixels. ``k5train`` decodes in float32, so the pipeline's VAE does here."""
    pipeline, cache = pipelines[precision], open_cache(toy_cache(precision))
    monkeypatch.setattr(pipeline, "vae", AutoencoderKL.from_pretrained(toy_model, subfolder="vae"))
    theirs = pipeline(PROMPTS[0], width=SIZE[0], height=SIZE[1], num_inference_steps=STEPS, guidance_scale=3.5,
                      generator=torch.Generator().manual_seed(5)).image[0]  # fmt: skip
    transformer = load_transformer(toy_model, "no_change", PRECISIONS[precision], "cpu")
    latents = drawn_by_us(transformer, toy_model, cache, PROMPTS[0], 3.5, 5)
    (ours,) = sample.decode(toy_model, [latents], torch.device("cpu"))
    assert np.array_equal(np.asarray(ours), np.asarray(theirs))

"""Editing parity: forward passes, drawings and training are those of ``Kandinsky5I2IPipeline`` and a plain loop."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from diffusers import Kandinsky5I2IPipeline
from PIL import Image

from k5cache.shared.checkpoint import read_config
from k5cache.store.reader import open_cache
from k5train.adapter import attach, files
from k5train.base.linear import Int8Linear
from k5train.base.quantize import load_transformer
from k5train.data.batch import Group
from k5train.forward.predict_velocity import predict_velocity
from k5train.options.adapter import LoraConfig
from k5train.options.memory import MemoryConfig
from k5train.pictures.sample import Drawing, Posterior, SampleSettings, load_scheduler, sample_latents
from tests.edit_training import GivenPosterior, make_pairs, pipeline_around, rows
from tests.parity import as_the_pipeline_calls_it, reference_transformer, with_strength
from tests.test_parity_training import CONFIG, LR, our_steps, plain_steps

DTYPES = [torch.float32, torch.bfloat16]
STEPS = 3


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


@pytest.fixture(scope="module")
def cache(toy_edit_model, once):
    return open_cache(once("toy_pairs", lambda folder: make_pairs(folder, toy_edit_model)))


def drawn_by_the_pipeline(
    pipeline, cache, guidance: float, instruction: str = "text-1-0", device: str = "cpu"
) -> torch.Tensor:
    """``Kandinsky5I2IPipeline.__call__`` on item 1's embeddings; its VAE gives item 1's source."""
    embeds = {
        f"{prefix}prompt_{name}": value.to(device)
        for prefix, row in (("", cache.text(instruction)), ("negative_", cache.text("empty-1")))
        for name, value in (("embeds_qwen", row.prompt_embeds[None]), ("embeds_clip", row.pooled[None]),
                            ("cu_seqlens", torch.tensor([0, row.n_tokens])))
    }  # fmt: skip
    return pipeline(
        image=Image.new("RGB", (64, 64)), **embeds, width=64, height=64, num_inference_steps=STEPS,
        guidance_scale=guidance, generator=torch.Generator().manual_seed(11), output_type="latent",
    ).image  # fmt: skip


def drawing(cache, guidance: float, instruction: str = "text-1-0") -> Drawing:
    scale = cache.manifest.recipe["latents"]["scaling_factor"]
    source = Posterior(**cache.latents("source-1"), scaling_factor=scale)
    settings = SampleSettings(64, 64, STEPS, guidance, 11)
    return Drawing("", cache.text(instruction), cache.text("empty-1"), settings, source)


def drawn_by_us(transformer, model, d: Drawing) -> torch.Tensor:
    return sample_latents(transformer, load_scheduler(model), d.prompt, d.negative, d.settings, source=d.source)


def pipeline_of(model, cache, dtype, device: str = "cpu") -> Kandinsky5I2IPipeline:
    scale = cache.manifest.recipe["latents"]["scaling_factor"]
    vae = GivenPosterior(cache.latents("source-1"), scale, dtype, device)
    return pipeline_around(reference_transformer(model, dtype, device), load_scheduler(model), vae, (64, 64))


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_drawing_from_a_cached_pair_is_the_pipelines_bit_for_bit(toy_edit_model, cache, dtype):
    """First latents, source, guidance with the source's own empty instruction, and every step."""
    transformer, pipeline = load_transformer(toy_edit_model, "no_change", dtype, "cpu"), None
    pipeline = pipeline_of(toy_edit_model, cache, dtype)
    drawn = []
    for guidance in (1.0, 3.5):
        ours = drawn_by_us(transformer, toy_edit_model, drawing(cache, guidance))
        assert torch.equal(ours, drawn_by_the_pipeline(pipeline, cache, guidance))
        drawn.append(ours)
    other = replace(
        drawing(cache, 1.0), source=replace(drawing(cache, 1.0).source, mean=cache.latents("source-0")["mean"])
    )
    drawn += [drawn_by_us(transformer, toy_edit_model, d) for d in (other, drawing(cache, 1.0, "text-1-1"))]
    assert all((a - b).abs().max() > 1e-2 for a, b in itertools.combinations(drawn, 2))  # each of them matters


@pytest.mark.parametrize("dtype", DTYPES)
def test_with_a_lora_it_is_the_drawing_of_the_pipeline_that_loaded_the_same_file(
    toy_edit_model, cache, tmp_path, dtype
):
    path = tmp_path / "a.safetensors"
    trained = load_transformer(toy_edit_model, "no_change", dtype, "cpu")
    attach.add_lora(trained, LoraConfig(rank=4), seed=1)
    with_strength(trained)
    files.save_lora(path, trained)
    pipeline = pipeline_of(toy_edit_model, cache, dtype)
    without = drawn_by_the_pipeline(pipeline, cache, 3.5)
    pipeline.load_lora_weights(path, adapter_name="mine")
    theirs = drawn_by_the_pipeline(pipeline, cache, 3.5)
    assert (theirs - without).abs().max() > 0.05
    ours = load_transformer(toy_edit_model, "no_change", dtype, "cpu")
    files.load_lora(ours, path)
    for parameter in attach.lora_parameters(ours):  # the pipeline casts the adapter when it loads it, we do not
        parameter.data = parameter.data.to(dtype)
    assert torch.equal(drawn_by_us(ours, toy_edit_model, drawing(cache, 3.5)), theirs)
    loaded = {n: p for n, p in pipeline.transformer.named_parameters() if "lora_" in n}
    saved = {n: p for n, p in ours.named_parameters() if "lora_" in n}
    assert len(loaded) == len(saved) == 2 * (2 * 6 + 3 * 10)  # every matrix: 2 text blocks, 3 visual ones


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


@pytest.mark.parametrize(
    ("precision", "dtype", "steps"),
    [
        ("no_change", torch.float32, 10),
        pytest.param("no_change", torch.float32, 50, marks=pytest.mark.long),
        ("no_change", torch.bfloat16, 6),
        ("int8-quanto", torch.float32, 6),
    ],
)
def test_training_on_pairs_is_a_plain_loop_with_diffusers_and_peft_bit_for_bit(
    toy_edit_model, cache, precision, dtype, steps
):
    config = replace(CONFIG, source_dropout_probability=0.25, batch_size=1 if steps == 50 else 2)
    losses, norms, ours, start, seen = our_steps(toy_edit_model, cache, precision, dtype, steps, config)
    their_losses, their_norms, theirs = plain_steps(toy_edit_model, precision, dtype, start, seen)
    assert (losses, norms) == (their_losses, their_norms)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    conditions = [g.condition[i] for batches in seen for b in batches for g in b.groups for i in range(len(g.sigma))]
    dropped = sum(condition.count_nonzero() == 0 for condition in conditions)
    assert 0 < dropped < len(conditions)
    assert min((ours[n] - start[n]).abs().max() for n in ours) > LR


def test_lean_blocks_and_masked_captions_train_on_pairs_as_the_plain_loop_does(toy_edit_model, cache):
    """One forward pass for captions of unequal lengths, in lean blocks: rounding apart, the plain loop's losses."""
    config = replace(CONFIG, memory=MemoryConfig(execution="eager"), mixed_precision="fp32", unequal_captions="mask")
    losses, _, _, start, seen = our_steps(toy_edit_model, cache, "int8-quanto", torch.float32, 8, config)
    apart = [[replace(batch, groups=tuple(_rows_apart(batch.groups))) for batch in batches] for batches in seen]
    their_losses, _, _ = plain_steps(toy_edit_model, "int8-quanto", torch.float32, start, apart)
    assert losses == pytest.approx(their_losses, rel=1e-5)


def _rows_apart(groups):
    """Each row as a group of its own, without padding."""
    for group in groups:
        for i in range(len(group.sigma)):
            length = group.text_lengths[i] if group.text_lengths else group.prompt_embeds.shape[1]
            row = {n: v[i : i + 1] for n, v in vars(group).items() if isinstance(v, torch.Tensor)}
            yield Group(**{**row, "prompt_embeds": row["prompt_embeds"][:, :length]})

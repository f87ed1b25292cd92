"""Does each deviation of ``pipelines.measure.deviations`` change what it says, and nothing else?"""

from __future__ import annotations

import json
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch

import k5cache
from k5cache.sources.images import image_size
from k5train.data.loader import Loader
from k5train.forward.predict_velocity import rotary
from pipelines.measure import deviations, judged
from tests import micro

pytestmark = pytest.mark.long


@pytest.fixture(scope="module")
def cache(once):
    return micro.cache(once, "held_out")


def batches_of(cache, unequal_captions="mask", **changes):
    config = replace(micro.config(steps=1), unequal_captions=unequal_captions, caption_dropout_probability=0.5)
    loader = Loader(k5cache.open(cache), config, 1.0145)
    return [loader.batch(micro_batch) for micro_batch in range(3)]


def test_nothing_deviates_by_default_or_afterwards(cache):
    expected = batches_of(cache)
    with deviations.deviating(deviations.VARIANTS["all three"]):
        pass
    with deviations.deviating(deviations.VARIANTS["what inference sees"]):
        inside = batches_of(cache)
    for batch, as_before in zip(inside, expected, strict=True):
        assert differences(batch, as_before) == []


def differences(batch, other):
    """The fields of two batches that differ."""
    assert batch.rows == other.rows
    assert len(batch.groups) == len(other.groups)
    pairs = [(vars(a), vars(b)) for a, b in zip(batch.groups, other.groups, strict=True)]
    return sorted({name for a, b in pairs for name in a if not same(a[name], b[name])})


def same(a, b):
    return torch.equal(a, b) if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor) else a == b


def test_shifted_latents_are_lower_by_the_scaled_shift_and_nothing_else_differs(cache):
    expected = batches_of(cache)
    with deviations.deviating(["latents"]):
        shifted = batches_of(cache)
    for batch, as_before in zip(shifted, expected, strict=True):
        assert differences(batch, as_before) == ["latents"]
        difference = as_before.groups[0].latents - batch.groups[0].latents
        torch.testing.assert_close(difference, torch.full_like(difference, 0.0419), rtol=0, atol=1e-4)


@pytest.mark.parametrize("unequal_captions", ["mask", "split"])
def test_padded_captions_have_32_tokens_of_which_the_rest_are_their_last_and_nothing_else_differs(
    cache, unequal_captions
):
    expected = batches_of(cache, unequal_captions)
    with deviations.deviating(["captions"]):
        padded = batches_of(cache, unequal_captions)
    lengths = set()
    for batch, as_before in zip(padded, expected, strict=True):
        assert set(differences(batch, as_before)) <= {"prompt_embeds", "text_lengths"}
        for group, before in zip(batch.groups, as_before.groups, strict=True):
            assert group.text_lengths is None  # nothing is masked
            assert group.prompt_embeds.shape == (len(group.sigma), 32, 128)
            for i, embeds in enumerate(group.prompt_embeds):
                length = (before.text_lengths or [before.prompt_embeds.shape[1]] * len(group.sigma))[i]
                assert torch.equal(embeds[:length], before.prompt_embeds[i, :length])
                assert torch.equal(embeds[length:], before.prompt_embeds[i, length - 1].expand(32 - length, 128))
                lengths.add(length)
    assert lengths >= {1, 11}  # the empty prompt, which caption dropout takes, and captions


def test_rope_of_the_video_models_turns_as_at_half_the_position_of_a_picture_and_text_as_ever():
    def tables():
        return rotary(judged.with_lora(micro.MODEL, None), 5, (1, 8, 8), torch.device("cpu"))

    ours = tables()
    with deviations.deviating(["rope"]):
        scaled = tables()
    assert torch.equal(scaled.text, ours.text)
    assert torch.equal(scaled.visual[:, :, ::2, ::2], ours.visual[:, :, :4, :4])
    assert not torch.equal(scaled.visual, ours.visual)
    assert torch.equal(tables().visual, ours.visual)


def test_all_three_deviate_together(cache):
    expected = batches_of(cache)
    with deviations.deviating(deviations.VARIANTS["all three"]):
        changed = batches_of(cache)
        assert deviations.predict_velocity.ROPE_SCALE == (1, 2, 2)
    assert deviations.predict_velocity.ROPE_SCALE == (1, 1, 1)
    for batch, as_before in zip(changed, expected, strict=True):
        assert {"latents", "prompt_embeds"} <= set(differences(batch, as_before))


def test_shares_of_the_base_are_averaged_over_seeds():
    results = {"base": {"held_out": [0.2, 0.6], "known": [0.5, 0.5]}}
    for variant in deviations.VARIANTS:
        for seed, loss in enumerate((0.3, 0.5)):
            results[deviations.job_name(variant, seed)] = {"held_out": [loss, loss], "known": [0.6, 0.7]}
    row = deviations.table_rows(results, 2)[3]
    assert row["trained with"] == "RoPE scale (1, 2, 2)"
    assert row["held_out"] == pytest.approx({"mean": 1.0, "lowest": 0.75, "highest": 1.25})
    assert row["known"]["mean"] == pytest.approx(1.3)


def test_a_trial_writes_losses_and_a_picture_and_goes_on_with_what_it_has(cache, tmp_path, monkeypatch):
    """One step of two variants, judged at one sigma; a cache that is there already stands for all three."""
    monkeypatch.chdir(micro.DEMO.parent.parent)
    two = {name: deviations.VARIANTS[name] for name in ("what inference sees", "RoPE scale (1, 2, 2)")}
    monkeypatch.setattr(deviations, "VARIANTS", two)
    monkeypatch.setattr(deviations, "ROWS", {"RoPE scale (1, 2, 2)": "with the RoPE scale"})
    monkeypatch.setattr(deviations, "JUDGED_ON", ("held_out",))
    monkeypatch.setattr(judged, "held_out_loss", partial(judged.held_out_loss, num_sigmas=1))
    monkeypatch.setattr(judged, "encode", lambda pictures, root, *_: root.exists() or link(root, cache))
    recipe = deviations.read_recipe("cpu", 1)
    validation = replace(recipe.train.validation, prompts=recipe.train.validation.prompts[:1], num_inference_steps=1)
    small = replace(recipe, train=replace(recipe.train, validation=validation))
    monkeypatch.setattr(deviations, "read_recipe", lambda device, steps: small)
    out = tmp_path / "new" / "deviations.json"
    deviations.main(out, seeds=1, workers=1, folder=tmp_path)
    results = json.loads(out.read_text(encoding="utf-8"))["results"]
    assert list(results) == ["base", "what inference sees, seed 0", "RoPE scale (1, 2, 2), seed 0"]
    losses = [result["held_out"][0] for result in results.values()]
    assert len({*losses}) == 3
    assert losses == pytest.approx([losses[0]] * 3, rel=0.1)  # of one small step
    assert image_size(out.with_suffix(".png"))[1] > 2 * 128

    monkeypatch.setattr(deviations, "train_and_judge", None)
    monkeypatch.setattr(deviations, "draw", lambda place, recipe, target: None)
    deviations.main(out, seeds=1, workers=1, folder=tmp_path)
    document = json.loads(out.read_text(encoding="utf-8"))
    assert document["results"] == results
    assert document["table"][1]["held_out"]["mean"] == pytest.approx(losses[2] / losses[0])


def link(root: Path, cache: Path) -> None:
    root.parent.mkdir(parents=True, exist_ok=True)
    root.symlink_to(cache)

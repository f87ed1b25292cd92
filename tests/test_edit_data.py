"""Pairs to batches: the source is drawn anew in every step, and everything else is as without one."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from k5cache.shared.errors import CacheStale, RecipeError, RunError
from k5cache.store.reader import open_cache
from k5train.data.compatible import check_fit
from k5train.data.kind import check_options
from k5train.data.loader import Loader
from k5train.data.mixture import Mixture, Source, open_mixture
from k5train.data.split import split_off
from k5train.options.data import DataConfig
from k5train.options.train import TrainConfig
from k5train.options.validation import EditConfig, ValidationConfig
from k5train.training.held_out_loss import HeldOutLoss
from k5train.training.identity import check_same, identity
from k5train.training.step import train_step
from tests.edit_training import make_pairs

SCALE = 0.3611
CONFIG = TrainConfig(steps=20, batch_size=2)


@pytest.fixture(scope="module")
def root(toy_edit_model, once):
    return once("toy_pairs", lambda folder: make_pairs(folder, toy_edit_model))


@pytest.fixture(scope="module")
def without_empty(toy_edit_model, once):
    return once("toy_pairs_without_empty", lambda folder: make_pairs(folder, toy_edit_model, with_empty=False))


def groups_of(cache, config, micros=range(12)):
    return [(micro, group) for micro in micros for group in Loader(cache, config, SCALE).batch(micro).groups]


def test_the_condition_is_a_fresh_sample_of_the_source_and_a_channel_of_ones(root):
    cache = open_cache(root)
    loader = Loader(cache, replace(CONFIG, batch_size=1), SCALE)
    seen: dict[int, list] = {}
    for micro in range(12):
        batch = loader.batch(micro)
        (group,) = batch.groups
        height, width = group.latents.shape[2:4]
        assert group.condition.shape == (1, 1, height, width, 17)
        assert torch.equal(group.condition[..., 16:], torch.ones(1, 1, height, width, 1))
        source = cache[batch.rows[0]]["source"]
        z = (group.condition[0, 0, ..., :16] / SCALE - source["mean"].float()) / source["std"].float()
        assert (abs(z.mean()) < 0.15, 0.9 < z.std() < 1.1) == (True, True)  # a draw of N(mean, std)
        seen.setdefault(batch.rows[0], []).append(group.condition)
        assert torch.equal(loader.batch(micro).groups[0].condition, group.condition)  # a function of seed and step
    assert all(not torch.equal(draws[0], draws[1]) for draws in seen.values())


def test_all_other_draws_are_those_of_a_row_without_a_source(root, monkeypatch):
    """So text-to-image draws what it drew before, and dropping the source changes nothing else."""
    cache = open_cache(root)
    with_source = groups_of(cache, CONFIG)
    dropped = groups_of(cache, replace(CONFIG, source_dropout_probability=1.0))
    monkeypatch.setattr(Loader, "_condition", lambda *_: None)
    without = groups_of(cache, CONFIG)
    for (_, a), (_, b), (_, c) in zip(with_source, dropped, without, strict=True):
        for name in ("latents", "noise", "sigma", "prompt_embeds", "pooled_projections"):
            assert torch.equal(getattr(a, name), getattr(c, name))
            assert torch.equal(getattr(b, name), getattr(c, name))
        assert b.condition.count_nonzero() == 0  # the mask channel too
        assert b.condition.shape == a.condition.shape


def test_half_of_the_sources_are_dropped_row_by_row_and_the_others_stay_as_they_are(root):
    config = replace(CONFIG, batch_size=1)
    whole = groups_of(open_cache(root), config, range(200))
    half = groups_of(open_cache(root), replace(config, source_dropout_probability=0.5), range(200))
    kept = [torch.equal(a.condition, b.condition) for (_, a), (_, b) in zip(whole, half, strict=True)]
    assert 80 <= sum(kept) <= 120
    assert all(is_kept or b.condition.count_nonzero() == 0 for is_kept, (_, b) in zip(kept, half, strict=True))


def test_a_dropped_caption_is_the_empty_instruction_with_this_source(root):
    cache = open_cache(root)
    loader = Loader(cache, replace(CONFIG, batch_size=1, caption_dropout_probability=1.0), SCALE)
    for micro in range(6):
        batch = loader.batch(micro)
        assert torch.equal(batch.groups[0].prompt_embeds[0], cache.text(f"empty-{batch.rows[0]}").prompt_embeds)


def test_padded_and_concatenated_batches_keep_each_rows_source(root):
    cache, alone = open_cache(root), {}
    for micro, group in groups_of(cache, replace(CONFIG, unequal_captions="split")):
        alone.setdefault(micro, []).append(group)
    for micro, group in groups_of(cache, replace(CONFIG, unequal_captions="mask")):
        by_noise = {g.noise[i].sum().item(): g.condition[i] for g in alone[micro] for i in range(len(g.sigma))}
        assert len(group.sigma) == len(by_noise)
        for noise, condition in zip(group.noise, group.condition, strict=True):
            assert torch.equal(by_noise[noise.sum().item()], condition)


def test_the_loss_is_on_the_target_alone(root):
    """A prediction of ``noise - latents`` has no error, whatever the source."""
    (_, group), *_ = groups_of(open_cache(root), CONFIG)
    seen = {}

    def predict(noisy, sigma, embeds, pooled, **extra):
        seen.update(extra, channels=noisy.shape[-1])
        return group.noise - group.latents

    assert train_step(predict, group).item() == 0
    assert torch.equal(seen["condition"], group.condition)
    assert seen["channels"] == 16


def test_the_held_out_loss_sees_the_mean_of_each_source(root):
    cache = open_cache(root)
    data = split_off(Mixture([Source(cache)]), 0.5)
    seen = []

    def predict(noisy, sigma, embeds, pooled, condition):
        seen.append(condition)
        return torch.zeros_like(noisy)

    HeldOutLoss(data, 1, SCALE).measure(predict, torch.device("cpu"))
    for item, condition in zip(sorted(data.sources[0].split), seen, strict=True):
        mean = cache[item]["source"]["mean"].float() * SCALE
        assert torch.equal(condition[0, 0], torch.cat([mean, torch.ones_like(mean[..., :1])], dim=-1))


def test_a_cache_of_pairs_fits_the_transformer_that_edits_and_no_other(root, toy_edit_model, toy_model, toy_cache):
    cache, plain = open_cache(root), open_cache(toy_cache("bf16"))
    check_fit(cache, toy_edit_model)
    check_fit(plain, toy_model)
    with pytest.raises(CacheStale, match=r"for image-to-image \(I2I\), and the transformer .* text-to-image"):
        check_fit(cache, toy_model)
    with pytest.raises(CacheStale, match=r"for text-to-image \(T2I\), and the transformer .* image-to-image"):
        check_fit(plain, toy_edit_model)
    for pair in ((root, plain.root), (plain.root, root)):
        with pytest.raises(CacheStale, match="a transformer is for one of the two"):
            open_mixture([DataConfig(str(path)) for path in pair])


def test_options_of_the_other_kind_are_refused_by_name(root, toy_cache):
    pairs, plain = (open_mixture([DataConfig(str(path))]) for path in (root, toy_cache("bf16")))
    validation = {
        "prompts": ("a",), "prompt_library": "a.json", "negative_prompt": "blurry", "width": 64, "height": 64,
    }  # fmt: skip
    of_pairs = {"edits": (EditConfig("a.png", "b"),), "pairs": 2}
    for data, options, other in ((pairs, validation, "text-to-image"), (plain, of_pairs, "image-to-image")):
        check_options(data, CONFIG)
        for name, value in options.items():
            config = replace(CONFIG, validation=ValidationConfig(**{name: value}))
            with pytest.raises(RecipeError, match=rf"train\.validation\.{name} is only for {other}"):
                check_options(data, config)
    with pytest.raises(RecipeError, match=r"train\.source_dropout_probability is only for image-to-image"):
        check_options(plain, replace(CONFIG, source_dropout_probability=0.1))


def test_caption_dropout_without_empty_instructions_is_refused_with_what_to_do(without_empty):
    data = open_mixture([DataConfig(str(without_empty))])
    check_options(data, replace(CONFIG, caption_dropout_probability=0.0))
    with pytest.raises(RecipeError, match="without the empty instruction of each source") as caught:
        check_options(data, CONFIG)
    assert "train.caption_dropout_probability=0" in caught.value.fix
    assert "TARGETS --sources SOURCES -o" in caught.value.fix  # pasted without sources it would be refused again
    assert "--set cache.empty_instruction=true" in caught.value.fix


def test_a_run_is_another_if_a_source_or_an_empty_instruction_has_changed(root, toy_edit_model, without_empty):
    rows = {
        identity(open_mixture([DataConfig(str(path))]), toy_edit_model, CONFIG)["cache"]["rows"]
        for path in (root, without_empty)
    }
    assert len(rows) == 2


def test_a_run_of_a_version_without_these_options_goes_on_and_counts_them_as_their_defaults(toy_model, toy_cache):
    data = open_mixture([DataConfig(str(toy_cache("bf16")))])
    before = identity(data, toy_model, CONFIG)
    del before["train"]["source_dropout_probability"], before["train"]["validation"]["pairs"]
    saved = SimpleNamespace(facts={"identity": before}, folder=Path("runs/mine/state/step-000010"))
    check_same(saved, identity(data, toy_model, CONFIG))
    with pytest.raises(RunError, match=r"source_dropout_probability: 0\.0, now 0\.5"):
        check_same(saved, identity(data, toy_model, replace(CONFIG, source_dropout_probability=0.5)))

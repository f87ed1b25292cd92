"""Rows to batches: is every draw a function of (seed, step, row), and does each cache give its share of rows?"""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from k5cache.cli import app
from k5cache.shared.errors import CacheStale, RecipeError
from k5cache.store.reader import open_cache
from k5train.data.loader import Loader
from k5train.data.mixture import Mixture, Source, epoch_batches, num_batches, open_mixture
from k5train.objective import flow, tread
from k5train.options.adapter import LoraConfig
from k5train.options.data import DataConfig
from k5train.options.objective import ObjectiveConfig, RolloutConfig, RouteConfig, TreadConfig
from k5train.options.train import TrainConfig
from k5train.training.step import exploded, train_step
from tests.cli import Cli

SCALE = 0.3611
GRID = torch.linspace(1, 0, 11)
CONFIG = TrainConfig(steps=20, batch_size=2, lora=LoraConfig(targets=("qkv",)))


def encode(root: Path, name: str, model: Path, sizes: list[tuple[int, int]], *options: str) -> Path:
    """A cache of pictures of these sizes. The first has a mask of its left half and two captions."""
    source = root / "datasets" / name
    source.mkdir(parents=True)
    random = np.random.default_rng(len(sizes))
    for i, (width, height) in enumerate(sizes):
        Image.fromarray(random.integers(0, 256, (height, width, 3), dtype=np.uint8)).save(source / f"{i}.png")
        (source / f"{i}.txt").write_text(f"picture {i}" + (f"\n{name} of something else" if i == 0 else ""))
    mask = np.zeros((sizes[0][1], sizes[0][0]), dtype=np.uint8)
    mask[:, : sizes[0][0] // 2] = 255
    if name == "subject":
        Image.fromarray(mask).save(source / "0.mask.png")
    arguments = ["encode", f"datasets/{name}", "--model", str(model), "--set", "cache.resolution=64", *options]
    done = Cli(root)(app, *arguments)
    assert done.code == 0, done.err
    return root / "cache" / name


@pytest.fixture(scope="module")
def caches(tmp_path_factory, toy_model) -> tuple[Path, Path]:
    """Three pictures of two buckets, and two of one bucket."""
    root = tmp_path_factory.mktemp("caches")
    return (
        encode(root, "subject", toy_model, [(64, 64), (64, 64), (128, 64)]),
        encode(root, "class", toy_model, [(64, 64), (70, 70)]),
    )


def entries(caches, *options: dict) -> list[DataConfig]:
    return [DataConfig(str(path), **extra) for path, extra in zip(caches, options or ({}, {}), strict=True)]


def groups(data, config: TrainConfig, micros=range(6)):
    loader = Loader(data, config, SCALE, GRID)
    return [group for micro in micros for group in loader.batch(micro).groups]


def counts(mixture: Mixture, epoch: int, batch_size: int = 2) -> tuple[Counter, int]:
    batches = epoch_batches(mixture.pools, batch_size, epoch, torch.Generator().manual_seed(epoch))
    return Counter(row for rows in batches for row in rows), len(batches)


# --- which rows


def test_rows_of_several_caches_are_numbered_one_after_another(caches):
    mixture = open_mixture(entries(caches))
    assert len(mixture) == 5
    assert [mixture.name(row) for row in range(5)] == [
        "subject: 0.png", "subject: 1.png", "subject: 2.png", "class: 0.png", "class: 1.png"]  # fmt: skip
    assert mixture.row(4).path == "1.png"
    assert mixture.locate(3) == (mixture.sources[1], 0)
    assert open_mixture(entries(caches)[:1]).name(2) == "2.png"


def test_a_batch_never_mixes_buckets_and_an_epoch_has_every_row_repeats_times(caches):
    mixture = open_mixture(entries(caches, {"repeats": 2}, {"repeats": 1}))
    for epoch in range(3):
        seen, _ = counts(mixture, epoch)
        assert seen == {0: 2, 1: 2, 2: 2, 3: 1, 4: 1}
    batches = epoch_batches(mixture.pools, 2, 0, torch.Generator().manual_seed(0))
    sizes = [{(mixture.row(r).bucket_width, mixture.row(r).bucket_height) for r in rows} for rows in batches]
    assert all(len(s) == 1 for s in sizes)
    assert len(set.union(*sizes)) == 2


def test_weights_share_the_rows_and_no_row_of_any_bucket_is_left_out(caches):
    mixture = open_mixture(entries(caches, {"weight": 1.0}, {"weight": 9.0}))
    epochs = [counts(mixture, epoch) for epoch in range(60)]
    together = sum((seen for seen, _ in epochs), Counter())
    # 5 rows an epoch: half a row of the first cache's three, 4.5 of the second's two
    assert sum(together[row] for row in range(3)) == pytest.approx(30, abs=2)
    assert sum(together[row] for row in (3, 4)) == pytest.approx(270, abs=2)
    assert together[2] == pytest.approx(10, abs=1)  # alone in its bucket
    assert min(together[0], together[1]) >= 4  # of 20, drawn at random between the two
    assert {num for _, num in epochs} == {num_batches(mixture.pools, 2, epoch) for epoch in range(60)}
    assert all(num == num_batches(mixture.pools, 2, epoch) for epoch, (_, num) in enumerate(epochs))


def test_micro_batches_follow_each_other_over_epochs_of_different_length(caches):
    mixture = open_mixture(entries(caches, {"weight": 1.0}, {"weight": 9.0}))
    loader = Loader(mixture, CONFIG, SCALE)
    lengths = [num_batches(mixture.pools, 2, epoch) for epoch in range(8)]
    assert len(set(lengths)) > 1
    assert [loader.micro_batches(epochs) for epochs in range(9)] == [sum(lengths[:n]) for n in range(9)]
    inside = [loader.rows_of(micro) for micro in range(sum(lengths))]
    epochs = [row for epoch in range(8) for row in loader._epoch(epoch)]
    assert inside == epochs
    assert Loader(mixture, CONFIG, SCALE).rows_of(sum(lengths) - 1) == inside[-1]  # from anywhere


def test_held_out_rows_are_never_trained_on(caches):
    mixture = Mixture([Source(open_cache(caches[0]), repeats=3, split=frozenset({1}))])
    assert counts(mixture, 0)[0] == {0: 3, 2: 3}


def test_caches_of_different_encoders_do_not_mix(caches, tmp_path, toy_model):
    other = encode(tmp_path, "class", toy_model, [(64, 64)], "--set", "cache.text_encoder_1_precision=fp32")
    with pytest.raises(CacheStale, match=r"encoded differently: text.text_encoder_1_precision differ"):
        open_mixture([DataConfig(str(caches[0])), DataConfig(str(other))])


# --- what is made of it


def test_a_step_counts_the_errors_that_its_masks_and_weights_say(caches):
    group = groups(open_cache(caches[0]), CONFIG, [0])[0]
    wrong = torch.zeros_like(group.latents)
    wrong[..., :2, :] = 3.0  # the prediction is off in the first two columns

    def predict(noisy, sigma, embeds, pooled):
        return group.noise - group.latents + wrong

    share = 2 / group.latents.shape[3]
    assert train_step(predict, group).item() == pytest.approx(9 * share, rel=1e-4)
    mask = torch.zeros(*group.latents.shape[:-1], 1)
    mask[..., :1, :] = 1.0
    assert train_step(predict, replace(group, mask=mask)).item() == pytest.approx(9, rel=1e-4)
    weight = torch.full_like(group.sigma, 0.5)
    assert train_step(predict, replace(group, weight=weight)).item() == pytest.approx(4.5 * share, rel=1e-4)
    assert train_step(predict, group, huber_c=1.0).item() == pytest.approx(5 * share, rel=1e-4)  # 2 * 3 - 1


# --- what is drawn for a row

EVERYTHING = replace(
    CONFIG,
    gradient_accumulation_steps=2,
    caption_dropout_probability=0.3,
    objective=ObjectiveConfig(stratified_sigmas=True, weighting="cosmap", masked_loss=True),
    tread=TreadConfig(routes=(RouteConfig(0.5, 0, 1), RouteConfig(0.25, 2, 2)), keep_masked=True),
    rollout=RolloutConfig(probability=0.5, max_steps=2, num_inference_steps=10),
)


TREAD = replace(CONFIG, tread=TreadConfig(routes=(RouteConfig(0.5, 0, 1),)))


def test_every_draw_is_a_function_of_seed_step_and_row_in_any_order(caches):
    mixture = open_mixture(entries(caches))
    loader, other = Loader(mixture, EVERYTHING, SCALE, GRID), Loader(mixture, EVERYTHING, SCALE, GRID)
    forwards = [loader.batch(i) for i in range(12)]
    backwards = [other.batch(i) for i in reversed(range(12))][::-1]
    for a, b in zip(forwards, backwards, strict=True):
        assert a.rows == b.rows
        for ours, theirs in zip(a.groups, b.groups, strict=True):
            for name in ("latents", "noise", "sigma", "prompt_embeds", "weight", "mask"):
                assert torch.equal(getattr(ours, name), getattr(theirs, name)), name
            assert (ours.path is None) == (theirs.path is None)
            assert ours.path is None or torch.equal(ours.path, theirs.path)
            assert len(ours.routes) == 2
            for route, same in zip(ours.routes, theirs.routes, strict=True):
                assert torch.equal(route.kept, same.kept)


def test_another_seed_changes_every_draw(caches):
    mixture = open_mixture(entries(caches)[:1])
    first, other = (groups(mixture, replace(EVERYTHING, seed=seed), [0])[0] for seed in (1, 2))
    assert first.sigma[0] != other.sigma[0]
    assert not torch.equal(first.noise[0], other.noise[0])
    tokens = [route.kept[0].tolist() for group in groups(mixture, TREAD, range(8)) for route in group.routes]
    other_seed = groups(mixture, replace(TREAD, seed=1), [0])
    tokens += [route.kept[0].tolist() for group in other_seed for route in group.routes]
    assert len({tuple(k) for k in tokens if len(k) == 8}) > 4  # TREAD's tokens are others for each row, step and seed


def test_options_that_are_on_leave_the_other_draws_as_they_were(caches):
    mixture = open_mixture(entries(caches))
    plain = groups(mixture, replace(CONFIG, caption_dropout_probability=0.3, gradient_accumulation_steps=2))
    on = groups(mixture, EVERYTHING)
    for a, b in zip(plain, on, strict=True):
        assert torch.equal(a.noise, b.noise)
        assert torch.equal(a.latents, b.latents)
        assert torch.equal(a.prompt_embeds, b.prompt_embeds)


def test_stratified_sigmas_fill_every_slice_of_an_update_once(caches):
    objective = ObjectiveConfig(stratified_sigmas=True, sigma_sampling="uniform")
    config = replace(CONFIG, gradient_accumulation_steps=4, objective=objective)
    loader = Loader(open_mixture(entries(caches)), config, SCALE)
    order = []
    for step in range(6):
        drawn = [g.sigma for micro in range(4 * step, 4 * step + 4) for g in loader.batch(micro).groups]
        sigmas = torch.cat(drawn)
        assert sorted((sigmas * len(sigmas)).long().tolist()) == list(range(len(sigmas)))
        order.append((sigmas * len(sigmas)).long().tolist())
    assert len({tuple(o) for o in order}) > 1


def test_dropout_puts_the_empty_prompt_in_its_share_of_rows(caches):
    cache = open_cache(caches[0])
    empty = cache.prompt("").prompt_embeds
    for share in (0.0, 0.3, 1.0):
        batches = groups(cache, replace(CONFIG, caption_dropout_probability=share), range(100))
        rows = [row for g in batches for row in g.prompt_embeds]
        dropped = sum(row.shape == empty.shape and torch.equal(row, empty) for row in rows) / len(rows)
        assert dropped == pytest.approx(share, abs=0.14 if share == 0.3 else 0)  # 4 standard errors


def test_captions_are_chosen_at_random_or_the_first_is_taken(caches):
    cache = open_cache(caches[0])
    both = {key: cache.text(key).prompt_embeds for key in cache.row(0).caption_keys}
    assert len(both) == 2

    def chosen(choice: str) -> Counter:
        counts = Counter()
        for group in groups(cache, replace(CONFIG, caption_dropout_probability=0.0, caption_choice=choice), range(60)):
            for row in group.prompt_embeds:
                counts.update(k for k, t in both.items() if t.shape == row.shape and torch.equal(t, row))
        return counts

    first, second = both
    assert set(chosen("first")) == {first}
    random = chosen("random")
    assert 0.2 < random[second] / random.total() < 0.8


def test_the_shift_follows_the_recipe_or_the_bucket(caches):
    cache = open_cache(caches[0])
    plain = groups(cache, CONFIG)
    shifted = groups(cache, replace(CONFIG, flow_schedule_shift=3.0))
    auto = groups(cache, replace(CONFIG, objective=ObjectiveConfig(flow_schedule_auto_shift=True)))
    for a, b, c in zip(plain, shifted, auto, strict=True):
        torch.testing.assert_close(b.sigma, flow.shift_sigmas(a.sigma, 3.0))
        tokens = a.latents.shape[2] * a.latents.shape[3] // 4
        torch.testing.assert_close(c.sigma, flow.shift_sigmas(a.sigma, flow.auto_shift(tokens)))


def test_sigmas_stay_in_the_range_of_the_recipe_with_strata_and_rollouts_too(caches):
    cache = open_cache(caches[0])
    objective = ObjectiveConfig(sigma_min=0.6, sigma_max=0.8, stratified_sigmas=True)
    config = replace(CONFIG, objective=objective, rollout=RolloutConfig(probability=0.5), flow_schedule_shift=3.0)
    loader = Loader(cache, config, SCALE, torch.linspace(1, 0, 51))
    sigmas = torch.cat([g.sigma for micro in range(20) for g in loader.batch(micro).groups])
    assert 0.6 <= sigmas.min() < 0.65
    assert 0.75 < sigmas.max() <= 0.8
    with pytest.raises(RecipeError, match="No sigma of the 50 steps on which a rollout ends is in"):
        Loader(cache, replace(config, objective=ObjectiveConfig(sigma_min=0.505, sigma_max=0.51)), SCALE,
               torch.linspace(1, 0, 51))  # fmt: skip


def test_regularisation_rows_weigh_their_share_and_the_weighting_multiplies_it(caches):
    mixture = open_mixture(entries(caches, {}, {"is_regularisation_data": True}))
    objective = ObjectiveConfig(prior_loss_weight=0.25, weighting="cosmap")
    loader = Loader(mixture, replace(CONFIG, objective=objective, batch_size=1), SCALE)
    seen = set()
    for micro in range(10):
        batch = loader.batch(micro)
        (group,) = batch.groups
        prior = 0.25 if batch.rows[0] > 2 else 1.0
        assert torch.equal(group.weight, flow.loss_weights(group.sigma, objective) * prior)
        seen.add(prior)
    assert seen == {0.25, 1.0}
    assert all(g.weight is None for g in groups(mixture, CONFIG))


def test_masks_of_a_batch_are_those_of_its_rows_and_whole_where_there_is_none(caches):
    cache = open_cache(caches[0])
    config = replace(CONFIG, batch_size=1, objective=ObjectiveConfig(masked_loss=True, unmasked_weight=0.1))
    loader = Loader(cache, config, SCALE)
    for micro in range(6):
        batch = loader.batch(micro)
        (group,) = batch.groups
        assert group.mask.shape == (*group.latents.shape[:-1], 1)
        if batch.rows[0] == 0:
            half = torch.full((8, 8), 0.1)
            half[:, :4] = 1
            torch.testing.assert_close(group.mask[0, 0, ..., 0], half)
        else:
            assert (group.mask == 1).all()


@pytest.mark.parametrize(
    "options",
    [
        {"objective": ObjectiveConfig(masked_loss=True)},
        {"tread": TreadConfig(routes=(RouteConfig(0.5, 0, 0),), keep_masked=True)},
    ],
)
def test_counting_on_masks_that_are_not_there_is_refused(caches, options):
    with pytest.raises(RecipeError, match="the cache holds no masks"):
        Loader(open_cache(caches[1]), replace(CONFIG, **options), SCALE)


def test_routes_keep_their_share_of_tokens_and_what_a_mask_covers(caches):
    config = replace(CONFIG, batch_size=1, tread=TreadConfig(routes=(RouteConfig(0.75, 0, 1),), keep_masked=True))
    loader = Loader(open_cache(caches[0]), config, SCALE)
    for micro in range(6):
        batch = loader.batch(micro)
        (group,), (route,) = batch.groups, batch.groups[0].routes
        num_tokens = group.latents.shape[2] * group.latents.shape[3] // 4
        if batch.rows[0] == 0:  # the left half: 8 of 16 tokens, more than the quarter that 0.75 leaves
            covered = torch.nonzero(tread.masked_tokens(loader.data.first.mask(loader.data.row(0).mask_key))).flatten()
            assert route.kept[0].tolist() == covered.tolist()
        else:
            assert route.kept.shape[1] == num_tokens - int(0.75 * num_tokens)
    last = replace(config, tread=replace(config.tread, ramp_down=1.0, keep_masked=False))
    ramped = Loader(open_cache(caches[0]), last, SCALE)
    assert len(ramped.batch(0).groups[0].routes) == 1
    assert ramped.batch(last.steps - 1).groups[0].routes == ()


def test_rolled_rows_end_on_the_grid_and_a_group_without_any_has_no_path(caches):
    cache = open_cache(caches[0])
    config = replace(CONFIG, batch_size=1, rollout=RolloutConfig(probability=0.5, num_inference_steps=10))
    batches, plain = groups(cache, config, range(30)), groups(cache, replace(CONFIG, batch_size=1), range(30))
    rolled = [(a, b) for a, b in zip(batches, plain, strict=True) if a.path is not None]
    assert 5 < len(rolled) < 25
    for group, before in rolled:
        assert torch.equal(group.sigma, group.path[:, -1])
        assert (GRID - group.sigma).abs().min() == 0
        assert abs(group.sigma - before.sigma) <= 0.1
    assert all(torch.equal(a.sigma, b.sigma) for a, b in zip(batches, plain, strict=True) if a.path is None)


def test_a_row_that_ends_a_run_is_named_with_its_cache_where_there_are_several(caches):
    several, single = open_mixture(entries(caches)), open_mixture(entries(caches)[:1])
    said = exploded("The loss is nan", [0, len(several) - 1], several).problem
    assert all(f"{path.name}: " in said for path in map(Path, caches))
    assert f"{Path(caches[0]).name}: " not in exploded("The loss is nan", [0], single).problem

"""Differential output preservation: class captions in the cache, and a step that is a plain loop's, to the gradient."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest
import torch
import torch.nn.functional as F

from k5cache.encode.request import check_options
from k5cache.options import CacheConfig
from k5cache.shared.errors import RecipeError
from k5cache.shared.model import ModelConfig
from k5cache.sources.class_captions import class_of, notice
from k5cache.store.manifest import read_manifest
from k5cache.store.reader import open_cache
from k5cache.upkeep.gc import collect
from k5cache.upkeep.merge import merge_caches
from k5cache.upkeep.verify import verify_cache
from k5train.adapter import attach
from k5train.base.quantize import load_transformer
from k5train.data.batch import Batch, Group
from k5train.data.kind import class_warnings
from k5train.data.loader import Loader
from k5train.data.mixture import Mixture, Source
from k5train.forward.predict_velocity import predict_velocity
from k5train.forward.routing import Route
from k5train.forward.without_adapter import adapter_layers, without_adapter
from k5train.objective import flow
from k5train.options.adapter import LoraConfig
from k5train.options.objective import ObjectiveConfig, RolloutConfig, RouteConfig, TreadConfig
from k5train.options.train import TrainConfig
from k5train.planning.memory import Streaming
from k5train.training import loop
from k5train.training.step import accumulate, train_step
from tests.runs import CONFIG, go_on, metrics_of, numbers, same, start_run, state_of
from tests.toy_blocks import batch, eager_execution, model
from tests.workshop import EditShop, Workshop

PRESERVED = ObjectiveConfig(preservation_weight=0.5)


def test_a_class_caption_has_the_class_in_the_place_of_the_trigger():
    def of(caption: str, **options: str) -> str | None:
        replaced = class_of(CacheConfig(**{"trigger": "sks", "class_word": "woman", **options}))
        assert replaced is not None
        return replaced(caption)

    assert of("sks, a portrait of sks") == "woman, a portrait of woman"
    assert of("a sks's hat, sksy") == "a woman's hat, sksy"
    assert of("a portrait") is None
    assert of("sks woman, smiling", trigger="sks woman ", class_word=r"\1 woman") == r"\1 woman, smiling"
    assert of("photo of ohwx man", class_replaces="ohwx man", class_word="man") == "photo of man"
    assert of("一张小明的照片", class_replaces="小明", class_word="男人") == "一张男人的照片"
    assert class_of(CacheConfig(trigger="sks")) is None
    (line,) = notice(["sks, a", "a b", "a b"], CacheConfig(trigger="sks", class_word="cat"))
    assert line.startswith("1 of 2 captions do not have 'sks', which cache.class_word replaces, such as 'a b'")
    with pytest.raises(RecipeError, match="no word in the captions that it replaces"):
        check_options(CacheConfig(class_word="cat"), "t2i", ModelConfig())
    with pytest.raises(RecipeError, match=r"caption_extension is \.PNG, which is the suffix of images"):
        check_options(CacheConfig(caption_extension=".PNG"), "t2i", ModelConfig())


@pytest.fixture(scope="module")
def shop(tmp_path_factory, toy_model) -> Workshop:
    """Five images in two buckets; one of them has two captions, and one has none with the trigger in it."""
    shop = Workshop(tmp_path_factory.mktemp("shop"), toy_model)
    for i, caption in enumerate(("sks", "sks on a hill", "a portrait of sks\na drawing of sks, red", "a dog")):
        shop.put(f"{i}.png", caption, seed=i)
    shop.put("wide.png", "sks, a wide picture", seed=9, size=(96, 64))
    shop.encode(class_replaces="sks", class_word="old cat")
    return shop


def test_every_caption_with_the_trigger_has_its_class_caption_in_the_cache_and_keeps_it(shop, tmp_path, toy_model):
    cache = open_cache(shop.root)
    texts = {
        cache.text(key).caption: text.caption if (text := cache.class_text(key)) else None
        for i in range(len(cache))
        for key in cache.row(i).caption_keys
    }
    assert texts == {
        "sks": "old cat", "sks on a hill": "old cat on a hill", "a portrait of sks": "a portrait of old cat",
        "a drawing of sks, red": "a drawing of old cat, red", "a dog": None,
        "sks, a wide picture": "old cat, a wide picture",
    }  # fmt: skip
    assert collect(shop.root).num_rows == 0
    assert verify_cache(shop.root).problems == ()
    other = Workshop(tmp_path, toy_model)
    other.put("new.png", "sks", seed=20)
    other.put("more.png", "sks in a box", seed=21)
    assert other.encode(class_replaces="sks", class_word="old cat").num_texts == 5  # and the empty prompt
    merge_caches([shop.root, other.root], tmp_path / "merged")
    assert len(read_manifest(tmp_path / "merged").classes) == 6
    # One image more is its two texts; another class is all class captions again, and no caption.
    other.put("third.png", "sks asleep", seed=22)
    assert other.encode(class_replaces="sks", class_word="old cat").num_texts == 2
    assert other.encode(class_replaces="sks", class_word="dog", update=True).num_texts == 3
    assert collect(other.root).num_rows == 3
    # Without a class the manifest is as it always was.
    assert other.encode(update=True).num_texts == 0
    assert b"classes" not in (other.root / "manifest.json").read_bytes()


def config_with(**options: object) -> TrainConfig:
    return replace(CONFIG, objective=PRESERVED, batch_size=5, caption_dropout_probability=0.5, **options)


def test_each_row_of_a_batch_has_its_own_class_caption_padded_or_in_a_group_of_its_length(shop):
    cache = open_cache(shop.root)
    of_class = {cache.class_text(k).caption: cache.class_text(k) for k in cache.manifest.classes}
    for unequal in ("split", "mask"):
        loader = Loader(cache, config_with(unequal_captions=unequal), 0.3611)
        plain = Loader(cache, replace(loader.config, objective=ObjectiveConfig()), 0.3611)
        seen = 0
        for micro in range(6):
            batch = loader.batch(micro)
            assert sum(len(g.sigma) for g in batch.groups) == batch.num_rows
            without = {tuple(x) for g in plain.batch(micro).groups for x in g.noise.flatten(1)[:, :3].tolist()}
            for group in batch.groups:
                assert all(tuple(row) in without for row in group.noise.flatten(1)[:, :3].tolist())  # the same draws
                if group.class_embeds is None:
                    continue
                lengths = group.class_lengths or (group.class_embeds.shape[1],) * len(group.sigma)
                for embeds, pooled, length in zip(group.class_embeds, group.class_pooled, lengths, strict=True):
                    assert any(
                        torch.equal(embeds[:length], text.prompt_embeds) and torch.equal(pooled, text.pooled)
                        for text in of_class.values()
                    )
                    assert (embeds[length:] == 0).all()
                    seen += 1
        assert seen > 9  # dropout, which half of the rows have, drops none
    regularised = Mixture([Source(cache), Source(cache, is_regularisation_data=True)])
    loader = Loader(regularised, replace(config_with(), batch_size=1), 0.3611)
    for micro in range(12):
        (group,) = loader.batch(micro).groups
        is_dog = cache.text(regularised.row(loader.rows_of(micro)[0]).caption_keys[0]).caption == "a dog"
        assert (group.class_embeds is None) == (loader.rows_of(micro)[0] >= len(cache) or is_dog)


def test_class_captions_that_do_nothing_are_named_and_the_cost_of_those_that_do(shop, toy_cache):
    data, plain = (Mixture([Source(open_cache(root))]) for root in (shop.root, toy_cache("fp32")))
    (unused,) = class_warnings(data, CONFIG)
    assert unused == "The class captions of cache do nothing here: train.objective.preservation_weight is not set"
    (cost,) = class_warnings(data, config_with())
    assert "about 2.2 times as long" in cost
    assert class_warnings(plain, CONFIG) == []


def test_preserving_without_class_captions_is_refused_with_the_command(toy_cache):
    with pytest.raises(RecipeError, match="holds no class captions") as caught:
        Loader(open_cache(toy_cache("fp32")), config_with(), 0.3611)
    assert "--set cache.class_word=CLASS --update" in caught.value.fix


def adapted(folder, algo: str):
    transformer = load_transformer(folder, "no_change", torch.float32, "cpu")
    attach.add_lora(transformer, LoraConfig(algo=algo, rank=4, alpha=None, targets=("official",)), seed=0)
    generator = torch.Generator().manual_seed(3)
    for parameter in attach.lora_parameters(transformer):
        parameter.data = parameter.data + 0.1 * torch.randn(parameter.shape, generator=generator)
    return transformer.train()


def a_group(transformer, size: int, seed: int, **changes: object) -> Group:
    latents, sigma, text, pooled = batch(transformer, size=size)
    generator = torch.Generator().manual_seed(seed)
    return Group(
        latents, torch.randn(latents.shape, generator=generator), sigma, text, pooled,
        class_embeds=torch.randn(size, 4, text.shape[2], generator=generator),
        class_pooled=torch.randn(pooled.shape, generator=generator), **changes,
    )  # fmt: skip


@pytest.mark.parametrize("algo", ["lora", "dora", "lokr"])
def test_a_step_has_the_gradient_of_a_plain_loop_over_an_adapted_model_and_its_base(toy_model, algo):
    ours, base = adapted(toy_model, algo), load_transformer(toy_model, "no_change", torch.float32, "cpu")
    mask = torch.zeros(2, 1, 8, 8, 1)
    mask[..., :3, :] = 1
    route = Route(0, 1, torch.tensor([[0, 3, 5, 6, 9, 10, 12, 15]] * 2))
    groups = [
        a_group(ours, 2, 5, mask=mask, weight=torch.tensor([0.2, 1.5]), routes=(route,)),
        a_group(ours, 1, 6),
        replace(a_group(ours, 2, 7), class_embeds=None, class_pooled=None),  # no class caption
    ]
    batches = [Batch((0, 1, 2), tuple(groups[:2])), Batch((3, 4), (groups[2],))]
    layers = adapter_layers(ours)
    trained = [p.requires_grad for p in ours.parameters()]

    def predict_base(*inputs, **extra):
        with without_adapter(layers):
            return predict_velocity(ours, *inputs, **extra)

    loss_of = partial(train_step, huber_c=0.5)
    losses = accumulate(partial(predict_velocity, ours), batches, None, torch.device("cpu"), loss_of=loss_of,
                        preserve=(0.7, predict_base))  # fmt: skip
    found = {name: p.grad.clone() for name, p in ours.named_parameters() if p.grad is not None}
    assert [p.requires_grad for p in ours.parameters()] == trained
    ours.zero_grad()

    total, of_classes, plain = torch.zeros(()), 0.0, 0.0
    for group in groups:
        noisy = flow.add_noise(group.latents, group.noise, group.sigma)
        target = flow.velocity_target(group.latents, group.noise)
        routes = {"routes": group.routes}
        velocity = predict_velocity(ours, noisy, group.sigma, group.prompt_embeds, group.pooled_projections, **routes)
        trained_on = flow.flow_loss(velocity, target, group.weight, group.mask, 0.5)
        total = total + trained_on * len(group.sigma) / 5
        plain += trained_on.item() * len(group.sigma) / 5
        if group.class_embeds is not None:
            texts = (group.class_embeds, group.class_pooled)
            with torch.no_grad():
                kept = predict_velocity(base, noisy, group.sigma, *texts, **routes)
            error = F.mse_loss(predict_velocity(ours, noisy, group.sigma, *texts, **routes), kept)
            total = total + 0.7 * error * len(group.sigma) / 5
            of_classes += error.item() * len(group.sigma) / 3
    total.backward()
    expected = {name: p.grad for name, p in ours.named_parameters() if p.grad is not None}
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-7, msg=name)
    assert losses.preservation == pytest.approx(of_classes, rel=1e-5)
    assert losses.preservation > 1e-4
    assert losses.mean == pytest.approx(plain, rel=1e-5)


@pytest.mark.parametrize("streaming", [None, Streaming(2, slots=1)], ids=["resident", "streamed"])
def test_lean_blocks_without_their_adapters_are_the_base_and_go_on_as_before(toy_model, streaming):
    transformer = model(toy_model, targets=("qkv", "time_embeddings.in_layer"), dropout=0.3)
    inputs = batch(transformer)
    base = load_transformer(toy_model, "int8-quanto", torch.float32, "cpu")
    execution = eager_execution(transformer, "selective", streaming)
    its_own = eager_execution(base, "selective")
    layers = adapter_layers(transformer)

    def gradients() -> dict[str, torch.Tensor]:
        torch.manual_seed(0)
        transformer.zero_grad()
        predict_velocity(transformer, *inputs, block_policies=execution.policies).square().mean().backward()
        return {n: p.grad.clone() for n, p in transformer.named_parameters() if p.grad is not None}

    before = gradients()
    expected = predict_velocity(base, *inputs, block_policies=its_own.policies)
    for _ in range(1 if streaming is None else 2):
        with torch.no_grad(), without_adapter(layers):
            velocity = predict_velocity(transformer, *inputs, block_policies=execution.policies)
        assert torch.equal(velocity, expected)
        assert same(gradients(), before)
    with torch.no_grad():
        adapted = predict_velocity(transformer, *inputs, block_policies=execution.policies)
    assert (adapted - expected).abs().max() > 1e-3


def test_a_run_with_everything_on_resumes_to_the_bit_and_writes_what_it_preserved(
    shop, tmp_path, toy_model, monkeypatch
):
    config = replace(
        CONFIG, steps=3, checkpoint_every=1, objective=replace(PRESERVED, sigma_min=0.1), gradient_accumulation_steps=2,
        rollout=RolloutConfig(probability=0.5), tread=TreadConfig(routes=(RouteConfig(0.5, 0, 0),)),
        unequal_captions="mask",
    )  # fmt: skip
    start_run(tmp_path / "whole", shop.root, toy_model, config)
    ordinary, calls = loop.accumulate, []

    def stop_at_the_third(*args, **kwargs):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return ordinary(*args, **kwargs)

    monkeypatch.setattr(loop, "accumulate", stop_at_the_third)
    with pytest.raises(KeyboardInterrupt, match="saved at step 2"):
        start_run(tmp_path / "stopped", shop.root, toy_model, config)
    go_on(tmp_path / "stopped")
    assert same(state_of(tmp_path / "stopped"), state_of(tmp_path / "whole"))
    rows, again = (numbers(metrics_of(tmp_path / name)) for name in ("whole", "stopped"))
    assert rows == again
    preserved = [row["preservation_loss"] for row in rows if "loss" in row]
    assert preserved[0] == 0  # lora_B is zero before the first update
    assert all(value > 0 for value in preserved[1:])


def test_pairs_of_image_to_image_preserve_what_the_base_does_with_their_source(tmp_path, toy_edit_model):
    shop = EditShop(tmp_path / "pairs", toy_edit_model)
    for i in range(2):
        shop.put_pair(f"{i}.png", "paint it", seed=i)
    shop.encode(trigger="sks style", class_word="style")
    cache = open_cache(shop.root)
    assert {cache.class_text(key).caption for key in cache.manifest.classes} == {"paint it, style"}
    assert len(set(cache.manifest.classes.values())) == 2  # one for each source
    loader = Loader(cache, replace(CONFIG, objective=PRESERVED, caption_dropout_probability=0.0), 0.3611)
    transformer = adapted(toy_edit_model, "lora")
    layers, seen = adapter_layers(transformer), []

    def predict_base(*inputs, **extra):
        seen.append(extra["condition"])
        with without_adapter(layers):
            return predict_velocity(transformer, *inputs, **extra)

    pairs = loader.batch(0)
    predict = partial(predict_velocity, transformer)
    losses = accumulate(predict, [pairs], cache, torch.device("cpu"), preserve=(1.0, predict_base))
    assert losses.preservation > 1e-4
    assert all(torch.equal(a, g.condition) for a, g in zip(seen, pairs.groups, strict=True))

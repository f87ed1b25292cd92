"""``k5cache selftest`` and ``verify --reencode`` on image-to-image: a checkpoint, and a cache of pairs."""

from __future__ import annotations

import pytest
import torch

from k5cache.cli import app
from k5cache.encoders import vision
from k5cache.exact.reencode import reencode
from k5cache.shared import console
from k5cache.shared.model import ModelConfig
from tests.cli import Cli
from tests.edit_models import edit_pipeline
from tests.workshop import EditShop


@pytest.fixture(scope="module")
def shop(toy_edit_model, tmp_path_factory):
    shop = EditShop(tmp_path_factory.mktemp("shop"), toy_edit_model)
    shop.put_pair("a.png", "make the whole picture look like a drawing in ink", seed=1)
    shop.put_pair("b.png", "turn the sky into a starry night over the house", seed=2, source_size=(40, 90))
    shop.put_pair("c.png", "make the whole picture look like a drawing in ink", seed=3, size=(130, 60))
    shop.encode()
    return shop


def selftest(shop, *words: str):
    return Cli(shop.root.parent)(app, "selftest", *words, "--model", str(shop.model), "--device", "cpu")


def test_a_checkpoint_and_a_cache_of_pairs_are_what_diffusers_computes(shop):
    alone = selftest(shop)
    assert alone.code == 0, alone.err + alone.out
    cached = selftest(shop, str(shop.root), "--source", str(shop.source), "--sources", str(shop.sources))
    assert cached.code == 0, cached.err + cached.out
    said = " ".join(cached.out.split())
    for words in ("mean of 6 crops", "cached latents of 6", "All 10 comparisons pass, 10 of them bit for bit"):
        assert words in said, cached.out


def test_stored_rows_are_the_pipelines_for_the_crop(shop):
    from PIL import Image

    from k5cache.sources.images import load_pixels
    from k5cache.store.geometry import source_of_row

    pipeline = edit_pipeline(shop.model)
    for i in range(len(shop.cache)):
        item = shop.cache[i]
        row = item["row"]
        crop = load_pixels(shop.sources / row.source_path, source_of_row(row))
        image = Image.fromarray(crop.permute(1, 2, 0).numpy())
        for text, prompt in ((item["captions"][0], item["captions"][0].caption), (item["empty"], "")):
            with torch.no_grad():
                theirs, pooled, _ = pipeline.encode_prompt(prompt, image=image, device=torch.device("cpu"))
            assert torch.equal(text.prompt_embeds, theirs[0])
            assert torch.equal(text.pooled, pooled[0])


def again(shop, count, source, sources):
    with console.progress() as bars:
        return reencode(shop.cache, count, source, ModelConfig(path=str(shop.model)), "cpu", bars, sources=sources)


def test_rows_of_pairs_are_encoded_again_and_compared(shop):
    reencoded = again(shop, 9, shop.source, shop.sources)
    assert reencoded.not_compared == ()
    assert sum(row.kind == "text" for row in reencoded.compared) == 6
    assert sum(row.kind == "latents" for row in reencoded.compared) == 6
    assert all(row.is_exact for row in reencoded.compared)


def test_without_the_sources_it_says_what_to_name(shop):
    reencoded = again(shop, 9, None, None)
    assert reencoded.compared == ()
    assert "name the folder of the images with --source" in reencoded.not_compared[0]


def test_another_vision_tower_is_seen(shop, monkeypatch):
    look = vision.look
    monkeypatch.setattr(vision, "look", lambda *a, **k: ((name, 1.1 * tokens) for name, tokens in look(*a, **k)))
    reencoded = again(shop, 9, shop.source, shop.sources)
    assert {row.kind for row in reencoded.compared if row.is_wrong} == {"text"}
    assert selftest(shop).code == 1

"""Is a LoRA that was trained from the cache the same as one trained with live encoders? Tested on k5-micro."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import Kandinsky5T2IPipeline
from diffusers.image_processor import VaeImageProcessor
from PIL import Image

from k5cache.store.reader import Cache
from tests import micro
from tests.runs import lora_of


@pytest.mark.long
def test_a_lora_from_the_cache_equals_one_trained_with_live_encoders(once, tmp_path, monkeypatch):
    cache = micro.cache(once, "held_out")
    chosen = micro.config(steps=5)
    micro.train_lora(tmp_path / "cached", cache, chosen)
    live = Live(cache.parent.parent / "held_out")
    monkeypatch.setattr(Cache, "text", live.text(Cache.text))
    monkeypatch.setattr(Cache, "latents", live.latents(Cache))
    micro.train_lora(tmp_path / "live", cache, chosen)
    assert live.num_texts >= 5
    assert live.num_pictures == 20  # 5 steps of 4
    ours, theirs = lora_of(tmp_path / "cached"), lora_of(tmp_path / "live")
    assert any(tensor.abs().max() > 0 for name, tensor in ours.items() if "lora_B" in name)
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []


class Live:
    """diffusers' pipeline in place of the cache: each row is encoded alone when it is read.

    Numbers are rounded as the cache stores them; nothing else comes from the cache.
    """

    def __init__(self, pictures: Path) -> None:
        self.pictures, self.num_texts, self.num_pictures = pictures, 0, 0
        self.pipeline = Kandinsky5T2IPipeline.from_pretrained(micro.MODEL, dtype=torch.float32)
        self.processor = VaeImageProcessor(vae_scale_factor=8)

    def text(self, read):
        def text(cache, key):
            row = read(cache, key)
            self.num_texts += 1
            with torch.no_grad():
                embeds, pooled, _ = self.pipeline.encode_prompt(row.caption, device="cpu")
            dtypes = row.prompt_embeds.dtype, row.pooled.dtype
            return replace(row, prompt_embeds=embeds[0].to(dtypes[0]), pooled=pooled[0].to(dtypes[1]))

        return text

    def latents(self, _):
        paths = {}

        def latents(cache, key):
            if not paths:
                paths.update({row.latent_key: row.path for row in map(cache.row, range(len(cache)))})
            self.num_pictures += 1
            with Image.open(self.pictures / paths[key]) as image, torch.no_grad():
                pixels = self.processor.preprocess(image.convert("RGB"))
                posterior = self.pipeline.vae.encode(pixels).latent_dist
            parts = {"mean": posterior.mean, "std": posterior.std}
            return {name: part[0].permute(1, 2, 0).to(torch.float16) for name, part in parts.items()}

        return latents

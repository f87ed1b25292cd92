"""On a GPU: streamed and resident encoders give the same bits, keep to the VRAM limit, and free it afterwards."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from rich.progress import Progress

from k5cache.buckets import Bucket, cover
from k5cache.encode import estimate, image_pass, text_pass
from k5cache.encode.commit import Committer
from k5cache.encode.job import Job, LatentJob, TextJob
from k5cache.encoders import memory_plan, qwen, streaming, vae
from k5cache.encoders.pipeline import clean
from k5cache.encoders.strips import moments_in_strips
from k5cache.options import CacheConfig
from k5cache.shared import vram
from k5cache.store.manifest import Manifest

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")

CAPTIONS = [" ".join(["a red fox in the snow"] * n) for n in (1, 3, 3, 9, 2, 30, 1, 14)]


@pytest.fixture(scope="module")
def tokens(toy_model):
    tokenizer = qwen.load_tokenizer(toy_model)
    return [qwen.tokenize(tokenizer, clean(caption), 512) for caption in CAPTIONS]


@pytest.mark.parametrize("parking", ["device", "host"])
@pytest.mark.parametrize("exact", [True, False], ids=["exact", "fast"])
def test_streaming_gives_the_bits_of_the_whole_model(toy_model, tokens, exact, parking):
    options = {"exact": exact, "batch_tokens": 200}
    expected = qwen.encode_prompt_embeds(qwen.load_qwen(toy_model, "cuda", torch.bfloat16), tokens, **options)
    encoder = qwen.load_qwen(toy_model, "cuda", torch.bfloat16, streamed=True)
    for _ in range(5):  # a race would not show each time
        streamed = {
            i: row.clone() for i, row in streaming.stream_prompt_embeds(encoder, tokens, parking=parking, **options)
        }
        for i, row in enumerate(expected):
            assert torch.equal(streamed[i], row), CAPTIONS[i]


def test_layers_read_through_pinned_memory_are_the_file(toy_model):
    encoder = qwen.load_qwen(toy_model, "cuda", torch.bfloat16)
    for name, value in encoder.model.layers.state_dict().items():
        assert torch.equal(value.cpu(), encoder.weights.tensor(f"layers.{name}"))


@pytest.mark.parametrize("mode", ["resident", "streamed"])
def test_vram_is_free_after_each_encoder(toy_model, tmp_path, monkeypatch, mode, capfd):
    text_plan = memory_plan.TextPlan(mode, "device", 300, 8192, 0, 0, 0)
    monkeypatch.setattr(estimate, "plan_text", lambda *_: text_plan)
    vram.release("cuda")
    before = torch.cuda.memory_allocated(), torch.cuda.memory_reserved()
    job = Job(Path, tmp_path, toy_model, CacheConfig(), "cuda", Progress(disable=True))
    jobs = [TextJob(f"{i:032x}", caption) for i, caption in enumerate(CAPTIONS)]
    text_pass.encode_texts(job, Committer(tmp_path, Manifest(recipe={}), 2**20), jobs)
    assert (torch.cuda.memory_allocated(), torch.cuda.memory_reserved()) == before
    assert "behind" not in capfd.readouterr().err


def test_strips_are_the_whole_image(toy_model):
    loaded = vae.load_vae(toy_model, "cuda", torch.float32)
    pixels = torch.rand(1, 3, 256, 192, generator=torch.Generator().manual_seed(0)).cuda() * 2 - 1
    with torch.no_grad():
        expected = loaded._encode(pixels)
        moments = moments_in_strips(loaded, pixels, 5000)
    # Convolutions are in TF32 where the library chooses so: 10 bits of mantissa
    assert (moments - expected).norm() / expected.norm() < 2e-3


def test_latents_of_the_pass_are_those_of_one_image_alone(toy_model):
    geometry = cover(80, 70, Bucket(64, 64))
    job = Job(Path, Path(), toy_model, CacheConfig(resolution=64), "cuda", Progress(disable=True))
    encoder = image_pass.Vae(job, [LatentJob("0", "x.png", geometry)])
    pixels = torch.randint(0, 256, (3, 64, 64), dtype=torch.uint8)
    moments = encoder.moments(pixels, ["mean", "std"]).cpu()
    alone = vae.encode_pixels(vae.load_vae(toy_model, "cuda", torch.float32), vae.to_model_range(pixels[None]))
    assert torch.equal(moments[0], alone.mean[0].half())
    assert torch.equal(moments[1], alone.std[0].half())


def test_the_limit_that_vram_sets_is_kept_and_lifted():
    vram.limit_to_card("cuda", vram.CONTEXT_BYTES + 2**26)
    try:
        with pytest.raises(torch.OutOfMemoryError):
            torch.empty(2**28, dtype=torch.uint8, device="cuda")
    finally:
        vram.limit_to_card("cuda", None)
    torch.empty(2**28, dtype=torch.uint8, device="cuda")

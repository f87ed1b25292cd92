"""Image-to-image on a GPU: pairs have the bits of ``Kandinsky5I2IPipeline`` there too, resident and streamed."""

from __future__ import annotations

import pytest
import torch

from k5cache.encoders.pipeline import clean
from k5cache.encoders.qwen import encode_prompt_embeds, load_qwen
from k5cache.encoders.streaming import stream_prompt_embeds
from k5cache.encoders.vision import load_tower, look
from k5cache.encoders.with_picture import load_processor, see, tokenize_with_picture
from tests.edit_models import edit_pipeline, picture

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
TEXTS = ("Turn the sky into a starry night, and keep the house as it is", "")
SIZES = ((512, 512), (1023, 769), (640, 1408))


@pytest.mark.parametrize("parking", ["device", "host"])
def test_pairs_have_the_pipelines_bits_on_a_gpu(toy_edit_model, parking):
    processor, dtype = load_processor(toy_edit_model), torch.bfloat16
    pairs = [(picture(*size, seed=i), text) for i, size in enumerate(SIZES) for text in TEXTS]
    seen = [see(processor, source) for source, _ in pairs]
    tower = load_tower(toy_edit_model, "cuda", dtype)
    pictures = [tokens for _, tokens in look(tower, enumerate(seen))]
    fast = [tokens for _, tokens in look(tower, enumerate(seen), exact=False)]
    for exact, close in zip(pictures, fast, strict=True):
        assert (exact.float() - close.float()).norm() < 0.03 * exact.float().norm()  # bfloat16, other sizes
    tokens = [
        tokenize_with_picture(processor, clean(text, "i2i"), own.grid, 1024)
        for own, (_, text) in zip(seen, pairs, strict=True)
    ]
    resident = encode_prompt_embeds(load_qwen(toy_edit_model, "cuda", dtype, kind="i2i"), tokens, pictures)
    streaming = load_qwen(toy_edit_model, "cuda", dtype, kind="i2i", streamed=True)
    streamed = {i: rows.clone() for i, rows in stream_prompt_embeds(streaming, tokens, pictures, parking=parking)}
    pipeline = edit_pipeline(toy_edit_model).to("cuda")
    for i, (source, text) in enumerate(pairs):
        with torch.no_grad():
            theirs, _, _ = pipeline.encode_prompt([text], image=[source], device=torch.device("cuda"))
        assert torch.equal(resident[i], theirs[0].cpu()), (source.size, text)
        assert torch.equal(streamed[i], theirs[0].cpu()), (source.size, text)

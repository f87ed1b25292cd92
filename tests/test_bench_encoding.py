"""Does `k5cache bench --encoders` measure what it says? A tiny model on the CPU: bits and memory, not speed."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest

from k5cache.bench import encoding
from k5cache.bench.encoding import Sizes, bench
from k5cache.encoders.random_model import FULL_CLIP, FULL_TEXT, FULL_VAE, write_model
from k5cache.shared import vram

TINY = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3, "num_attention_heads": 4}
TEXT = {**FULL_TEXT, **TINY, "num_key_value_heads": 2,
        "rope_parameters": {**FULL_TEXT["rope_parameters"], "mrope_section": [2, 3, 3]}}  # fmt: skip
SIZES = Sizes(
    text=TEXT, clip={**FULL_CLIP, **TINY}, vae={**FULL_VAE, "block_out_channels": (32, 32, 32, 32)},
    num_captions=8, num_baseline=4, tokens=(45, 60), growth_tokens=(45, 60),
    num_images=3, side=64, source=(96, 72), growth=(3, 6), growth_layers=1,
)  # fmt: skip


def test_a_full_size_encoder_is_not_loaded_onto_a_card_that_is_too_small(monkeypatch):
    monkeypatch.setattr(vram, "free_card", lambda _: 12 * 2**30)
    found = encoding.Found()
    assert not encoding.has_room(found, "the whole text encoder", encoding.whole_text_bytes(Sizes()), "cuda")
    assert found.rows == [("the whole text encoder", "not measured", "it takes 16.2 GiB of VRAM, 12.0 GiB are free")]
    assert encoding.has_room(found, "the VAE", encoding.whole_vae_bytes(Sizes()), "cuda")


@pytest.mark.filterwarnings("ignore")
def test_what_does_not_fit_is_left_out_and_the_rest_is_measured(monkeypatch):
    monkeypatch.setattr(encoding, "has_room", lambda *_: False)
    monkeypatch.setattr(encoding, "ceiling", lambda *_: None)
    values = bench("cpu", vram=2**29, sizes=replace(SIZES, growth=())).values
    assert {"read_exact", "read_fast", "int8_error"} <= values.keys()
    assert not {"same_exact", "streamed_same_exact", "vae float32"} & values.keys()


@pytest.mark.filterwarnings("ignore")  # the random model's config has keys that transformers remarks on
def test_every_line_is_measured_and_what_must_be_the_same_is():
    values = bench("cpu", vram=2**29, sizes=SIZES).values
    assert values["same_exact"] == [4, 4]  # captions whose bits are encode_prompt's: Qwen, CLIP
    assert values["error_fast"] < 0.02  # bfloat16, other sizes of matrix products
    for batching in ("exact", "fast"):
        assert values[f"streamed_same_{batching}"] == 8
    assert values["vae float32"][2] == 0.0
    assert values["vae float32, strips"][2] < 1e-3  # group norms summed in another order
    assert [values[f"freed_{what}"] for what in ("resident text", "streamed text", "VAE")] == [0, 0, 0]
    assert {f"growth_{n}" for n in SIZES.growth} <= values.keys()


@pytest.mark.filterwarnings("ignore")
def test_first_passes_are_compared_streamed_and_resident(tmp_path, monkeypatch):
    monkeypatch.setattr(encoding, "ProcessPoolExecutor", lambda n, mp_context: ThreadPoolExecutor(n))  # spares imports
    write_model(tmp_path, SIZES, "cpu")
    found = encoding.Found()
    encoding.first_passes(found, tmp_path, SIZES, "cpu")
    values = found.values
    assert 0 < values["first_streamed"] < 60
    assert 0 < values["first_resident"] < 60
    assert values["first_over"] == values["first_streamed"] / values["first_resident"]
    assert found.rows[0][2].startswith(f"{values['first_resident']:.2f} s resident")

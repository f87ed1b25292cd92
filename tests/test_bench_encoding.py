"""Does `k5cache bench --encoders` measure what it says? A tiny model on the CPU: bits and memory, not speed."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest

from k5cache.bench import encoding, text
from k5cache.bench.encoding import bench
from k5cache.bench.measurements import Measurements, Sizes
from k5cache.bench.pairs import bench_pairs
from k5cache.encoders.random_model import FULL_CLIP, FULL_TEXT, FULL_VAE, FULL_VISION, PREPROCESSOR, write_model
from pipelines.demo.make_checkpoint import IMAGE_PROCESSOR

pytestmark = pytest.mark.long

TINY = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3, "num_attention_heads": 4}
TEXT = {**FULL_TEXT, **TINY, "num_key_value_heads": 2,
        "rope_parameters": {**FULL_TEXT["rope_parameters"], "mrope_section": [2, 3, 3]}}  # fmt: skip
SIZES = Sizes(
    text=TEXT, clip={**FULL_CLIP, **TINY}, vae={**FULL_VAE, "block_out_channels": (32, 32, 32, 32)},
    num_captions=8, num_baseline=4, tokens=(45, 60),
    num_images=3, side=64, source=(96, 72),
)  # fmt: skip


def test_a_full_size_encoder_is_not_loaded_onto_a_card_that_is_too_small(monkeypatch):
    monkeypatch.setattr(encoding, "free_card", lambda _: 12 * 2**30)
    measurements = Measurements()
    assert not encoding.has_room(measurements, "the whole text encoder", encoding.whole_text_bytes(Sizes()), "cuda")
    assert measurements.rows == [
        ("the whole text encoder", "not measured", "it takes 16.2 GiB of VRAM, 12.0 GiB are free")
    ]
    assert encoding.has_room(measurements, "the VAE", encoding.whole_vae_bytes(Sizes()), "cuda")


@pytest.mark.filterwarnings("ignore")
def test_what_does_not_fit_is_left_out_and_the_rest_is_measured(monkeypatch):
    monkeypatch.setattr(encoding, "has_room", lambda *_: False)
    monkeypatch.setattr(encoding, "measure_ceiling", lambda *_: None)
    values = bench("cpu", vram=2**29, sizes=SIZES).values
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
    assert [values[f"freed_{name}"] for name in ("resident text", "streamed text", "VAE")] == [0, 0, 0]


@pytest.mark.filterwarnings("ignore")
def test_first_passes_are_compared_streamed_and_resident(tmp_path, monkeypatch):
    monkeypatch.setattr(text, "ProcessPoolExecutor", lambda n, mp_context: ThreadPoolExecutor(n))  # spares imports
    write_model(tmp_path, SIZES, "cpu")
    measurements = Measurements()
    text.first_passes(measurements, tmp_path, SIZES, "cpu")
    values = measurements.values
    assert 0 < values["first_streamed"] < 60
    assert 0 < values["first_resident"] < 60
    assert values["first_over"] == values["first_streamed"] / values["first_resident"]
    assert measurements.rows[0][2].startswith(f"{values['first_resident']:.2f} s resident")


@pytest.mark.filterwarnings("ignore")
def test_pairs_are_measured_beside_the_pipeline_and_exact_ones_have_its_bits():
    tower = {**FULL_VISION, "depth": 2, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2,
             "out_hidden_size": 64, "fullatt_block_indexes": [1]}  # fmt: skip
    values = bench_pairs("cpu", sizes=replace(SIZES, vision=tower, tokens=(5, 20), side=128)).values
    assert values["same_exact"] == 8  # four pairs, each with its instruction and the empty one
    assert values["error_fast"] < 0.02
    assert values["baseline_pairs"] > 0
    assert values["over_baseline_exact"] == pytest.approx(values["pairs_exact"] / values["baseline_pairs"])


def test_the_random_models_image_processor_is_the_published_one():
    assert {key: IMAGE_PROCESSOR[key] for key in PREPROCESSOR} == PREPROCESSOR

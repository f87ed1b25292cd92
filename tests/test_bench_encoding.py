"""Does `k5cache bench --encoders` measure what it says? A tiny model on the CPU: bits and memory, not speed."""

from __future__ import annotations

import pytest

from k5cache.bench.encoding import Sizes, bench
from k5cache.encoders.random_model import FULL_CLIP, FULL_TEXT, FULL_VAE

TINY = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3, "num_attention_heads": 4}
TEXT = {**FULL_TEXT, **TINY, "num_key_value_heads": 2,
        "rope_parameters": {**FULL_TEXT["rope_parameters"], "mrope_section": [2, 3, 3]}}  # fmt: skip
SIZES = Sizes(
    text=TEXT, clip={**FULL_CLIP, **TINY}, vae={**FULL_VAE, "block_out_channels": (32, 32, 32, 32)},
    num_captions=8, num_baseline=4, num_images=3, side=64, source=(96, 72), growth=(3, 6), growth_layers=1,
)  # fmt: skip


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

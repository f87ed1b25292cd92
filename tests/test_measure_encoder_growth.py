"""Does ``pipelines.measure.encoder_growth`` encode what it counts? A tiny model on the CPU."""

from __future__ import annotations

from dataclasses import replace

import pytest

from pipelines.measure.encoder_growth import COLUMNS, measure_growth, table_row
from tests.test_bench_encoding import SIZES, TEXT


@pytest.mark.filterwarnings("ignore")  # the random model's config has keys that transformers remarks on
def test_each_number_of_captions_is_encoded_and_reported():
    lines: list[str] = []
    sizes = replace(SIZES, text={**TEXT, "num_hidden_layers": 1})
    growths = measure_growth(sizes, (3, 6), "cpu", None, lines.append)
    assert [growth.num_captions for growth in growths] == [3, 6]
    assert all(0 < growth.seconds < 60 and growth.host_bytes > 2**27 and not growth.vram_bytes for growth in growths)
    assert [len(table_row(growth)) for growth in growths] == [len(COLUMNS)] * 2
    assert len(lines) == 2

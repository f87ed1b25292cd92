"""Image-to-image on a GPU: parity of one call, of drawings and steps, compiled and streamed blocks, exact resume.

python -m pytest tests/gpu/test_edit_gpu.py
"""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import pytest
import torch

from k5cache.store.reader import open_cache
from k5train.base.quantize import load_transformer
from k5train.bench import steps
from k5train.bench.case import CARDS, EDITS
from k5train.forward.predict_velocity import predict_velocity
from k5train.options.validation import ValidationConfig
from k5train.planning.memory import Streaming
from tests.cli import Cli
from tests.edit_training import make_pairs, rows
from tests.gpu.test_execute_gpu import CASE, GPU, adapted, assert_near, outcome, run
from tests.gpu.test_resume_gpu import COMPILED, compare
from tests.parity import as_the_pipeline_calls_it, reference_transformer
from tests.test_parity_edit import drawing, drawn_by_the_pipeline, drawn_by_us, pipeline_of
from tests.test_parity_training import CONFIG, our_steps, plain_steps

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
DTYPES = [torch.float32, torch.bfloat16]
EDIT = replace(CASE, is_i2i=True)


@pytest.fixture
def root(toy_edit_model, once):
    return once("toy_pairs", lambda folder: make_pairs(folder, toy_edit_model))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_velocity_is_diffusers_own_bit_for_bit(toy_edit_model, dtype):
    for size in ((64, 64), (32, 96)):
        r = rows(size, 2)
        latents, condition, *text = (t.cuda() for t in (r.latents, r.condition, r.sigma, r.embeds, r.pooled))
        with torch.no_grad():
            whole = torch.cat([latents, condition], dim=-1)
            theirs = as_the_pipeline_calls_it(reference_transformer(toy_edit_model, dtype, "cuda"), whole, *text)
            ours = load_transformer(toy_edit_model, "no_change", dtype, "cuda")
            assert torch.equal(predict_velocity(ours, latents, *text, condition=condition), theirs)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_drawing_from_a_cached_pair_is_the_pipelines_bit_for_bit(toy_edit_model, root, dtype):
    cache = open_cache(root)
    transformer = load_transformer(toy_edit_model, "no_change", dtype, "cuda")
    ours = drawn_by_us(transformer, toy_edit_model, drawing(cache, 3.5))
    pipeline = pipeline_of(toy_edit_model, cache, dtype, "cuda")
    assert torch.equal(ours, drawn_by_the_pipeline(pipeline, cache, 3.5, device="cuda"))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_twenty_training_steps_are_a_plain_loops(toy_edit_model, root, dtype):
    cache, config = open_cache(root), replace(CONFIG, source_dropout_probability=0.25)
    losses, _, ours, start, seen = our_steps(toy_edit_model, cache, "no_change", dtype, 20, config, "cuda")
    start = {name: tensor.cuda() for name, tensor in start.items()}
    their_losses, _, theirs = plain_steps(toy_edit_model, "no_change", dtype, start, seen, "cuda")
    # Attention's backward adds in no fixed order on a GPU, and Adam turns a gradient near zero into a step of lr.
    assert losses == pytest.approx(their_losses, rel={torch.float32: 1e-4, torch.bfloat16: 1e-2}[dtype])
    moved = torch.cat([(theirs[n] - start[n]).flatten() for n in ours])
    apart = torch.cat([(theirs[n] - ours[n]).flatten() for n in ours])
    assert apart.norm() < {torch.float32: 0.02, torch.bfloat16: 0.2}[dtype] * moved.norm()


def test_compiled_and_streamed_blocks_give_the_plain_gradients():
    transformer = adapted("int8-quanto", case=EDIT)
    run(transformer, "int8-quanto", execution="diffusers")
    plain = outcome(transformer, EDIT)
    execution = run(transformer, "int8-quanto", "selective")
    execution.warm_up(lambda: outcome(transformer, EDIT))
    assert execution.is_compiled
    assert_near(outcome(transformer, EDIT), plain, 0.999)  # bfloat16 in other orders
    run(transformer, "int8-quanto", "attention", streaming=Streaming(4))
    for _ in range(3):
        assert_near(outcome(transformer, EDIT), plain, 0.999)


def test_a_killed_run_on_pairs_goes_on_bit_for_bit(tmp_path, toy_edit_model, root, monkeypatch):
    monkeypatch.setenv("K5_HOME", str(tmp_path / "k5"))
    config = replace(COMPILED, source_dropout_probability=0.25, validation=ValidationConfig(pairs=0))
    compare(tmp_path, root, toy_edit_model, config, None, None)


def test_the_selftest_passes_on_the_gpu(toy_edit_model, root, tmp_path):
    from k5train.cli import app

    shutil.copytree(root, tmp_path / "pairs")
    done = Cli(tmp_path)(app, "selftest", "pairs", "--model", str(toy_edit_model), "--json")
    assert [row["what"] for row in json.loads(done.out) if row["result"] == "DIFFERS"] == [], done.err


@pytest.mark.parametrize("cap_gib", CARDS)
def test_a_step_at_full_size_stays_within_ten_percent_of_its_prediction(cap_gib):
    """With 1,000 text tokens, which text-to-image never has, on cards of 12 and 8 GB."""
    case = replace(EDITS[1], cap_gib=cap_gib, num_text_tokens=1000)
    (result,) = steps.time_cases((case,), GPU, num_steps=2, num_warm_up=1)
    assert result.predicted_gib == pytest.approx(result.reserved_gib, rel=0.1)
    assert ("streamed" in result.plan) == (cap_gib == CARDS[1])

"""The selftests pass if all is right, name the first thing that is wrong, and work on models that do not fit."""

from __future__ import annotations

import json
import shutil

import pytest
import torch

from k5cache.cli import app as cache_app
from k5cache.encoders import reference
from k5cache.shared.comparison import check, compare, not_run, print_comparisons
from k5train.cli import app as train_app
from k5train.exact import selftest
from k5train.exact.case import GUIDANCE, STEPS, case_of
from k5train.exact.reference import pipeline_latents, reference_transformer
from k5train.forward import predict_velocity
from k5train.options.train import TrainConfig
from k5train.pictures.sample import load_scheduler
from tests.cli import Cli


def run(cache, app, *arguments):
    """Run a selftest in the folder of a toy cache; returns (exit code, {line: comparison}, stderr)."""
    command = ["selftest", f"cache/{cache.name}", *arguments]
    done = Cli(cache.parent.parent)(app, *command, "--json")
    rows = {row["what"]: row for row in json.loads(done.out)} if done.code in (0, 1) else {}
    return done.code, rows, done.err


def test_of_a_cache_and_its_images_every_line_of_k5cache_selftest_is_bit_for_bit(toy_cache):
    code, rows, err = run(toy_cache("bf16"), cache_app, "--device", "cpu")
    assert code == 0, (rows, err)
    assert {row["result"] for row in rows.values()} == {"same bits"}
    assert len(rows) == 10
    assert rows["cached latents of 4 images"]["difference"] == 0


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_of_a_cache_every_line_of_k5train_selftest_is_bit_for_bit_but_int8_in_bfloat16(toy_cache, toy_model, precision):
    options = ["--set", f"train.mixed_precision={precision}", "--set", "train.device=cpu"]
    code, rows, err = run(toy_cache("bf16"), train_app, *options)
    assert code == 0, (rows, err)
    int8 = rows.pop("velocity, int8-quanto, diffusers")
    assert {row["result"] for row in rows.values()} == {"same bits"}
    assert len(rows) == 5
    assert int8["result"] == ("same bits" if precision == "fp32" else "rounding")


def test_an_encoder_that_computes_something_else_is_named_with_the_caption_and_the_place(toy_cache, monkeypatch):
    from k5cache.encoders import clip

    cache, true = toy_cache("bf16"), clip.encode_pooled

    def wrong(tower, captions, **options):
        pooled = true(tower, captions, **options)
        pooled[:, 1] += 0.5
        return pooled

    monkeypatch.setattr(clip, "encode_pooled", wrong)
    done = Cli(cache.parent.parent)(cache_app, "selftest", "cache/pictures", "--device", "cpu")
    assert done.code == 1
    assert "The first difference: pooled of 15 captions: 'fox' at [1] is" in done.out
    assert "cached pooled" in done.out  # all lines are printed, and what is stored is still right


def test_the_video_models_rope_is_found_by_the_first_line_it_touches(toy_cache, monkeypatch):
    monkeypatch.setattr(predict_velocity, "ROPE_SCALE", (1.0, 2.0, 2.0))
    code, rows, _ = run(toy_cache("bf16"), train_app, "--set", "train.device=cpu")
    assert code == 1
    failed = [what for what, row in rows.items() if row["result"] == "DIFFERS"]
    assert failed[0] == "velocity, bfloat16"
    assert rows["noisy latents at 3 sigmas"]["result"] == "same bits"


def test_a_transformer_that_does_not_fit_is_compared_module_by_module(toy_model, monkeypatch):
    monkeypatch.setattr(selftest, "fits", lambda num_bytes, device: False)
    config = TrainConfig(mixed_precision="fp32")
    rows = {row.what: row for row in selftest.selftest(None, toy_model, config, torch.device("cpu"))}
    assert rows["velocity, float32"].result == "same bits"
    assert rows["loss and LoRA gradients of a step"].result == "not run"
    assert rows["2 drawing steps, guided"].result == "not run"
    assert rows["2 drawing steps, guided, int8"].result == "same bits"


def test_a_text_encoder_that_does_not_fit_is_spread_over_memory_and_disk(toy_model, monkeypatch):
    from k5cache.encoders import reference

    dtypes = (torch.bfloat16, torch.bfloat16)
    whole = reference.encode_as_the_pipeline(toy_model, ["a red fox"], 512, "cpu", dtypes)
    monkeypatch.setattr(reference, "_free_bytes", lambda device: {"cpu": 300_000})
    (spread,) = reference.encode_as_the_pipeline(toy_model, ["a red fox"], 512, "cpu", dtypes)
    assert torch.equal(spread.prompt_embeds, whole[0].prompt_embeds)
    assert spread.ids == whole[0].ids


def test_the_reference_drawing_is_the_pipelines(toy_model):
    from tests.parity import pipeline_of

    case = case_of(None, toy_model, TrainConfig(), torch.device("cpu"))
    width, height = case.settings.width, case.settings.height
    pipeline = pipeline_of(toy_model, torch.float32, (width, height))
    prompt, negative = (
        (row.prompt_embeds[None].float(), row.pooled[None].float(), torch.tensor([0, row.n_tokens], dtype=torch.int32))
        for row in (case.prompt, case.negative)
    )
    names = ("prompt_embeds_qwen", "prompt_embeds_clip", "prompt_cu_seqlens")
    theirs = pipeline(
        **dict(zip(names, prompt, strict=True)),
        **dict(zip((f"negative_{name}" for name in names), negative, strict=True)),
        width=width, height=height, num_inference_steps=STEPS, guidance_scale=GUIDANCE,
        generator=torch.Generator().manual_seed(0), output_type="latent",
    ).image  # fmt: skip
    model = reference_transformer(toy_model, torch.float32)
    assert torch.equal(pipeline_latents(model, load_scheduler(toy_model), case), theirs)


def test_where_the_images_are_not_at_hand_the_hub_is_not_asked_for_them(toy_model, toy_cache, tmp_path, monkeypatch):
    from k5cache.sources import find

    shutil.copytree(toy_cache("bf16"), tmp_path / "cache" / "pictures")
    monkeypatch.delattr(find, "find")
    done = Cli(tmp_path)(cache_app, "selftest", "--model", str(toy_model), "cache/pictures", "--count", "1")
    assert done.code == 0, done.err
    assert "there is no datasets/pictures: name the folder of the images with --source" in done.out


def test_without_a_cache_there_must_be_a_model_or_a_checkout(tmp_path, monkeypatch):
    from k5cache.shared import selftest_model

    monkeypatch.setattr(selftest_model, "MAKER", tmp_path / "none.py")
    for app in (cache_app, train_app):
        done = Cli(tmp_path)(app, "selftest")
        assert done.code == 2
        assert "--model DIR" in done.err


def test_a_comparison_says_how_far_where_and_whether_rounding_explains_it():
    theirs = torch.tensor([[3.0, 0.0], [0.0, 4.0]])
    ours = theirs + torch.tensor([[0.0, 0.0], [0.5, 0.0]])
    same, off = (
        compare("a", "b", [("x", theirs, theirs)]),
        compare("a", "b", [("x", theirs, theirs), ("y", ours, theirs)]),
    )
    assert (same.result, same.difference, same.note) == ("same bits", 0.0, "")
    assert (off.result, off.difference, off.relative) == ("DIFFERS", 0.5, 0.1)
    assert off.note == "y at [1, 0] is 0.5 instead of 0"
    assert compare("a", "b", [("y", ours, theirs)], allowed=0.11).result == "rounding"


@pytest.mark.parametrize("allowed", [0.0, 10.0])
def test_nan_infinity_and_another_shape_are_never_rounding(allowed):
    ones = torch.ones(2)
    for ours, theirs in ((ones * torch.nan, ones), (ones, ones * torch.nan), (ones * torch.nan, ones * torch.nan),
                         (ones * torch.inf, ones), (torch.ones(3), ones)):  # fmt: skip
        assert compare("a", "b", [("x", ours, theirs)], allowed).is_failed


def test_the_table_ends_in_the_first_failure_or_in_a_count(capsys):
    passed, failed = check("facts", "them", ""), check("facts", "them", "crop is 41 instead of 40")
    assert print_comparisons("t", [passed, not_run("big", "them", "no room")])
    assert not print_comparisons("t", [passed, failed])


def test_both_selftests_count_the_memory_that_a_container_leaves_them(monkeypatch):
    monkeypatch.setattr(reference, "free_ram", lambda: 2**20)
    monkeypatch.setattr(selftest, "free_ram", lambda: 2**20)
    assert reference._free_bytes("cpu") == {"cpu": 2**20}
    assert "1.0 MiB are free" in selftest.short_of_memory(2**21)
    assert selftest.short_of_memory(2**19) == ""

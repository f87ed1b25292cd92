"""The selftest of stage 2 on a model that edits images: the same lines, the same bits, with a source in all of them."""

from __future__ import annotations

import json
import shutil

import torch
from PIL import Image

from k5train.cli import app
from k5train.exact.case import GUIDANCE, STEPS, case_of
from k5train.exact.reference import pipeline_latents, reference_transformer
from k5train.exact.selftest import selftest
from k5train.forward.condition import no_source
from k5train.options.train import TrainConfig
from k5train.pictures import sample
from k5train.pictures.sample import load_scheduler
from tests.cli import Cli
from tests.edit_training import GivenPosterior, make_pairs, pipeline_around

CPU = torch.device("cpu")


def test_the_reference_drawing_is_that_of_the_i2i_pipeline(toy_edit_model):
    case = case_of(None, toy_edit_model, TrainConfig(), CPU)
    width, height = case.settings.width, case.settings.height
    moments = {"mean": case.source.mean, "std": case.source.std}
    vae = GivenPosterior(moments, case.source.scaling_factor, torch.float32)
    model = reference_transformer(toy_edit_model, torch.float32)
    embeds = {
        f"{prefix}prompt_{name}": value
        for prefix, row in (("", case.prompt), ("negative_", case.negative))
        for name, value in (("embeds_qwen", row.prompt_embeds[None].float()), ("embeds_clip", row.pooled[None].float()),
                            ("cu_seqlens", torch.tensor([0, row.n_tokens])))
    }  # fmt: skip
    theirs = pipeline_around(model, load_scheduler(toy_edit_model), vae, (width, height))(
        image=Image.new("RGB", (width, height)), **embeds, width=width, height=height, num_inference_steps=STEPS,
        guidance_scale=GUIDANCE, generator=torch.Generator().manual_seed(0), output_type="latent",
    ).image  # fmt: skip
    assert torch.equal(pipeline_latents(model, load_scheduler(toy_edit_model), case), theirs)


def test_every_line_is_bit_for_bit_with_a_cache_of_pairs_and_without(toy_edit_model, once, tmp_path):
    shutil.copytree(once("toy_pairs", lambda folder: make_pairs(folder, toy_edit_model)), tmp_path / "pairs")
    for cache in (["pairs"], []):
        done = Cli(tmp_path)(app, "selftest", *cache, "--model", str(toy_edit_model), "--json",
                             "--set", "train.mixed_precision=fp32", "--set", "train.device=cpu")  # fmt: skip
        assert done.code == 0, (done.out, done.err)
        rows = {row["what"]: row["result"] for row in json.loads(done.out)}
        assert set(rows.values()) == {"same bits"}
        assert len(rows) == 5 + len(cache)


def test_a_mask_channel_of_zeros_is_found_by_the_line_it_touches(toy_edit_model, monkeypatch):
    monkeypatch.setattr(sample, "condition_of", no_source)
    config = TrainConfig(mixed_precision="fp32", base_model_precision="no_change")
    rows = {row.what: row.result for row in selftest(None, toy_edit_model, config, CPU)}
    assert [what for what, result in rows.items() if result == "DIFFERS"] == ["2 drawing steps, guided"]

"""Passes of image-to-image: pairs through ``encode_texts`` and ``encode_latents``, as an encode runs them."""

from __future__ import annotations

import io
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers.image_processor import VaeImageProcessor
from PIL import Image
from rich.progress import Progress

from k5cache.buckets import Bucket, cover, source_geometry
from k5cache.encode import estimate, text_pass
from k5cache.encode.image_pass import encode_latents
from k5cache.encode.job import Job, LatentJob, SourceView, TextJob
from k5cache.encode.sink import Collector
from k5cache.encode.text_pass import encode_texts
from k5cache.encoders import clip, memory_plan, qwen, vision
from k5cache.encoders.pipeline import clean
from k5cache.encoders.vision_plan import VisionArchitecture
from k5cache.encoders.with_picture import load_processor
from k5cache.options import CacheConfig
from k5cache.shared.checkpoint import read_config
from k5cache.shared.errors import DoesNotFit, ModelError
from k5cache.sources.find import find
from k5cache.sources.images import hash_content, load_pixels, load_whole
from k5cache.sources.items import UnreadableImage
from tests.edit_models import edit_pipeline, picture

TEXTS = ("Turn the sky into a starry night, and keep the house as it is", "")
BUCKET = Bucket(256, 192)
GIB = 2**30


def as_png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


TARGET = cover(300, 226, BUCKET)
CONTENTS = {
    "same.png": as_png(picture(300, 226, seed=1)),  # of the target's shape: resized and cropped as the target
    "tall.png": as_png(picture(150, 400, seed=2)),  # of another: stretched
    "odd.png": as_png(picture(1023, 769, seed=3)),
}


def view_of(name: str, flipped: bool = False) -> SourceView:
    content = CONTENTS[name]
    with Image.open(io.BytesIO(content)) as image:
        geometry = source_geometry(replace(TARGET, flipped=flipped), *image.size)
    return SourceView(name, hash_content(content), geometry)


def text_jobs_of(views: list[SourceView]) -> list[TextJob]:
    # One instruction after another, so that the jobs of a source are not side by side.
    return [TextJob(f"{view.path} {view.geometry.flipped} {text}", clean(text, "i2i"), view)
            for text in TEXTS for view in views]  # fmt: skip


def job_of(folder: Path, tmp_path: Path, read=CONTENTS.__getitem__, **options: object) -> Job:
    return Job(Path, tmp_path, folder, CacheConfig(**options), "cpu", Progress(disable=True), read_source=read)


def crop_of(view: SourceView, is_whole: bool = False) -> Image.Image:
    load = load_whole if is_whole else load_pixels
    return Image.fromarray(load(CONTENTS[view.path], view.geometry).permute(1, 2, 0).numpy())


@pytest.mark.parametrize("mode", ["resident", "streamed"])
def test_rows_are_what_the_pipeline_encodes_for_our_crop_and_sources_are_seen_once(
    toy_edit_model, tmp_path, monkeypatch, mode
):
    if mode == "streamed":
        resident = estimate.plan_text
        plan = lambda *a, **k: replace(resident(*a, **k), mode="streamed", chunk_tokens=300)  # noqa: E731
        monkeypatch.setattr(text_pass.estimate, "plan_text", plan)
    looked, pooled, loads = [], [], []
    look, encode_pooled, load_tower = vision.look, clip.encode_pooled, vision.load_tower
    monkeypatch.setattr(
        vision, "look", lambda tower, seen, **k: look(tower, (looked.append(v) or (v, s) for v, s in seen), **k)
    )
    monkeypatch.setattr(clip, "encode_pooled", lambda t, c, **k: pooled.extend(c) or encode_pooled(t, c, **k))
    monkeypatch.setattr(vision, "load_tower", lambda *a: loads.append(a) or load_tower(*a))
    views = [view_of("same.png"), view_of("tall.png"), view_of("odd.png"), view_of("tall.png", flipped=True)]
    ours, failed = Collector(), {}
    assert encode_texts(job_of(toy_edit_model, tmp_path), ours, text_jobs_of(views), failed) == ()
    assert failed == {}
    assert sorted(looked, key=views.index) == views
    assert sorted(pooled) == sorted(clean(text, "i2i") for text in TEXTS)
    assert len(loads) == (1 if mode == "resident" else 2)
    pipeline = edit_pipeline(toy_edit_model)
    for text_job in text_jobs_of(views):
        assert text_job.source is not None
        with torch.no_grad():
            theirs, their_pooled, _ = pipeline.encode_prompt(
                text_job.caption, image=crop_of(text_job.source), device=torch.device("cpu")
            )
        row = ours.rows[text_job.key]
        assert torch.equal(row["prompt_embeds"], theirs[0]), text_job.key
        assert torch.equal(row["pooled"], their_pooled[0])
        assert row["n_tokens"] == len(theirs[0])


def test_fast_rows_are_close(toy_edit_model, tmp_path):
    views = [view_of("same.png"), view_of("tall.png"), view_of("odd.png")]
    exact, fast = Collector(), Collector()
    encode_texts(job_of(toy_edit_model, tmp_path, text_encoder_1_precision="fp32"), exact, text_jobs_of(views))
    encode_texts(
        job_of(toy_edit_model, tmp_path, text_encoder_1_precision="fp32", text_batching="fast"),
        fast,
        text_jobs_of(views),
    )
    for key, row in exact.rows.items():
        torch.testing.assert_close(row["prompt_embeds"], fast.rows[key]["prompt_embeds"], rtol=0, atol=1e-4)


def test_int8_says_how_far_it_is_and_streams(toy_edit_model, tmp_path, capsys):
    ours = Collector()
    encode_texts(
        job_of(toy_edit_model, tmp_path, text_encoder_1_precision="int8"), ours, text_jobs_of([view_of("same.png")])
    )
    assert "differ from bf16 by" in capsys.readouterr().err
    assert len(ours.rows) == 2


def test_prepare_latents_draws_from_the_moments_that_are_stored(toy_edit_model, tmp_path):
    pipeline = edit_pipeline(toy_edit_model, torch.float32)
    for view in (view_of("same.png"), view_of("tall.png"), view_of("tall.png", flipped=True), view_of("odd.png")):
        latent_job = LatentJob("key", view.path, view.geometry, view.content_hash, is_source=True)
        ours = Collector()
        assert encode_latents(job_of(toy_edit_model, tmp_path), ours, [latent_job]) == {}
        crop = crop_of(view)
        with torch.no_grad():
            posterior = pipeline.vae.encode(
                pipeline.image_processor.preprocess(crop, height=BUCKET.height, width=BUCKET.width)
            ).latent_dist
            latents = pipeline.prepare_latents(
                crop, 1, 16, BUCKET.height, BUCKET.width, torch.float32, torch.device("cpu"),
                torch.Generator().manual_seed(3),
            )  # fmt: skip
        row = ours.rows["key"]
        mean, std = (m[0].permute(1, 2, 0) for m in (posterior.mean, posterior.std))
        assert torch.equal(row["mean"], mean.half())
        assert torch.equal(row["std"], std.half())
        # Noise first, then the posterior's sample, from one generator.
        generator = torch.Generator().manual_seed(3)
        torch.randn(1, 1, *BUCKET.latent_shape, 16, generator=generator)
        noise = torch.randn(1, 16, *BUCKET.latent_shape, generator=generator)[0].permute(1, 2, 0)
        drawn = (mean + std * noise) * pipeline.vae.config.scaling_factor
        torch.testing.assert_close(latents[0, 0, :, :, 16:32], drawn, rtol=0, atol=1e-6)
        assert torch.equal(latents[..., 32], torch.ones(1, 1, *BUCKET.latent_shape))


def test_a_stretched_source_is_the_pipelines_own_resize(toy_edit_model):
    view = view_of("tall.png")
    assert view.geometry.stretched
    processor = VaeImageProcessor(vae_scale_factor=8)
    with Image.open(io.BytesIO(CONTENTS["tall.png"])) as image:
        theirs = processor.preprocess(image, height=BUCKET.height, width=BUCKET.width)
    ours = processor.preprocess(crop_of(view))
    assert torch.equal(ours, theirs)
    flipped = load_pixels(CONTENTS["tall.png"], replace(view.geometry, flipped=True))
    assert torch.equal(flipped, load_pixels(CONTENTS["tall.png"], view.geometry).flip(2))
    assert not view_of("same.png").geometry.stretched


def test_pairs_that_cannot_be_encoded_are_left_out_with_a_sentence_and_the_rest_goes_on(toy_edit_model, tmp_path):
    good, view = view_of("same.png"), view_of("tall.png")
    contents = {**CONTENTS, "tall.png": b"no picture"}
    jobs = [
        TextJob("good", TEXTS[0], good),
        TextJob("long", "fox " * 5000, good),
        TextJob("token", "an <|image_pad|>", good),
        TextJob("changed", TEXTS[0], view),
        TextJob("broken", TEXTS[0], replace(view, content_hash=hash_content(b"no picture"))),
    ]
    ours, failed = Collector(), dict[str, UnreadableImage]()
    encode_texts(job_of(toy_edit_model, tmp_path, contents.__getitem__), ours, jobs, failed)
    assert set(ours.rows) == {"good"}
    assert set(failed) == {"long", "token", "changed", "broken"}
    assert "too long: Kandinsky5I2IPipeline fails on them" in failed["long"].reason
    assert "has an instruction with <|image_pad|>" in failed["token"].reason
    assert "has changed since the encode began" in failed["changed"].reason
    assert not failed["changed"].is_lasting
    assert failed["broken"].is_lasting


def test_nothing_is_loaded_if_the_pipeline_fails_on_every_pair(toy_edit_model, tmp_path, monkeypatch):
    monkeypatch.setattr(clip, "load_clip", None)
    monkeypatch.setattr(qwen, "load_qwen", None)
    failed = dict[str, UnreadableImage]()
    encode_texts(
        job_of(toy_edit_model, tmp_path), Collector(), [TextJob("long", "x " * 5000, view_of("same.png"))], failed
    )
    assert set(failed) == {"long"}


def test_instructions_of_which_nothing_survives_are_counted_and_named(toy_edit_model, tmp_path, capsys):
    jobs = [TextJob(text, text, view_of("same.png")) for text in ("red", "blue", TEXTS[0], "")]
    encode_texts(job_of(toy_edit_model, tmp_path), Collector(), jobs)
    said = " ".join(capsys.readouterr().err.split())
    assert "2 instructions are so short that Qwen's embedding holds nothing of them ('red', 'blue')" in said
    encode_texts(job_of(toy_edit_model, tmp_path), Collector(), jobs[:1])
    said = " ".join(capsys.readouterr().err.split())
    assert "1 instruction is so short that Qwen's embedding holds nothing of it ('red')" in said


def test_a_checkpoint_without_a_vision_tower_or_a_preprocessor_is_refused_in_a_sentence(
    toy_edit_model, tmp_path, monkeypatch
):
    from safetensors.torch import load_file, save_file

    folder = tmp_path / "model"
    shutil.copytree(toy_edit_model, folder)
    jobs = [TextJob("key", TEXTS[0], view_of("same.png"))]
    monkeypatch.setattr(clip, "load_clip", None)  # it is found before anything is loaded
    config = folder / "tokenizer" / "preprocessor_config.json"
    config.write_text('{"patch_size": "x", "size": 3}')
    with pytest.raises(ModelError, match="preprocessor"):
        encode_texts(job_of(folder, tmp_path), Collector(), jobs)
    config.unlink()
    with pytest.raises(ModelError, match=r"lacks tokenizer/preprocessor_config\.json: image-to-image needs it"):
        encode_texts(job_of(folder, tmp_path), Collector(), jobs)
    file = folder / "text_encoder" / "model.safetensors"
    save_file({name: t for name, t in load_file(file).items() if "visual" not in name}, file)
    with pytest.raises(ModelError, match="no vision tower, which image-to-image needs"):
        encode_texts(job_of(folder, tmp_path), Collector(), jobs)


SEVEN_B = {
    "hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28, "num_attention_heads": 28,
    "num_key_value_heads": 4, "vocab_size": 152064, "vision_config": {"depth": 32, "hidden_size": 1280,
    "intermediate_size": 3420, "out_hidden_size": 3584, "in_chans": 3, "patch_size": 14, "temporal_patch_size": 2,
    "spatial_merge_size": 2},
}  # fmt: skip


def test_the_arithmetic_counts_the_parameters_of_the_real_tower(toy_edit_model):
    config = read_config(toy_edit_model, "text_encoder")
    tower = vision.load_tower(toy_edit_model, "cpu", torch.bfloat16)
    assert VisionArchitecture.of(config).num_parameters == sum(p.numel() for p in tower.model.parameters())
    assert round(VisionArchitecture.of(SEVEN_B).num_parameters / 1e9, 2) == 0.68


@pytest.mark.parametrize("batching", ["exact", "fast"])
def test_the_tower_is_planned_beside_the_layers_or_before_them(batching):
    text, tower = memory_plan.TextArchitecture.of(SEVEN_B), VisionArchitecture.of(SEVEN_B)
    modes = {}
    for gib in (24, 16, 15, 12, 8, 4, 3):
        options = {"vram": gib * GIB, "ram": 32 * GIB, "num_tokens": 400_000}
        plan = memory_plan.plan_text(text, "bf16", batching, 1024, vision=tower, **options)
        modes[gib] = plan.mode
        assert plan.vram <= gib * GIB
        without = memory_plan.plan_text(text, "bf16", batching, 1024, **options)
        if plan.mode == without.mode == "resident":
            assert plan.vram >= without.vram + 2 * tower.num_parameters - 2 * GIB * (batching == "fast")
        assert plan.vram >= 2 * tower.num_parameters + tower.working_bytes(4 * 1088, 2)
        assert plan.chunk_tokens <= 65_536
    assert modes[24] == "resident"
    assert modes[12] == modes[8] == modes[4] == modes[3] == "streamed"
    with pytest.raises(DoesNotFit, match=r"The text encoder needs 2\.\d GiB? of VRAM|The text encoder needs"):
        memory_plan.plan_text(text, "bf16", batching, 1024, vision=tower, vram=2 * GIB, ram=32 * GIB)


def test_text_to_image_is_planned_as_before():
    text = memory_plan.TextArchitecture.of(SEVEN_B)
    plan = memory_plan.plan_text(text, "bf16", "exact", 512, vram=4 * GIB, ram=32 * GIB, num_tokens=100_000)
    assert (plan.mode, plan.parking) == ("streamed", "device")


def test_an_estimate_knows_the_sources(toy_edit_model):
    view = view_of("odd.png")
    jobs = [TextJob("a", TEXTS[0], view), TextJob("b", "", view)]
    config = CacheConfig()
    plain = estimate.token_counts(config, [replace(job, source=None) for job in jobs])
    with_sources = estimate.token_counts(config, jobs)
    grid = load_processor(toy_edit_model).grid_of(BUCKET.width, BUCKET.height)  # as many patches as four a token
    assert [b - a for a, b in zip(plain, with_sources, strict=True)] == [grid[1] * grid[2] // 4] * 2
    estimated = estimate.estimate(toy_edit_model, config, "cpu", None, jobs, [])
    without = estimate.estimate(toy_edit_model, config, "cpu", None, [replace(job, source=None) for job in jobs], [])
    assert estimated.num_tokens > without.num_tokens
    assert estimated.text_seconds > 0


@pytest.mark.parametrize(
    ("trigger", "instruction", "expected"),
    [
        ("sks", "make it red", "make it red, sks"),
        ("sks ", "make it red ", "make it red sks"),
        ("sks", "Make it red.", "Make it red. sks"),
        (None, "make it red", "make it red"),
    ],
)
def test_a_trigger_comes_last_where_the_first_tokens_are_cut(tmp_path, trigger, instruction, expected):
    for name in ("cat_start.png", "cat_end.png"):
        (tmp_path / name).write_bytes(CONTENTS["same.png"])
    (tmp_path / "cat.txt").write_text(instruction)
    config = CacheConfig(trigger=trigger)
    assert [item.captions for item in find(tmp_path, config, "i2i").items] == [(expected,)]


def test_the_default_number_of_tokens_is_the_pipelines(toy_edit_model):
    assert (CacheConfig().text_limit("t2i"), CacheConfig().text_limit("i2i")) == (512, 1024)
    assert CacheConfig(max_sequence_length=77).text_limit("i2i") == 77

"""A run on pairs, from its start to its pictures: what it draws, what it keeps, and what goes on after a stop."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from k5cache.shared.checkpoint import read_config
from k5cache.shared.errors import CacheError, RecipeError
from k5cache.store.reader import open_cache
from k5train.adapter import attach, export, files
from k5train.adapter.header import PIPELINE_KEY, pipeline_of
from k5train.base.quantize import load_transformer
from k5train.cli import app
from k5train.data.mixture import Mixture, Source
from k5train.data.split import split_off
from k5train.options.adapter import LoraConfig
from k5train.options.objective import RolloutConfig, RouteConfig, TreadConfig
from k5train.options.optimizer import OptimConfig
from k5train.options.validation import EditConfig, ValidationConfig
from k5train.pictures import drawings, sample
from k5train.pictures.drawings import drawings_for, find_edit, items_to_draw
from tests.cli import Cli
from tests.edit_training import PICTURE, make_pairs
from tests.parity import with_strength
from tests.runs import CONFIG, go_on, lora_of, metrics_of, numbers, same, start_run

VALIDATION = ValidationConfig(num_inference_steps=2, every=0, guidance_scale=2.0, pairs=3, split=0.25, held_out_every=2)
PAIRS = replace(CONFIG, steps=4, checkpoint_every=2, optim=OptimConfig(lr=1e-2, ema_decay=0.9), validation=VALIDATION)


@pytest.fixture(scope="module")
def root(toy_edit_model, once) -> Path:
    return once("toy_pairs", lambda folder: make_pairs(folder, toy_edit_model))


@pytest.fixture(scope="module")
def finished(root, toy_edit_model, tmp_path_factory) -> Path:
    """A run of four steps on pairs, with everything that carries state."""
    run = tmp_path_factory.mktemp("runs") / "pairs"
    start_run(run, root, toy_edit_model, PAIRS)
    return run


def pictures_in(folder: Path) -> list[np.ndarray]:
    return [picture_at(path) for path in sorted(folder.glob("*.png"))]


def picture_at(path: Path) -> np.ndarray:
    with Image.open(path) as picture:
        return np.asarray(picture)


def test_the_grid_has_sources_above_and_targets_below_what_was_drawn(finished, root, toy_edit_model):
    cache = open_cache(root)
    samples = finished / "samples"
    held_out = split_off(Mixture([Source(cache)]), 0.25).sources[0].split
    shown = items_to_draw(cache, held_out, 3)
    assert shown[0] in held_out
    for name, key in (("source", "source_key"), ("target", "latent_key")):
        latents = [cache.latents(getattr(cache.row(i), key))["mean"].float()[None, None] * 0.3611 for i in shown]
        decoded = sample.decode(toy_edit_model, latents, torch.device("cpu"))
        kept = pictures_in(samples / "pairs" / name)
        assert all(np.array_equal(a, np.asarray(b)) for a, b in zip(kept, decoded, strict=True))
    drawn = [pictures_in(samples / step) for step in ("step-000000", "step-000004", "step-000004/ema")]
    assert [len(pictures) for pictures in drawn] == [3, 3, 3]
    assert [picture.shape for picture in drawn[0]] == [
        (cache.row(i).bucket_height, cache.row(i).bucket_width, 3) for i in shown
    ]
    assert not np.array_equal(drawn[0][0], drawn[1][0])  # the LoRA matters
    rows = ["source", "base model", "step 4", "step 4 EMA", "target"]
    assert len(picture_at(finished / "samples.png")) > len(rows) * 192  # toy pictures are shown at 192 pixels


def test_a_run_on_pairs_says_how_its_lora_loads_and_how_to_draw_more(finished, root, toy_edit_model, tmp_path):
    options = ("--set", "train.base_model_precision=no_change", "--set", "train.validation.pairs=0")
    taken = tmp_path / "runs" / root.name
    taken.mkdir(parents=True)
    done = Cli(tmp_path)(app, "run", str(root), "--model", str(toy_edit_model), "--set", "train.steps=1", *options)
    assert done.code == 0, done.err
    assert f"This run goes to runs/{root.name}-2: runs/{root.name} is there already" in done.err
    assert list(taken.iterdir()) == []
    assert "of a Kandinsky5I2IPipeline: diffusers has loaded it back" in done.out
    assert "k5train sample runs/toy_pairs-2 --source PICTURE --prompt PROMPT" in done.out + done.err


def test_a_lora_for_pairs_names_its_pipeline_also_after_export_and_its_wider_first_matrix_is_known(
    finished, toy_edit_model, tmp_path, monkeypatch
):
    """The architecture of the published model is the toy's here: without --model a file says which of the two it is."""
    config = read_config(toy_edit_model, "transformer")
    monkeypatch.setattr(export, "full_size", lambda kind: {**config, "visual_cond": kind == "i2i"})
    transformer = load_transformer(toy_edit_model, "no_change", torch.float32, "cpu")
    attach.add_lora(transformer, LoraConfig(rank=4, targets=("visual_embeddings.in_layer",)), seed=1)
    with_strength(transformer)
    files.save_lora(tmp_path / "wide.safetensors", transformer, {PIPELINE_KEY: "Kandinsky5I2IPipeline"})
    for name, source in (("trained", str(finished)), ("wide", "wide.safetensors")):
        done = Cli(tmp_path)(app, "check-lora", source)
        assert (done.code, "It was trained for Kandinsky5I2IPipeline" in done.out) == (0, True), done.out + done.err
        exported = Cli(tmp_path)(app, "export", source, "-o", f"{name}-16.safetensors", "--format", "diffusers")
        assert exported.code == 0, exported.err
        assert pipeline_of(tmp_path / f"{name}-16.safetensors") == "Kandinsky5I2IPipeline"
    files.save_lora(tmp_path / "unsaid.safetensors", transformer, {})
    assert "of another size" in Cli(tmp_path)(app, "check-lora", "unsaid.safetensors").out


def test_a_stopped_run_on_pairs_goes_on_to_the_same_bits(finished, root, toy_edit_model, tmp_path, monkeypatch):
    validation = replace(VALIDATION, pairs=1, num_inference_steps=1)
    config = replace(PAIRS, source_dropout_probability=0.3, validation=validation)
    start_run(tmp_path / "whole", root, toy_edit_model, config)
    start_run(tmp_path / "stopped", root, toy_edit_model, replace(config, max_hours=1e-9))
    go_on(tmp_path / "stopped", max_hours=None)
    assert same(lora_of(tmp_path / "whole"), lora_of(tmp_path / "stopped"))
    assert not same(lora_of(tmp_path / "whole"), lora_of(finished))  # the dropout of sources matters
    whole, stopped = (
        [row for row in numbers(metrics_of(tmp_path / name)) if "loss" in row] for name in ("whole", "stopped")
    )
    assert whole == stopped


def test_tread_rollout_and_captions_of_unequal_lengths_train_on_pairs(root, toy_edit_model, tmp_path):
    config = replace(
        PAIRS, validation=ValidationConfig(pairs=0), unequal_captions="mask", loss_limit=0.0,
        tread=TreadConfig(routes=(RouteConfig(0.5, 1, 1),)),
        rollout=RolloutConfig(probability=1.0, num_inference_steps=8, ramp_steps=0),
    )  # fmt: skip
    start_run(tmp_path / "all", root, toy_edit_model, config)
    assert sum(row.get("rollout_passes", 0) for row in metrics_of(tmp_path / "all")) > 0
    start_run(tmp_path / "none", root, toy_edit_model, replace(config, tread=TreadConfig(), rollout=RolloutConfig()))
    assert not same(lora_of(tmp_path / "all"), lora_of(tmp_path / "none"))


def test_sample_draws_a_picture_that_the_cache_knows_by_its_bytes(finished, tmp_path):
    (tmp_path / "moved.png").write_bytes(PICTURE)
    arguments = ("sample", str(finished), "--source", "moved.png", "--prompt", "make it blue", "-o", "out.png")
    done = Cli(tmp_path)(app, *arguments)
    assert done.code == 0, done.err
    first = picture_at(tmp_path / "out.png")
    assert len(picture_at(tmp_path / "out.png")) > 3 * 192  # source, base model, LoRA; no target
    again = Cli(tmp_path)(app, *arguments[:-1], "again.png", "--seed", "7")
    assert again.code == 0
    assert not np.array_equal(first, picture_at(tmp_path / "again.png"))
    chosen = ("--which", "4", "--which", "ema", "--strength", "0.5", "--strength", "1")
    done = Cli(tmp_path)(app, "sample", str(finished), *chosen, "-o", "pairs.png")  # the recipe's pairs, with targets
    assert done.code == 0, done.err
    assert len(picture_at(tmp_path / "pairs.png")) > 7 * 192  # source, base model, four LoRAs, target


def test_sample_says_which_line_adds_a_pair_that_is_not_cached(finished, root, tmp_path):
    for name in ("other picture.png", "new.png"):
        (tmp_path / name).write_bytes(b"other")
    for source, prompt, words in (
        (
            "other picture.png",
            "make it blue",
            f"k5cache prompts add {root} --source 'other picture.png' 'make it blue'",
        ),
        ("gone.png", "make it blue", "There is no picture gone.png"),
        ("new.png", "-1 degrees", f"k5cache prompts add {root} --source new.png -- '-1 degrees'"),
    ):
        done = Cli(tmp_path)(app, "sample", str(finished), "--source", source, f"--prompt={prompt}")
        assert done.code == 2
        assert words in " ".join(done.err.split()), done.err
    for arguments, words in (
        (("--prompt", "a cat"), "Add --source PICTURE"),
        (("--source", "new.png"), "--prompt PROMPT"),
        (("--set", "train.validation.pairs=0"), "There is no pair to draw"),
        (("--set", "train.validation.negative_prompt=blurry"), "train.validation.negative_prompt is only for"),
    ):
        done = Cli(tmp_path)(app, "sample", str(finished), *arguments)
        assert (done.code, words in " ".join(done.err.split())) == (2, True), done.err


def test_a_pair_is_found_by_bytes_and_by_path_only_where_there_is_no_file(root, tmp_path, monkeypatch):
    cache = open_cache(root)
    monkeypatch.chdir(tmp_path)
    wanted = EditConfig("new.png", "make it blue")
    assert find_edit(cache, wanted).text_key == "text-edit"  # a cache opens anywhere, also without the pictures
    with pytest.raises(RecipeError, match=r"There is no picture nwe\.png"):  # prompts add could not add it
        find_edit(cache, EditConfig("nwe.png", "make it blue"))
    Path("new.png").write_bytes(b"another picture by now")
    with pytest.raises(CacheError, match=r"'make it blue' for the picture new\.png, which has changed since it was"):
        find_edit(cache, wanted)
    Path("new.png").write_bytes(PICTURE)
    assert find_edit(cache, wanted).source_key == "source-1"
    (drawing,) = drawings_for(cache, ValidationConfig(edits=(wanted,)))
    assert (drawing.label, drawing.settings.width, drawing.target) == ("new.png: make it blue", 64, None)
    deep = replace(find_edit(cache, wanted), source="datasets/test/new.png")
    assert drawings._of_edit(cache, deep, ValidationConfig()).label == "new.png: make it blue"  # as wide as a picture
    assert torch.equal(drawing.negative.prompt_embeds, cache.text("empty-0").prompt_embeds)


def test_guidance_without_empty_instructions_is_refused_with_what_to_do(toy_edit_model, once):
    cache = open_cache(
        once("toy_pairs_without_empty", lambda folder: make_pairs(folder, toy_edit_model, with_empty=False))
    )
    with pytest.raises(RecipeError, match=r"guidance_scale is 5, and .* without the empty instruction") as caught:
        drawings_for(cache, ValidationConfig())
    assert "train.validation.guidance_scale=1" in caught.value.fix
    assert all(d.negative is None for d in drawings_for(cache, ValidationConfig(guidance_scale=1.0)))


def test_no_picture_is_drawn_twice_because_of_a_flip(root, monkeypatch):
    cache = open_cache(root)
    rows = [cache.row(i) for i in range(4)]
    flipped = [rows[0], replace(rows[0], flipped=True), rows[1], rows[2]]
    monkeypatch.setattr(type(cache), "row", lambda self, i: flipped[i])
    assert items_to_draw(cache, (), 3) == [0, 2, 3]
    assert items_to_draw(cache, (3,), 2) == [3, 0]
    assert items_to_draw(cache, (), 9) == [0, 2, 3]
    assert items_to_draw(cache, (), 0) == []


@pytest.mark.long
def test_a_sweep_on_pairs_puts_the_last_row_of_each_run_between_sources_and_targets(root, toy_edit_model, tmp_path):
    done = Cli(tmp_path)(
        app, "sweep", str(root), "--model", str(toy_edit_model), "-o", "sweep", "--grid", "train.optim.lr=1e-3,1e-2",
        "--set", "train.steps=2", "--set", "train.validation.num_inference_steps=1", "--set", "train.device=cpu",
        "--set", "train.validation.pairs=2",
    )  # fmt: skip
    assert done.code == 0, done.err
    assert len(picture_at(tmp_path / "sweep" / "samples.png")) > 5 * 192  # source, base, two runs, target

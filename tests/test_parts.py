"""A checkpoint that neither stage can use is refused by its configs, before any work."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from k5cache.cli import app as cache_app
from k5cache.shared.checkpoint import ENCODER_PARTS, model_folder
from k5cache.shared.errors import ModelError
from k5cache.shared.model import ModelConfig
from k5cache.shared.parts import VAE_SCALE
from k5train.cli import app
from tests.cli import Cli
from tests.workshop import Workshop

ALL = ("transformer", *ENCODER_PARTS)


@pytest.fixture
def copy(toy_model, tmp_path) -> Path:
    """A model of configs, with the weights as links."""
    return Path(shutil.copytree(toy_model, tmp_path / "model", copy_function=lambda a, b: Path(b).symlink_to(a)))


def change(model: Path, part: str, **values: object) -> None:
    path = model / part / "config.json"
    document = {**json.loads(path.read_text(encoding="utf-8")), **values}
    path.unlink()
    path.write_text(json.dumps(document), encoding="utf-8")


@pytest.mark.parametrize(
    ("part", "values", "problem"),
    [
        ("vae", {"block_out_channels": [32, 64]}, "its VAE makes images 2 times smaller, and the pipeline counts on 8"),
        ("vae", {"latent_channels": 4}, "its VAE makes latents of 4 channels, and the transformer takes 16"),
        ("vae", {"_class_name": "AutoencoderKLHunyuanVideo"}, "its VAE is a AutoencoderKLHunyuanVideo"),
        ("vae", {"scaling_factor": None}, "its VAE has no scaling_factor"),
        ("transformer", {"in_text_dim": 3584}, "its text_encoder gives vectors of 64 numbers"),
        ("transformer", {"in_text_dim2": 768}, "its text_encoder_2 gives vectors of 48 numbers, and"),
        ("transformer", {"patch_size": [1, 1, 1]}, "its transformer has patches of [1, 1, 1], not [1, 2, 2]"),
        ("transformer", {"_class_name": "FluxTransformer2DModel"}, "its transformer is a FluxTransformer2DModel"),
        ("transformer", {"visual_cond": "yes"}, "its transformer has visual_cond 'yes', not true or false"),
    ],
)  # fmt: skip
def test_parts_that_do_not_belong_together_are_named(copy, part, values, problem):
    config = ModelConfig(path=str(copy))
    assert model_folder(config, ALL) == copy
    change(copy, part, **values)
    with pytest.raises(ModelError) as caught:
        model_folder(config, ALL)
    assert problem in caught.value.problem


def test_the_pipeline_has_the_scale_of_its_vae_written_in_it():
    from diffusers import Kandinsky5T2IPipeline

    parts = ("transformer", "vae", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2", "scheduler")
    assert Kandinsky5T2IPipeline(**dict.fromkeys(parts)).vae_scale_factor_spatial == VAE_SCALE


def test_a_weight_file_that_an_index_names_is_missed_before_any_work(copy):
    index = copy / "transformer" / "diffusion_pytorch_model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "diffusion_pytorch_model-00002-of-00002.safetensors"}}))
    with pytest.raises(ModelError, match=r"lacks diffusion_pytorch_model-00002-of-00002.safetensors"):
        model_folder(ModelConfig(path=str(copy)), ("transformer",))


def test_neither_command_line_takes_a_model_that_shrinks_otherwise(copy, toy_cache, tmp_path):
    shop = Workshop(tmp_path / "shop", copy)
    shop.put("cat.png", "a cat")
    cli, cache = Cli(shop.source.parent), str(toy_cache("fp32"))
    commands = (
        (cache_app, ("encode", "images")), (cache_app, ("plan", "images")), (cache_app, ("diff", "images")),
        (app, ("run", cache)), (app, ("sweep", cache, "--grid", "train.steps=1,2")),
    )  # fmt: skip
    change(copy, "vae", block_out_channels=[32, 64])
    for program, arguments in commands:
        done = cli(program, *arguments, "--model", str(copy))
        assert (done.code, "makes images 2 times smaller" in done.err) == (2, True), (arguments, done.err)
    assert sorted(path.name for path in cli.folder.iterdir()) == ["images"]

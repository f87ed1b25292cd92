"""Does the trainer refuse a cache that other encoders made?"""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from k5cache.shared.checkpoint import ENCODER_PARTS
from k5cache.shared.errors import CacheStale
from k5cache.shared.fingerprint import fingerprint
from k5train.data.compatible import check_encoders


class Recorded:
    """A stand-in for a cache: only its recipe is read."""

    def __init__(self, recipe: dict) -> None:
        self.root, self.manifest = Path("cache/mine"), type("Manifest", (), {"recipe": recipe, "part": None})


@pytest.fixture
def recipe(toy_model) -> dict:
    prints = {part: fingerprint(toy_model, part) for part in ENCODER_PARTS}
    return {
        "model": {"source": "kandinskylab/theirs", "flavour": "t2i-lite-pretrain"},
        "text": {part: prints[part] for part in ENCODER_PARTS if part != "vae"},
        "latents": {"vae": prints["vae"]},
    }


def folder_with(tmp_path: Path, toy_model: Path, *parts: str) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    for part in parts:
        shutil.copytree(toy_model / part, folder / part)
    return folder


def test_the_encoders_that_made_it_fit_under_any_name(tmp_path, toy_model, recipe):
    check_encoders(Recorded(recipe), folder_with(tmp_path, toy_model, "transformer", *ENCODER_PARTS))


def test_parts_that_the_training_machine_has_not_are_not_asked_for(tmp_path, toy_model, recipe):
    check_encoders(Recorded(recipe), folder_with(tmp_path, toy_model, "transformer"))


def test_other_weights_of_the_same_architecture_are_refused_and_named(tmp_path, toy_model, recipe):
    folder = folder_with(tmp_path, toy_model, "transformer", "vae", "text_encoder_2")
    (file,) = (folder / "text_encoder_2").glob("*.safetensors")
    tensors = load_file(file)
    name = sorted(tensors)[0]
    tensors[name] = tensors[name] * 1.01
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(CacheStale) as caught:
        check_encoders(Recorded(recipe), folder)
    assert "its captions were encoded by another CLIP (part text_encoder_2)" in caught.value.problem
    assert "VAE" not in caught.value.problem
    assert "kandinskylab/theirs" in caught.value.fix
    assert "--update" in caught.value.fix


def test_a_cache_of_one_kind_is_refused_by_a_transformer_of_the_other(tmp_path, toy_model, toy_edit_model, recipe):
    texts = "was encoded for text-to-image (T2I), and the transformer in", "is for image-to-image (I2I)"
    edits = "was encoded for image-to-image (I2I), and the transformer in", "is for text-to-image (T2I)"
    for model, pipeline, words, again in (
        (toy_edit_model, {}, texts, "k5cache encode SOURCE --sources SOURCES -o OTHER --model"),
        (toy_model, {"pipeline": "i2i"}, edits, "k5cache encode SOURCE -o OTHER --model"),
    ):
        recipe["text"].update(pipeline)
        with pytest.raises(CacheStale) as caught:
            check_encoders(Recorded(recipe), model)
        assert all(text in caught.value.problem for text in words)
        assert again in caught.value.fix
        assert "kandinskylab/theirs" in caught.value.fix

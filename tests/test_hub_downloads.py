"""Which files of a model are fetched? Asked of a server that speaks as the hub does: only what is used, and its sizes
are said first."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

from k5cache.shared import download
from k5cache.shared.checkpoint import ENCODER_PARTS, folder_on_disk, folder_without_weights, model_folder
from k5cache.shared.console import human_bytes
from k5cache.shared.errors import HubError, ModelError
from k5cache.shared.fingerprint import _fingerprint, fingerprint
from k5cache.shared.hub import api, reason_of
from k5cache.shared.model import ModelConfig
from k5cache.shared.part_files import stored_tensors
from k5train.data.compatible import check_encoders
from k5train.doctor.room import read_volumes
from tests.hub_server import TOKEN, Hub, point_client_at, serving
from tests.workshop import Workshop

MODEL = ModelConfig(path="someone/toy")
SHARDS = {"model-1-of-3.safetensors": "", "model-2-of-3.safetensors": "visual", "model-3-of-3.safetensors": "lm_head"}
"""The shards of the text encoder, with what each holds alone."""


@pytest.fixture
def hub(tmp_path, monkeypatch):
    with serving(Hub()) as server:
        point_client_at(server, tmp_path / "downloads", monkeypatch)
        yield server


def sharded(model: Path, folder: Path) -> Path:
    """A copy with the text encoder in three files and their index, as the published one has its lm_head apart, and with
    files beside the weights that nobody uses."""
    shutil.copytree(model, folder)
    part = folder / "text_encoder"
    tensors = load_file(part / "model.safetensors")
    (part / "model.safetensors").unlink()
    file_of = {
        name: next(file for file, word in reversed(SHARDS.items()) if word in name.split(".") or not word)
        for name in tensors
    }
    assert set(file_of.values()) == set(SHARDS)
    for file in SHARDS:
        save_file({n: t for n, t in tensors.items() if file_of[n] == file}, part / file, {"format": "pt"})
    (part / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": file_of}))
    (part / "pytorch_model.bin").write_bytes(b"0" * 50_000)
    (folder / "vae" / "diffusion_pytorch_model.fp16.safetensors").write_bytes(b"0" * 50_000)
    (folder / "demo.png").write_bytes(b"0" * 50_000)
    return folder


@pytest.mark.parametrize("kind", ["t2i", "i2i"])
def test_only_what_is_used_is_fetched_and_it_has_the_fingerprint_of_the_whole(
    kind, hub, tmp_path, toy_model, toy_edit_model, capsys
):
    whole = sharded(toy_edit_model if kind == "i2i" else toy_model, tmp_path / "model")
    hub.model("someone/toy", whole)
    folder = model_folder(MODEL, ENCODER_PARTS)
    vision = {"text_encoder/model-2-of-3.safetensors"} if kind == "i2i" else set()
    fetched = set(hub.fetched())
    assert {name for name in fetched if name.endswith((".safetensors", ".bin", ".png"))} == vision | {
        "text_encoder/model-1-of-3.safetensors",
        "text_encoder_2/model.safetensors",
        "vae/diffusion_pytorch_model.safetensors",
    }
    for part in ENCODER_PARTS:
        assert fingerprint(folder, part, kind == "i2i") == fingerprint(whole, part, kind == "i2i"), part
    said = " ".join(capsys.readouterr().err.split())
    assert said.startswith("Downloading ")
    assert "of someone/toy" in said
    assert (fingerprint(whole, "text_encoder", True) == fingerprint(whole, "text_encoder")) is False


def test_a_cache_of_what_was_fetched_has_the_rows_of_the_whole_model_and_trains_with_either(hub, tmp_path, toy_model):
    hub.model("someone/toy", sharded(toy_model, tmp_path / "model"))
    folder = model_folder(MODEL, ENCODER_PARTS)
    assert not (folder / "text_encoder" / "model-3-of-3.safetensors").exists()
    shops = {name: Workshop(tmp_path / name, model) for name, model in (("whole", toy_model), ("fetched", folder))}
    for shop in shops.values():
        shop.put("cat.png", "a cat")
        shop.encode()
    whole, fetched = (shop.cache for shop in shops.values())
    assert whole.manifest.recipe["text"] == fetched.manifest.recipe["text"]
    assert whole.row(0).caption_keys == fetched.row(0).caption_keys
    assert torch.equal(whole[0]["captions"][0].prompt_embeds, fetched[0]["captions"][0].prompt_embeds)
    assert torch.equal(whole[0]["mean"], fetched[0]["mean"])
    check_encoders(fetched, toy_model)
    check_encoders(whole, folder_with_transformer(folder, toy_model, tmp_path))


def folder_with_transformer(folder: Path, model: Path, tmp_path: Path) -> Path:
    """What is left on a training machine after a plan of stage 1: a transformer, and encoders' configs alone."""
    copy = tmp_path / "training"
    shutil.copytree(folder, copy)
    (copy / "text_encoder" / "model-1-of-3.safetensors").unlink()
    return copy


def test_a_cache_of_the_first_version_stays_valid_while_all_files_are_there(hub, tmp_path, toy_model):
    whole = sharded(toy_model, tmp_path / "model")
    of_all = _fingerprint(whole, "text_encoder", stored_tensors(whole, "text_encoder", unused=True))
    of_used = fingerprint(whole, "text_encoder")
    assert of_all != of_used
    assert fingerprint(whole, "text_encoder", cached=of_all) == of_all
    (whole / "text_encoder" / "model-3-of-3.safetensors").unlink()
    assert fingerprint(whole, "text_encoder", cached=of_all) == of_used


def test_a_commit_that_changed_no_weights_downloads_none_and_keeps_what_was_fetched_of_them(hub, tmp_path, toy_model):
    whole = sharded(toy_model, tmp_path / "model")
    repository = hub.model("someone/toy", whole)
    api().snapshot_download("someone/toy")  # as the first version did
    hub.requests.clear()
    repository.put({"README.md": b"newer"})
    folder = model_folder(MODEL, ENCODER_PARTS)
    assert folder.name == repository.commit
    assert hub.fetched() == []
    assert (folder / "text_encoder" / "model-3-of-3.safetensors").is_file()


def test_what_is_on_this_machine_already_is_counted(hub, tmp_path, toy_model, capsys):
    hub.model("someone/toy", toy_model)
    model_folder(MODEL, ("vae", "text_encoder_2"))
    here = sum((toy_model / name).stat().st_size for name in (
        "text_encoder_2/config.json", "text_encoder_2/model.safetensors", "vae/config.json",
        "vae/diffusion_pytorch_model.safetensors", "text_encoder/config.json", "tokenizer/tokenizer_config.json",
        "tokenizer_2/tokenizer_config.json",
    ))  # fmt: skip
    capsys.readouterr()
    model_folder(MODEL, ENCODER_PARTS)
    assert f"; {human_bytes(here)} is on this machine already) of someone/toy\n" in capsys.readouterr().err


def test_configs_alone_are_no_model_for_the_doctor_and_for_an_encode_with_nothing_to_do(hub, toy_model):
    hub.model("someone/toy", toy_model)
    folder_without_weights(MODEL, (*ENCODER_PARTS, "transformer"))
    assert folder_on_disk(MODEL, ()) is not None
    for parts, is_here in ((ENCODER_PARTS, False), (("transformer",), False)):
        assert (folder_on_disk(MODEL, parts) is not None) is is_here
    assert sum(volume.needed for volume in read_volumes(MODEL)) >= 29_590_000_000
    model_folder(MODEL, ("transformer", "vae"))
    assert folder_on_disk(MODEL, ("transformer", "vae")) is not None
    assert 17_000_000_000 <= sum(volume.needed for volume in read_volumes(MODEL)) < 29_000_000_000


def test_a_disk_without_room_is_named_before_anything_large_is_fetched(hub, tmp_path, toy_model, monkeypatch):
    hub.model("someone/toy", toy_model)
    usage = SimpleNamespace(free=1_000_000)
    monkeypatch.setattr(download.shutil, "disk_usage", lambda folder: usage)
    with pytest.raises(
        HubError, match=r"someone/toy needs .* more, and the disk of .*downloads has 976.6 KiB free"
    ) as e:
        model_folder(MODEL, ENCODER_PARTS)
    assert "HF_HOME" in e.value.fix
    assert all(name.endswith(".json") for name in hub.fetched())


def test_a_refusal_of_the_hub_is_one_line_without_the_token(hub, tmp_path, monkeypatch):
    point_client_at(hub, tmp_path / "downloads", monkeypatch, TOKEN)
    for status, fix in ((401, "Log in"), (403, "accept the terms"), (404, "Connect"), (500, "Connect")):
        hub.refuse = lambda request, status=status: status
        with pytest.raises(ModelError, match=r"someone/toy is not on this machine and cannot be downloaded") as caught:
            model_folder(MODEL, ENCODER_PARTS)
        assert TOKEN not in str(caught.value)
        assert fix in caught.value.fix
        assert "--model DIR" in caught.value.fix
        assert "\n" not in caught.value.problem
    odd = ValueError("404 Client Error. (Request ID: Root=1-2)\n\nRepository Not Found for url: http://x.\nCheck it.")
    assert reason_of(odd) == "404 Client Error: Repository Not Found for url: http://x."
    error = ValueError(f"bad header Authorization: Bearer {TOKEN} to https://me:secret@host/x\nmore")
    assert reason_of(error) == "bad header Authorization: (hidden) to https://(hidden)@host/x"

"""Fingerprints tell weights, configs and vocabularies apart by content, whatever their name and sharding."""

from __future__ import annotations

import json
import os
import shutil
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from k5cache.shared import fingerprint as fingerprints
from k5cache.shared.checkpoint import ENCODER_PARTS
from k5cache.shared.errors import ModelError
from k5cache.shared.fingerprint import NUM_PROBES, PROBE_BYTES, fingerprint


@pytest.fixture
def model(toy_model, tmp_path) -> Path:
    """A copy of the toy's encoders that a test may write into."""
    for part in ENCODER_PARTS:
        shutil.copytree(toy_model / part, tmp_path / "model" / part)
    return tmp_path / "model"


@pytest.fixture
def sampled(monkeypatch) -> None:
    """Treat every part as a large one."""
    monkeypatch.setattr(fingerprints, "WHOLE_BELOW", 0)


def edit_json(path: Path, **changes: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def rewrite_element(model: Path, name: str, position: int) -> None:
    file = model / "text_encoder" / "model.safetensors"
    tensors = load_file(file)
    flat = tensors[name].view(-1)
    flat[position] = flat[position] + 1
    save_file(tensors, file)


def test_each_part_has_its_own_and_a_copy_elsewhere_has_the_same(toy_model, model):
    there = {part: fingerprint(toy_model, part) for part in (*ENCODER_PARTS, "transformer", "scheduler")}
    assert len(set(there.values())) == len(there)
    assert {part: fingerprint(model, part) for part in ENCODER_PARTS} == {part: there[part] for part in ENCODER_PARTS}
    assert all(len(value) == 32 and int(value, 16) for value in there.values())


def test_two_checkpoints_of_one_architecture_differ(model, sampled):
    before = fingerprint(model, "text_encoder")
    file = model / "text_encoder" / "model.safetensors"
    save_file({name: tensor * 1.01 for name, tensor in load_file(file).items()}, file)
    assert fingerprint(model, "text_encoder") != before


@pytest.mark.parametrize("position", [0, 1000, -1])
def test_one_changed_element_of_a_small_model_is_seen_wherever_it_is(model, position):
    before = fingerprint(model, "text_encoder")
    rewrite_element(model, "model.embed_tokens.weight", position)
    assert fingerprint(model, "text_encoder") != before


def test_of_a_large_tensor_a_changed_element_is_seen_in_a_probe_and_not_between_two(model, sampled):
    name = "model.embed_tokens.weight"
    size = load_file(model / "text_encoder" / "model.safetensors")[name].nbytes
    gap = (size - PROBE_BYTES) // (NUM_PROBES - 1)
    assert gap > PROBE_BYTES + 2, "the toy's embedding is too small to lie between probes"
    before = fingerprint(model, "text_encoder")
    rewrite_element(model, name, (PROBE_BYTES + gap) // 4)  # half way between the first two probes, in bfloat16
    assert fingerprint(model, "text_encoder") == before
    for probe in (0, gap, size - PROBE_BYTES):
        rewrite_element(model, name, probe // 2 + 1)
        before, now = fingerprint(model, "text_encoder"), before
        assert before != now


def test_files_that_are_as_they_were_are_read_once_and_one_that_is_written_again_anew(model, monkeypatch):
    reads: list[int] = []
    read = fingerprints._sample
    monkeypatch.setattr(fingerprints, "_sample", lambda tensors: [reads.append(len(tensors)), read(tensors)][1])
    before = fingerprint(model, "text_encoder")
    assert fingerprint(model, "text_encoder") == before
    assert len(reads) == 2, "a file written just now may be written again within one tick of the file system's clock"
    an_hour_later(monkeypatch)
    assert fingerprint(model, "text_encoder") == fingerprint(model, "text_encoder") == before
    assert len(reads) == 3
    rewrite_element(model, "model.embed_tokens.weight", 0)
    assert fingerprint(model, "text_encoder") != before
    assert len(reads) == 4
    now = fingerprint(model, "text_encoder")
    edit_json(model / "text_encoder" / "config.json", hidden_act="relu")
    assert fingerprint(model, "text_encoder") != now


def an_hour_later(monkeypatch) -> None:
    now = time.time_ns
    monkeypatch.setattr(fingerprints.time, "time_ns", lambda: now() + 3600 * 10**9)


def test_a_file_that_is_written_over_in_place_with_its_old_time_is_read_anew(model, monkeypatch):
    """As `cp -p` and `rsync --inplace -t` write."""
    file = model / "text_encoder" / "model.safetensors"
    states = []
    for _ in range(2):
        rewrite_element(model, "model.embed_tokens.weight", 0)
        states.append(file.read_bytes())
    os.utime(file, (1e9, 1e9))
    an_hour_later(monkeypatch)
    before = fingerprint(model, "text_encoder")
    time.sleep(0.05)  # longer than a tick of the file system's clock
    with file.open("r+b") as opened:
        opened.write(states[0])
    os.utime(file, (1e9, 1e9))
    assert len(states[0]) == len(states[1])
    assert fingerprint(model, "text_encoder") != before


@pytest.mark.parametrize("whole", [True, False])
def test_sharding_does_not_matter_but_names_shapes_and_dtypes_do(model, monkeypatch, whole):
    monkeypatch.setattr(fingerprints, "WHOLE_BELOW", 2**40 if whole else 0)
    before = fingerprint(model, "text_encoder")
    folder = model / "text_encoder"
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()

    def shard(tensors: dict[str, torch.Tensor]) -> str:
        names = sorted(tensors, reverse=True)
        halves = {"model-1.safetensors": names[::2], "model-2.safetensors": names[1::2]}
        for file, part in halves.items():
            save_file({n: tensors[n] for n in part}, folder / file, metadata={"format": "pt", "note": "resharded"})
        index = {"weight_map": {n: file for file, part in halves.items() for n in part}}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
        return fingerprint(model, "text_encoder")

    assert shard(tensors) == before
    norm = tensors.pop("model.norm.weight")
    assert shard(tensors | {"model.norm.gain": norm}) != before
    assert shard(tensors | {"model.norm.weight": norm.view(2, -1)}) != before
    assert shard(tensors | {"model.norm.weight": norm.view(torch.float16)}) != before
    assert shard(tensors | {"model.norm.weight": norm}) == before


def test_a_config_counts_but_not_the_name_and_versions_in_it(model):
    before = fingerprint(model, "vae")
    edit_json(model / "vae" / "config.json", _name_or_path="elsewhere", _diffusers_version="0.1", torch_dtype="float16")
    assert fingerprint(model, "vae") == before
    edit_json(model / "vae" / "config.json", scaling_factor=0.5)
    assert fingerprint(model, "vae") != before


def test_of_a_tokenizer_only_the_files_that_decide_ids_count(model):
    before = fingerprint(model, "tokenizer")
    (model / "tokenizer" / "chat_template.jinja").write_text("{{ messages }}")
    (model / "tokenizer" / "preprocessor_config.json").write_text("{}")
    (model / "tokenizer" / "merges.txt").write_text("tokenizer.json is what is read")
    edit_json(model / "tokenizer" / "tokenizer_config.json", processor_class="Qwen2VLProcessor", chat_template="x")
    assert fingerprint(model, "tokenizer") == before
    vocabulary = model / "tokenizer" / "tokenizer.json"
    vocabulary.write_text(vocabulary.read_text().replace('"type": "NFC"', '"type": "NFKC"'))
    assert fingerprint(model, "tokenizer") != before


def test_a_file_cut_short_or_not_safetensors_is_named(model):
    file = model / "vae" / "diffusion_pytorch_model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(ModelError, match=r"diffusion_pytorch_model\.safetensors is cut short"):
        fingerprint(model, "vae")
    for junk in (b"", b"not a model", b"\xff" * 64, b"\x02" + b"\0" * 7 + b"[]"):
        file.write_bytes(junk)
        with pytest.raises(ModelError, match="is not a safetensors file"):
            fingerprint(model, "vae")

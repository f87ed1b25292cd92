"""Is what is fingerprinted what is loaded, whatever else is in a checkpoint's folder, and does none of its code run?"""

from __future__ import annotations

import ast
import io
import json
import shutil
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL
from safetensors.torch import load_file, save_file
from transformers import CLIPTextModel

from k5cache.encoders.clip import load_clip, load_clip_tokenizer
from k5cache.encoders.qwen import load_qwen, load_tokenizer
from k5cache.encoders.vae import load_vae
from k5cache.shared import fingerprint as fingerprints
from k5cache.shared.checkpoint import ENCODER_PARTS
from k5cache.shared.errors import ModelError
from k5cache.shared.fingerprint import fingerprint
from k5cache.shared.handed_over import handed_over
from k5cache.shared.part_files import library_name, weight_files
from k5train.base.quantize import load_transformer

ROOT = Path(__file__).parent.parent
CPU = torch.device("cpu")
Tensors = dict[str, torch.Tensor]


@pytest.fixture
def model(toy_model, tmp_path) -> Path:
    """A copy of the toy that a test may write into."""
    return shutil.copytree(toy_model, tmp_path / "model")


def loaded(folder: Path, part: str) -> Tensors:
    """The weights of a part as our loaders load them."""
    match part:
        case "text_encoder":
            return {**(qwen := load_qwen(folder, "cpu", torch.float32)).model.layers.state_dict(),
                    "embeddings": qwen.embeddings}  # fmt: skip
        case "text_encoder_2":
            return load_clip(folder, "cpu", torch.float32).model.state_dict()
        case "vae":
            return load_vae(folder, "cpu", torch.float32).state_dict()
    return load_transformer(folder, "no_change", torch.float32, CPU).state_dict()


def same(a: Tensors, b: Tensors) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def files_of(folder: Path, part: str) -> Path:
    """The whole weight file of a part of the toy."""
    return folder / part / f"{library_name(part)}.safetensors"


def write_shards(folder: Path, tensors: Tensors, name: str) -> Path:
    """Two shards and their index, called ``name``."""
    names = sorted(tensors)
    halves = {f"{name}-1.safetensors": names[::2], f"{name}-2.safetensors": names[1::2]}
    for file, half in halves.items():
        save_file({n: tensors[n] for n in half}, folder / file, metadata={"format": "pt"})
    index = folder / f"{name}.safetensors.index.json"
    weight_map = {n: file for file, half in halves.items() for n in half}
    index.write_text(json.dumps({"metadata": {"total_size": 0}, "weight_map": weight_map}))
    return index


def test_the_fingerprints_of_ordinary_checkpoints_are_those_that_existing_caches_have():
    micro = ROOT / "pipelines" / "demo" / "k5-micro"
    assert {part: fingerprint(micro, part) for part in (*ENCODER_PARTS, "transformer", "scheduler")} == {
        "text_encoder": "1027203783d89e10982d496e756b3365",
        "tokenizer": "6e1046f81d1f7d550a52f1134db17f14",
        "text_encoder_2": "0d95cd2afaa55a7ca661b6f1cf19400a",
        "tokenizer_2": "de2a33ec53f9f6b7e5d23bf4f5ec0bd2",
        "vae": "6bd6575d5d48a4df8c248ba47e5c88b1",
        "transformer": "3731dfd981a14f54aa89d84cfdfde0ec",
        "scheduler": "0a7c609b5b7253301dfcf6af6be78ea5",
    }
    of_every_tensor = "17a7b1298f9961701f15e09b4fafba63"  # as the first caches have it
    for cached in (of_every_tensor, of_every_tensor[::-1], ""):
        known = fingerprint(micro, "text_encoder", cached=cached) == cached
        assert known is (cached == of_every_tensor)


@pytest.mark.parametrize("part", ["text_encoder", "text_encoder_2", "vae", "transformer"])
def test_of_a_whole_file_beside_an_index_what_is_loaded_is_what_is_fingerprinted(model, part):
    whole = files_of(model, part)
    before, plain = fingerprint(model, part), loaded(model, part)
    tensors = load_file(whole)
    other = {name: tensor * 1.5 for name, tensor in tensors.items()}
    is_whole_first = part.startswith("text_encoder")  # as transformers has it; diffusers follows the index
    for shards, is_changed in ((other, not is_whole_first), (tensors, False)):
        write_shards(whole.parent, shards, library_name(part))
        assert (fingerprint(model, part) != before) == is_changed
        assert same(loaded(model, part), plain) == (not is_changed)
    save_file(other, whole, metadata={"format": "pt"})  # now the file is the changed one
    assert (fingerprint(model, part) != before) == is_whole_first
    assert same(loaded(model, part), plain) == (not is_whole_first)


@pytest.mark.parametrize(("part", "library"), [("text_encoder_2", CLIPTextModel), ("vae", AutoencoderKL)])
def test_the_file_is_chosen_as_the_library_itself_chooses_it(model, part, library):
    whole = files_of(model, part)
    other = {name: tensor * 1.5 for name, tensor in load_file(whole).items()}
    write_shards(whole.parent, other, library_name(part))
    theirs = library.from_pretrained(whole.parent).float().state_dict()
    assert same(loaded(model, part), theirs)


@pytest.mark.parametrize("part", ["text_encoder", "text_encoder_2", "vae", "transformer"])
def test_shards_and_files_with_names_of_their_own_are_loaded_as_they_are_fingerprinted(model, part):
    whole = files_of(model, part)
    before, plain, tensors = fingerprint(model, part), loaded(model, part), load_file(whole)
    whole.rename(whole.with_name("other.safetensors"))
    assert (fingerprint(model, part), same(loaded(model, part), plain)) == (before, True)
    whole.with_name("other.safetensors").unlink()
    index = write_shards(whole.parent, tensors, "mine")
    assert (fingerprint(model, part), same(loaded(model, part), plain)) == (before, True)
    write_shards(whole.parent, {name: tensor * 1.5 for name, tensor in tensors.items()}, "yours")
    with pytest.raises(ModelError, match=r"mine\.safetensors\.index\.json and yours.*: which are its weights\?"):
        fingerprint(model, part)
    index.rename(whole.parent / f"{library_name(part)}.safetensors.index.json")  # the library's name decides
    assert (fingerprint(model, part), same(loaded(model, part), plain)) == (before, True)


INDEXES = {
    "outside": ('{"weight_map": {"a": "../../outside.safetensors"}}', "'../../outside.safetensors', which is not"),
    "absolute": ('{"weight_map": {"a": "/outside.safetensors"}}', "'/outside.safetensors', which is not"),
    "another kind": ('{"weight_map": {"a": "model.bin"}}', "'model.bin', which is not a .safetensors file beside it"),
    "number": ('{"weight_map": {"a": 3}}', "which is not a .safetensors file"),
    "missing": ('{"weight_map": {"a": "gone.safetensors"}}', "lacks gone.safetensors"),
    "truncated": ('{"weight_map": {"a": "mod', "cannot be read as an index of weights"),
    "list": ("[]", "cannot be read as an index of weights"),
    "empty": ('{"weight_map": {}}', "it names no file"),
    "nested": ('{"weight_map":' * 100_000, "cannot be read as an index of weights"),
    "lists": ('{"weight_map": {"a": ["x.safetensors"]}}', "cannot be read as an index of weights"),
    "bytes": ("\udcff\udcfe", "cannot be read as an index of weights"),
}


@pytest.mark.parametrize("name", sorted(INDEXES))
def test_an_index_that_is_damaged_or_leads_outside_is_refused(model, name):
    text, words = INDEXES[name]
    shutil.copy(files_of(model, "vae"), model.parent / "outside.safetensors")
    index = model / "vae" / "diffusion_pytorch_model.safetensors.index.json"
    index.write_bytes(text.encode("utf-8", "surrogateescape"))
    for use in (fingerprint, weight_files, lambda folder, part: load_vae(folder, "cpu", torch.float32)):
        with pytest.raises(ModelError) as refused:
            use(model, "vae")
        assert words in refused.value.problem
        assert str(model / "vae") in refused.value.problem


def test_a_tensor_in_two_files_is_refused(model):
    whole = files_of(model, "vae")
    write_shards(whole.parent, load_file(whole), "diffusion_pytorch_model")
    shutil.copy(whole, whole.with_name("diffusion_pytorch_model-2.safetensors"))
    with pytest.raises(ModelError, match=r"twice, in diffusion_pytorch_model-1\.safetensors and"):
        fingerprint(model, "vae")


HEADERS: list[Any] = [
    [], 3, {"a": 3},
    *({"a": {"dtype": "F32", "shape": shape, "data_offsets": places}} for shape, places in (
        ([1], [4, 0]), ([1], [-8, 4]), ([1], 3), ([1], ["0", 4]), ([-1], [0, 4]), (["1"], [0, 4]), ("x", [0, 4]),
    )),
]  # fmt: skip


@pytest.mark.parametrize("header", HEADERS)
def test_a_header_with_impossible_places_is_refused(model, header):
    text = json.dumps(header).encode()
    files_of(model, "vae").write_bytes(len(text).to_bytes(8, "little") + text + bytes(16))
    with pytest.raises(ModelError, match="is not a safetensors file"):
        fingerprint(model, "vae")


def test_an_adapter_or_another_vocabulary_beside_a_part_is_not_loaded(model):
    """transformers loads both by itself."""
    plain, ids = loaded(model, "text_encoder_2"), load_tokenizer(model)("a fox")["input_ids"]
    before = {part: fingerprint(model, part) for part in ENCODER_PARTS}
    folder = model / "text_encoder_2"
    adapter = {"peft_type": "LORA", "r": 1, "lora_alpha": 8, "target_modules": ["q_proj"], "task_type": None}
    (folder / "adapter_config.json").write_text(json.dumps(adapter))
    save_file({}, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    assert same(loaded(model, "text_encoder_2"), plain)
    tokenizer = json.loads((model / "tokenizer" / "tokenizer.json").read_text())
    tokenizer["normalizer"] = {"type": "Replace", "pattern": {"String": "f"}, "content": "b"}
    (model / "tokenizer" / "tokenizer.4.0.0.json").write_text(json.dumps(tokenizer))
    assert {part: fingerprint(model, part) for part in ENCODER_PARTS} == before
    config = model / "tokenizer" / "tokenizer_config.json"
    other = {"fast_tokenizer_files": ["tokenizer.4.0.0.json"], "vocab_file": "x", "tokenizer_file": "/dev/null"}
    config.write_text(json.dumps(json.loads(config.read_text()) | other))
    assert load_tokenizer(model)("a fox")["input_ids"] == ids


def test_a_tokenizer_without_a_vocabulary_is_refused(model):
    """transformers makes one that knows no words, and says nothing."""
    (model / "tokenizer" / "tokenizer.json").unlink()
    for use in (load_tokenizer, lambda folder: fingerprint(folder, "tokenizer")):
        with pytest.raises(ModelError, match="tokenizer has no vocabulary"):
            use(model)


def test_nothing_is_left_of_the_folder_of_links_and_what_was_mapped_from_it_stays(model, tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "tmp"))
    (tmp_path / "tmp").mkdir()
    with handed_over(model, "vae") as only:
        assert sorted(path.name for path in only.iterdir()) == ["config.json", "diffusion_pytorch_model.safetensors"]
        vae = AutoencoderKL.from_pretrained(only)
    assert list((tmp_path / "tmp").iterdir()) == []
    assert same(dict(vae.state_dict()), load_file(files_of(model, "vae")))


STRANGER = """
from pathlib import Path
Path({marker!r}).touch()
class Stranger: pass
"""
LOADERS: dict[str, Callable[[Path], object]] = {
    "tokenizer": load_tokenizer,
    "tokenizer_2": load_clip_tokenizer,
    "text_encoder": lambda folder: load_qwen(folder, "cpu", torch.float32),
    "text_encoder_2": lambda folder: load_clip(folder, "cpu", torch.float32),
    "vae": lambda folder: load_vae(folder, "cpu", torch.float32),
    "transformer": lambda folder: load_transformer(folder, "no_change", torch.float32, CPU),
}


@pytest.mark.parametrize("class_name", [None, "StrangerTokenizer"])
def test_code_in_a_checkpoint_never_runs_and_nobody_is_asked(model, tmp_path, monkeypatch, capsys, class_name):
    marker = tmp_path / "ran"
    kinds = ("AutoConfig", "AutoModel", "AutoTokenizer", "AutoModelForCausalLM", "AutoProcessor")
    for config in model.glob("*/*config.json"):
        (config.parent / "stranger.py").write_text(STRANGER.format(marker=str(marker)))
        auto_map: dict[str, Any] = dict.fromkeys(kinds, "stranger.Stranger")
        auto_map["AutoTokenizer"] = ["stranger.Stranger", "stranger.Stranger"]
        changes = {"auto_map": auto_map, "custom_pipelines": {"x": {"impl": "stranger.Stranger"}}}
        if class_name and "tokenizer" in config.name:
            changes["tokenizer_class"] = class_name
        config.write_text(json.dumps(json.loads(config.read_text()) | changes))
    monkeypatch.setattr(sys, "stdin", io.StringIO("y\n" * 100))
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked"))
    for load in LOADERS.values():
        with suppress(ModelError):
            load(model)
    assert not marker.exists()
    assert "trust_remote_code" not in capsys.readouterr().out
    assert sys.stdin.read() == "y\n" * 100


def calls_of_libraries() -> list[tuple[str, ast.Call]]:
    """Every call in both packages by which a library loads a part by itself."""
    names = {"from_pretrained", "load_config", "load_dataset", "load_from_disk", "from_single_file"}
    return [
        (f"{path.relative_to(ROOT)}:{node.lineno}", node)
        for package in ("k5cache", "k5train")
        for path in sorted((ROOT / package).rglob("*.py"))
        if path.name != "reading.py"  # it reads a dataset that it has just written
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in names
    ]


def test_every_library_is_given_the_handed_over_folder_and_transformers_is_told_to_trust_no_code():
    calls = calls_of_libraries()
    assert len(calls) >= 10
    for where, call in calls:
        assert isinstance(call.args[0], ast.Name), where
        assert call.args[0].id == "only", where
        library = call.func.value.id  # type: ignore[attr-defined]
        if library not in ("AutoencoderKL", "FlowMatchEulerDiscreteScheduler", "Kandinsky5Transformer3DModel"):
            trust = {word.arg: word.value for word in call.keywords}["trust_remote_code"]  # diffusers' models have none
            assert isinstance(trust, ast.Constant), where
            assert trust.value is False, where


def test_a_large_part_is_sampled_from_the_same_files(model, monkeypatch):
    monkeypatch.setattr(fingerprints, "WHOLE_BELOW", 0)
    before = fingerprint(model, "vae")
    whole = files_of(model, "vae")
    shutil.copy(whole, whole.with_name("diffusion_pytorch_model.fp16.safetensors"))
    assert fingerprint(model, "vae") == before

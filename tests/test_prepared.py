"""Is the int8 base on disk always the one that would be quantised now, and never broken or another model's?"""

from __future__ import annotations

import os
import shutil
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from k5cache.shared.errors import ModelError, OutputError
from k5train.base import prepared
from k5train.base.prepared import list_bases, load_prepared, prepare, prepared_path, remove
from k5train.base.quantize import finish, load_transformer

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def k5_home(tmp_path, monkeypatch):
    monkeypatch.setenv("K5_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


def state(transformer: Any) -> dict[str, torch.Tensor]:
    return transformer.state_dict()


def assert_equal(ours: Any, theirs: Any) -> None:
    ours, theirs = state(ours), state(theirs)
    assert ours.keys() == theirs.keys()
    for name in theirs:
        assert ours[name].dtype == theirs[name].dtype
        assert torch.equal(ours[name], theirs[name]), name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_prepared_base_is_bit_for_bit_the_one_quantised_now(toy_model, dtype):
    expected = load_transformer(toy_model, "int8-quanto", dtype, CPU)
    for _ in range(2):  # made, then read
        ours = load_prepared(toy_model, dtype, CPU)
        assert_equal(ours, expected)
        assert [type(m) for m in ours.modules()] == [type(m) for m in expected.modules()]


def test_a_second_use_reads_the_file_and_not_the_checkpoint(toy_model, monkeypatch):
    load_prepared(toy_model, torch.bfloat16, CPU)
    monkeypatch.setattr(prepared, "converted", lambda *a: pytest.fail("quantised again"))
    load_prepared(toy_model, torch.bfloat16, CPU)


def test_it_is_a_plain_safetensors_file(toy_model):
    tensors = load_file(prepare(toy_model, torch.bfloat16, CPU))
    assert tensors["visual_transformer_blocks.0.feed_forward.in_layer.weight"].dtype == torch.int8


def test_another_checkpoint_of_the_same_shape_has_another_file(toy_model, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(toy_model, other)
    weights = next((other / "transformer").glob("*.safetensors"))
    tensors = load_file(weights)
    save_file({**tensors, (name := next(iter(tensors))): tensors[name] + 1}, weights)
    assert prepared_path(other, torch.bfloat16) != prepared_path(toy_model, torch.bfloat16)
    assert prepared_path(toy_model, torch.float32) != prepared_path(toy_model, torch.bfloat16)


def test_a_file_cut_short_is_made_again(toy_model):
    path = prepare(toy_model, torch.bfloat16, CPU)
    whole = path.read_bytes()
    path.write_bytes(whole[:-100])
    assert not list_bases()[0].is_whole
    assert_equal(
        load_prepared(toy_model, torch.bfloat16, CPU), load_transformer(toy_model, "int8-quanto", torch.bfloat16, CPU)
    )
    assert path.stat().st_size == len(whole)


def test_a_flipped_bit_is_found_and_the_file_made_again(toy_model, capsys):
    path = prepare(toy_model, torch.bfloat16, CPU)
    data = bytearray(path.read_bytes())
    data[-1000] ^= 1
    path.write_bytes(data)
    ours = load_prepared(toy_model, torch.bfloat16, CPU)
    assert "damaged" in capsys.readouterr().err
    assert_equal(ours, load_transformer(toy_model, "int8-quanto", torch.bfloat16, CPU))


def test_an_interrupted_quantisation_leaves_no_file(toy_model, monkeypatch, k5_home):
    def interrupted(*args: Any) -> Any:
        yield "text_embeddings.in_layer.weight", torch.zeros(4, 4)
        raise KeyboardInterrupt

    monkeypatch.setattr(prepared, "converted", interrupted)
    with pytest.raises(KeyboardInterrupt):
        prepare(toy_model, torch.bfloat16, CPU)
    assert list((k5_home / "base").iterdir()) == []


def test_what_a_killed_process_left_is_cleared(toy_model, k5_home):
    path = prepared_path(toy_model, torch.bfloat16)
    path.parent.mkdir(parents=True)
    dead = path.with_name(f".{2**22 + 1}-{path.name}")  # above the largest process id
    living = path.with_name(f".{os.getppid()}-{path.name}")
    dead.mkdir()
    (dead / ".tmpAbCdEf").touch()  # what safetensors itself leaves
    living.touch()
    prepare(toy_model, torch.bfloat16, CPU)
    assert not dead.exists()
    assert living.exists()


def test_streamed_tensors_are_left_on_the_host(toy_model):
    asked: list[tuple[str, bool]] = []

    def on_host(name: str, is_int8: bool) -> bool:
        asked.append((name, is_int8))
        return False

    load_prepared(toy_model, torch.bfloat16, CPU, on_host)
    by_name = dict(asked)
    assert by_name["visual_transformer_blocks.0.self_attention.to_query.bias"]
    assert not by_name["visual_transformer_blocks.0.visual_modulation.out_layer.weight"]


def test_bases_are_listed_and_removed_by_the_start_of_their_names(toy_model):
    path = prepare(toy_model, torch.bfloat16, CPU)
    (only,) = list_bases()
    assert (only.path, only.source, only.is_whole) == (path, str(toy_model), True)
    with pytest.raises(ModelError, match="0 prepared bases"):
        remove("zz")
    remove(path.name[:6])
    assert list_bases() == []


def test_a_foreign_file_in_the_folder_is_neither_listed_nor_removed(k5_home):
    (k5_home / "base").mkdir(parents=True)
    (k5_home / "base" / "x.safetensors").write_bytes(b"nonsense")
    damaged = k5_home / "base" / f"{'0' * 32}.safetensors"
    damaged.write_bytes(b"nonsense")
    assert [(base.path, base.is_whole) for base in list_bases()] == [(damaged, False)]
    with pytest.raises(ModelError, match="0 prepared bases"):
        remove("x")
    assert (k5_home / "base" / "x.safetensors").read_bytes() == b"nonsense"


def test_a_home_that_cannot_be_written_is_refused_before_anything_is_quantised(tmp_path, toy_model, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("K5_HOME", str(tmp_path / "file"))
    with pytest.raises(OutputError, match="file is a file") as caught:
        prepare(toy_model, torch.bfloat16, CPU)
    assert caught.value.fix == "Set K5_HOME to a folder that can be written"


def test_tables_go_to_the_device_and_weights_stay_where_they_were_placed(toy_model):
    transformer = finish(load_transformer(toy_model, "int8-quanto", torch.bfloat16, CPU), "meta")
    kinds = {name.rpartition(".")[2]: tensor.device.type for name, tensor in transformer.named_buffers()}
    assert kinds == {
        "args": "meta",
        "args_0": "meta",
        "args_1": "meta",
        "args_2": "meta",
        "weight": "cpu",
        "scale": "cpu",
    }

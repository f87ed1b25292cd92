"""Is the int8 base on disk always the one that would be quantised now, and never broken or another model's?"""

from __future__ import annotations

import errno
import json
import os
import random
import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from k5cache.shared.errors import ModelError, OutputError, RunError
from k5cache.shared.home import make_home
from k5cache.shared.lock import lock_file
from k5train.base import prepared
from k5train.base.prepared import load_prepared, prepare, prepared_path
from k5train.base.prepared_files import list_bases, remove
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


def test_processes_that_start_together_quantise_once(toy_model, k5_home, tmp_path, monkeypatch, capsys):
    path = prepare(toy_model, torch.bfloat16, CPU)
    made = tmp_path / "made"
    path.rename(made)
    monkeypatch.setattr(prepared, "converted", lambda *a: pytest.fail("quantised again"))
    with ThreadPoolExecutor(1) as pool:
        with lock_file(next((k5_home / "base").glob(".lock-*"))):
            other = pool.submit(prepare, toy_model, torch.bfloat16, CPU)
            while f"Waiting for process {os.getpid()} on" not in capsys.readouterr().err:
                time.sleep(0.02)
            made.rename(path)  # as the first one does at its end
        assert other.result(30) == path


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


def flip(path: Path, position: int, bit: int) -> None:
    with path.open("r+b") as file:
        file.seek(position)
        (byte,) = file.read(1)
        file.seek(position)
        file.write(bytes([byte ^ (1 << bit)]))


# The length of the header, its checksum, a name, an offset, the padding behind the text, and a tensor.
@pytest.mark.parametrize("place", [0, 5, 20, 45, 400, 5000, 4 * 2**20, -1000])
def test_a_flipped_bit_is_found_and_the_file_made_again(toy_model, capsys, place):
    path = prepare(toy_model, torch.bfloat16, CPU)
    whole = path.read_bytes()
    flip(path, place % len(whole), 0)
    ours = load_prepared(toy_model, torch.bfloat16, CPU)
    told = capsys.readouterr().err
    assert f"{path} is damaged (" in told
    assert "quantising the checkpoint again" in told
    assert_equal(ours, load_transformer(toy_model, "int8-quanto", torch.bfloat16, CPU))
    assert path.read_bytes() == whole


@pytest.mark.parametrize("count", [100, pytest.param(4000, marks=pytest.mark.long)])
def test_every_flipped_bit_is_found(toy_model, count):
    path = prepare(toy_model, torch.bfloat16, CPU)
    empty = prepared.empty_transformer(toy_model)
    chance, size = random.Random(5), path.stat().st_size
    text = 8 + len(path.read_bytes()[8 : 8 + 4 * 2**20].rstrip())
    for i in range(count):
        position = chance.randrange(text) if i % 2 else chance.randrange(text, size)
        bit = chance.randrange(8)
        flip(path, position, bit)
        with pytest.raises(prepared.Damaged):
            prepared._fill(empty, path, CPU, lambda *_: False)
        flip(path, position, bit)
    load_prepared(toy_model, torch.bfloat16, CPU)


def without_checksum(path: Path) -> None:
    """Write the header as versions did that saved no checksum of it."""
    raw = path.read_bytes()
    header = json.loads(raw[8 : 8 + 4 * 2**20])
    del header["__metadata__"]["checksum"]
    path.write_bytes(raw[:8] + json.dumps(header).encode().ljust(4 * 2**20) + raw[8 + 4 * 2**20 :])


@pytest.mark.parametrize(
    "damage",
    [
        without_checksum,
        lambda path: path.write_bytes(b""),
        lambda path: path.write_bytes(path.read_bytes() + b"\0"),
        lambda path: path.write_bytes(b"\xff" * 100),
        lambda path: save_file({"a": torch.zeros(3)}, path),
    ],
)
def test_a_file_of_an_earlier_version_or_of_something_else_is_made_again(toy_model, damage, capsys):
    path = prepare(toy_model, torch.bfloat16, CPU)
    whole = path.read_bytes()
    damage(path)
    assert not list_bases()[0].is_whole
    capsys.readouterr()
    prepare(toy_model, torch.bfloat16, CPU)
    assert "quantising the checkpoint again" in capsys.readouterr().err
    assert path.read_bytes() == whole


def test_another_checkpoints_base_under_its_name_is_not_used(toy_model):
    bf16, fp32 = (prepare(toy_model, dtype, CPU) for dtype in (torch.bfloat16, torch.float32))
    whole = bf16.read_bytes()
    shutil.copy(fp32, bf16)
    load_prepared(toy_model, torch.bfloat16, CPU)
    assert bf16.read_bytes() == whole


def test_a_disk_error_in_the_base_makes_it_again(toy_model, monkeypatch, capsys):
    path = prepare(toy_model, torch.bfloat16, CPU)
    real, failures = os.preadv, iter([True])

    def failing(descriptor: int, buffers: Any, offset: int) -> int:
        if next(failures, False):
            raise OSError(errno.EIO, "Input/output error")
        return real(descriptor, buffers, offset)

    monkeypatch.setattr(os, "preadv", failing)
    load_prepared(toy_model, torch.bfloat16, CPU)
    assert f"{path} is damaged (the disk reports an error)" in capsys.readouterr().err


STRANGER = 4242


def give_away(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make ``path`` another user's. Without root's rights, make this process another user's."""
    if os.geteuid() == 0:
        os.chown(path, STRANGER, STRANGER)
    else:
        monkeypatch.setattr(os, "geteuid", lambda: STRANGER)


@pytest.mark.parametrize("what", ["home", "base", "file"])
def test_what_another_user_owns_is_not_used(toy_model, k5_home, monkeypatch, what):
    path = prepare(toy_model, torch.bfloat16, CPU)
    give_away({"home": k5_home, "base": path.parent, "file": path}[what], monkeypatch)
    for use in (load_prepared, prepare):
        with pytest.raises(RunError, match=r"belongs to user 4242|belongs to \w+, and what lies there") as refused:
            use(toy_model, torch.bfloat16, CPU)
        assert "Set K5_HOME to a folder of your own" in refused.value.fix


@pytest.mark.parametrize("what", ["home", "base", "file"])
def test_what_others_can_write_is_not_used(toy_model, k5_home, monkeypatch, what):
    path = prepare(toy_model, torch.bfloat16, CPU)
    monkeypatch.setattr("k5cache.shared.system.is_private_group", lambda group: False)
    chosen = {"home": k5_home, "base": path.parent, "file": path}[what]
    usual = chosen.stat().st_mode & 0o777
    for mode, who in ((0o777, "every user"), (0o775, "its group")):
        chosen.chmod(mode)
        with pytest.raises(RunError, match=f"{chosen} can be written by {who}") as refused:
            load_prepared(toy_model, torch.bfloat16, CPU)
        assert f"chmod -R go-w {k5_home}" in refused.value.fix
    monkeypatch.setattr("k5cache.shared.system.is_private_group", lambda group: True)
    load_prepared(toy_model, torch.bfloat16, CPU)
    chosen.chmod(usual | 0o1022 if what != "file" else usual)  # sticky: nobody can replace what others own
    load_prepared(toy_model, torch.bfloat16, CPU)


def test_what_is_made_under_a_wide_umask_can_be_used_again(toy_model, k5_home, monkeypatch):
    monkeypatch.setattr("k5cache.shared.system.is_private_group", lambda group: False)
    before = os.umask(0)
    try:
        path = prepare(toy_model, torch.bfloat16, CPU)
        compiled = make_home("compiled", 0o700)
    finally:
        os.umask(before)
    modes = {p: p.stat().st_mode & 0o777 for p in (k5_home, path.parent, path, compiled)}
    assert list(modes.values()) == [0o755, 0o755, 0o644, 0o700]
    load_prepared(toy_model, torch.bfloat16, CPU)


def test_a_home_that_cannot_be_written_is_named_before_anything_is_compiled(k5_home, monkeypatch):
    make_home("base")
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # root may write everywhere
    with pytest.raises(OutputError, match=rf"{k5_home / 'compiled'} cannot be written") as refused:
        make_home("compiled", 0o700)
    assert refused.value.fix == "Set K5_HOME to a folder that can be written"


def test_headers_that_another_user_could_have_compiled_are_not_used(tmp_path, monkeypatch):
    import torch._inductor.config as inductor
    from torch._inductor.runtime import cache_dir_utils

    from k5train.forward.compile import set_up_compiler

    monkeypatch.setattr(cache_dir_utils, "default_cache_dir", lambda: str(tmp_path / "torchinductor_me"))
    monkeypatch.setattr("k5cache.shared.system.is_private_group", lambda group: False)
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "mine"))
    for where in ("torchinductor_me", "torchinductor_me/precompiled_headers"):
        with inductor.patch(cpp_cache_precompile_headers=True):
            set_up_compiler()
            assert inductor.cpp_cache_precompile_headers
            (tmp_path / where).chmod(0o775)
            set_up_compiler()
            assert not inductor.cpp_cache_precompile_headers
        (tmp_path / where).chmod(0o755)


def test_compiled_code_that_others_could_have_written_is_not_used(k5_home, monkeypatch):
    monkeypatch.setattr("k5cache.shared.system.is_private_group", lambda group: False)
    (k5_home / "compiled" / "ab").mkdir(parents=True)
    kernel = k5_home / "compiled" / "ab" / "kernel.so"
    kernel.touch()
    for folder in (k5_home, k5_home / "compiled", k5_home / "compiled" / "ab"):
        folder.chmod(0o755)
    kernel.chmod(0o664)  # as an earlier version left it
    with pytest.raises(RunError, match=rf"{kernel} can be written by its group"):
        make_home("compiled", 0o700)
    kernel.chmod(0o644)
    assert make_home("compiled", 0o700).stat().st_mode & 0o777 == 0o700


def test_what_another_users_killed_process_left_is_named(toy_model, k5_home, monkeypatch, capsys):
    leftover = k5_home / "base" / f".{2**22 + 1}-{'0' * 32}.safetensors"
    leftover.mkdir(parents=True)
    (leftover / "half").touch()  # so that root, too, leaves it
    if os.geteuid() != 0:
        pytest.skip("only root can make a file another user's")
    os.chown(leftover, STRANGER, STRANGER)
    prepare(toy_model, torch.bfloat16, CPU)
    assert f"{leftover} was left by a killed process of another user" in capsys.readouterr().err
    assert leftover.is_dir()


def test_an_interrupted_quantisation_leaves_no_file(toy_model, monkeypatch, k5_home):
    def interrupted(*args: Any) -> Any:
        yield "text_embeddings.in_layer.weight", torch.zeros(4, 4)
        raise KeyboardInterrupt

    monkeypatch.setattr(prepared, "converted", interrupted)
    with pytest.raises(KeyboardInterrupt):
        prepare(toy_model, torch.bfloat16, CPU)
    assert [path.name for path in (k5_home / "base").iterdir() if not path.name.startswith(".lock-")] == []


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

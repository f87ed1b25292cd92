"""Whatever a command is given in the place of a file or a folder, it ends soon, with a sentence."""

from __future__ import annotations

import bz2
import gzip
import importlib
import json
import lzma
import os
import shutil
import signal
import tarfile
import tracemalloc
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path

import pytest

from k5cache.cli import app as cache_app
from k5cache.options import CacheConfig
from k5cache.shared.checkpoint import ENCODER_PARTS, model_folder
from k5cache.shared.errors import DatasetError, ModelError
from k5cache.shared.model import ModelConfig
from k5cache.sources.find import find
from k5train.cli import app as train_app
from tests.cli import Cli
from tests.table_files import captions, png, skipped

SECONDS = 60  # for one command on a busy machine; most take 0.1 s
TABLES = (".csv", ".json", ".jsonl", ".parquet", ".arrow", ".tar")


def pipe(path: Path) -> None:
    os.mkfifo(path)


def endless(path: Path) -> None:
    path.symlink_to("/dev/zero")


def folder(path: Path) -> None:
    path.mkdir()


def circle(path: Path) -> None:
    path.symlink_to(path)


def huge(path: Path) -> None:
    """Ten gigabytes of zeros that take no space on the disk."""
    path.touch()
    os.truncate(path, 10_000_000_000)


def nested(path: Path) -> None:
    path.write_text("a = " * path.name.endswith(".toml") + "[" * 100_000 + "]" * 100_000, encoding="utf-8")


def digits(path: Path) -> None:
    path.write_text("a = " * path.name.endswith(".toml") + "1" * 10_000, encoding="utf-8")


KINDS: tuple[Callable[[Path], None], ...] = (pipe, endless, folder, circle, huge, nested, digits)
PLACES = {
    "source": [
        *((cache_app, "encode", f"x{suffix}") for suffix in TABLES),
        *((cache_app, command, "x.csv") for command in ("plan", "diff")),  # which find their source as encode does
    ],
    "recipe": [
        (cache_app, "encode", "images", "-r", "x.toml"), (cache_app, "plan", "images", "-r", "x.toml"),
        (train_app, "plan", "-r", "x.toml"), (train_app, "run", "cache", "-r", "x.toml"),
        (train_app, "sweep", "cache", "--list", "x.toml"), (train_app, "plan", "-r", "library.toml"),
        (cache_app, "encode", "images", "-r", "library.toml"),
    ],
    "model": [
        (cache_app, "encode", "images", "--model", "x"), (cache_app, "encode", "images", "--model", "odd_model"),
        (train_app, "plan", "--model", "odd_model"),
        (train_app, "check-lora", "lora.safetensors", "--model", "odd_model"),
        (train_app, "run", "cache", "--model", "odd_model"), (cache_app, "plan", "images", "--model", "odd_model"),
    ],
    "cache": [
        *((cache_app, command, name) for command in ("info", "verify", "show", "gc") for name in ("x", "odd_cache")),
        (cache_app, "merge", "x", "odd_cache", "-o", "new"), (cache_app, "prompts", "add", "odd_cache", "a fox"),
        (train_app, "plan", "odd_cache"), (train_app, "run", "odd_cache"),
    ],
    "run": [(train_app, command, name) for command in ("resume", "sample") for name in ("x", "odd_run")],
    "lora": [
        (train_app, "check-lora", "x.safetensors"), (train_app, "export", "x.safetensors"),
        (train_app, "merge", "x.safetensors", "x.safetensors", "-o", "new.safetensors"),
    ],
}  # fmt: skip


@contextmanager
def alarm(seconds: int, what: object):
    def ring(*_: object) -> None:
        raise TimeoutError(f"{what} has not ended after {seconds} s")

    before = signal.signal(signal.SIGALRM, ring)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


@pytest.fixture(scope="module")
def imported():
    """What the commands import takes long on a busy machine."""
    for module in ("training.shared_base", "training.carry_out", "training.picture_rows", "adapter.export"):
        importlib.import_module(f"k5train.{module}")


@pytest.fixture
def prepared(tmp_path, imported):
    """A folder in which every command of ``PLACES`` finds what it needs, apart from the odd file."""

    def prepare(make: Callable[[Path], None]) -> Cli:
        (tmp_path / "images").mkdir()
        for name in ("x", "x.toml", "x.safetensors", "x.library.json", *(f"x{suffix}" for suffix in TABLES)):
            make(tmp_path / name)
        library = 'train.validation.prompt_library = "x.library.json"\n'
        (tmp_path / "library.toml").write_text(library, encoding="utf-8")
        for name in ("odd_model/transformer/config.json", "odd_cache/manifest.json", "odd_run/run.json"):
            (tmp_path / name).parent.mkdir(parents=True)
            make(tmp_path / name)
        (tmp_path / "odd_run" / "recipe.toml").touch()
        return Cli(tmp_path)

    return prepare


@pytest.mark.parametrize("make", KINDS, ids=lambda make: make.__name__)
def test_a_command_that_is_given_something_odd_ends_with_a_sentence(prepared, make):
    cli = prepared(make)
    for commands in PLACES.values():
        for app, *arguments in commands:
            with alarm(SECONDS, arguments):
                done = cli(app, *arguments)
            if arguments == ["verify", "odd_cache"] and done.code == 1:  # its result is what is damaged
                assert "manifest.json" in done.out
                continue
            assert done.code == 2, (arguments, done)
            assert (done.err.count("error: "), done.err.count("fix: ")) == (1, 1), (arguments, done)


def zeros_in(kind: str, path: Path) -> None:
    """A compressed file of 90 MB of zeros."""
    opener = {"gz": gzip.open, "xz": lzma.open, "bz2": bz2.open}[kind]
    with opener(path, "wb") as file:
        if path.name.endswith(".tar"):
            info = tarfile.TarInfo("a.png")
            info.size = 90_000_000
            file.write(info.tobuf())
        for _ in range(90):
            file.write(bytes(1_000_000))


@pytest.mark.parametrize(("kind", "name"), [("gz", "a.csv"), ("gz", "a.jsonl"), ("xz", "a.tar"), ("gz", "a.tar")])
def test_a_compressed_file_that_grows_too_far_is_named(tmp_path, kind, name):
    zeros_in(kind, tmp_path / name)
    tracemalloc.start()
    with pytest.raises(DatasetError, match="decompresses to more than 100 times its size"):
        find(tmp_path / name, CacheConfig())
    assert tracemalloc.get_traced_memory()[1] < 500_000_000
    tracemalloc.stop()


@pytest.mark.parametrize("kind", [tarfile.XHDTYPE, tarfile.GNUTYPE_LONGNAME, tarfile.XGLTYPE])
@pytest.mark.parametrize("size", [3_000_000_000, -512])
def test_a_header_of_a_tar_that_claims_gigabytes_is_not_read(tmp_path, kind, size):
    info = tarfile.TarInfo("x")
    info.type = kind
    header = bytearray(info.tobuf(tarfile.GNU_FORMAT))
    header[124:136] = tarfile.itn(size, 12, tarfile.GNU_FORMAT)
    header[148:156] = b"        "
    header[148:156] = b"%06o\0 " % sum(header)
    (tmp_path / "a.tar").write_bytes(bytes(header) + bytes(4096))
    with pytest.raises(DatasetError, match=r"cannot be read as a tar: it has a header of"):
        find(tmp_path / "a.tar", CacheConfig())


def test_a_caption_that_leads_out_of_its_folder_is_read_only_beside_its_picture(tmp_path):
    source, other = tmp_path / "source", tmp_path / "other"
    source.mkdir()
    other.mkdir()
    for folder_, name in ((source, "real"), (other, "cat"), (source, "inner")):
        (folder_ / f"{name}.png").write_bytes(png(1))
    (tmp_path / "secret.txt").write_text("private", encoding="utf-8")
    (other / "cat.txt").write_text("a cat", encoding="utf-8")
    (source / "text").mkdir()
    (source / "text" / "a.txt").write_text("within", encoding="utf-8")
    (source / "inner.txt").symlink_to("text/a.txt")
    (source / "real.txt").symlink_to(tmp_path / "secret.txt")
    for name, picture, text in (("1", "cat.png", "cat.txt"), ("2", "cat.png", "../secret.txt")):
        (source / f"{name}.png").symlink_to(other / picture)
        (source / f"{name}.txt").symlink_to(other / text)
    assert captions(source) == {"1.png": ("a cat",), "inner.png": ("within",)}
    reason = "caption {}.txt is a link that leads out of the folder: copy the file instead"
    assert {name: skipped(source)[name] for name in ("2.png", "real.png")} == {
        "2.png": reason.format("2"), "real.png": reason.format("real"),
    }  # fmt: skip


def test_a_snapshot_of_the_hub_whose_files_are_links_to_blobs_is_read(tmp_path):
    snapshot, blobs = tmp_path / "datasets--me--cats" / "snapshots" / "0123", tmp_path / "datasets--me--cats" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    (blobs / "aa").write_bytes(png(1))
    (blobs / "bb").write_text("a cat", encoding="utf-8")
    (snapshot / "cat.png").symlink_to("../../blobs/aa")
    (snapshot / "cat.txt").symlink_to("../../blobs/bb")
    assert captions(snapshot) == {"cat.png": ("a cat",)}


@pytest.mark.parametrize(
    ("card", "words"),
    [
        ("---\na: &a [x, x]\nb: &b [*a, *a]\nconfigs: *b\n---\n", "aliases"),
        ("---\nconfigs: " + "[" * 50_000 + "\n---\n", "nested too deeply|cannot be read"),
        ("---\n" + "\n" * 1_000_000 + "configs: 5\n---\n", "."),
        ("---\nconfigs:\n- config_name: default\n  data_files: " + "a*" * 60 + "\n---\n", "has no rows"),
    ],
    ids=["aliases", "nested", "blank lines", "stars"],
)  # fmt: skip
def test_the_readme_of_a_dataset_cannot_hang(tmp_path, card, words):
    (tmp_path / "README.md").write_text(card, encoding="utf-8")
    (tmp_path / ("a" * 200 + ".csv")).write_text("image,text\n", encoding="utf-8")
    (tmp_path / "t.parquet").write_bytes(b"")
    with alarm(SECONDS, card[:40]), pytest.raises(DatasetError, match=words):
        find(tmp_path, CacheConfig())


@pytest.mark.parametrize(
    ("part", "values"),
    [
        ("transformer", {"model_dim": 10**9}), ("transformer", {"model_dim": -1}), ("transformer", {"ff_dim": "64"}),
        ("transformer", {"num_visual_blocks": 10**6}), ("transformer", {"axes_dims": [10**7, 2, 2]}),
        ("transformer", {"axes_dims": 4}), ("transformer", {"patch_size": 2}), ("transformer", {"time_dim": 1.5}),
        ("transformer", {"in_visual_dim": True}), ("transformer", {"model_dim": []}),
        ("vae", {"block_out_channels": 5}), ("vae", {"block_out_channels": [1, 2, "a", 4]}),
        ("vae", {"scaling_factor": "1"}), ("vae", {"scaling_factor": float("nan")}),
        ("vae", {"latent_channels": 10**9}),
        ("text_encoder", {"hidden_size": 10**9}), ("text_encoder", {"text_config": 5}),
        ("text_encoder_2", {"num_hidden_layers": -4}),
    ],
)  # fmt: skip
def test_absurd_numbers_of_a_model_are_refused_before_anything_is_made_of_them(tmp_path, toy_model, part, values):
    model = shutil.copytree(toy_model, tmp_path / "model")
    config = model / part / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text(encoding="utf-8")), **values}), encoding="utf-8")
    with pytest.raises(ModelError, match=next(iter(values)) + "|patches"):
        model_folder(ModelConfig(path=str(model)), ("transformer", *ENCODER_PARTS))

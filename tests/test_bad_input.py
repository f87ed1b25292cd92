"""Bad input ends in one or two lines of advice and exit code 2; good items are done, no file is half-written."""

from __future__ import annotations

import errno
import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import k5cache
from k5cache.cli import app as cache_app
from k5cache.shared import files
from k5cache.store.manifest import encode_document, read_manifest, write_manifest
from k5train.cli import app as train_app
from tests.cli import Cli, Done


@pytest.fixture
def cli(tmp_path) -> Cli:
    return Cli(tmp_path)


def picture(path: Path, width: int = 96, height: int = 80, caption: str | None = "a picture") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    values = np.random.default_rng(width).integers(0, 255, (height, width, 3), dtype=np.uint8)
    Image.fromarray(values).save(path)
    if caption is not None:
        path.with_suffix(".txt").write_text(caption, encoding="utf-8")
    return path


def refused(done: Done, *words: str) -> None:
    """Exit code 2 and at most two short lines that contain these words; no traceback."""
    assert done.code == 2, done.out + done.err
    lines = [line for line in done.err.splitlines() if line.strip()]
    assert [line.split(":")[0].strip() for line in lines[-2:]] == ["error", "fix"], done.err
    for word in words:
        assert word in done.err


def small(model: Path) -> list[str]:
    return ["--model", str(model), "--set", "cache.resolution=64"]


def test_a_source_that_is_not_there(cli, toy_model):
    refused(cli(cache_app, "encode", "nowhere", *small(toy_model)), "There is no folder nowhere")


def test_a_folder_without_images_leaves_no_cache(cli, toy_model):
    (cli.folder / "empty").mkdir()
    refused(cli(cache_app, "encode", "empty", *small(toy_model)), "empty has no image", ".avif")
    assert not (cli.folder / "cache").exists()


def test_images_without_captions_are_named(cli, toy_model):
    picture(cli.folder / "set" / "bare.png", caption=None)
    refused(cli(cache_app, "encode", "set", *small(toy_model)), "bare.png", "caption")


def test_bad_images_are_skipped_with_reasons_and_the_rest_is_encoded(cli, toy_model):
    folder = cli.folder / "set"
    picture(folder / "good.png")
    picture(folder / "tiny.png", 8, 8)
    picture(folder / "bare.png", caption=None)
    cut = picture(folder / "cut.jpg", 200, 200)
    cut.write_bytes(cut.read_bytes()[:2000])
    picture(folder / "zero.png").write_bytes(b"")
    picture(folder / "text.png").write_text("not a picture")
    done = cli(cache_app, "encode", "set", *small(toy_model))
    assert done.code == 0, done.err
    assert "4 skipped" in done.out
    assert all(f"  {name}: " in done.out for name in ("bare.png", "cut.jpg", "zero.png", "text.png"))
    assert "1 upscaled" in done.out
    cache = k5cache.open(cli.folder / "cache" / "set")
    assert [item["path"] for item in cache] == ["good.png", "tiny.png"]


def test_a_source_of_broken_images_only(cli, toy_model):
    picture(cli.folder / "set" / "cut.jpg", 200, 200)
    cut = cli.folder / "set" / "cut.jpg"
    cut.write_bytes(cut.read_bytes()[:2000])
    refused(cli(cache_app, "encode", "set", *small(toy_model)), "cut.jpg")


def test_a_caption_of_2000_words_is_cut_and_reported(cli, toy_model):
    picture(cli.folder / "set" / "long.png", caption="word " * 2000)
    done = cli(cache_app, "encode", "set", *small(toy_model))
    assert done.code == 0, done.err
    assert "1 truncated caption" in done.out
    assert cli(cache_app, "info", "cache/set").code == 0
    assert k5cache.open(cli.folder / "cache" / "set").texts().n_tokens.max() <= 512


@pytest.mark.parametrize("command", [(cache_app, "info"), (train_app, "run")], ids=["info", "run"])
def test_a_cache_that_is_not_one(cli, toy_model, command):
    app, name = command
    (cli.folder / "stuff").mkdir()
    (cli.folder / "stuff" / "notes.txt").write_text("hello")
    extra = ["--model", str(toy_model)] if name == "run" else []
    refused(cli(app, name, "stuff", *extra), "stuff is not a cache")
    refused(cli(app, name, "missing", *extra), "missing is not a cache")
    assert not (cli.folder / "runs").exists()


def test_no_cache_or_several_to_choose_from(cli, toy_model):
    refused(cli(train_app, "run", "--model", str(toy_model)), "no cache under cache/", "k5cache encode")
    for name in ("one", "two"):
        picture(cli.folder / name / "a.png")
        assert cli(cache_app, "encode", name, *small(toy_model)).code == 0
    refused(cli(train_app, "run", "--model", str(toy_model)), "There are 2 caches: cache/one, cache/two")


def test_a_misspelt_key_and_a_wrong_type_are_named_before_anything_is_loaded(cli, toy_model):
    picture(cli.folder / "set" / "a.png")
    (cli.folder / "r.toml").write_text('[cache]\nresolutoin = 64\nshard_mb = "big"\n')
    done = cli(cache_app, "encode", "set", "--recipe", "r.toml", "--model", str(toy_model))
    refused(done, "r.toml, line 2: [cache] unknown key 'resolutoin'; did you mean 'resolution'?", "cache.shard_mb")
    done = cli(train_app, "run", "--set", "train.optim.learning_rate=1")
    refused(done, "[train.optim] unknown key 'learning_rate'")
    refused(cli(cache_app, "encode", "set", "--recipe", "absent.toml"), "There is no recipe absent.toml")


@pytest.mark.parametrize("part", ["vae", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"])
def test_a_model_folder_that_lacks_a_part(cli, toy_model, part):
    picture(cli.folder / "set" / "a.png")
    model = cli.folder / "model"
    shutil.copytree(toy_model, model, ignore=lambda folder, names: [part] if Path(folder) == toy_model else [])
    refused(cli(cache_app, "encode", "set", *small(model)), f"lacks {part}/", "--model DIR")
    assert not (cli.folder / "cache").exists()


def test_a_model_that_is_not_there_and_cannot_be_downloaded(cli):
    picture(cli.folder / "set" / "a.png")
    refused(cli(cache_app, "encode", "set", "--model", "./models/none"), "There is no model folder ./models/none")
    refused(cli(cache_app, "encode", "set"), "kandinskylab/Kandinsky-5.0-T2I-Lite-sft-Diffusers", "--model DIR")


def test_a_full_size_transformer_without_a_gpu(cli, toy_model, monkeypatch):
    import torch

    from k5train.training import device

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(device, "LARGE", 1000)  # bytes: the toy counts as full size
    picture(cli.folder / "set" / "a.png")
    assert cli(cache_app, "encode", "set", *small(toy_model)).code == 0
    refused(cli(train_app, "run", "--model", str(toy_model)), "There is no GPU", "train.device=cpu")


def test_a_run_that_was_refused_leaves_its_folder_to_the_mended_command(cli, toy_model):
    picture(cli.folder / "set" / "a.png")
    assert cli(cache_app, "encode", "set", *small(toy_model)).code == 0
    run = ("run", "--model", str(toy_model), "-o", "runs/a", "--set", "train.lora.rank=2", "--set")
    refused(cli(train_app, *run, "train.lora.targets=['no_such_layer']"), "no_such_layer")
    assert list((cli.folder / "runs").iterdir()) == []
    (cli.folder / "runs" / "a").mkdir()
    (cli.folder / "runs" / "a" / "notes.txt").write_text("mine", encoding="utf-8")
    refused(cli(train_app, *run, "train.steps=1"), "runs/a is not empty and not a run: it holds notes.txt")
    assert (cli.folder / "runs" / "a" / "notes.txt").read_text(encoding="utf-8") == "mine"
    (cli.folder / "runs" / "a" / "notes.txt").unlink()
    done = cli(train_app, *run, "train.steps=1", "--set", "train.mixed_precision=fp32")
    assert done.code == 0, done.err
    assert "was stopped" not in done.err


def test_the_next_command_is_quoted_and_names_what_was_given(cli, toy_model):
    picture(cli.folder / "my set" / "a.png")
    (cli.folder / "my recipe.toml").write_text("[cache]\nresolution = 64\n", encoding="utf-8")
    given = ("-r", "my recipe.toml", "--model", str(toy_model))
    planned = cli(cache_app, "plan", "my set", *given, "--set", "cache.flip=true", "--device", "cpu")
    assert planned.out.splitlines()[-1] == (
        "Next, encode: k5cache encode 'my set' -o 'cache/my set' --recipe 'my recipe.toml' "
        f"--model {toy_model} --set cache.flip=true --device cpu"
    )
    encoded = cli(cache_app, "encode", "my set", *given)
    assert encoded.out.splitlines()[-1] == (
        f"Next, train a LoRA: k5train run 'cache/my set' --recipe 'my recipe.toml' --model {toy_model}"
    )
    shown = cli(cache_app, "info", "cache/my set")
    assert shown.out.splitlines()[-1] == f"Next, train a LoRA: k5train run 'cache/my set' --model {toy_model}"


@pytest.mark.parametrize("lost", ["model", "text", "latents", "selection"])
def test_a_cache_of_another_program_is_shown_and_refused_without_a_traceback(cli, toy_model, lost):
    picture(cli.folder / "set" / "a.png")
    assert cli(cache_app, "encode", "set", *small(toy_model)).code == 0
    root, asked = cli.folder / "cache" / "set", ("cache/set", "--model", str(toy_model))
    manifest = read_manifest(root)
    write_manifest(root, replace(manifest, recipe={k: v for k, v in manifest.recipe.items() if k != lost}))
    assert cli(cache_app, "verify", "cache/set").code == 0
    assert cli(cache_app, "info", "cache/set").code == 0
    if lost == "latents":
        refused(cli(cache_app, "show", *asked), "its recipe has no latents.vae")
    if lost == "text":
        refused(cli(cache_app, "prompts", "add", *asked, "a fox"), "its recipe has no text.text_encoder")
    if lost == "selection":
        refused(cli(train_app, "run", *asked, "--set", "train.steps=1"), "its recipe has no selection.resolution")
    document = json.loads((root / "manifest.json").read_text(encoding="utf-8"))
    del document["sha256"]
    document["recipe"][lost] = 5
    (root / "manifest.json").write_bytes(encode_document(document))
    refused(cli(cache_app, "info", "cache/set"), f"recipe.{lost} is 5")


@pytest.mark.parametrize("free", [1_000, 8_000, 16_000], ids=["text", "latents", "index"])
def test_a_full_disk_names_itself_and_the_next_encode_goes_on(cli, toy_model, monkeypatch, free):
    for i in range(2):
        picture(cli.folder / "set" / f"{i}.png", 90 + i, caption=f"picture {i}")
    write, room = files.NewFile.write, [free]

    def write_until_full(self: files.NewFile, data: bytes) -> int:
        room[0] -= len(data)
        if room[0] < 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(self, data)

    with monkeypatch.context() as patched:
        patched.setattr(files.NewFile, "write", write_until_full)
        done = cli(cache_app, "encode", "set", *small(toy_model))
    refused(done, "The disk is full")
    left = [p.name for p in (cli.folder / "cache" / "set").rglob("*") if p.is_file() and p.name.startswith(".tmp")]
    assert left == []
    again = cli(cache_app, "encode", "set", *small(toy_model))
    assert again.code == 0, again.err
    assert len([*k5cache.open(cli.folder / "cache" / "set")]) == 2


def test_an_out_that_is_a_file_is_refused_and_left_alone(cli, toy_model):
    picture(cli.folder / "set" / "a.png")
    (cli.folder / "notes.txt").write_text("mine", encoding="utf-8")
    refused(cli(cache_app, "encode", "set", "-o", "notes.txt", *small(toy_model)), "notes.txt cannot be written")
    assert (cli.folder / "notes.txt").read_text(encoding="utf-8") == "mine"


@pytest.mark.parametrize(
    ("number", "words"),
    [(errno.EFBIG, "larger than this system allows there"), (errno.EACCES, "no permission for there"),
     (errno.EROFS, "read-only there"), (errno.EDQUOT, "quota is used up while writing there")],
)  # fmt: skip
def test_what_a_disk_refuses_is_two_lines(cli, number, words):
    def write() -> None:
        raise OSError(number, "as the system says it", "there")

    refused(cli(write), words)


def test_an_error_shows_a_users_brackets_as_they_are(cli, toy_model):
    refused(cli(cache_app, "encode", "[bold]nowhere[/bold]", *small(toy_model)), "[bold]nowhere[/bold]")

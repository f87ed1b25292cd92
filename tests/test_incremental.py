"""Does a second encode do what changed, and only that?"""

from __future__ import annotations

import errno
import json
import os
import shutil
import struct
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from k5cache.encode import image_pass, source_note, update
from k5cache.encode import request as asking
from k5cache.encode.preview import preview_encode
from k5cache.encode.request import EncodeReport, read_listed_request
from k5cache.encoders import clip, qwen, vae
from k5cache.options import CacheConfig
from k5cache.shared.errors import CacheCorrupt, CacheStale
from k5cache.shared.model import Drawn, ModelConfig
from k5cache.shared.template import Template
from k5cache.sources import find, images, unchanged
from k5cache.sources.items import UnreadableImage
from k5cache.store.manifest import read_manifest
from k5cache.upkeep.gc import collect
from k5cache.upkeep.verify import verify_cache
from tests.workshop import Workshop


@pytest.fixture(scope="module")
def encoded(tmp_path_factory, toy_model) -> Workshop:
    """Three images, encoded; tests work on copies."""
    shop = Workshop(tmp_path_factory.mktemp("encoded"), toy_model)
    for i, name in enumerate(("cat", "dog", "sub/owl")):
        shop.put(f"{name}.png", f"a {Path(name).name}", seed=i, size=(64, 64) if i else (96, 64))
    shop.encode("a fox")
    return shop


@pytest.fixture
def three(encoded, tmp_path) -> Workshop:
    """A copy of the same images and cache for one test, which knows these files."""
    shop = Workshop(tmp_path / "shop", encoded.model)
    shutil.copytree(encoded.source, shop.source, dirs_exist_ok=True)
    shutil.copytree(encoded.root, shop.root)
    shop.encode("a fox")
    return shop


@pytest.fixture
def loaded(monkeypatch) -> Iterator[list[str]]:
    """Which models were loaded."""
    names: list[str] = []
    for module, function in ((qwen, "load_qwen"), (clip, "load_clip"), (vae, "load_vae")):
        original = getattr(module, function)

        def load(*args, original=original, function=function, **kwargs):
            names.append(function.removeprefix("load_"))
            return original(*args, **kwargs)

        monkeypatch.setattr(module, function, load)
    return names


def changes(report: EncodeReport) -> dict[str, object]:
    """The counts and lists of a report that are not empty."""
    names = ("num_latents", "num_texts", "added", "changed", "removed", "renamed", "skipped", "repaired")
    return {name: value for name in names if (value := getattr(report, name))}


def test_an_unchanged_folder_writes_nothing_and_loads_nothing(three, loaded):
    before = three.files()
    report = three.encode("a fox")
    assert (report.is_unchanged, report.num_items, changes(report), loaded) == (True, 3, {}, [])
    assert three.files() == before


@pytest.mark.parametrize("num_images", [500, pytest.param(10_000, marks=pytest.mark.long)])
def test_unchanged_images_need_no_heavy_library_and_no_write(tmp_path, toy_model, num_images):
    shop = Workshop(tmp_path, toy_model)
    first = shop.put("00000.png", "a cat")
    for i in range(1, num_images):
        for suffix in (".png", ".txt"):
            os.link(first.with_suffix(suffix), shop.source / f"{i:05}{suffix}")
    report = shop.encode()
    assert (report.num_items, report.num_latents, report.num_texts) == (num_images, 1, 2)  # identical: stored once
    before = shop.files()
    code = (
        "import sys\n"
        "from k5cache.cli import main\n"
        "try:\n    main()\nexcept SystemExit as end:\n    assert end.code == 0\n"
        "print(sorted({'torch', 'transformers', 'diffusers', 'pyarrow', 'numpy', 'PIL', 'datasets'} & {*sys.modules}))"
    )
    arguments = ["encode", shop.source, "-o", shop.root, "--model", toy_model, "--set", "cache.resolution=64"]
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False)
    assert f"is up to date: {num_images} items" in done.stdout, done.stderr
    assert done.stdout.splitlines()[-1] == "[]"
    assert shop.files() == before


def test_one_image_more_is_encoded_alone(three, loaded):
    three.put("fox.png", "a cat", seed=9)
    assert changes(three.encode("a fox")) == {"num_latents": 1, "added": ("fox.png",)}
    assert loaded == ["vae"]
    assert [three.cache.row(i).path for i in range(4)] == ["cat.png", "dog.png", "fox.png", "sub/owl.png"]


def test_an_edited_caption_is_encoded_alone(three, loaded):
    (three.source / "dog.txt").write_text("a spaniel", encoding="utf-8")
    assert changes(three.encode("a fox")) == {"num_texts": 1, "changed": ("dog.png",)}
    assert sorted(loaded) == ["clip", "qwen"]
    assert [text.caption for text in three.cache[1]["captions"]] == ["a spaniel"]


def test_a_renamed_image_is_read_and_not_encoded(three, loaded):
    for suffix in (".png", ".txt"):
        (three.source / f"dog{suffix}").rename(three.source / f"hound{suffix}")
    report = three.encode("a fox")
    assert (changes(report), loaded) == ({"renamed": (("dog.png", "hound.png"),)}, [])
    assert [item["path"] for item in three.cache] == ["cat.png", "hound.png", "sub/owl.png"]


def test_the_images_of_a_renamed_folder_are_neither_read_nor_encoded(three, loaded, monkeypatch):
    monkeypatch.setattr(images, "hash_content", lambda _: pytest.fail("it was read"))
    (three.source / "sub").rename(three.source / "birds")
    assert changes(three.encode("a fox")) == {"renamed": (("sub/owl.png", "birds/owl.png"),)}
    assert loaded == []


def test_a_copied_folder_is_read_and_not_encoded_and_then_known(three, loaded):
    copy = three.source.with_name("copy")
    shutil.copytree(three.source, copy, copy_function=shutil.copyfile)
    three.source = copy
    report = three.encode("a fox")
    assert (report.is_unchanged, changes(report), loaded) == (False, {}, [])
    assert three.encode("a fox").is_unchanged


def test_a_deleted_image_leaves_the_index_at_once_and_the_shards_at_gc(three):
    for suffix in (".png", ".txt"):
        (three.source / f"dog{suffix}").unlink()
    assert changes(three.encode("a fox")) == {"removed": ("dog.png",)}
    assert len(three.cache) == 2
    size = three.cache.manifest.shards
    assert collect(three.root, dry_run=True).num_rows == 2
    assert three.cache.manifest.shards == size
    collect(three.root)
    assert sum(shard.num_rows for shard in three.cache.manifest.shards) == 2 + 4  # "", a fox, a cat, an owl
    assert verify_cache(three.root).problems == ()
    assert three.encode("a fox").is_unchanged


def edit_in_place(path: Path, before: bytes, after: bytes) -> None:
    """Write over some bytes of a file and set its mtime back: size, mtime and inode stay."""
    stat, data = path.stat(), path.read_bytes()
    assert data.count(before) == 1
    path.write_bytes(data.replace(before, after))
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    now = path.stat()
    assert (now.st_size, now.st_mtime_ns, now.st_ino) == (stat.st_size, stat.st_mtime_ns, stat.st_ino)


def test_an_edit_that_keeps_size_time_and_inode_is_seen(three, loaded):
    exif = Image.Exif()
    exif[0x0112] = 1
    upright = struct.pack("<HHII", 0x0112, 3, 1, 1) if exif.endian == "<" else struct.pack(">HHIHH", 0x0112, 3, 1, 1, 0)
    turned = upright.replace(b"\1\0", b"\6\0") if exif.endian == "<" else upright[:8] + b"\0\6\0\0"
    three.put("fox.jpg", "a cat", seed=5, size=(96, 64))
    Image.open(three.source / "fox.jpg").save(three.source / "fox.jpg", exif=exif)
    Image.new("L", (96, 64), 9).save(three.source / "cat.mask.bmp")
    (three.source / "cat.mask.bmp").rename(three.source / "cat.mask.png")  # what it is decides, not its suffix
    three.encode("a fox")
    assert three.cache.row(2).width == 96
    loaded.clear()
    edit_in_place(three.source / "fox.jpg", upright, turned)
    assert changes(three.encode("a fox")) == {"num_latents": 1, "changed": ("fox.jpg",)}
    assert (three.cache.row(2).width, three.cache.row(2).height, loaded) == (64, 96, ["vae"])
    edit_in_place(three.source / "cat.mask.png", bytes([9]) * (96 * 64), bytes([77]) * (96 * 64))
    assert changes(three.encode("a fox")) == {"changed": ("cat.png",)}
    assert three.encode("a fox").is_unchanged


def test_other_permissions_and_a_new_link_have_an_image_read_and_not_encoded(three, loaded):
    (three.source / "cat.png").chmod(0o600)
    os.link(three.source / "dog.png", three.source.with_name("elsewhere.png"))
    assert (changes(three.encode("a fox")), loaded) == ({}, [])
    assert three.encode("a fox").is_unchanged


def cut(path: Path) -> Path:
    path.write_bytes(path.read_bytes()[:3000])
    return path


@pytest.fixture
def tried(monkeypatch) -> list[str]:
    """The images and masks that encodes tried to decode."""
    paths: list[str] = []
    for name in ("encode_latents", "encode_masks"):
        original = getattr(update, name)

        def encode(job, commit, jobs, original=original):
            paths.extend(job.path for job in jobs)
            return original(job, commit, jobs)

        monkeypatch.setattr(update, name, encode)
    return paths


@pytest.mark.parametrize("name", ["broken.png", "cat.mask.png"])
@pytest.mark.parametrize("flip", [False, True])
def test_an_image_or_mask_that_cannot_be_decoded_is_tried_once_and_reported_every_time(
    three, loaded, tried, monkeypatch, name, flip
):
    monkeypatch.setattr(unchanged, "SETTLED_NS", 0)
    three.put("broken.png", "a cat", seed=9)
    cut(three.put(name, "a cat", seed=9, size=(64, 64) if name == "broken.png" else (96, 64)))
    (three.source / "cat.mask.txt").unlink(missing_ok=True)
    first = three.encode("a fox", flip=flip, update=True)
    [skip] = first.skipped
    assert skip.path == ("cat.png" if name == "cat.mask.png" else name)
    assert skip.reason.startswith("its mask cat.mask.png cannot be read" if "mask" in name else "cannot be read")
    tried.clear(), loaded.clear()
    before = three.files()
    with monkeypatch.context() as patch:
        patch.setattr(find, "find", lambda *_: pytest.fail("the captions were read"))
        again = three.encode("a fox", flip=flip)
    assert (again.is_unchanged, again.skipped, tried, loaded) == (True, first.skipped, [], [])
    assert three.files() == before
    (three.source / "dog.txt").write_text("a spaniel", encoding="utf-8")
    third = three.encode("a fox", flip=flip)
    assert changes(third) == {"num_texts": 1, "changed": ("dog.png",), "skipped": first.skipped}
    assert (tried, sorted(loaded)) == ([], ["clip", "qwen"])
    assert three.encode("a fox", flip=flip).is_unchanged


def test_a_preview_does_not_count_an_image_that_cannot_be_decoded(three):
    cut(three.put("broken.png", "a cat", seed=9))
    first = three.encode("a fox")
    model, config = ModelConfig(path=str(three.model)), CacheConfig(resolution=64)
    preview = preview_encode(
        read_listed_request(three.source, three.root, model, config, Drawn(("a fox",))), False, None
    )
    assert (preview.num_latents, preview.num_items, preview.skipped) == (0, 3, first.skipped)


@pytest.mark.parametrize("again", ["rehash", "repair", "other Pillow", "replaced"])
def test_an_image_that_could_not_be_decoded_is_tried_again_when_that_may_help(three, tried, monkeypatch, again):
    cut(three.put("broken.png", "a cat", seed=9))
    three.encode("a fox")
    tried.clear()
    if again == "replaced":
        three.put("broken.png", "a cat", seed=9)
        assert changes(three.encode("a fox")) == {"num_latents": 1, "added": ("broken.png",)}
    elif again == "other Pillow":
        versions = {"pillow": "99.0"}
        monkeypatch.setattr(source_note, "version", versions.get)
        assert [skip.path for skip in three.encode("a fox").skipped] == ["broken.png"]
    else:
        assert [skip.path for skip in three.encode("a fox", **{again: True}).skipped] == ["broken.png"]
    assert tried == ["broken.png"]
    three.encode("a fox")
    assert tried == ["broken.png"]


def test_an_image_that_the_system_could_not_read_is_tried_again(three, tried, monkeypatch):
    def fail(*_: object) -> None:
        raise UnreadableImage("cannot be read (Input/output error)") from OSError(errno.EIO, "Input/output error")

    three.put("fox.png", "a cat", seed=9)
    with monkeypatch.context() as patch:
        patch.setattr(images, "load_pixels", fail)
        assert [skip.reason for skip in three.encode("a fox").skipped] == ["cannot be read (Input/output error)"]
    assert changes(three.encode("a fox")) == {"num_latents": 1, "added": ("fox.png",)}
    assert tried == ["fox.png", "fox.png"]


def test_an_image_that_changes_while_it_is_encoded_is_not_stored_under_the_old_name(three, monkeypatch):
    path = three.put("fox.png", "a cat", seed=9)
    original = image_pass.encode_latents

    def late(job, commit, jobs):
        three.put("fox.png", "a cat", seed=10)
        return original(job, commit, jobs)

    monkeypatch.setattr(update, "encode_latents", late)
    report = three.encode("a fox")
    assert [(skip.path, "changed" in skip.reason) for skip in report.skipped] == [("fox.png", True)]
    monkeypatch.undo()
    assert changes(three.encode("a fox")) == {"num_latents": 1, "added": ("fox.png",)}
    assert path.exists()


def test_a_picture_and_a_caption_replaced_at_any_stage_are_never_trained_on_as_they_were(three, tmp_path, monkeypatch):
    monkeypatch.setattr(unchanged, "SETTLED_NS", 0)
    stages, latents = ("plan_request", "encode_texts", "take_note"), []
    for seed, stage in enumerate(stages):
        original = getattr(update, stage)
        three.put("cat.png", "an early cat", seed=seed + 20, size=(96, 64))  # so that there is something to do

        def late(*arguments, original=original, seed=seed):
            time = (three.source / "cat.png").stat().st_mtime_ns
            three.put("cat.png", f"cat {seed}", seed=seed, size=(96, 64))
            os.utime(three.source / "cat.png", ns=(time, time))
            return original(*arguments)

        monkeypatch.setattr(update, stage, late)
        three.encode("a fox")
        monkeypatch.setattr(update, stage, original)
        three.encode("a fox")
        latents.append(three.cache[0]["mean"])
        assert three.cache[0]["captions"][0].caption == f"cat {seed}"
        assert three.encode("a fox").is_unchanged
    fresh = Workshop(tmp_path / "fresh", three.model)
    for seed in range(len(stages)):
        fresh.put(f"{seed}.png", "a cat", seed=seed, size=(96, 64))
    fresh.encode()
    assert all(torch.equal(fresh.cache[seed]["mean"], mean) for seed, mean in enumerate(latents))


# Another recipe


@pytest.fixture(scope="module")
def other_vae(tmp_path_factory, toy_model) -> Path:
    """The toy model with one weight of its VAE changed, under another name."""
    folder = tmp_path_factory.mktemp("models") / "other"
    folder.mkdir()
    for part in toy_model.iterdir():
        if part.name != "vae":
            (folder / part.name).symlink_to(part)
    shutil.copytree(toy_model / "vae", folder / "vae")
    (file,) = (folder / "vae").glob("*.safetensors")
    tensors = load_file(file)
    tensors["encoder.conv_out.bias"] += 1
    save_file(tensors, file)
    return folder


def test_every_field_that_differs_is_named_with_both_values(three, other_vae, monkeypatch):
    monkeypatch.setattr(asking, "prompt_template", lambda _kind: Template("other {}", 40))
    with pytest.raises(CacheStale) as caught:
        three.encode(model=other_vae, resolution=128, max_sequence_length=256)
    said = caught.value.problem
    for words in (
        "text.prompt_template is '<|im_start|>", "'other {}' now",
        "text.max_sequence_length is 512 in the cache, 256 now", "latents.vae has other weights",
        "selection.resolution is 64 in the cache, 128 now",
    ):  # fmt: skip
        assert words in said
    assert "--update" in caught.value.fix
    assert "text_encoder" not in said


def test_every_option_but_three_is_in_the_recipe_that_a_cache_is_compared_with(toy_model, toy_edit_model):
    plain = CacheConfig()
    for model, kind in ((toy_model, "t2i"), (toy_edit_model, "i2i")):
        known = asking.build_recipe(ModelConfig(path="mine"), plain, model)
        for field in fields(CacheConfig):
            other = "another" if isinstance(field.default, str | None) else field.default + 1
            config = replace(plain, **{field.name: other})
            if not config.refused_for(kind):
                recipe = asking.build_recipe(ModelConfig(path="mine"), config, model)
                assert (recipe == known) is (field.name in ("shard_mb", "source_dir")), field.name


def test_another_vae_encodes_the_images_again_and_leaves_the_text_alone(three, other_vae, loaded):
    old = three.cache
    report = three.encode("a fox", model=other_vae, update=True)
    assert (report.num_latents, report.num_texts, loaded) == (3, 0, ["vae"])
    new = three.cache
    assert not torch.equal(old[0]["mean"], new[0]["mean"])
    assert torch.equal(old[0]["captions"][0].prompt_embeds, new[0]["captions"][0].prompt_embeds)
    assert set(old.manifest.shards) < set(new.manifest.shards)  # until gc
    assert three.encode("a fox", update=True).num_latents == 0  # and back again


def test_another_template_encodes_the_captions_again_and_leaves_the_images_alone(three, loaded, monkeypatch):
    monkeypatch.setattr(asking, "prompt_template", lambda _kind: Template("other {}", 40))
    report = three.encode(update=True)  # the prompt "a fox" was asked for before: it is not lost
    assert (report.num_latents, report.num_texts) == (0, 5)
    assert "vae" not in loaded
    assert set(three.cache.manifest.prompts) == {"", "a fox"}
    three.cache.prompt("a fox")


def test_an_update_that_is_interrupted_leaves_the_cache_as_it_was(three, other_vae, monkeypatch):
    def fail(self, *args):
        raise KeyboardInterrupt

    before = three.cache
    monkeypatch.setattr("k5cache.encode.commit.Committer.index", fail)
    with pytest.raises(KeyboardInterrupt):
        three.encode("a fox", model=other_vae, update=True)
    after = three.cache
    assert after.manifest.recipe == before.manifest.recipe
    assert after.index.equals(before.index)
    monkeypatch.undo()
    report = three.encode("a fox", model=other_vae, update=True)
    assert (report.num_latents, report.reused_latents) == (0, 3)


def test_captions_are_cleaned_again_when_the_cleaner_changed_and_encoded_only_where_it_matters(three, monkeypatch):
    monkeypatch.setattr(asking, "cleaning", lambda: "f" * 16)
    report = three.encode("a fox")
    assert (report.num_texts, report.is_unchanged) == (0, False)
    assert three.cache.manifest.recipe["cleaning"] == "f" * 16
    assert three.encode("a fox").is_unchanged


# Damage


def test_a_missing_or_cut_shard_is_named_by_an_encode_with_nothing_else_to_do(three):
    shard = three.cache.manifest.shards[0].file
    data = (three.root / shard).read_bytes()
    (three.root / shard).write_bytes(data[:-1])
    with pytest.raises(CacheCorrupt, match=Path(shard).name):
        three.encode("a fox")
    (three.root / shard).unlink()
    with pytest.raises(CacheCorrupt, match=f"{Path(shard).name} is missing") as caught:
        three.encode("a fox")
    assert "--repair" in caught.value.fix


@pytest.mark.parametrize("kind", ["latents", "index-", "locations-"])
def test_repair_encodes_what_is_damaged_and_only_that(three, kind):
    path = next(p for p in sorted(three.root.rglob("*.parquet")) if str(p.relative_to(three.root)).startswith(kind))
    rows = [three.cache[i]["mean"] for i in range(3)]
    data = bytearray(path.read_bytes())
    data[100] ^= 1
    path.write_bytes(data)
    assert verify_cache(three.root).problems
    report = three.encode("a fox", repair=True)
    assert report.repaired == (str(path.relative_to(three.root)),)
    assert report.num_texts == 0
    assert not report.is_unchanged
    assert (report.num_latents > 0) == (kind == "latents")
    assert verify_cache(three.root).problems == ()
    assert all(torch.equal(rows[i], three.cache[i]["mean"]) for i in range(3))
    assert three.encode("a fox").is_unchanged


# What encode would do


def test_a_preview_says_what_an_encode_then_does_and_writes_nothing(three):
    three.put("fox.png", "a fox", seed=9)
    (three.source / "dog.png").unlink()
    before = three.files()
    model, config = ModelConfig(path=str(three.model)), CacheConfig(resolution=64)
    preview = preview_encode(
        read_listed_request(three.source, three.root, model, config, Drawn(("a fox",))), False, None
    )
    assert three.files() == before
    did = three.encode("a fox")
    assert (preview.num_latents, preview.num_texts, preview.added, preview.removed) == (
        1,
        0,
        ("fox.png",),
        ("dog.png",),
    )
    assert (did.num_latents, did.num_texts, did.added, did.removed) == (1, 0, ("fox.png",), ("dog.png",))


def test_the_manifest_keeps_no_path_of_this_machine_but_the_models(three):
    written = json.dumps([str(read_manifest(three.root).source), *read_manifest(three.root).prompts])
    assert str(three.source) not in written

"""Does a second encode of pairs do what changed, and only that? And what a cache of pairs goes through afterwards."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image

from k5cache.cli import app
from k5cache.encode import update
from k5cache.encode.request import EncodeReport
from k5cache.encoders import clip, qwen, vae
from k5cache.shared import console
from k5cache.shared.errors import CacheStale, DatasetError, RecipeError
from k5cache.shared.model import ModelConfig, WantedEdit
from k5cache.sources import find, images, unchanged
from k5cache.store.manifest import read_manifest, write_manifest
from k5cache.upkeep.edits import add_edits
from k5cache.upkeep.gc import collect
from k5cache.upkeep.merge import merge_caches
from k5cache.upkeep.prompts import Added
from k5cache.upkeep.show import CELL, Shown, contact_sheet, decode
from k5cache.upkeep.verify import verify_cache
from tests.cli import Cli
from tests.workshop import EditShop, Workshop

LONG = "make the whole sky much bluer and the sea calm"
OTHER = "turn the bright day into a dark and starry night"


@pytest.fixture(scope="module")
def encoded(tmp_path_factory, toy_edit_model) -> EditShop:
    """Three pairs, encoded; tests work on copies."""
    shop = EditShop(tmp_path_factory.mktemp("encoded"), toy_edit_model)
    for i, name in enumerate(("cat", "dog", "sub/owl")):
        shop.put_pair(f"{name}.png", f"{LONG} of {name}", seed=i, size=(64, 64) if i else (96, 64))
    shop.encode()
    return shop


@pytest.fixture
def three(encoded, tmp_path) -> EditShop:
    """A copy of the same pairs and cache for one test, which knows these files."""
    shop = EditShop(tmp_path / "shop", encoded.model)
    for copied in ("source", "sources", "root"):
        shutil.copytree(getattr(encoded, copied), getattr(shop, copied), dirs_exist_ok=True)
    shop.encode()
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


def texts_of(shop: EditShop) -> dict[str, list[str]]:
    """Path -> the captions of its rows, the empty instruction last."""
    return {item["path"]: [t.caption for t in (*item["captions"], item["empty"])] for item in shop.cache}


def test_a_pair_has_latents_of_both_pictures_and_two_texts(encoded):
    cache = encoded.cache
    assert cache.kind == "i2i"
    assert cache.manifest.prompts == {}
    assert texts_of(encoded) == {f"{n}.png": [f"{LONG} of {n}", ""] for n in ("cat", "dog", "sub/owl")}
    for item in cache:
        row, (text,) = item["row"], item["captions"]
        assert row.source_path == row.path
        assert item["source"]["mean"].shape == item["mean"].shape
        assert not torch.equal(item["source"]["mean"], item["mean"])
        assert torch.equal(text.pooled, cache.text(row.caption_keys[0]).pooled)
        assert 0 < item["empty"].n_tokens < text.n_tokens
    assert len({item["row"].empty_key for item in cache}) == 3  # Qwen sees another picture each time


def test_unchanged_pairs_write_nothing_load_nothing_and_open_nothing(three, loaded, monkeypatch):
    monkeypatch.setattr(unchanged, "SETTLED_NS", 0)
    three.put_pair("dog.png", OTHER, seed=1)
    three.encode()
    loaded.clear()
    before = three.files()
    monkeypatch.setattr(find, "find", lambda *_: pytest.fail("the folders were read"))
    report = three.encode()
    assert (report.is_unchanged, report.num_items, loaded) == (True, 3, [])
    assert three.files() == before


@pytest.mark.parametrize(
    ("change", "expected", "models"),
    [
        ("source", {"num_latents": 1, "num_texts": 2, "changed": ("dog.png",)}, ["clip", "qwen", "vae"]),
        ("target", {"num_latents": 1, "changed": ("dog.png",)}, ["vae"]),
        ("instruction", {"num_texts": 1, "changed": ("dog.png",)}, ["clip", "qwen"]),
        ("second instruction", {"num_texts": 1, "changed": ("dog.png",)}, ["clip", "qwen"]),
        ("renamed", {"renamed": (("dog.png", "hound.png"),)}, []),
        ("source renamed", {}, []),
        ("removed", {"removed": ("dog.png",)}, []),
        ("added", {"num_latents": 2, "num_texts": 2, "added": ("emu.png",)}, ["clip", "qwen", "vae"]),
        ("source of another pair", {"num_texts": 1, "changed": ("dog.png",)}, ["clip", "qwen"]),
    ],
)
def test_only_what_changed_is_encoded(three, loaded, change, expected, models):
    text = three.source / "dog.txt"
    match change:
        case "source":
            three.put_source("dog.png", seed=55)
        case "target":
            three.put("dog.png", text.read_text(), seed=55)
        case "instruction":
            text.write_text(OTHER)
        case "second instruction":
            text.write_text(f"{text.read_text()}\n{OTHER}")
        case "renamed":
            for path in (three.source / "dog.png", text, three.sources / "dog.png"):
                path.rename(path.with_stem("hound"))
        case "source renamed":
            picture = three.sources / "dog.png"
            Image.open(picture).save(picture.with_suffix(".bmp"))
            picture.unlink()
            expected, models = {"num_latents": 1, "num_texts": 2, "changed": ("dog.png",)}, ["clip", "qwen", "vae"]
        case "removed":
            for path in (three.source / "dog.png", text, three.sources / "dog.png"):
                path.unlink()
        case "added":
            three.put_pair("emu.png", OTHER, seed=9)
        case "source of another pair":
            shutil.copy(three.sources / "sub" / "owl.png", three.sources / "dog.png")
    assert changes(three.encode()) == expected
    assert sorted(loaded) == models
    assert verify_cache(three.root).problems == ()
    assert three.encode().is_unchanged
    names = sorted(path.relative_to(three.source).as_posix() for path in three.source.rglob("*.png"))
    assert sorted(texts_of(three)) == names


def test_several_targets_of_one_source_and_equal_pairs_share_their_rows(tmp_path, toy_edit_model):
    shop = EditShop(tmp_path, toy_edit_model)
    for name in ("a.png", "b.png"):
        shop.put_pair(name, LONG, seed=0)
    shop.put("c.png", OTHER, seed=1)
    shutil.copy(shop.sources / "a.png", shop.sources / "c.png")
    report = shop.encode()
    assert (report.num_items, report.num_latents, report.num_texts) == (3, 3, 3)  # 2 targets and 1 source
    rows = {row["path"]: row["row"] for row in shop.cache}
    assert len({row.source_key for row in rows.values()}) == len({row.empty_key for row in rows.values()}) == 1
    assert rows["a.png"].caption_keys == rows["b.png"].caption_keys != rows["c.png"].caption_keys


def test_a_mirrored_pair_is_mirrored_on_both_sides_and_seen_so(tmp_path, toy_edit_model):
    shop = EditShop(tmp_path, toy_edit_model)
    shop.put_pair("a.png", LONG)
    for view, num_texts in (("crop", 4), ("whole", 4)):
        report = shop.encode(flip=True, source_view=view, update=True)
        assert (report.num_items, report.num_texts) == (2, num_texts)
        plain, mirrored = (item["row"] for item in shop.cache)
        assert (plain.flipped, mirrored.flipped) == (False, True)
        assert plain.source_key != mirrored.source_key
        assert plain.caption_keys != mirrored.caption_keys
        assert plain.empty_key != mirrored.empty_key


def test_what_qwen_sees_and_empty_instructions_are_of_the_recipe(three, loaded):
    with pytest.raises(CacheStale, match=r"text.source_view is 'crop' in the cache, 'whole' now"):
        three.encode(source_view="whole")
    assert changes(three.encode(source_view="whole", update=True)) == {
        "num_texts": 6, "changed": ("cat.png", "dog.png", "sub/owl.png"),
    }  # fmt: skip
    assert sorted(loaded) == ["clip", "qwen"]
    with pytest.raises(CacheStale, match=r"selection.empty_instruction is True in the cache, False now"):
        three.encode(source_view="whole", empty_instruction=False)
    assert three.encode(source_view="whole", empty_instruction=False, update=True).num_texts == 0
    assert [item["empty"] for item in three.cache] == [None] * 3
    collect(three.root)
    assert three.encode(source_view="whole", update=True).num_texts == 3
    assert verify_cache(three.root).problems == ()


def test_a_source_that_cannot_be_read_leaves_its_pair_out_and_says_so(three, tried):
    (three.sources / "dog.png").write_bytes(b"no picture")
    report = three.encode()
    (skip,) = report.skipped
    assert skip.path == "dog.png"
    assert skip.reason.startswith("its source dog.png ")
    assert changes(report)["removed"] == ("dog.png",)
    assert sorted(texts_of(three)) == ["cat.png", "sub/owl.png"]
    picture = three.put_source("dog.png", seed=1001)
    whole = picture.read_bytes()
    picture.write_bytes(whole[: len(whole) // 2])  # its header is whole: found out when it is decoded
    report = three.encode()
    assert [(skip.path, skip.reason.split(" cannot")[0]) for skip in report.skipped] == [
        ("dog.png", "its source dog.png")
    ]
    tried.clear()
    assert three.encode().is_unchanged
    three.put_pair("emu.png", OTHER, seed=9, size=(80, 80))
    again = three.encode()
    assert [skip.path for skip in again.skipped] == ["dog.png"]
    assert again.added == ("emu.png",)
    assert set(tried) == {"80x80"}


@pytest.fixture
def tried(monkeypatch) -> list[str]:
    """Of which size the pictures were that were decoded."""
    seen: list[str] = []
    original = images.load_pixels

    def load(content, geometry):
        seen.append(f"{geometry.width}x{geometry.height}")
        return original(content, geometry)

    monkeypatch.setattr(images, "load_pixels", load)
    return seen


def test_the_pictures_of_a_pair_that_is_skipped_for_its_text_are_not_encoded(tmp_path, toy_edit_model):
    shop = EditShop(tmp_path, toy_edit_model)
    shop.put_pair("long.png", "fox " * 5000, seed=1)
    shop.put_pair("good.png", seed=2)
    done = shop.encode()
    assert [skip.path for skip in done.skipped] == ["long.png"]
    assert (done.num_items, done.num_latents) == (1, 2)
    assert sum(shard.num_rows for shard in shop.cache.manifest.shards if shard.kind == "latents") == 2


def test_a_source_that_changes_during_the_encode_is_not_stored_as_what_it_was(three, monkeypatch):
    three.put_source("dog.png", seed=77)
    original = update.encode_latents

    def late(*arguments):
        three.put_source("dog.png", seed=78)
        return original(*arguments)

    monkeypatch.setattr(update, "encode_latents", late)
    report = three.encode()
    (skip,) = report.skipped
    assert (skip.path, "has changed since the encode began" in skip.reason) == ("dog.png", True)
    monkeypatch.undo()
    assert changes(three.encode())["num_latents"] == 1
    assert sorted(texts_of(three)) == ["cat.png", "dog.png", "sub/owl.png"]
    assert verify_cache(three.root).problems == ()


def test_stretched_sources_and_sources_that_are_their_target_are_named(tmp_path, toy_edit_model):
    shop = EditShop(tmp_path, toy_edit_model)
    shop.put_pair("swapped.png", LONG, seed=0, size=(96, 64), source_size=(64, 96))
    shop.put_pair("half.png", LONG, seed=1, size=(96, 64), source_size=(48, 32))
    shop.put_pair("long.png", LONG, seed=2, source_size=(40, 600))
    shutil.copy(shop.put_pair("same.png", LONG, seed=3), shop.sources / "same.png")
    report = shop.encode()
    assert report.stretched == ("long.png", "swapped.png")
    assert report.same_as_target == ("same.png",)
    assert (report.num_items, report.skipped) == (4, ())
    for item in shop.cache:
        assert item["source"]["mean"].shape == item["mean"].shape
    same = next(item for item in shop.cache if item["path"] == "same.png")
    assert torch.equal(same["source"]["mean"], same["mean"])


@pytest.mark.parametrize("folder", ["latents", "text"])
def test_a_damaged_shard_is_named_and_repair_encodes_its_rows_alone(three, folder):
    before = three.cache[0]
    shard = max((three.root / folder).iterdir(), key=lambda path: path.stat().st_size)
    raw = bytearray(shard.read_bytes())
    raw[len(raw) // 2] ^= 1
    shard.write_bytes(raw)
    assert any(shard.name in problem for problem in verify_cache(three.root).problems)
    report = three.encode(repair=True)
    assert report.repaired == (f"{folder}/{shard.name}",)
    assert (report.num_latents > 0, report.num_texts > 0) == (folder == "latents", folder == "text")
    assert verify_cache(three.root).problems == ()
    after = three.cache[0]
    assert torch.equal(after["source"]["mean"], before["source"]["mean"])
    assert torch.equal(after["empty"].prompt_embeds, before["empty"].prompt_embeds)


def test_verify_names_pairs_and_edits_that_lack_a_row(three):
    manifest = read_manifest(three.root)
    texts = next(shard for shard in manifest.shards if shard.kind == "text")
    three.encode(WantedEdit(str(three.sources / "cat.png"), OTHER))
    manifest = read_manifest(three.root)
    kept = tuple(shard for shard in manifest.shards if shard.file != texts.file)
    write_manifest(three.root, replace(manifest, shards=kept, locations=None))
    problems = "\n".join(verify_cache(three.root).problems)
    assert "cat.png has no captions of the lengths it says" in problems
    assert "cat.png has no empty instruction" in problems
    kept = tuple(shard for shard in manifest.shards if shard.kind != "latents")
    write_manifest(three.root, replace(manifest, shards=kept, locations=None))
    problems = "\n".join(verify_cache(three.root).problems)
    assert "dog.png has no latents of its source of 64x64" in problems
    assert f"the pair to draw of {three.sources / 'cat.png'} and {OTHER!r} lacks a row" in problems


def test_garbage_is_what_no_pair_and_no_pair_to_draw_names(three):
    edit = WantedEdit(str(three.sources / "cat.png"), OTHER)
    three.encode(edit)
    assert collect(three.root).num_rows == 0
    three.put_source("dog.png", seed=55)
    three.encode(edit)
    assert collect(three.root).num_rows == 3  # the old source, its instruction and its empty one
    assert verify_cache(three.root).problems == ()
    assert three.encode(edit).is_unchanged
    assert three.cache.edit(three.cache[0]["row"].source_hash, OTHER).prompt == OTHER


def test_pairs_to_draw_stay_in_the_cache_and_are_encoded_once(three, loaded, tmp_path):
    drawn = tmp_path / "drawn.png"
    shutil.copy(three.put_source("../drawn.png", seed=500, size=(96, 64)), drawn)
    edit = WantedEdit(str(drawn), OTHER)
    report = three.encode(edit)
    assert (changes(report), sorted(loaded)) == ({"num_latents": 1, "num_texts": 2}, ["clip", "qwen", "vae"])
    cache = three.cache
    stored = cache.edit(images.hash_content(drawn), OTHER)
    assert (stored.source, stored.width, stored.height) == (str(drawn), 80, 48)
    assert cache.text(stored.text_key).caption == OTHER
    assert cache.text(stored.empty_key).caption == ""
    assert cache.latents(stored.source_key)["mean"].shape == (6, 10, 16)
    loaded.clear()
    assert three.encode(edit).is_unchanged
    assert three.encode().is_unchanged  # those of the cache stay
    (three.source / "dog.txt").write_text(OTHER)
    assert changes(three.encode()) == {"num_texts": 1, "changed": ("dog.png",)}
    assert three.cache.manifest.edits == (stored,)
    moved = WantedEdit(str(drawn.rename(tmp_path / "moved.png")), OTHER)
    assert three.encode(moved).is_unchanged
    with pytest.raises(DatasetError, match=r"The picture .*drawn.png, which is to be drawn from, "):
        three.encode(edit)


def test_a_pair_to_draw_whose_source_is_gone_is_left_out_when_it_must_be_encoded_again(three, tmp_path):
    drawn = three.put_source("../drawn.png", seed=500)
    three.encode(WantedEdit(str(drawn), OTHER))
    drawn.unlink()
    report = three.encode(source_view="whole", update=True)
    assert [(skip.path, "was to be drawn from and" in skip.reason) for skip in report.skipped] == [(str(drawn), True)]
    assert three.cache.manifest.edits == ()


def test_a_cache_of_the_other_kind_is_refused_with_the_command(three, toy_model, toy_edit_model, tmp_path):
    with pytest.raises(CacheStale) as caught:
        Workshop.encode(three, model=toy_model, update=True)
    assert "was encoded for image-to-image (I2I), and" in caught.value.problem
    assert caught.value.fix == f"Encode into another cache: k5cache encode {three.source} -o OTHER --model {toy_model}"
    texts = Workshop(tmp_path / "texts", toy_model)
    texts.put("cat.png")
    texts.encode()
    before = texts.files()
    pairs = EditShop(tmp_path / "pairs", toy_edit_model)
    pairs.root = texts.root
    pairs.put_pair("cat.png")
    with pytest.raises(CacheStale, match=r"was encoded for text-to-image \(T2I\), and .* is for image-to-image"):
        pairs.encode(update=True)
    assert texts.files() == before
    with pytest.raises(RecipeError, match=r"train.validation.prompts.* are for text-to-image"):
        three.encode("a prompt")
    with pytest.raises(RecipeError, match=r"train.validation.edits are for image-to-image"):
        texts.encode(WantedEdit("cat.png", "x"))


def test_two_caches_of_pairs_merge_with_their_pairs_to_draw(three, tmp_path, toy_edit_model):
    edit = WantedEdit(str(three.sources / "cat.png"), OTHER)
    three.encode(edit)
    more = EditShop(tmp_path / "more", toy_edit_model)
    more.put_pair("emu.png", OTHER, seed=9)
    more.encode(edit)
    merged = merge_caches([three.root, more.root], tmp_path / "merged")
    assert merged.num_items == 4
    assert verify_cache(tmp_path / "merged").problems == ()
    manifest = read_manifest(tmp_path / "merged")
    assert [(e.source, e.prompt) for e in manifest.edits] == [(edit.source, edit.prompt)]
    assert manifest.format == 2


def test_a_cache_of_pairs_and_one_of_captions_do_not_merge(three, tmp_path, toy_model):
    texts = Workshop(tmp_path / "texts", toy_model)
    texts.put("cat.png")
    texts.encode()
    with pytest.raises(CacheStale, match=r"Merge caches of one kind|was encoded for"):
        merge_caches([three.root, texts.root], tmp_path / "merged")


def test_prompts_add_encodes_a_picture_with_instructions_once(three, loaded, tmp_path):
    drawn = three.put_source("../drawn.png", seed=500)
    model, before = ModelConfig(path=str(three.model)), three.cache

    def add(source: Path, *prompts: str) -> Added:
        with console.progress() as bars:
            return add_edits(three.root, str(source), prompts, model, "cpu", bars)

    added = add(drawn, OTHER, LONG)
    assert (added.encoded, added.already_there) == ((OTHER, LONG), ())
    assert sorted(loaded) == ["clip", "qwen", "vae"]
    loaded.clear()
    assert add(drawn, OTHER) == Added((), (OTHER,), ())
    cat = before[0]
    again = add(three.sources / "cat.png", f"{LONG} of cat")  # an item has it: nothing is computed
    assert (again.already_there, loaded) == ((f"{LONG} of cat",), [])
    cache = three.cache
    assert len(cache.manifest.edits) == 3
    edit = cache.edit(cat["row"].source_hash, f"{LONG} of cat")
    assert (edit.source_key, (edit.text_key,), edit.empty_key) == (
        cat["row"].source_key, cat["row"].caption_keys, cat["row"].empty_key,
    )  # fmt: skip
    assert [row["row"] for row in cache] == [row["row"] for row in before]
    assert three.encode().is_unchanged
    assert verify_cache(three.root).problems == ()
    assert collect(three.root).num_rows == 0


def test_prompts_add_refuses_what_does_not_fit_the_cache_and_changes_nothing(three, tmp_path, toy_model):
    texts = Workshop(tmp_path / "texts", toy_model)
    texts.put("cat.png")
    texts.encode()
    picture = str(three.sources / "cat.png")
    (tmp_path / "no picture.png").write_text("x")
    for shop, arguments, problem, fix in (
        (three, ("a cat",), "where every instruction has a picture", f"{three.root} --source PICTURE 'a cat'"),
        (texts, ("a cat", "--source", picture), "where prompts have no picture", f"add {texts.root} 'a cat'"),
        (three, ("a cat", "--source", "absent.png"), "absent.png, which is to be drawn from, does not exist", "path"),
        (three, ("a cat", "--source", str(tmp_path / "no picture.png")), "no picture.png, which is to be", "path"),
        (three, ("a <|image_pad|>", "--source", picture), f"The source {picture}", "a shorter prompt"),
    ):
        before = shop.files()
        done = Cli(tmp_path)(app, "prompts", "add", str(shop.root), *arguments)
        assert (done.code, problem in done.err, fix in done.err) == (2, True, True), done.err
        assert {**shop.files(), ".lock": before[".lock"]} == before


def test_info_and_diff_say_what_pairs_there_are(three, tmp_path):
    three.encode(WantedEdit(str(three.sources / "cat.png"), OTHER))
    done = Cli(tmp_path)(app, "info", str(three.root), "--json")
    document = json.loads(done.out)
    assert (document["kind"], document["format"], document["items"]) == ("i2i", 2, 3)
    assert document["edits"] == [[str(three.sources / "cat.png"), OTHER]]
    assert "image-to-image (I2I)" in Cli(tmp_path)(app, "info", str(three.root)).out
    shutil.copy(three.source / "cat.png", three.sources / "cat.png")
    three.put_source("dog.png", 3, size=(64, 160))
    arguments = (three.source, "--sources", three.sources, "-o", three.root, "--model", three.model)
    before = three.files()
    done = Cli(tmp_path)(app, "diff", *map(str, arguments), "--set", "cache.resolution=64", "--json")
    preview = json.loads(done.out)
    assert (preview["num_latents"], preview["num_texts"]) == (1, 4)  # cat.png as its own source is there already
    assert (preview["stretched"], preview["same_as_target"]) == (["dog.png"], ["cat.png"])
    assert three.files() == before


def test_show_draws_the_source_on_the_left_of_its_target(three, tmp_path):
    with console.progress() as bars:
        (shown,) = decode(three.cache, [1], ModelConfig(path=str(three.model)), "cpu", bars)
    assert (shown.row.path, shown.captions) == ("dog.png", (f"{LONG} of dog",))
    assert shown.source.size == shown.picture.size == (64, 64)
    assert shown.source.tobytes() != shown.picture.tobytes()
    coloured = [
        Shown(shown.row, ("blue",), Image.new("RGB", (64, 64), "blue"), source=Image.new("RGB", (64, 64), "red")),
        Shown(shown.row, ("green",), Image.new("RGB", (64, 64), "lime"), source=Image.new("RGB", (64, 64), "red")),
    ]
    sheet = contact_sheet(coloured, columns=1)
    middle, right = 12 + CELL // 2, 12 + CELL + 12 + CELL // 2
    assert sheet.getpixel((middle, 12 + CELL // 2)) == (255, 0, 0)
    assert sheet.getpixel((right, 12 + CELL // 2)) == (0, 0, 255)
    colours = {sheet.getpixel((right, y)) for y in range(sheet.height)}
    assert {(0, 0, 255), (0, 255, 0)} <= colours


def test_an_encode_of_pairs_with_nothing_to_do_imports_no_heavy_library(three):
    three.encode(WantedEdit(str(three.sources / "cat.png"), OTHER))
    recipe = three.root.parent / "r.toml"
    recipe.write_text(
        f'[model]\npath = "{three.model}"\n[cache]\nresolution = 64\nsource_dir = "{three.sources}"\n'
        f'[[train.validation.edits]]\nsource = "{three.sources / "cat.png"}"\nprompt = "{OTHER}"\n'
    )
    code = (
        "import sys\nfrom k5cache.cli import main\n"
        "try:\n    main()\nexcept SystemExit as end:\n    assert not end.code\n"
        "assert not {'torch', 'numpy', 'PIL', 'diffusers', 'transformers', 'pyarrow'} & set(sys.modules)\n"
    )
    command = [sys.executable, "-c", code, "encode", str(three.source), "-o", str(three.root), "--recipe", str(recipe)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "is up to date: 3 items" in done.stdout


def test_the_pairs_of_a_cache_are_listed_and_where_there_are_none_the_command_that_adds_one(three):
    words = ("prompts", "list", str(three.root))
    none = Cli(three.root.parent)(app, *words)
    assert none.out == f"Next, add one: k5cache prompts add {three.root} PROMPT --source PICTURE\n"
    picture = three.sources / "cat.png"
    with console.progress() as bars:
        add_edits(three.root, str(picture), [LONG], ModelConfig(path=str(three.model)), "cpu", bars)
    listed = Cli(three.root.parent)(app, *words).out.splitlines()
    assert listed[0] == f"{picture}: {LONG}"
    assert listed[1].endswith(f"k5train sample RUN --source {picture} --prompt '{LONG}'")

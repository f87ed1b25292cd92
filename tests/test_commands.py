"""Do the commands about a cache report the truth, as text and as JSON?"""

from __future__ import annotations

import json
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from k5cache.bench import reading
from k5cache.buckets import Bucket, Geometry
from k5cache.cli import app
from k5cache.encode.commit import Committer
from k5cache.encode.sink import Collector
from k5cache.encoders.vae import encode_pixels, load_vae, to_model_range
from k5cache.exact.reencode import reencode
from k5cache.options import config_of
from k5cache.shared import console
from k5cache.shared.errors import CacheError, CacheStale
from k5cache.shared.model import ModelConfig
from k5cache.sources.images import load_pixels
from k5cache.store.geometry import geometry_of
from k5cache.store.manifest import Manifest
from k5cache.store.shards import Shard
from k5cache.store.tensors import TensorSpec
from k5cache.upkeep import show
from k5cache.upkeep.verify import verify_cache
from tests.cli import Cli
from tests.store_samples import index_row
from tests.workshop import Workshop


@pytest.fixture(scope="module")
def shop(tmp_path_factory, toy_model) -> Workshop:
    """Three images, one with two captions. Tests only read it."""
    workshop = Workshop(tmp_path_factory.mktemp("commands"), toy_model)
    for i, size in enumerate(((64, 64), (96, 64), (70, 100))):
        workshop.put(f"{i}.png", f"number {i}", seed=i, size=size)
    (workshop.source / "2.txt").write_text("number 2\nzwei", encoding="utf-8")
    workshop.encode("a fox")
    return workshop


@pytest.fixture
def own(shop, tmp_path) -> Workshop:
    """A copy of the shared cache, which the test may change."""
    workshop = Workshop(tmp_path / "shop", shop.model)
    shutil.rmtree(workshop.source)
    workshop.source = shop.source
    shutil.copytree(shop.root, workshop.root)
    return workshop


def again(shop: Workshop, count: int, source: Path | None):
    with console.progress() as bars:
        return reencode(shop.cache, count, source, ModelConfig(path=str(shop.model)), "cpu", bars)


def test_rows_encoded_again_are_the_same_bits_on_the_same_machine(shop):
    reencoded = again(shop, 9, shop.source)
    assert sorted((row.kind, row.name) for row in reencoded.compared) == [
        ("latents", "0.png"), ("latents", "1.png"), ("latents", "2.png"),
        ("text", ""), ("text", "a fox"), ("text", "number 0"), ("text", "number 1"), ("text", "number 2"),
        ("text", "zwei"),
    ]  # fmt: skip
    assert all(row.is_exact and row.error == 0 and not row.is_wrong for row in reencoded.compared)
    assert reencoded.problems == ()
    assert verify_cache(shop.root).problems == ()


def test_rows_collected_in_memory_are_those_that_a_cache_would_hold(tmp_path):
    specs = {"mask": TensorSpec("uint8", (8, 8))}
    rows = [{"key": f"{i:032x}", "mask": torch.full((8, 8), i, dtype=torch.uint8)} for i in range(3)]
    collector, committer = Collector(), Committer(tmp_path, Manifest(recipe={}), 2**20)
    for sink in (collector, committer):
        with sink.shards("masks", specs, Bucket(64, 64)) as append:
            for row in rows:
                append(row)
    (shard,) = committer.manifest.shards
    stored = Shard(tmp_path, shard)
    assert collector.rows.keys() == committer.keys("masks") == set(stored.keys)
    for number, key in enumerate(stored.keys):
        assert torch.equal(collector.rows[key]["mask"], stored.read(number, key).tensors["mask"])


def test_rows_that_another_encoder_would_give_are_problems(shop, monkeypatch):
    original = type(shop.cache).text

    def scaled(self, key):
        row = original(self, key)
        return type(row)(**{**vars(row), "prompt_embeds": row.prompt_embeds * 1.05})

    monkeypatch.setattr(type(shop.cache), "text", scaled)
    reencoded = again(shop, 2, None)
    assert [row.is_wrong for row in reencoded.compared] == [True, True]
    assert reencoded.compared[0].error == pytest.approx(0.05 / 1.05, rel=0.05)
    assert len(reencoded.problems) == 2


def test_an_image_that_changed_since_is_not_held_against_the_cache(shop, tmp_path):
    shutil.copytree(shop.source, tmp_path / "images")
    (tmp_path / "images" / "1.png").write_bytes((shop.source / "0.png").read_bytes())
    reencoded = again(shop, 9, tmp_path / "images")
    assert reencoded.not_compared == ("1.png: has changed since it was encoded",)
    assert sum(row.kind == "latents" for row in reencoded.compared) == 2


def test_the_recipe_gives_back_the_options_and_the_index_the_crops(shop):
    config = config_of(shop.cache.manifest.recipe)
    assert (config.resolution, config.max_sequence_length, config.vae_precision) == (64, 512, "fp32")
    row = shop.cache.row(1)
    assert isinstance(geometry_of(row), Geometry)
    vae = load_vae(shop.model, "cpu", torch.float32)
    pixels = to_model_range(load_pixels(shop.source / row.path, geometry_of(row)).unsqueeze(0))
    assert torch.equal(encode_pixels(vae, pixels).mean[0].half(), shop.cache[1]["mean"])


def test_show_decodes_what_diffusers_decodes_and_writes_a_sheet(shop, tmp_path):
    with console.progress() as bars:
        shown = show.decode(shop.cache, [0, 2], ModelConfig(path=str(shop.model)), "cpu", bars)
    vae = load_vae(shop.model, "cpu", torch.float32)
    from diffusers.image_processor import VaeImageProcessor

    for path, number in zip(shown, (0, 2), strict=True):
        latents = shop.cache[number]["mean"].float() * vae.config.scaling_factor
        with torch.no_grad():  # as Kandinsky5T2IPipeline decodes
            pixels = vae.decode(latents.permute(2, 0, 1).unsqueeze(0) / vae.config.scaling_factor).sample
        (theirs,) = VaeImageProcessor().postprocess(pixels)
        difference = np.abs(np.asarray(path.picture, int) - np.asarray(theirs, int))
        assert difference.max() <= 1  # x * s / s rounds
        assert path.picture.size == (path.row.bucket_width, path.row.bucket_height)
    assert shown[1].captions == ("number 2", "zwei")
    with console.progress() as bars:
        model = ModelConfig(path=str(shop.model))
        assert show.write_contact_sheet(shop.cache, tmp_path / "sheet.png", 9, model, "cpu", bars) == 3
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert sheet.width > 2 * show.CELL
        assert np.asarray(sheet.convert("L")).std() > 10


def test_show_pales_what_a_mask_leaves_out(tmp_path):
    grey, mask = Image.new("RGB", (64, 64), (100, 100, 100)), Image.new("L", (8, 8), 0)
    mask.paste(255, (0, 0, 6, 8))
    row = index_row(0)
    sheet = np.asarray(show.contact_sheet([show.Shown(row, ("a",), grey, mask)], columns=1).convert("L"))
    assert {*np.unique(sheet[12 : 12 + show.CELL, 12 : 12 + 192])} == {100}
    assert {*np.unique(sheet[12 : 12 + show.CELL, 12 + 192 : 12 + 256])} == {round(100 + 0.8 * 155)}
    assert show._labels(show.Shown(row, ("a",), grey, mask))[1][0].endswith(", mask 75%")


def test_collecting_a_cache_that_is_not_there_makes_no_folder(tmp_path):
    done = Cli(tmp_path)(app, "gc", "cache/none")
    assert (done.code, [*tmp_path.iterdir()]) == (2, [])
    assert "cache/none is not a cache: it does not exist" in done.err


def test_another_vae_is_not_asked_to_decode(shop, tmp_path):
    shop_recipe = shop.cache
    recipe = shop_recipe.manifest.recipe
    recipe["latents"]["vae"] = "0" * 32
    with pytest.raises(CacheStale, match=r"latents.vae has other weights"), console.progress() as bars:
        show.decode(shop_recipe, [0], ModelConfig(path=str(shop.model)), "cpu", bars)


def test_prompts_are_added_to_a_finished_cache_and_its_items_stay(own):
    cli = Cli(own.root.parent)
    before = own.cache
    done = cli(app, "prompts", "add", "cache", "a red fox", "a fox", "number 1", "  a   red fox ", "--json")
    assert done.code == 0, done.err
    assert json.loads(done.out) == {
        "encoded": ["a red fox", "  a   red fox "], "already_there": ["a fox", "number 1"], "truncated": [],
    }  # fmt: skip
    after = own.cache
    assert after.prompt("a red fox").key == after.prompt("  a   red fox ").key
    assert after.prompt("number 1").key == before.row(1).caption_keys[0]
    assert after.index.equals(before.index)
    assert verify_cache(own.root).problems == ()
    assert own.encode().is_unchanged
    again = cli(app, "prompts", "add", "cache", "a red fox")
    assert "1 prompts" not in again.err
    assert "k5train sample RUN --prompt 'a red fox'" in again.out


def test_a_missing_prompt_is_answered_with_the_command_that_adds_it(own):
    with pytest.raises(CacheError) as caught:
        own.cache.prompt("it's new")
    assert caught.value.fix.endswith("""k5cache prompts add """ + f"{own.root} 'it'\"'\"'s new'")


def test_every_command_speaks_json(own):
    cli = Cli(own.root.parent)
    model = ["--model", str(own.model), "--set", "cache.resolution=64"]
    info = json.loads(cli(app, "info", "cache", "--json").out)
    assert (info["items"], info["captions"], info["prompts"]) == (3, 6, ["", "a fox"])
    assert sum(info["buckets"].values()) == 3
    difference = json.loads(cli(app, "diff", str(own.source), "-o", "cache", *model, "--json").out)
    assert (difference["num_items"], difference["num_latents"], difference["differences"]) == (3, 0, [])
    done = json.loads(cli(app, "encode", str(own.source), "-o", "cache", *model, "--json").out)
    assert (done["is_unchanged"], done["num_items"]) == (True, 3)
    assert json.loads(cli(app, "verify", "cache", "--json").out)["verified"]["problems"] == []
    assert json.loads(cli(app, "gc", "cache", "--dry-run", "--json").out)["num_rows"] == 0


def test_json_is_whole_while_warnings_are_on_stderr(own):
    cli = Cli(own.root.parent)
    (own.source / "broken.png").write_bytes(b"no picture")
    (own.source / "broken.txt").write_text("a picture", encoding="utf-8")
    arguments = (str(own.source), "-o", "cache", "--model", str(own.model), "--set", "cache.resolution=64", "--json")
    for command in ("diff", "plan", "encode"):
        done = cli(app, command, *arguments, *(("--device", "cpu") if command != "diff" else ()))
        assert done.code == 0, done.err
        assert isinstance(json.loads(done.out), dict)


@pytest.mark.parametrize("into", ["| true", "| head -1", ">&-", "> /dev/full"])
def test_an_output_that_nobody_reads_leaves_no_traceback(into):
    program = f"{shlex.quote(sys.executable)} -c 'from k5cache.cli import main; main()' options {into}"
    done = subprocess.run(["/bin/sh", "-c", program], capture_output=True, text=True, cwd=Path(__file__).parents[1])
    expected = ["error: The disk is full"] if "full" in into else []  # the output has no path
    assert done.stderr.splitlines()[:1] == expected
    assert "Traceback" not in done.stderr
    assert "ignored" not in done.stderr


def test_diff_lists_recipe_differences_that_encode_would_refuse(own):
    cli = Cli(own.root.parent)
    model = ["--model", str(own.model), "--set", "cache.resolution=128"]
    done = cli(app, "diff", str(own.source), "-o", "cache", *model)
    assert done.code == 0, done.err
    assert "selection.resolution is 64 in the cache, 128 now" in done.out
    refused = cli(app, "encode", str(own.source), "-o", "cache", *model)
    assert refused.code == 2
    assert "selection.resolution is 64 in the cache, 128 now" in refused.err


def test_the_store_bench_measures_every_format_and_what_compression_would_save(tmp_path):
    report = reading.bench_store(6, tmp_path)
    assert list(tmp_path.iterdir()) == []
    names = [reading.name for reading in report.readings]
    assert len(names) == 6
    ours = report.readings[names.index(reading.OURS)]
    assert 1 < ours.disk_over_raw < 1.02
    assert all(reading.rows_a_second == pytest.approx(1000 / reading.ms_a_row) for reading in report.readings)
    by_codec = {packing.codec: packing for packing in report.packings}
    assert by_codec["none"].row == 1
    assert 0.7 < by_codec["zstd 3"].text < 0.9 < by_codec["lz4"].row
    assert len(report.targets) == 3


def test_the_prompts_of_a_cache_are_listed_and_one_of_them_is_offered(shop):
    done = Cli(shop.root.parent)(app, "prompts", "list", shop.root.name)
    assert done.out.splitlines() == [
        "a fox",
        "Next, draw one with a run that was trained on this cache: k5train sample RUN --prompt 'a fox'",
    ]
    done = Cli(shop.root.parent)(app, "prompts", "list", shop.root.name, "--json")
    assert json.loads(done.out) == {"prompts": ["a fox"], "edits": []}

"""Does a mask follow its image: the same crop and flip, averaged over each latent's area, into the cache and out?"""

from __future__ import annotations

import itertools
import os
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import k5cache
from k5cache.buckets import Bucket, Geometry, cover, squash
from k5cache.cli import app
from k5cache.options import CacheConfig
from k5cache.sources.folder import find_items
from k5cache.sources.images import hash_content
from k5cache.sources.items import PictureFile, Skipped, SourceItem, UnreadableImage, stat_numbers
from k5cache.sources.masks import check, load_mask
from tests.cli import Cli
from tests.picture_files import png


def mask_file(path: Path, rows: np.ndarray, **options: object) -> Path:
    Image.fromarray(rows.astype(np.uint8)).save(path, **options)
    return path


def whole(width: int, height: int) -> Geometry:
    return cover(width, height, Bucket(width, height))


def white_left(width: int, height: int, columns: int) -> np.ndarray:
    rows = np.zeros((height, width), np.uint8)
    rows[:, :columns] = 255
    return rows


# --- one mask ---


def test_a_latent_has_the_average_of_its_64_pixels(tmp_path):
    rows = white_left(32, 16, 20)
    rows[8:, 24:28] = 100
    mask = load_mask(mask_file(tmp_path / "m.png", rows), whole(32, 16))
    assert (mask.dtype, mask.is_contiguous()) == (torch.uint8, True)
    assert mask.tolist() == [[255, 255, 128, 0], [255, 255, 128, 50]]


def test_a_mask_is_cropped_and_flipped_as_its_image(tmp_path):
    path = mask_file(tmp_path / "m.png", white_left(64, 16, 32))
    geometry = Geometry(64, 16, Bucket(32, 16), 64, 16, left=8, top=0)
    assert load_mask(path, geometry).tolist() == [[255, 255, 255, 0]] * 2
    assert load_mask(path, replace(geometry, flipped=True)).tolist() == [[0, 255, 255, 255]] * 2


@pytest.mark.parametrize(
    "geometry",
    [
        cover(100, 70, Bucket(64, 48)),
        cover(37, 90, Bucket(48, 64)),
        replace(cover(200, 70, Bucket(64, 48)), left=3),
        squash(91, 47, Bucket(80, 32)),
    ],
    ids=["smaller", "larger", "off centre", "squashed"],
)
def test_the_average_is_over_the_exact_area_that_the_image_is_cut_from(tmp_path, geometry):
    rows = np.random.default_rng(1).integers(0, 256, (geometry.height, geometry.width))
    mask = load_mask(mask_file(tmp_path / "m.png", rows), geometry)

    # A grid so fine that every pixel and every latent is made of whole cells of it: no arithmetic to get wrong.
    down, across = geometry.resized_height, geometry.resized_width
    height, width = geometry.bucket.latent_shape
    tall = np.repeat(rows, down, axis=0)
    edges = (geometry.top + 8 * np.arange(height + 1)) * geometry.height
    means = np.array([tall[low:high].mean(axis=0) for low, high in itertools.pairwise(edges)])
    wide = np.repeat(means, across, axis=1)
    edges = (geometry.left + 8 * np.arange(width + 1)) * geometry.width
    expected = np.array([wide[:, low:high].mean(axis=1) for low, high in itertools.pairwise(edges)]).T
    assert np.abs(mask.numpy() - expected).max() < 0.501  # rounded to 8 bits, float32 sums


def test_turns_colours_transparency_and_16_bits_are_read_as_a_person_sees_them(tmp_path):
    upright = load_mask(mask_file(tmp_path / "a.png", white_left(16, 32, 8)), whole(16, 32))
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: the file's rows are columns
    turned = mask_file(tmp_path / "b.png", np.rot90(white_left(16, 32, 8)), exif=exif)
    assert load_mask(turned, whole(16, 32)).tolist() == upright.tolist() == [[255, 0]] * 4
    Image.new("RGB", (16, 16), (0, 255, 0)).save(tmp_path / "green.png")
    assert load_mask(tmp_path / "green.png", whole(16, 16)).tolist() == [[150] * 2] * 2  # 0.587 * 255
    Image.new("RGBA", (16, 16), (255, 255, 255, 51)).save(tmp_path / "clear.png")
    assert load_mask(tmp_path / "clear.png", whole(16, 16)).tolist() == [[51] * 2] * 2
    deep = png(tmp_path / "deep.png", (16, 16), 16, 0, (b"\0" + b"\x80\xff" * 16) * 16)
    assert load_mask(deep, whole(16, 16)).tolist() == [[128] * 2] * 2  # 33023 / 257
    Image.new("1", (16, 16), 1).save(tmp_path / "bit.png")
    assert load_mask(tmp_path / "bit.png", whole(16, 16)).tolist() == [[255] * 2] * 2
    Image.new("L", (16, 16), 255).save(tmp_path / "m.webp", lossless=True)
    assert load_mask((tmp_path / "m.webp").read_bytes(), whole(16, 16)).tolist() == [[255] * 2] * 2


def test_a_mask_of_another_size_than_its_image_is_not_stretched(tmp_path):
    path = mask_file(tmp_path / "m.png", white_left(16, 32, 8))
    with pytest.raises(UnreadableImage, match="is 16x32, the image 32x32"):
        load_mask(path, whole(32, 32))
    item = SourceItem("a.png", 1, 2, 3, ("a",), PictureFile("m.png", 4, 5, 6))
    assert check(lambda name: tmp_path / name, item, 16, 32) == hash_content(path)
    with pytest.raises(UnreadableImage, match=r"its mask m\.png is 16x32, the image 32x32"):
        check(lambda name: tmp_path / name, item, 32, 32)


# --- masks in a folder ---


def test_a_mask_belongs_to_the_image_of_its_name_and_is_no_item_itself(tmp_path):
    for name in ("cat.jpg", "cat.mask.png", "sub/dog.png", "sub/dog.mask.WEBP", "owl.jpg", "lone.mask.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    items, skipped = find_items(tmp_path, CacheConfig(caption_strategy="filename"))
    assert [(item.path, item.mask.path if item.mask else None) for item in items] == [
        ("cat.jpg", "cat.mask.png"),
        ("owl.jpg", None),
        ("sub/dog.png", "sub/dog.mask.WEBP"),
    ]
    assert skipped == [Skipped("lone.mask.png", "is a mask without an image beside it")]
    stat = (tmp_path / "cat.mask.png").stat()
    mask = items[0].mask
    assert mask is not None
    assert (mask.num_bytes, mask.mtime_ns, mask.inode) == stat_numbers(stat)


# --- masks and flips in a cache ---


def picture(path: Path, width: int, height: int) -> None:
    path.parent.mkdir(exist_ok=True)
    rows = np.random.default_rng(width).integers(0, 256, (height, width, 3), dtype=np.uint8)
    Image.fromarray(rows).save(path)
    path.with_suffix(".txt").write_text("a picture\nanother caption")


@pytest.fixture(scope="module")
def place(tmp_path_factory, toy_model) -> Cli:
    """Two images, one with a mask, encoded with flips and one bucket of 64x64."""
    cli = Cli(tmp_path_factory.mktemp("masks"))
    picture(cli.folder / "set" / "a.png", 128, 64)
    picture(cli.folder / "set" / "b.png", 64, 64)
    mask_file(cli.folder / "set" / "a.mask.png", white_left(128, 64, 48))
    done = encode(cli, toy_model)
    assert done.code == 0, done.err
    return cli


def encode(cli: Cli, model: Path, *options: str):
    shape = ["cache.resolution=64", "cache.buckets=square", "cache.flip=true"]
    return cli(app, "encode", "set", "--model", str(model), *(f"--set={o}" for o in shape), *options)


def test_the_cache_gives_each_items_mask_and_its_mirror_image(place):
    cache = k5cache.open(place.folder / "cache" / "set")
    masks = [(item["path"], item["row"].flipped, item["mask"]) for item in cache]
    assert [(path, flipped) for path, flipped, _ in masks] == [
        ("a.png", False), ("a.png", True), ("b.png", False), ("b.png", True)
    ]  # fmt: skip
    mask, mirrored, *none = (mask for _, _, mask in masks)
    # 128x64, the middle 64 columns are kept, 16 of them white
    assert (mask.dtype, mask.tolist()) == (torch.float32, [[1.0] * 2 + [0.0] * 6] * 8)
    assert mirrored.tolist() == [[0.0] * 6 + [1.0] * 2] * 8
    assert none == [None, None]
    assert len(list((place.folder / "cache/set/masks").glob("64x64-*.parquet"))) == 1
    out = place(app, "info", "cache/set").out
    assert "4, 2 of them mirrored, 2 with a mask" in out
    assert re.search(r"masks +2 rows in 1 shard\b", out)
    assert "instance_prompt" not in out


def test_a_flipped_row_has_the_latents_of_the_mirrored_pixels(place, toy_model):
    from k5cache.encoders import vae
    from k5cache.sources.images import load_pixels

    cache = k5cache.open(place.folder / "cache" / "set")
    encoder = vae.load_vae(toy_model, "cpu", torch.float32)
    geometry = cover(128, 64, Bucket(64, 64))
    pixels = load_pixels(place.folder / "set" / "a.png", geometry)
    for row, seen in ((0, pixels), (1, pixels.flip(2))):
        expected = vae.encode_pixels(encoder, vae.to_model_range(seen[None]))
        assert torch.equal(cache[row]["mean"], expected.mean[0].half())
    assert not torch.equal(cache[0]["mean"], cache[1]["mean"])
    assert cache.row(0).caption_keys == cache.row(1).caption_keys


def test_an_edited_mask_encodes_no_image_and_one_of_another_size_takes_its_image_out(place, toy_model):
    before = k5cache.open(place.folder / "cache" / "set")
    assert "cache/set is up to date: 4 items" in encode(place, toy_model).out
    mask_file(place.folder / "set" / "a.mask.png", white_left(128, 64, 64))
    assert encode(place, toy_model).code == 0
    edited = k5cache.open(place.folder / "cache" / "set")
    assert edited[0]["mask"].tolist() == [[1.0] * 4 + [0.0] * 4] * 8
    assert [r.latent_key for r in map(edited.row, range(4))] == [r.latent_key for r in map(before.row, range(4))]
    assert {s.file for s in edited.manifest.shards if s.kind == "latents"} == {
        s.file for s in before.manifest.shards if s.kind == "latents"
    }
    mask_file(place.folder / "set" / "a.mask.png", white_left(64, 64, 64))
    done = encode(place, toy_model)
    assert "a.png: its mask a.mask.png is 64x64, the image 128x64" in done.out
    assert [item["path"] for item in k5cache.open(place.folder / "cache" / "set")] == ["b.png", "b.png"]
    (place.folder / "set" / "a.mask.png").unlink()
    assert encode(place, toy_model).code == 0
    assert [item["mask"] for item in k5cache.open(place.folder / "cache" / "set")] == [None] * 4


def test_a_mask_that_cannot_be_decoded_takes_its_image_out(place, toy_model):
    path = mask_file(place.folder / "set" / "b.mask.png", np.random.default_rng(0).integers(0, 256, (64, 64)))
    whole_file = path.read_bytes()
    path.write_bytes(whole_file[:2000])
    done = encode(place, toy_model)
    assert done.code == 0, done.err
    assert "b.png: its mask b.mask.png cannot be read" in done.out
    assert [item["path"] for item in k5cache.open(place.folder / "cache" / "set")] == ["a.png", "a.png"]
    path.unlink()


def test_a_mask_that_changes_while_it_is_encoded_is_not_stored_under_the_old_bytes_key(
    tmp_path, toy_model, monkeypatch
):
    from k5cache.encode import update

    cli = Cli(tmp_path)
    picture(tmp_path / "set" / "a.png", 64, 64)
    picture(tmp_path / "set" / "b.png", 64, 64)
    path = mask_file(tmp_path / "set" / "a.mask.png", white_left(64, 64, 16))
    original = update.encode_masks

    def late(read, commit, jobs):
        mask_file(path, white_left(64, 64, 48))  # after its hash was taken
        return original(read, commit, jobs)

    monkeypatch.setattr(update, "encode_masks", late)
    done = encode(cli, toy_model)
    assert "a.png: its mask a.mask.png has changed since the encode began; encode again" in done.out
    cache = k5cache.open(tmp_path / "cache" / "set")
    assert [item["path"] for item in cache] == ["b.png", "b.png"]
    assert not [shard for shard in cache.manifest.shards if shard.kind == "masks"]
    monkeypatch.undo()
    assert encode(cli, toy_model).code == 0
    again = k5cache.open(tmp_path / "cache" / "set")
    assert [item["path"] for item in again] == ["a.png", "a.png", "b.png", "b.png"]
    assert again[0]["mask"].tolist() == [[1.0] * 6 + [0.0] * 2] * 8


def test_a_mask_rewritten_with_other_bytes_and_the_same_size_time_and_name_is_seen(tmp_path, toy_model):
    cli = Cli(tmp_path)
    picture(tmp_path / "set" / "a.png", 64, 64)
    rows = white_left(64, 64, 16)
    path = tmp_path / "set" / "a.mask.png"
    Image.fromarray(rows).save(path, compress_level=0)  # stored: as many bytes whatever it shows
    assert encode(cli, toy_model).code == 0
    before, stat = k5cache.open(tmp_path / "cache" / "set"), path.stat()
    Image.fromarray(rows[:, ::-1]).save(path, compress_level=0)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert (path.stat().st_size, path.stat().st_ino) == (stat.st_size, stat.st_ino)
    assert encode(cli, toy_model).code == 0
    after = k5cache.open(tmp_path / "cache" / "set")
    assert torch.equal(after[0]["mask"], before[0]["mask"].flip(1))
    assert after.row(0).mask_key != before.row(0).mask_key
    assert after.row(0).latent_key == before.row(0).latent_key

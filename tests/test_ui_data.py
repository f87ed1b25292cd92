"""The pages of data: crops, grids, captions, what comes in, and what an encode is told."""

from __future__ import annotations

import os
import re
from dataclasses import replace
from io import BytesIO
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image
from starlette.testclient import TestClient

from k5cache.buckets import Bucket, Framing, Geometry, cover, source_geometry
from k5cache.options import CacheConfig
from k5cache.shared.errors import OutputError
from k5cache.shared.lock import lock_file
from k5cache.shared.model import ModelConfig
from k5cache.sources import find, images
from k5cache.sources.items import UnreadableImage, stat_numbers
from k5cache.store import tables
from k5cache.store.index import IndexRow, with_index
from k5cache.store.manifest import Manifest, lock, read_manifest, write_manifest
from k5cache.store.notes import LeftOut, Part
from k5cache.store.shards import ShardWriter
from k5cache.store.skipped import write_skipped
from k5cache.store.tensors import TensorSpec
from k5train.options.data import DataConfig
from k5train.options.train import TrainConfig
from k5train.runs.recipe import write_new
from k5train.ui import editing, listing
from k5train.ui.app import create_app
from k5train.ui.data import (
    cache_view,
    captions,
    commands,
    folder_view,
    limits,
    options,
    origin,
    panel,
    state,
    thumbnails,
    uploads,
)
from k5train.ui.data.crops import crop
from k5train.ui.data.opened import Opened, open_index
from k5train.ui.data.query import PAGE, Query, read_query
from k5train.ui.ids import id_of
from k5train.ui.new_run import saving
from k5train.ui.new_run.draft import Draft
from k5train.ui.project import Project
from tests.test_charts import channels, contrast

LATENTS = {name: TensorSpec("float16", (8, 8, 16)) for name in ("mean", "std")}
MASK = {"mask": TensorSpec("uint8", (8, 8))}
TEXT = {"prompt_embeds": TensorSpec("bfloat16", (None, 2)), "pooled": TensorSpec("bfloat16", (2,))}
RECIPE = {
    "model": {"source": "toy", "flavour": "t2i-lite-sft"},
    "text": {"text_batching": "exact"},
    "latents": {"posterior": "sample"},
    "selection": CacheConfig(resolution=64, trigger="sks").selection,
}
HOSTILE = '<script>alert(1)</script></textarea>"\x1b[31m\u202e'
NOTHING = LeftOut()
USUAL = CacheConfig(resolution=64)
FRAMING = Framing((Bucket(64, 64),))


@pytest.fixture
def project(tmp_path: Path) -> Project:
    for name in ("datasets", "cache"):
        (tmp_path / name).mkdir()
    return Project(tmp_path.resolve())


@pytest.fixture
def page(project: Project) -> TestClient:
    return TestClient(create_app(project), "http://127.0.0.1", headers={"origin": "http://127.0.0.1"})


def picture(path: Path, size: tuple[int, int] = (90, 70), seed: int = 0, caption: str | None = "a cat") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    values = np.random.default_rng(seed).integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(values).save(path)
    if caption is not None:
        path.with_suffix(".txt").write_text(caption, encoding="utf-8")
    return path


def item(folder: Path, name: str, keys: tuple[str, ...] = ("t0",), **changes: object) -> IndexRow:
    """The row of the index that an encode makes of a picture."""
    file = folder / name
    (width, height), content = images.image_size(file), images.hash_content(file)
    geometry = FRAMING.frame(width, height, content)[0]
    row = IndexRow(
        name, content, *stat_numbers(file.stat()), width, height, 64, 64, geometry.resized_width,
        geometry.resized_height, geometry.left, geometry.top, False, "l0", keys,
    )  # fmt: skip
    return replace(row, **changes)  # type: ignore[arg-type]


def write_cache(root: Path, rows: list[IndexRow], texts: dict[str, str], left_out: LeftOut = NOTHING) -> None:
    import torch

    with lock(root):
        shards = []
        with ShardWriter(root, "latents", LATENTS, (64, 64)) as writer:
            zeros = torch.zeros(8, 8, 16, dtype=torch.float16)
            writer.append({"key": "l0", "mean": zeros, "std": zeros})
            shards.append(writer.finish())
        with ShardWriter(root, "masks", MASK, (64, 64)) as writer:
            half = torch.zeros(8, 8, dtype=torch.uint8)
            half[:, 4:] = 255
            writer.append({"key": "m0", "mask": half})
            shards.append(writer.finish())
        with ShardWriter(root, "text", TEXT) as writer:
            for key, caption in texts.items():
                ones = torch.ones(3, 2, dtype=torch.bfloat16)
                writer.append({"key": key, "prompt_embeds": ones, "pooled": ones[0], "n_tokens": 3, "caption": caption})
            shards.append(writer.finish())
        manifest = Manifest(recipe=RECIPE, shards=tuple(shards), created_by={}, left_out=left_out)
        write_manifest(root, with_index(root, manifest, rows))


@pytest.fixture
def cats(project: Project) -> Path:
    """Three pictures, one with a mask and one with two captions, and their cache; one was left out."""
    folder = project.root / "datasets" / "cats"
    for number, name in enumerate(("a.png", "b.png", "sub/c.png")):
        picture(folder / name, (90 + 10 * number, 70), number)
    rows = [
        item(folder, "a.png", ("t0",), mask_key="m0"),
        item(folder, "b.png", ("t0", "t1")),
        item(folder, "sub/c.png", ("t2",)),
    ]
    root = project.root / "cache" / "cats"
    left_out = LeftOut((("bad.png", "is damaged"),), truncated=(("t2", 7, "sks"),))
    write_cache(root, rows, {"t0": "sks, a cat", "t1": f"sks, {HOSTILE}", "t2": "sks, A DOG"}, left_out)
    write_skipped(root, left_out.skipped)
    return folder


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def url(kind: str, relative: str) -> str:
    return f"/data/{kind}/{id_of(relative)}"


def shown(project: Project, name: str = "cats") -> cache_view.Shown:
    entry = listing.find(listing.caches(project), id_of(f"cache/{name}"))
    return cache_view.Shown(project, entry, open_index(entry.path), origin.source_of(project, entry))


def listed(project: Project, name: str = "cats", config: CacheConfig = USUAL) -> folder_view.Listing:
    entry = listing.find(listing.folders(project), id_of(f"datasets/{name}"))
    return folder_view.list_folder(project, entry, config)


# The crop


def test_a_crop_has_the_levels_that_are_trained_on_to_two_of_255(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    wide, tall = picture(tmp_path / "wide.png", (211, 97)), tmp_path / "tall.jpg"
    Image.open(wide).save(tall, exif=exif, quality=95)
    target = cover(211, 97, Bucket(64, 96))
    cases: list[tuple[Path, Geometry]] = [
        (wide, target),
        (wide, replace(target, flipped=True)),
        (wide, replace(target, left=0)),
        (wide, cover(211, 97, Bucket(320, 160))),
        (tall, cover(97, 211, Bucket(64, 64))),
        (wide, source_geometry(cover(50, 120, Bucket(64, 96)), 211, 97)),
        (wide, Geometry(211, 97, Bucket(64, 64), 211, 97, left=31, top=5)),
    ]
    assert cases[5][1].stretched
    for file, geometry in cases:
        theirs = images.load_pixels(file, geometry).permute(1, 2, 0).numpy().astype(int)
        ours = np.asarray(crop(file, geometry)).astype(int)
        assert ours.shape == theirs.shape
        assert np.abs(ours - theirs).max() <= 2, geometry


def test_what_is_too_thin_or_has_changed_its_size_is_said_and_not_loaded(tmp_path):
    thin = picture(tmp_path / "thin.png", (3000, 1))
    with pytest.raises(UnreadableImage, match="too long and thin"):
        crop(thin, replace(cover(3000, 1, Bucket(1024, 1024)), resized_width=3_000_000))
    with pytest.raises(UnreadableImage, match="is 3000x1 now"):
        crop(thin, cover(10, 10, Bucket(64, 64)))


# A cache


def test_a_grid_shows_each_item_as_it_is_trained_on(project, cats):
    grid = cache_view.grid(shown(project), Query())
    assert [(tile.name, tile.captions, tile.facts, tile.badges) for tile in grid.tiles] == [
        ("a.png", ("sks, a cat",), "64x64 of 90x70", ("mask",)),
        ("b.png", ("sks, a cat", f"sks, {HOSTILE}"), "64x64 of 100x70", ("2 captions",)),
        ("sub/c.png", ("sks, A DOG",), "64x64 of 110x70", ()),
    ]
    assert [(choice.label, choice.count) for choice in grid.choices] == [
        ("All", 3), ("Left out", 1), ("Cut-off caption", 1), ("With a mask", 1), ("Several captions", 1),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("query", "names"),
    [
        (Query(only="mask"), ["a.png"]),
        (Query(only="several"), ["b.png"]),
        (Query(only="truncated"), ["sub/c.png"]),
        (Query(only="left-out"), ["bad.png"]),
        (Query(only="no-caption"), []),
        (Query(bucket="64x64", sort="size"), ["sub/c.png", "b.png", "a.png"]),
        (Query(bucket="64x32"), []),
        (Query(q="a dog"), ["sub/c.png"]),
        (Query(q="B.PN"), ["b.png"]),
        (Query(q="cat", only="mask"), ["a.png"]),
        (Query(sort="name", page=9), ["a.png", "b.png", "sub/c.png"]),
    ],
)
def test_a_grid_is_filtered_searched_and_sorted(project, cats, query, names):
    assert [tile.name for tile in cache_view.grid(shown(project), query).tiles] == names


def test_a_picture_that_is_no_longer_what_was_encoded_says_so_in_its_tile(project, cats, page, tmp_path_factory):
    outside = picture(tmp_path_factory.mktemp("outside") / "secret.png")
    picture(cats / "a.png", seed=9)
    (cats / "b.png").unlink()
    (cats / "sub/c.png").unlink()
    (cats / "sub/c.png").symlink_to(outside)
    tiles = cache_view.grid(shown(project), Query()).tiles
    assert [tile.problem for tile in tiles] == [
        "has changed since the encode",
        "is gone: it was deleted, moved or renamed",
        "lies outside the project, so it is not shown",
    ]
    for tile in tiles:
        answer = page.get(tile.picture)
        assert (answer.status_code, answer.headers["content-type"]) == (200, "image/svg+xml")
        assert answer.headers["cache-control"] == "no-store"


def test_a_file_that_was_only_touched_is_still_what_was_encoded(project, cats):
    os.utime(cats / "a.png")
    assert cache_view.grid(shown(project), Query()).tiles[0].problem == ""


def test_the_tile_of_an_item_is_its_crop_under_its_mask(project, cats, page):
    tile = cache_view.grid(shown(project), Query()).tiles[0]
    answer = page.get(tile.picture)
    assert answer.headers["cache-control"] == "private, max-age=31536000, immutable"
    seen = np.asarray(Image.open(BytesIO(answer.content)).convert("RGB")).astype(float)
    expected = np.asarray(crop(cats / "a.png", cover(90, 70, Bucket(64, 64)))).astype(float)
    assert seen.shape == (64, 64, 3)
    assert abs(seen[:, 34:].mean() - expected[:, 34:].mean()) < 3  # WebP
    assert abs(seen[:, :30].mean() - (0.2 * expected[:, :30].mean() + 0.8 * 255)) < 3
    assert page.get(tile.picture.partition("?")[0] + "?v=old").headers["cache-control"] == "no-store"


def test_paths_of_a_strangers_index_lead_nowhere(project, cats):
    for name in ("../../x.png", "/etc/passwd", "a/../../b", "a\0b", "..\\x"):
        row = replace(item(cats, "a.png"), path=name)
        assert cache_view.picture_of(shown(project), row).path is None, name


def test_pages_of_a_large_cache_decode_only_the_row_groups_that_they_show(project, cats, monkeypatch):
    monkeypatch.setattr(tables, "ROW_GROUP", 100)
    rows = [item(cats, "a.png", path=f"{n:05d}.png", width=1000 + n % 7, mtime_ns=n) for n in range(950)]
    write_cache(project.root / "cache" / "large", rows, {"t0": "a cat"})
    opened = open_index(project.root / "cache" / "large")
    read: list[int] = []
    whole = tables.read_group
    monkeypatch.setattr(tables, "read_group", lambda table, group: read.append(group) or whole(table, group))
    numbers, count = opened.page(Query(page=3))
    assert [row.path for row in opened.cache.rows(numbers)] == [f"{n:05d}.png" for n in range(120, 180)]
    assert (count, read) == (950, [1])
    newest, _ = opened.page(Query(sort="newest", q="7.PNG"))
    assert [row.path for row in opened.cache.rows(newest)][:2] == ["00947.png", "00937.png"]
    monkeypatch.setattr(Opened, "has_captions", False, raising=False)
    assert len(numbers) == PAGE


def test_a_cache_that_is_being_encoded_or_was_stopped_says_so(project, cats, page):
    root = project.root / "cache" / "new"
    root.mkdir()
    with lock_file(root / ".lock"):
        text = page.get(url("c", "cache/new")).text
    assert "being encoded" in text
    assert "Its pictures are shown here when that has finished" in text
    write_manifest(root, Manifest(recipe=RECIPE))
    assert "unfinished" in page.get(url("c", "cache/new")).text
    (root / "manifest.json").write_text('{\n "sha256": "' + "0" * 64 + '"}')
    assert "its checksum does not match" in page.get(url("c", "cache/new")).text


# A folder


def test_a_folder_is_shown_as_an_encode_would_take_it(project, cats):
    picture(cats / "d.png", (40, 400), caption=None)
    picture(cats / "e.jpg", (30, 30), caption="one\ntwo")
    (cats / "f.png").write_bytes(b"no picture")
    (cats / "f.txt").write_text("f")
    (cats / "lone.txt").write_text("no picture")
    config = CacheConfig(resolution=64, trigger="sks", no_upscale=True)
    its = listed(project, config=config)
    found = find.find(cats, config)
    tiles = {tile.name: tile for tile in folder_view.grid(its, Query()).tiles}
    assert {tile.name: tile.captions for tile in tiles.values() if "missing" not in tile.problem} == {
        item.path: item.captions for item in found.items
    }
    assert tiles["d.png"].problem == "missing caption d.txt"
    assert tiles["e.jpg"].problem == "is 30x30 pixels, smaller than its bucket 64x64 (no_upscale)"
    assert tiles["f.png"].problem == "is not an image, or is of a kind that is not supported"
    left_out = folder_view.grid(its, Query(only="left-out"))
    assert {(tile.name, tile.problem) for tile in left_out.tiles} == {(s.path, s.reason) for s in found.skipped}
    geometry = folder_view.frame(its, its.images[0], found.items[0]).geometry
    assert geometry == config.framing.frame(90, 70, "")[0]
    (cats / "f.txt").unlink()  # of two reasons, that of the picture comes first
    its = listed(project, config=config)
    (entry,) = (image for image in its.images if image.path == "f.png")
    framed = folder_view.frame(its, entry, its.captioned["f.png"])
    assert framed.problem == "is not an image, or is of a kind that is not supported; missing caption f.txt"


def test_what_lies_outside_the_project_is_not_read(project, cats, page, tmp_path_factory):
    outside = tmp_path_factory.mktemp("outside")
    picture(outside / "secret.png", caption="a secret caption")
    (cats / "linked").symlink_to(outside, target_is_directory=True)
    (cats / "one.png").symlink_to(outside / "secret.png")
    (cats / "two.png").write_bytes((cats / "a.png").read_bytes())
    (cats / "two.txt").symlink_to(outside / "secret.txt")
    tiles = {tile.name: tile.problem for tile in folder_view.grid(listed(project), Query()).tiles}
    assert {name for name, problem in tiles.items() if problem == folder_view.OUTSIDE} == {"one.png", "two.png"}
    assert "linked/secret.png" not in tiles
    answer = page.get(url("f", "datasets/cats"))
    assert "a secret caption" not in answer.text
    assert (
        page.get(f"{url('f', 'datasets/cats')}/{id_of('one.png')}/picture").headers["content-type"] == "image/svg+xml"
    )


def test_pairs_are_shown_side_by_side_and_a_source_of_another_shape_is_stretched(project, page):
    folder = project.root / "datasets" / "pairs"
    for name, size in (("a", (90, 70)), ("b", (70, 90))):
        picture(folder / f"{name}.png", size, caption="make it red")
        picture(folder / f"{name}.source.png", (90, 70), seed=1, caption=None)
    picture(folder / "alone.png")
    its = listed(project, "pairs", CacheConfig(resolution=64, buckets="square", trigger="sks"))
    tiles = folder_view.grid(its, Query()).tiles
    assert [(tile.name, tile.captions, tile.shape, tile.badges) for tile in tiles] == [
        ("a.png", ("make it red, sks",), (128, 64), ()),
        ("b.png", ("make it red, sks",), (128, 64), ("source stretched",)),
    ]
    assert [(skip.path, skip.reason[:13]) for skip in its.skipped] == [("alone.png", "has no source")]
    seen = Image.open(BytesIO(page.get(tiles[1].picture.partition("?")[0] + "?resolution=64").content))
    assert seen.width > 1.4 * seen.height


def test_a_metadata_file_is_read_as_an_encode_reads_it_or_says_what_is_wrong(project, page):
    folder = project.root / "datasets" / "meta"
    picture(folder / "a.png", caption=None)
    picture(folder / "b.png", caption=None)
    rows = folder / "metadata.jsonl"
    rows.write_text('{"file_name": "a.png", "text": "from the file"}\n{"file_name": "no.png", "text": "x"}\n')
    its = listed(project, "meta", CacheConfig(resolution=64, caption_strategy="metadata"))
    tiles = folder_view.grid(its, Query()).tiles
    assert [(tile.captions, tile.problem) for tile in tiles] == [
        (("from the file",), ""),
        ((), "has no row in metadata.jsonl"),
    ]
    assert [skip.path for skip in its.skipped] == ["no.png"]
    rows.write_text("{")
    answer = page.get(url("f", "datasets/meta"))
    assert answer.status_code == 200
    assert "metadata.jsonl line 1 is not JSON" in answer.text


def test_captions_and_names_of_others_are_text_to_every_page(project, cats, page):
    picture(cats / "<b>&.png", caption=HOSTILE)
    base = url("f", "datasets/cats")
    for path in (
        "/data", base, f"{base}?q=%3Cb%3E", f"{base}/{id_of('<b>&.png')}",
        url("c", "cache/cats"), f"{url('c', 'cache/cats')}/1", f"{url('c', 'cache/cats')}?only=left-out&sort=%3Cb%3E",
    ):  # fmt: skip
        answer = page.get(path)
        assert answer.status_code == 200, path
        assert "<script>alert" not in answer.text, path
        assert "<b>&" not in answer.text, path
        assert page.get(f"{base}/0123456789ab").status_code == 404
    assert page.get(f"{url('c', 'cache/cats')}/99").status_code == 404


# Captions


def save(project: Project, name: str, typed: str, digest: str | None = None) -> Path:
    its = listed(project)
    image = its.by_id[id_of(name)]
    return captions.save(its, image, typed, captions.editor_of(its, image).digest if digest is None else digest)


def test_a_caption_is_written_whole_with_its_own_line_ends(project, cats):
    (cats / "a.txt").write_bytes(b"\xef\xbb\xbfold\r\nsecond\r\n")
    assert captions.editor_of(listed(project), listed(project).by_id[id_of("a.png")]).text == "old\nsecond\n"
    assert save(project, "a.png", "new\nlines\n").read_bytes() == b"\xef\xbb\xbfnew\r\nlines\r\n"
    assert save(project, "b.png", "\n naïve ").read_bytes() == "\n naïve ".encode()
    picture(cats / "d.png", caption=None)
    assert save(project, "d.png", "made").read_text() == "made"
    assert not [path for path in cats.iterdir() if path.name.startswith(".tmp")]


@pytest.mark.parametrize(
    ("before", "typed", "after"),
    [
        ('{"caption": "a", "seed": 3}\n', "b", '{"caption": "b", "seed": 3}\n'),
        ('{"text": ["a", "b"]}', "c\n\nd", '{"text": ["c", "d"]}'),
        ('"a"', "é", '"é"'),
        ('{\n  "caption": "a"\n}', "b", '{\n  "caption": "b"\n}'),
    ],
)
def test_a_json_file_keeps_its_other_fields(project, cats, before, typed, after):
    picture(cats / "j.png", caption=None)
    (cats / "j.json").write_text(before)
    assert save(project, "j.png", typed).read_text() == after


def test_what_is_no_caption_or_has_changed_meanwhile_is_not_written(project, cats):
    shown_before = captions.digest_of(b"a cat")
    (cats / "a.txt").write_text("edited elsewhere")
    for typed, digest, problem in (
        ("mine", shown_before, "a.txt has changed since this page showed it"),
        ("mine", "", "a.txt has changed since this page showed it"),
        (" \n", None, "The caption is empty"),
        ("a\0b", None, "null character"),
    ):
        with pytest.raises(captions.NotSaved, match=problem):
            save(project, "a.png", typed, digest)
    assert (cats / "a.txt").read_text() == "edited elsewhere"


def test_of_two_pages_that_save_at_once_one_waits_and_neither_loses_what_was_typed(project, cats, monkeypatch):
    """A page has read the file and not yet written it: another one, of another process, may not read it now."""
    written, refused = captions.written, []
    monkeypatch.setattr(editing, "_SECONDS", 0)

    def meanwhile(*words: object) -> bytes:
        monkeypatch.setattr(captions, "written", written)
        others = lambda: save(project, "a.png", "theirs"), lambda: saving.save(project, Draft("[train]", save_as="new"))
        for other, kind in zip(others, (captions.NotSaved, OutputError), strict=True):
            with pytest.raises(kind, match="Nothing was saved: process") as one:
                other()
            refused.append(one.value.fix)
        return written(*words)

    monkeypatch.setattr(captions, "written", meanwhile)
    assert save(project, "a.png", "mine").read_text() == "mine"
    assert refused == ["Try again; if that process hangs, end it"] * 2
    assert not (project.root / "new.toml").exists()
    assert save(project, "a.png", "theirs").read_text() == "theirs"
    (project.own / editing.LOCK).unlink()
    (project.own / editing.LOCK).symlink_to(cats / "a.txt")  # a stranger's project
    with pytest.raises(captions.NotSaved, match=r"edits\.lock cannot be written"):
        save(project, "a.png", "more")
    assert (cats / "a.txt").read_text() == "theirs"


def test_a_refused_caption_is_shown_again_with_what_the_file_has_now(project, cats, page):
    base = f"{url('f', 'datasets/cats')}/{id_of('a.png')}"
    sent = {"caption": "mine\r\n<two>", "digest": captions.digest_of(b"a cat")}
    (cats / "a.txt").write_text("theirs")
    answer = page.post(f"{base}/caption", data=sent)
    assert answer.status_code == 409
    assert "mine\n&lt;two&gt;</textarea>" in answer.text
    assert ">theirs</pre>" in answer.text
    again = page.post(f"{base}/caption", data={**sent, "digest": captions.digest_of(b"theirs")}, follow_redirects=False)
    assert (again.status_code, again.headers["location"]) == (303, base)
    assert (cats / "a.txt").read_text() == "mine\n<two>"
    of_cache = {
        "caption": "b",
        "digest": captions.digest_of(b"mine\n<two>"),
        "cache": id_of("cache/cats"),
        "number": "0",
    }
    back = page.post(f"{base}/caption", data=of_cache, follow_redirects=False)
    assert back.headers["location"] == f"{url('c', 'cache/cats')}/0"


def test_captions_that_are_not_in_side_files_are_read_only_with_the_reason(project, cats, tmp_path_factory):
    secret = tmp_path_factory.mktemp("outside") / "secret.txt"
    secret.write_text("secret")
    (cats / "b.txt").unlink()
    (cats / "b.txt").symlink_to(secret)
    (cats / "a.txt").write_bytes("a cat".encode("utf-16"))
    its = listed(project)
    editors = {name: captions.editor_of(its, its.by_id[id_of(name)]) for name in ("a.png", "b.png")}
    assert "UTF-16" in editors["a.png"].read_only
    assert (editors["b.png"].text, "outside" in editors["b.png"].read_only) == ("", True)
    with pytest.raises(captions.NotSaved):
        save(project, "b.png", "mine", "")
    assert secret.read_text() == "secret"
    of_names = listed(project, config=CacheConfig(resolution=64, caption_strategy="filename"))
    assert "names of the files" in captions.editor_of(of_names, of_names.images[0]).read_only


# What comes in


def sent(name: str, content: bytes) -> uploads.Sent:
    return uploads.Sent(name, BytesIO(content))


def png(seed: int = 0) -> bytes:
    data = BytesIO()
    Image.fromarray(np.full((8, 8, 3), seed, dtype=np.uint8)).save(data, format="PNG")
    return data.getvalue()


def test_pictures_come_in_under_clean_and_free_names_and_overwrite_nothing(project, cats):
    entry = listing.find(listing.folders(project), id_of("datasets/cats"))
    before = {path.name: path.read_bytes() for path in cats.iterdir() if path.is_file()}
    received = uploads.receive(
        project, entry,
        [
            sent("a.png", png(1)), sent("a.txt", b"another a"), sent("../../evil.png", png(2)),
            sent("C:\\x\\con.png", png(3)), sent("..hidden.png", png(4)), sent("ta\0b\x1b.png", png(5)),
            sent("new.png", png(6)), sent("new.txt", b"a new one"), sent("new.mask.png", png(255)),
            sent("bad.png", b"\x89PNG broken"), sent("run.exe", b"MZ"), sent("empty.txt", b" "), sent("u.txt", b"\xff"),
            sent("photo.psd", b"8BPS"),
        ],
    )  # fmt: skip
    assert [one.name for one in received if not one.problem] == [
        "a-2.png", "a-2.txt", "evil.png", "_con.png", "hidden.png", "tab.png", "new.png", "new.txt", "new.mask.png",
    ]  # fmt: skip
    assert {one.name: one.problem for one in received if one.problem} == {
        "bad.png": "is not an image, or is of a kind that is not supported",
        "run.exe": "is neither a picture nor a caption (.txt)",
        "empty.txt": "is empty",
        "u.txt": "is not UTF-8: save it as UTF-8",
        "photo.psd": "is a Photoshop document: save it as PNG",
    }
    assert {name: (cats / name).read_bytes() for name in before} == before
    assert (cats / "a-2.txt").read_bytes() == b"another a"
    assert not [path for path in cats.iterdir() if path.name.startswith(".")]


def test_a_picture_larger_than_is_taken_leaves_nothing(project, cats, monkeypatch):
    entry = listing.find(listing.folders(project), id_of("datasets/cats"))
    monkeypatch.setattr(limits, "MOST_PIXELS", 63)
    monkeypatch.setattr(limits, "MOST_BYTES_A_FILE", 200)
    names = names_in(cats)
    received = uploads.receive(project, entry, [sent("x.png", png()), sent("y.png", png() + b"\0" * 300)])
    assert ["63 are taken here" in received[0].problem, received[1].problem] == [True, "has more than 200 B"]
    assert names_in(cats) == names


def test_a_folder_is_made_and_filled_without_a_script(project, page):
    answer = page.post("/data/folders", data={"name": "new ones"}, follow_redirects=False)
    base = url("f", "datasets/new ones")
    assert (answer.status_code, answer.headers["location"]) == (303, base)
    assert "There are no pictures here yet" in page.get(base).text
    files = [("pictures", ("x.png", png(), "image/png")), ("pictures", ("x.txt", b"a cat", "text/plain"))]
    answer = page.post(f"{base}/pictures", files=files, follow_redirects=False)
    assert (answer.status_code, names_in(project.root / "datasets" / "new ones")) == (303, ["x.png", "x.txt"])
    answer = page.post(f"{base}/pictures", files=files[:1])
    assert "x-2.png (it was called x.png, and there is one of that name)" in answer.text
    for name in ("new ones", "../x", "", "a/b", ".hidden", "con"):
        assert page.post("/data/folders", data={"name": name}).status_code == 400, name
    assert names_in(project.root / "datasets") == ["new ones"]


# The encode


def test_an_encode_again_takes_the_options_and_the_model_of_the_cache(project, cats):
    source = listing.folders(project)[0]
    cache = listing.caches(project)[0]
    base, _ = options.base_of(cache)
    words = ["k5cache", "encode", "datasets/cats", "-o", "cache/cats", "--model", "toy"]
    assert commands.argv("encode", project, source, cache, base) == [
        *words, "--set", "cache.resolution=64", "--set", 'cache.trigger="sks"',
    ]  # fmt: skip
    other = options.with_values(base, {"trigger": 'b"', "resolution": "64", "flip": "true", "unknown": "x"})
    assert options.changes(base, other) == {"trigger": 'b"', "flip": "true"}
    assert commands.argv("encode", project, source, cache, other, is_changed=True) == [
        *words, "--set", "cache.resolution=64", "--set", "cache.flip=true", "--set", 'cache.trigger="b\\""', "--update",
    ]  # fmt: skip
    new = replace(project, model="other/model")
    assert commands.argv("diff", new, source, None, CacheConfig()) == [
        "k5cache", "diff", "datasets/cats", "-o", "cache/cats", "--model", "other/model",
    ]  # fmt: skip
    with lock(cache.path):
        write_manifest(cache.path, replace(read_manifest(cache.path), part=Part((2,), 8)))
    assert commands.argv("diff", project, source, cache, base)[3:7] == ["-o", "cache/cats", "--part", "2/8"]


def test_a_button_puts_the_encode_into_the_queue(project, cats, page, monkeypatch):
    added: list[tuple[object, ...]] = []
    monkeypatch.setattr("k5train.ui.jobs.queue.add", lambda *words, **more: added.append((*words[1:], more)))
    answer = page.post(f"{url('c', 'cache/cats')}/encode", data={"trigger": "ohwx"}, follow_redirects=False)
    assert (answer.status_code, answer.headers["location"]) == (303, url("c", "cache/cats"))
    page.post(f"{url('c', 'cache/cats')}/diff", data={"trigger": "sks"}, follow_redirects=False)
    answer = page.post(f"{url('f', 'datasets/cats')}/encode", data={"trigger": "s&s"}, follow_redirects=False)
    assert answer.headers["location"] == url("f", "datasets/cats") + "?trigger=s%26s"  # it shows what is encoded
    assert [(words[0][1], words[0][-1], words[3]) for words in added] == [  # type: ignore[index]
        ("encode", "--update", "cache/cats"),
        ("diff", 'cache.trigger="sks"', "cache/cats"),
        ("encode", "--update", "cache/cats"),
    ]
    assert page.post(f"{url('c', 'cache/cats')}/encode", data={"resolution": "65"}).status_code == 400
    assert len(added) == 3


def test_what_is_encoded_or_waits_is_not_asked_for_again(project, cats, page, monkeypatch):
    job = SimpleNamespace(about="cache/cats", kind="encode", is_over=False)
    monkeypatch.setattr(panel, "panel_of", lambda project, about: None)
    page.app.state.listeners.close()  # so that a stream ends after its first state
    monkeypatch.setattr("k5train.ui.jobs.queue.jobs", lambda project: [job])
    places = url("c", "cache/cats"), url("f", "datasets/cats")
    for kind, is_over, disabled in (
        ("encode", False, [["encode-now", "diff-now"], ["encode-now"]]),
        ("diff", False, [["diff-now"], []]), ("encode", True, [[], []]),
    ):  # fmt: skip
        job.kind, job.is_over = kind, is_over
        for path, names in zip(places, disabled, strict=True):
            for text in (page.get(path).text, page.get(f"{path}/events").text):
                assert re.findall(r'<button [^>]*id="(\S+-now)"[^>]* disabled>', text) == names, (kind, path)
        if not is_over:
            answer = page.post(f"{places[0]}/{kind}", data={"resolution": "64"})
            assert (answer.status_code, "already, or that waits in the queue" in answer.text) == (400, True)


def test_the_list_says_how_folders_and_caches_stand(project, cats):
    picture(project.root / "datasets" / "dogs" / "x.png")
    seen = state.overview(project)
    assert [(f.entry.name, f.num_pictures, f.word) for f in seen.folders] == [
        ("cats", 3, "not known"),
        ("dogs", 1, "never encoded"),
    ]
    ((cache, source),) = seen.caches
    assert (cache.num_items, cache.num_left_out, cache.trigger, source and source.name) == (3, 1, "sks", "cats")


def test_a_cache_names_the_runs_that_train_on_it(project, cats, monkeypatch):
    monkeypatch.chdir(project.root)
    first = TrainConfig()
    for name, config in (("a", first), ("b", replace(first, data=(DataConfig(cache="cache/cats"),))), ("c", first)):
        root = Path("runs") / name
        root.mkdir(parents=True)
        write_new(root, Path("cache/others" if name == "c" else "cache/cats"), {}, ModelConfig(), config)
    monkeypatch.chdir(project.root.parent)  # the page may be started elsewhere, with --folder
    cache = listing.caches(project)[0]
    assert sorted(run.name for run in state.used_by(project, cache)) == ["a", "b"]
    (project.root / "runs" / "a" / "run.json").write_text("{")
    assert [run.name for run in state.used_by(project, cache)] == ["b"]


def test_the_address_of_a_form_that_was_refused_leads_back_to_its_folder(page, cats):
    for name in ("pictures", "encode"):
        answer = page.get(f"{url('f', 'datasets/cats')}/{name}", follow_redirects=False)
        assert (answer.status_code, answer.headers["location"]) == (303, url("f", "datasets/cats"))


def test_an_item_says_that_its_caption_or_its_picture_is_another_one_now(project, cats, page):
    item_page = f"{url('c', 'cache/cats')}/2"
    assert "Encode again to train on it" in page.get(item_page).text  # the dog is a cat in its file
    (cats / "sub/c.txt").write_text("A  DOG")
    config = CacheConfig(resolution=64, trigger="sks")
    assert listed(project, config=config).captioned["sub/c.png"].captions == ("sks, A  DOG",)
    assert "Encode again to train on it" not in page.get(item_page).text
    (cats / "sub/c.txt").unlink()
    assert "The next encode leaves it out: missing caption c.txt" in page.get(item_page).text


def test_a_renamed_cache_is_still_known_by_its_pictures(project, cats):
    (project.root / "datasets" / "a_first").mkdir()
    (project.root / "cache" / "cats").rename(project.root / "cache" / "others")
    assert origin.source_of(project, listing.caches(project)[0]) == listing.folders(project)[1]


# Thumbnails


def test_a_thumbnail_is_made_once_and_needs_no_permission(project):
    made: list[int] = []

    def make() -> Image.Image:
        made.append(1)
        return Image.new("RGB", (640, 480), "teal")

    first = thumbnails.thumbnail(project, "key", make)
    assert thumbnails.thumbnail(project, "key", make) == first
    assert len(made) == 1
    assert Image.open(BytesIO(first)).size == (320, 240)
    assert (project.own / ".gitignore").read_text() == "*\n"
    other = Project(project.root / "cache")
    other.own.write_text("a file in the place of the folder")
    assert thumbnails.thumbnail(other, "key", make) == first
    assert len(made) == 2


def test_thumbnails_are_neither_read_nor_written_through_links_of_a_strangers_project(project, tmp_path_factory):
    def make() -> Image.Image:
        return Image.new("RGB", (64, 64), "teal")

    first = thumbnails.thumbnail(project, "key", make)
    outside = tmp_path_factory.mktemp("outside")
    (own,) = (project.own / "thumbnails").glob("*/*.webp")
    for swap in ("file", "pipe", "folder"):
        secret = outside / own.name
        secret.write_bytes(b"a secret")
        own.unlink()
        if swap == "file":
            own.symlink_to(secret)
        elif swap == "pipe":
            os.mkfifo(own)
        else:
            own.parent.rmdir()
            own.parent.symlink_to(outside)
        assert thumbnails.thumbnail(project, "key", make) == first, swap
        assert secret.read_bytes() == b"a secret"
    (project.own / ".gitignore").unlink()
    (project.own / ".gitignore").symlink_to(outside / "new")
    thumbnails.thumbnail(project, "another", make)
    assert [path.name for path in outside.iterdir()] == [own.name]


def test_a_placeholder_is_text_that_says_why():
    svg = thumbnails.placeholder(f"{HOSTILE} & damaged")
    assert "<script" not in svg
    assert "\x1b" not in svg
    assert svg.count("<text") > 1
    words, ground = (channels(colour) for colour in thumbnails.PLACEHOLDER)
    assert contrast(words, ground) > 7
    assert int(re.search(r'font-size="(\d+)"', svg)[1]) * 140 / 320 > 12  # pixels, in the smallest tile


def test_a_query_survives_its_url_and_knows_only_its_words():
    query = Query("mask", "64x96", "a & b", "size", 3, {"trigger": "x y"})
    assert query.url() == "?only=mask&bucket=64x96&q=a+%26+b&sort=size&trigger=x+y"
    assert query.url(page=4) == "?only=mask&bucket=64x96&q=a+%26+b&sort=size&page=4&trigger=x+y"
    assert read_query({"only": "<b>", "bucket": "x", "sort": "?", "page": "-1", "q": "q" * 999}) == Query(q="q" * 200)

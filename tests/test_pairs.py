"""Pairs for image-to-image: which picture is the source of which, in each layout, and what is said of all others?"""

from __future__ import annotations

import json
import os
import shutil
import time
import unicodedata
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from k5cache.buckets import bucket_table, choose_bucket, cover, is_turned
from k5cache.cli import app
from k5cache.commands.listing import print_skipped
from k5cache.encode.request import read_listed_request
from k5cache.encode.source_note import take_note
from k5cache.options import CacheConfig
from k5cache.shared.errors import DatasetError, RecipeError
from k5cache.shared.kind import kind_at_hand
from k5cache.shared.model import Drawn, ModelConfig
from k5cache.sources import unchanged
from k5cache.sources.find import Source, find
from k5cache.sources.images import image_size
from k5cache.sources.items import UnreadableImage
from k5cache.sources.pairs import pair
from k5cache.sources.unchanged import is_untouched, listing_digest
from tests.cli import Cli
from tests.table_files import IMAGES, png, tar

RED, BLUE = png(255), png(0, (4, 6))


def fill(folder: Path, *names: str) -> Path:
    """Write files: pictures of their name's length in red, and texts that say the file's name."""
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(name.encode() if path.suffix == ".txt" else png(len(name)))
    return folder


def edits(source: Path, **options: object) -> Source:
    return find(source, CacheConfig(**options), "i2i")


def pairs(source: Path, **options: object) -> dict[str, tuple[str, str]]:
    """Target -> its source and its captions."""
    return {item.path: (item.source.path, " | ".join(item.captions)) for item in edits(source, **options).items}


def skips(source: Path, **options: object) -> dict[str, str]:
    return {skip.path: skip.reason for skip in edits(source, **options).skipped}


def refusal(source: Path, **options: object) -> str:
    with pytest.raises(DatasetError) as caught:
        edits(source, **options)
    assert "\n" not in caught.value.problem + caught.value.fix
    return f"{caught.value.problem}; {caught.value.fix}"


# --- by name in one folder ---


def test_pairs_are_found_by_the_endings_of_their_names(tmp_path):
    fill(tmp_path, "a_start.png", "a_end.jpg", "a.txt", "sub/b_source.png", "sub/b_target.png", "sub/b_target.txt")
    fill(tmp_path, "c_input.png", "c_target.png", "c.txt", "d_Before.PNG", "d_after.png", "d.txt")
    fill(tmp_path, "e_input.png", "e_output.png", "e.txt", "f.source.webp", "f.png", "f.txt")
    assert pairs(tmp_path) == {
        "a_end.jpg": ("a_start.png", "a.txt"),
        "sub/b_target.png": ("sub/b_source.png", "sub/b_target.txt"),
        "c_target.png": ("c_input.png", "c.txt"),
        "d_after.png": ("d_Before.PNG", "d.txt"),
        "e_output.png": ("e_input.png", "e.txt"),
        "f.png": ("f.source.webp", "f.txt"),
    }
    assert skips(tmp_path) == {}
    found = edits(tmp_path)
    item = found.items[0]
    status = (tmp_path / "a_start.png").stat()
    assert (item.source.num_bytes, item.source.mtime_ns) == (status.st_size, status.st_mtime_ns)
    assert found.read_source(item.source.path) == tmp_path / "a_start.png"
    assert found.is_plain


def test_whatever_has_no_partner_is_named(tmp_path):
    fill(tmp_path, "a_start.png", "a_end.png", "a.txt", "a_start.txt", "a_start.mask.png", "a_end.mask.png")
    fill(tmp_path, "b_end.png", "b.txt", "c_start.png", "d.png", "d.txt", "e.source.png", "f_source.png", "f.png")
    fill(tmp_path, "g_target.png", "g_source.png", "g_input.png", "g.txt", "h_end.png", "h_start.png", "x.txt")
    fill(tmp_path, "i_end.png", "i_start.jpg", "i_start.png", "j_end.png", "j_start.png", "j_end.txt", "j.txt")
    assert pairs(tmp_path).keys() == {"a_end.png", "j_end.png"}
    assert edits(tmp_path).items[0].mask.path == "a_end.mask.png"
    assert skips(tmp_path) == {
        "a_start.mask.png": "is the mask of a source, which is not read",
        "a_start.txt": "is the caption of a source, which is not read",
        "b_end.png": "has no source: there is no b_start.* or b_end.source.*",
        "c_start.png": "is a source without a target: there is no c_end.*",
        "d.png": "has no source: there is no d.source.*",
        "e.source.png": "is a source without a target: there is no e.*",
        "f_source.png": "is a source without a target: there is no f_target.*: "
        "if f is its target, rename it f.source.*",
        "f.png": "has no source: there is no f.source.*",
        "g_target.png": "has 2 sources, g_input.png and g_source.png: keep one of them",
        "h_end.png": "missing caption h_end.txt or h.txt",
        "i_end.png": "has 2 sources, i_start.jpg and i_start.png: keep one of them",
        "j.txt": "is a second caption: j_end.txt is read",
        "b.txt": "is a caption without an image",
        "x.txt": "is a caption without an image",
        "g.txt": "is a caption without an image",
    }


def test_one_source_serves_several_targets_and_letters_in_another_case_are_named():
    several = pair([("a_input", "a_input.png"), ("a_target", "a_target.png"), ("a_output", "a_output.png")])
    assert several.sources == {"a_target": "a_input.png", "a_output": "a_input.png"}
    assert several.refused == {}
    accents = unicodedata.normalize("NFD", "é")
    others = pair(
        [("Cat_start", "Cat_start.png"), ("cat_end", "cat_end.png"), (f"{accents}_end", "x"), ("é_start", "y")]
    )
    assert others.sources == {}
    assert "no cat_start.* or cat_end.source.*, but Cat_start.*, whose letters differ" in others.refused["cat_end.png"]
    assert "but é_start.*, whose letters differ in case or accents" in others.refused["x"]
    assert f"but {accents}_end.*, whose letters differ" in others.refused["y"]


def test_a_chain_of_edits_loses_no_picture():
    chain = pair([("a", "a.png"), ("a.source", "a.source.png"), ("a.source.source", "a.source.source.png")])
    assert chain.sources == {"a": "a.source.png", "a.source": "a.source.source.png"}
    assert chain.used == {"a.source.source.png"}


def test_captions_from_file_names_lose_the_ending(tmp_path):
    fill(tmp_path, "make_it_blue_start.png", "make_it_blue_end.png")
    assert pairs(tmp_path, caption_strategy="filename") == {
        "make_it_blue_end.png": ("make_it_blue_start.png", "make it blue")
    }


def test_several_lines_are_several_instructions(tmp_path):
    fill(tmp_path, "a.png", "a.source.png")
    (tmp_path / "a.txt").write_text("make it blue\nblue, please\n")
    assert pairs(tmp_path) == {"a.png": ("a.source.png", "make it blue | blue, please")}


def test_where_nothing_is_a_pair_the_layouts_are_said(tmp_path):
    fill(tmp_path, "a.png", "a.txt", "b.png", "b.txt")
    said = refusal(tmp_path)
    assert f"learns from pairs, and {tmp_path} has none (a.png: has no source: there is no a.source.*)" in said
    for layout in ("--sources DIR", "X_start.png and X_end.png", "X.source.png and X.png", "column `source`"):
        assert layout in said
    assert "source_column" in refusal(tmp_path, source_column="source")


def test_text_to_image_reads_such_folders_as_before(tmp_path):
    fill(tmp_path, "a.source.png", "a.png", "a.txt", "a_start.png", "a_start.txt")
    listing = find(tmp_path, CacheConfig())
    assert [(item.path, item.source) for item in listing.items] == [("a.png", None), ("a_start.png", None)]
    reason = "missing caption a.source.txt, unless it is the source of a pair for image-to-image"
    assert [(skip.path, skip.reason) for skip in listing.skipped] == [("a.source.png", reason)]


# --- a second folder ---


def folders(root: Path, targets: tuple[str, ...], sources: tuple[str, ...]) -> tuple[Path, str]:
    return fill(root / "targets", *targets), str(fill(root / "sources", *sources))


def test_a_second_folder_has_the_sources_under_the_same_names(tmp_path):
    names = "a.jpg", "a.txt", "sub/b.png", "sub/b.txt", "c.jpg", "c.png", "c.txt", "d.e.png", "d.e.txt"
    targets, sources = folders(tmp_path, names, ("a.png", "sub/b.webp", "c.png", "d.e.jpg"))
    assert pairs(targets, source_dir=sources) == {
        "a.jpg": ("a.png", "a.txt"),
        "sub/b.png": ("sub/b.webp", "sub/b.txt"),
        "c.jpg": ("c.png", "c.txt"),
        "c.png": ("c.png", "c.txt"),
        "d.e.png": ("d.e.jpg", "d.e.txt"),
    }
    assert skips(targets, source_dir=sources) == {}
    assert edits(targets, source_dir=sources).read_source("sub/b.webp") == tmp_path / "sources/sub/b.webp"


def test_partners_that_two_folders_lack_are_named_on_either_side(tmp_path):
    targets, sources = folders(
        tmp_path,
        ("a.png", "a.txt", "b.png", "b.txt", "c.png", "d.png", "d.txt", "e.png", "e.txt", "f.png", "f.txt"),
        ("a.png", "a.jpg", "c.png", "c.txt", "d.jpg", "d.webp", "E.png", "f/x.jpg", "g.png", "h.psd", "a.mask.png"),
    )
    (targets / "f.png").rename(targets / "f.jpg")
    assert pairs(targets, source_dir=sources).keys() == {"a.png"}
    assert skips(targets, source_dir=sources) == {
        f"{sources}/a.jpg": "is a second source of its target: a.png is used",
        f"{sources}/a.mask.png": "is the mask of a source, which is not read",
        "b.png": f"has no source: there is no {sources}/b.*",
        "c.png": f"missing caption c.txt: move {sources}/c.txt, which is beside the source",
        "d.png": "has 2 sources, d.jpg and d.webp: keep one of them",
        "e.png": f"has no source: there is no {sources}/e.*, but E.*, whose letters differ in case or accents",
        f"{sources}/E.png": f"is a source without a target: there is no {targets}/E.*",
        "f.jpg": f"has no source: there is no {sources}/f.*",
        f"{sources}/f/x.jpg": f"is a source without a target: there is no {targets}/f/x.*",
        f"{sources}/g.png": f"is a source without a target: there is no {targets}/g.*",
        f"{sources}/h.psd": "is a Photoshop document: save it as PNG",
    }


def test_one_folder_may_be_inside_the_other(tmp_path):
    fill(tmp_path, "a.png", "a.txt", "sources/a.png", "targets/a.png", "targets/a.txt")
    (tmp_path / "targets").rename(tmp_path / "sources/targets")
    inner = tmp_path / "sources"
    assert pairs(tmp_path, source_dir=str(inner)) == {"a.png": ("a.png", "a.txt")}
    targets = inner / "targets"
    assert pairs(targets, source_dir=str(inner)) == {"a.png": ("a.png", "targets/a.txt")}
    assert skips(targets, source_dir=str(inner)) == {}


def test_links_are_followed_and_what_is_no_file_is_not_waited_for(tmp_path):
    names = [f"{letter}.{suffix}" for letter in "abcd" for suffix in ("png", "txt")]
    targets, sources = folders(tmp_path, tuple(names), ("d.png/x.png",))
    (tmp_path / "sources/a.png").symlink_to(targets / "b.png")
    (tmp_path / "sources/b.png").symlink_to("nowhere.png")
    os.mkfifo(tmp_path / "sources/c.png")
    assert pairs(targets, source_dir=sources) == {"a.png": ("a.png", "a.txt")}
    reasons = skips(targets, source_dir=sources)
    assert reasons["b.png"] == "its source b.png is a broken link"
    assert reasons["c.png"] == "its source c.png is not a file"
    assert reasons["d.png"].startswith("has no source")
    link = tmp_path / "linked"
    link.symlink_to(sources)
    assert pairs(targets, source_dir=str(link)).keys() == {"a.png"}


def test_a_second_folder_that_cannot_be_one_is_refused(tmp_path):
    targets, sources = folders(tmp_path, ("a.png", "a.txt"), ("b.png",))
    (tmp_path / "same").symlink_to(targets)
    (tmp_path / "empty").mkdir()
    assert "does not exist; Correct --sources" in refusal(targets, source_dir=str(tmp_path / "none"))
    assert "is not a folder; Correct --sources" in refusal(targets, source_dir=str(targets / "a.png"))
    assert "is given for the sources and for the targets" in refusal(targets, source_dir=str(tmp_path / "same"))
    assert "has no images; Name a source like its target" in refusal(targets, source_dir=str(tmp_path / "empty"))
    fill(tmp_path / "bare", "a.png")
    assert "bare has no image with a caption (1 skipped: a.png: missing caption a.txt)" in refusal(
        tmp_path / "bare", source_dir=sources
    )
    assert "me/cats is no folder on this machine" in refusal(Path("me/cats"), source_dir=sources)
    assert f"No image in {targets} has a source" in (said := refusal(targets, source_dir=sources))
    assert f"a.png: has no source: there is no {sources}/a.*" in said
    (tmp_path / "t.csv").write_text("image,text\ntargets/a.png,a\n")
    assert "--sources is for folders of images" in refusal(tmp_path / "t.csv", source_dir=sources)
    assert CacheConfig(source_dir="a", source_column="b").check() == [
        "source_dir and source_column both say where the sources are: set one of them"
    ]


# --- tables, tars and datasets ---


def metadata(folder: Path, *rows: dict[str, object]) -> Path:
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


def test_metadata_files_name_sources_in_a_column(tmp_path):
    fill(tmp_path, "a.png", "b.png", "in/a.png", "c.png", "d.png", "loose.png")
    rows = [
        {"file_name": "a.png", "source": "in/a.png", "text": "one"},
        {"file_name": "a.png", "source": "in\\a.png", "text": "two"},
        {"file_name": "a.png", "source": "b.png", "text": "three"},
        {"file_name": "b.png", "source": None, "text": "x"},
        {"file_name": "c.png", "source": "", "text": "x"},
        {"file_name": "d.png", "source": "../up.png", "text": "x"},
        {"file_name": "loose.png", "source": "gone.png", "text": "x"},
    ]
    listing = edits(metadata(tmp_path, *rows), caption_strategy="metadata")
    assert [(i.path, i.source.path, i.captions) for i in listing.items] == [("a.png", "in/a.png", ("one", "two"))]
    assert listing.read_source("in/a.png") == tmp_path / "in/a.png"
    assert {skip.path: skip.reason for skip in listing.skipped} == {
        "a.png": "has two sources: in/a.png, and here b.png; copy the image under another name (metadata.jsonl line 3)",
        "b.png": "has no source: its column source is empty (metadata.jsonl line 4)",
        "c.png": "has no source: its column source is empty (metadata.jsonl line 5)",
        "d.png": "its source ../up.png lies outside the folder of its table (metadata.jsonl line 6)",
        "loose.png": "its source gone.png does not exist (metadata.jsonl line 7)",
    }


def test_metadata_files_that_are_not_asked_for_are_pointed_out(tmp_path):
    fill(tmp_path, "a.png", "in/a.png")
    metadata(tmp_path, {"file_name": "a.png", "source": "in/a.png", "text": "one"})
    assert refusal(tmp_path).endswith("Set cache.caption_strategy=metadata to use metadata.jsonl")


def test_metadata_files_take_their_sources_from_a_second_folder(tmp_path):
    fill(tmp_path, "a.png", "b.png", "sources/a.jpg")
    metadata(tmp_path, {"file_name": "a.png", "text": "one"}, {"file_name": "b.png", "text": "two"})
    options = {"caption_strategy": "metadata", "source_dir": str(tmp_path / "sources")}
    assert pairs(tmp_path, **options) == {"a.png": ("a.jpg", "one")}
    assert skips(tmp_path, **options).keys() == {"b.png"}


@pytest.mark.parametrize("names", [("source", "image", "text"), ("original_image", "edited_image", "edit_prompt")])
def test_text_tables_name_both_pictures(tmp_path, names):
    fill(tmp_path, "a.png", "in/a.png")
    (tmp_path / "t.csv").write_text(f"{','.join(names)}\nin/a.png,a.png,make it red\n,a.png,x\n")
    assert pairs(tmp_path / "t.csv") == {"a.png": ("in/a.png", "make it red")}
    assert edits(tmp_path / "t.csv").read_source("in/a.png") == tmp_path / "in/a.png"
    assert skips(tmp_path / "t.csv") == {"a.png": f"has no source: its column {names[0]} is empty (t.csv line 3)"}


def test_a_table_without_a_usable_column_of_sources_says_which_columns_it_has(tmp_path):
    fill(tmp_path, "a.png")
    table = tmp_path / "t.csv"
    table.write_text("image,text,number\na.png,x,1\n")
    assert "t.csv has no column of sources" in (said := refusal(table))
    assert "its columns are image, text, number; Set cache.source_column" in said
    assert "has no column before; its columns are image, text, number" in refusal(table, source_column="before")
    table.write_text("image,source,source_image,text\na.png,a.png,a.png,x\n")
    assert "has sources in source and source_image" in refusal(table)
    assert pairs(table, source_column="source") == {"a.png": ("a.png", "x")}
    table.write_text("image,source,text\na.png,,x\na.png,,y\n")
    assert "learns from pairs" in refusal(table)
    rows = pa.table({"image": pa.array([{"bytes": RED, "path": None}], IMAGES), "text": ["x"], "source": [3]})
    pq.write_table(rows, tmp_path / "t.parquet")
    assert "t.parquet has no images in source but int64" in refusal(tmp_path / "t.parquet")


def test_parquet_holds_or_names_both_pictures(tmp_path):
    fill(tmp_path, "0.png")
    cells = [{"bytes": BLUE, "path": None}, None, {"bytes": None, "path": "0.png"}, {"bytes": None, "path": "no.png"}]
    images = pa.array([{"bytes": RED, "path": None}] * 4, IMAGES)
    texts = ["a", "b", "c", "d"]
    path = tmp_path / "t.parquet"
    pq.write_table(pa.table({"source": pa.array(cells, IMAGES), "result": images, "instruction": texts}), path)
    listing = edits(path)
    assert pairs(path) == {"t.parquet#0": ("t.parquet#0.source", "a"), "t.parquet#2": ("t.parquet#2.source", "c")}
    assert listing.read("t.parquet#0") == RED
    assert listing.read_source("t.parquet#0.source") == BLUE
    assert listing.read_source("t.parquet#2.source") == tmp_path / "0.png"
    assert skips(path) == {
        "t.parquet#1": "has no source: its column source is empty",
        "t.parquet#3": "its source names no.png, which is not in the folder of t.parquet",
    }
    assert len({item.source.inode for item in listing.items} | {item.inode for item in listing.items}) == 4
    pq.write_table(pa.table({"source": ["0.png", None, "", "x/y"], "image": images, "text": texts}), path)
    assert pairs(path) == {"t.parquet#0": ("0.png", "a")}
    assert edits(path).read_source("0.png") == tmp_path / "0.png"
    assert skips(path)["t.parquet#3"] == "its source x/y does not exist"
    assert [item.path for item in find(path, CacheConfig()).items] == [f"t.parquet#{i}" for i in range(4)]


def test_saved_datasets_and_folders_of_parquet_have_the_column_too(tmp_path):
    import datasets

    columns = {"image": [{"bytes": RED, "path": "r.png"}], "source": [{"bytes": BLUE, "path": "b.png"}], "text": ["x"]}
    features = datasets.Features(
        {"image": datasets.Image(), "source": datasets.Image(), "text": datasets.Value("string")}
    )
    saved = datasets.Dataset.from_dict(columns, features=features)
    saved.save_to_disk(tmp_path / "saved")
    (tmp_path / "hub/data").mkdir(parents=True)
    saved.to_parquet(tmp_path / "hub/data/train-00000-of-00001.parquet")
    for name in ("saved", "hub"):
        assert pairs(tmp_path / name) == {f"{name}#0": (f"{name}#0.source", "x")}
        assert edits(tmp_path / name).read_source(f"{name}#0.source") == BLUE


def test_tars_hold_sources_beside_their_targets(tmp_path):
    members = {
        "0.jpg": RED, "0.source.png": BLUE, "0.txt": "a", "d/1.png": RED, "d/1.source.jpg": BLUE, "d/1.txt": "b",
        "2.png": RED, "2.txt": "c", "p.v2.png": RED, "p.v2.source.png": BLUE, "p.v2.txt": "d",
        "4.png": RED, "4.source.png": BLUE, "4.source.jpg": BLUE, "4.txt": "e",
        "d/5.source.png": BLUE, "p.v3.source.png": BLUE,
    }  # fmt: skip
    path = tar(tmp_path / "t.tar", members)
    assert pairs(path) == {
        "t.tar/0.jpg": ("t.tar/0.source.png", "a"),
        "t.tar/d/1.png": ("t.tar/d/1.source.jpg", "b"),
        "t.tar/p.v2.png": ("t.tar/p.v2.source.png", "d"),
    }
    assert edits(path).read_source("t.tar/0.source.png") == BLUE
    assert skips(path) == {
        "t.tar/2.png": "has no source: there is no 2.source.* beside it",
        "t.tar/d/5.source.png": "is a source without a target: there is no 5.* beside it",
        "t.tar/p.v3.source.png": "is a source without a target: there is no p.v3.* beside it",
        "t.tar/4.png": "has 2 sources, 4.source.jpg and 4.source.png: keep one of them",
    }
    named = tar(tmp_path / "n.tar", {"0.in.jpg": BLUE, "0.out.jpg": RED, "0.json": '{"prompt": "go"}'})
    options = {"image_column": "out.jpg", "caption_column": "json.prompt"}
    for option in ("in", "in.jpg"):
        assert pairs(named, source_column=option, **options) == {"n.tar/0.out.jpg": ("n.tar/0.in.jpg", "go")}
    assert "has none (n.tar/0.out.jpg: has no source: there is no 0.source.* beside it)" in refusal(named, **options)


def test_an_empty_source_is_named_when_it_is_read(tmp_path):
    path = tmp_path / "t.parquet"
    images, sources = (pa.array([{"bytes": data, "path": None}], IMAGES) for data in (RED, b""))
    pq.write_table(pa.table({"image": images, "source": sources, "text": ["x"]}), path)
    with pytest.raises(UnreadableImage, match="is empty"):
        edits(path).read_source("t.parquet#0.source")


# --- what an encode makes of them ---


def test_a_source_that_changes_is_seen_and_none_is_opened_where_nothing_changed(tmp_path, monkeypatch):
    monkeypatch.setattr(unchanged, "SETTLED_NS", 0)
    targets, sources = folders(tmp_path, ("a.png", "a.txt", "b.png", "b.txt"), ("a.jpg", "b.jpg"))
    config, alone = CacheConfig(source_dir=sources), CacheConfig()
    time.sleep(0.01)
    note = take_note(targets, config, edits(targets, source_dir=sources))
    assert note.stats
    assert is_untouched(targets, config, note)
    assert not is_untouched(targets, alone, note)
    for change in (
        lambda path: path.write_bytes(RED),
        lambda path: os.utime(path, ns=(0, 0)),
        lambda path: path.with_suffix(".webp").write_bytes(RED),
        lambda path: path.unlink(),
    ):
        change(tmp_path / "sources/a.jpg")
        assert not is_untouched(targets, config, note)
        listing = edits(targets, source_dir=sources)
        assert listing_digest(listing) != note.listing
        time.sleep(0.01)
        note = take_note(targets, config, listing)
        assert is_untouched(targets, config, note)
    shutil.rmtree(sources)
    assert not is_untouched(targets, config, note)


def test_the_note_of_text_to_image_is_of_one_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(unchanged, "SETTLED_NS", 0)
    fill(tmp_path, "a.png", "a.txt")
    time.sleep(0.01)
    note = take_note(tmp_path, CacheConfig(), find(tmp_path, CacheConfig()))
    assert note.stats == unchanged.read_stats(tmp_path).digest


@pytest.mark.parametrize("option", [{"source_dir": "in"}, {"source_column": "source"}])
def test_text_to_image_refuses_options_for_sources_by_name(tmp_path, toy_model, option):
    fill(tmp_path, "a.png", "a.txt")
    [name] = option
    with pytest.raises(RecipeError, match=rf"cache\.{name} is only for image-to-image models") as caught:
        read_listed_request(tmp_path, tmp_path / "c", ModelConfig(path=str(toy_model)), CacheConfig(**option), Drawn())
    assert "i2i-lite-sft" in caught.value.fix
    assert CacheConfig(**option).refused_for("i2i") == CacheConfig().refused_for("t2i") == []


def test_an_option_for_sources_is_part_of_a_recipe_only_if_it_is_set(tmp_path):
    assert "source_column" not in CacheConfig().selection
    assert CacheConfig(source_column="before").selection["source_column"] == "before"
    assert CacheConfig(source_dir="anywhere").selection == CacheConfig().selection


def test_the_kind_of_a_model_is_known_before_it_is_downloaded(tmp_path, toy_model, toy_edit_model, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    models = [ModelConfig(flavour="i2i-lite-sft"), ModelConfig(path=str(toy_edit_model)), ModelConfig()]
    assert [kind_at_hand(model) for model in models] == ["i2i", "i2i", "t2i"]
    assert kind_at_hand(ModelConfig(path=str(toy_model))) == "t2i"


def test_an_edit_model_without_pairs_is_refused_by_the_command_line(tmp_path, toy_edit_model):
    cli = Cli(tmp_path)
    fill(tmp_path / "set", "a.png", "a.txt")
    for command in ("encode", "diff", "plan"):
        done = cli(app, command, "set", "--model", str(toy_edit_model))
        assert done.code == 2
        assert "learns from pairs, and set has none" in done.err
    done = cli(app, "encode", "set", "--sources", "set", "--model", str(toy_edit_model))
    assert "set is given for the sources and for the targets" in done.err
    assert not (tmp_path / "cache").exists()


def test_pictures_without_a_partner_are_told_by_their_reasons_and_not_one_by_one(tmp_path, capsys):
    names = [f"{name}_{ending}.png" for name in ("cat", "dog", "owl") for ending in ("end", "start")]
    targets, sources = folders(tmp_path, ("a.png", "a.txt", *(f"sub/{n}{e}" for n in "bcd" for e in (".png", ".txt"))),
                               ("a.png", "x.jpg", "y.jpg"))  # fmt: skip
    print_skipped(edits(targets, source_dir=sources).skipped)
    printed = capsys.readouterr().out.splitlines()
    assert printed[0] == "5 skipped"
    assert [line.strip().split(":")[0] for line in printed if "more for this reason" in line] == [
        "and 2 more for this reason",
        "and 1 more for this reason",
    ]
    fill(tmp_path / "one", "a.png", "a.source.png", "a.txt", *(name for name in names if "end" in name))
    print_skipped(edits(tmp_path / "one").skipped)
    assert capsys.readouterr().out.splitlines() == [
        "3 skipped",
        "  cat_end.png: has no source: there is no cat_start.* or cat_end.source.*",
        "    and 2 more for this reason: dog_end.png, owl_end.png",
    ]


def test_odd_shapes_of_sources_are_counted_and_named_and_an_exif_orientation_is_applied(tmp_path, toy_edit_model):
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees to the right
    turned, lost, clear = ((96, 64), {"exif": exif}), ((96, 64), {}), Image.new("RGBA", (64, 96), (9, 9, 9, 0))
    for name, (size, options) in {
        "exif": turned,
        "lost": lost,
        "long": ((40, 6000), {}),
        "same": ((64, 96), {}),
    }.items():
        fill(tmp_path / "set", f"{name}.txt")
        Image.new("RGB", (64, 96), "red").save(tmp_path / f"set/{name}.png")
        Image.new("RGB", size, "red" if name == "same" else "blue").save(tmp_path / f"set/{name}.source.png", **options)
    fill(tmp_path / "set", "clear.txt", "bad.png", "bad.txt")
    Image.new("RGB", (64, 96), "red").save(tmp_path / "set/clear.png")
    clear.save(tmp_path / "set/clear.source.png")
    (tmp_path / "set/bad.source.png").write_bytes(b"no picture")
    found = edits(tmp_path / "set")
    assert image_size(found.read_source("exif.source.png")) == (64, 96)
    options = ["set", "--model", str(toy_edit_model), "--set", "cache.resolution=64"]
    done = Cli(tmp_path)(app, "diff", *options)
    assert done.code == 0, done.err
    lines = [line.rstrip() for line in done.out.splitlines()]
    stretched = lines.index("2 with a stretched source, of another shape than its target")
    assert lines[stretched + 1 : stretched + 3] == ["  long.png", "  lost.png"]
    on_its_side = "1 with a source that lies on its side, perhaps by a lost EXIF orientation"
    assert lines[lines.index(on_its_side) + 1] == "  lost.png"
    same = "1 source and target are the same file: nothing to learn"
    assert lines[lines.index(same) + 1] == "  same.png"
    assert any(line.startswith("  bad.png: its source bad.source.png is not an image") for line in lines)
    preview = json.loads(Cli(tmp_path)(app, "diff", *options, "--json").out)
    assert (preview["turned"], preview["num_items"]) == (["lost.png"], 5)


def test_a_source_lies_on_its_side_only_if_that_gives_it_its_targets_shape():
    target = cover(1200, 800, choose_bucket(1200, 800, bucket_table(1024, "native")))
    for size, is_on_its_side in (((800, 1200), True), ((401, 600), True), ((1200, 800), False), ((600, 400), False),
                                 ((1000, 1000), False), ((800, 1300), False)):  # fmt: skip
        assert is_turned(target, *size) == is_on_its_side, size
    square = cover(512, 512, choose_bucket(512, 512, bucket_table(1024, "native")))
    assert not is_turned(square, 512, 512)

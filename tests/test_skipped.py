"""What could not be used of a source: is it kept, for people, where they look for it?"""

from __future__ import annotations

import csv
import json

from k5cache.cli import app
from k5cache.encode.job import TextJob
from k5cache.encode.source_note import note_truncated
from k5cache.store import skipped
from k5cache.store.manifest import read_manifest
from k5cache.store.notes import LeftOut
from k5cache.upkeep.gc import collect
from k5cache.upkeep.verify import verify_cache
from tests.cli import Cli
from tests.workshop import Workshop


def rows_of(root):
    with (root / "skipped.csv").open(encoding="utf-8", newline="") as file:
        return list(csv.reader(file))


def test_skips_are_in_a_file_and_in_info_with_the_captions_that_were_cut(tmp_path, toy_model):
    shop, cli = Workshop(tmp_path, toy_model), Cli(tmp_path)
    shop.put("a.png", "word " * 30)
    shop.put("b.png", "a dog", seed=1)
    (shop.source / "no,caption.png").write_bytes((shop.source / "b.png").read_bytes())
    (shop.source / "lone.txt").write_text("x")
    options = {"max_sequence_length": 20}
    assert shop.encode(**options).truncated
    header = ["path", "skipped by k5cache because"]
    all_skips = [["lone.txt", "is a caption without an image"], ["no,caption.png", "missing caption no,caption.txt"]]
    assert rows_of(shop.root) == [header, *all_skips]
    text = " ".join(cli(app, "info", "cache").out.split())
    assert "2 skipped lone.txt: is a caption without an image" in text
    assert "all of them: cache/skipped.csv" in text
    assert "1 truncated caption word word" in text
    facts = json.loads(cli(app, "info", "cache", "--json").out)
    assert sorted(facts["skipped"]) == all_skips
    (cut,) = facts["truncated"]
    assert cut[0].startswith("word word")
    assert 0 < cut[1] < 150

    before = shop.files()
    assert shop.encode(**options).is_unchanged
    assert shop.files() == before
    assert verify_cache(shop.root).foreign == ()
    collect(shop.root)
    assert rows_of(shop.root) == [header, *all_skips]

    for name in ("lone.txt", "no,caption.png", "a.png", "a.txt"):
        (shop.source / name).unlink()
    shop.encode(**options)
    assert not (shop.root / "skipped.csv").exists()
    assert read_manifest(shop.root).left_out == LeftOut()  # the caption that was cut is gone, too


def test_another_file_of_that_name_is_neither_overwritten_nor_deleted_and_named(tmp_path):
    for content in (b"", b"path,reason\r\n", b"mine"):
        (tmp_path / "skipped.csv").write_bytes(content)
        for entries in ([("a", "b")], []):
            skipped.write_skipped(tmp_path, entries)
            assert (tmp_path / "skipped.csv").read_bytes() == content
    (tmp_path / "skipped.csv").unlink()
    (tmp_path / "skipped.csv").symlink_to("elsewhere")
    skipped.write_skipped(tmp_path, [("a", "b")])
    assert not (tmp_path / "elsewhere").exists()
    assert not skipped.is_ours(tmp_path)


def test_cells_are_quoted_as_spreadsheets_read_them(tmp_path):
    entries = [('a "b", c.png', "line\nbreak"), ("катя\ud800.png", "x")]
    skipped.write_skipped(tmp_path, entries)
    assert rows_of(tmp_path)[1:] == [['a "b", c.png', "line\nbreak"], ["катя?.png", "x"]]
    assert skipped.is_ours(tmp_path)


def test_truncations_are_kept_while_their_captions_are_needed():
    before = LeftOut(truncated=(("1", 5, "old"), ("2", 6, "gone")))
    jobs = [TextJob("3", "new" * 100), TextJob("4", "whole")]
    assert note_truncated(before, [("new" * 100, 7)], jobs, {"1", "3", "4"}.intersection) == (
        *(("1", 5, "old"), ("3", 7, ("new" * 100)[:80])),
    )

"""What do tables give whose content, names or folders are not as usual, and is every change of them seen?"""

from __future__ import annotations

import base64
import gzip
import json
import os
import random
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from k5cache.options import CacheConfig
from k5cache.shared.errors import DatasetError
from k5cache.sources.find import find
from k5cache.sources.items import UnreadableImage
from k5cache.sources.table_cells import Cell, cells_of
from k5cache.sources.tables import load_files
from tests.table_files import IMAGES, captions, contents, parquet, png, skipped, tar

SPECIAL = "a [1] *{x}?::b%20#c"


def refusal(source: Path, **options: object) -> str:
    with pytest.raises(DatasetError) as caught:
        find(source, CacheConfig(**options))
    assert "\n" not in caught.value.problem
    return f"{caught.value.problem}; {caught.value.fix}"


def every_kind(root: Path) -> dict[str, dict[str, bytes]]:
    """Sources of every kind below ``root``, and the pictures that each must give, by path."""
    import datasets

    root.mkdir(parents=True)
    pictures = {f"{i}.png": png(i) for i in range(3)}
    for name, data in pictures.items():
        (root / name).write_bytes(data)
        (root / name).with_suffix(".txt").write_text("of a folder")
    tar(root / "t.tar", dict(sorted({**pictures, **{f"{i}.txt": f"number {i}" for i in range(3)}}.items())))
    images = [pictures["0.png"], (None, "1.png"), (pictures["2.png"], "2.png")]
    parquet(root / "t.parquet", images, ["number 0", "number 1", "number 2"])
    (root / "t.csv").write_text("image,text\n" + "".join(f"{i}.png,number {i}\n" for i in range(3)))
    (root / "t.tsv").write_text("image\ttext\n" + "".join(f"{i}.png\tnumber {i}\n" for i in range(3)))
    rows = [{"image": f"{i}.png", "text": f"number {i}"} for i in range(3)]
    (root / "t.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (root / "t.json").write_text(json.dumps(rows))
    (root / "metadata.csv").write_text("file_name,text\n" + "".join(f"{i}.png,number {i}\n" for i in range(3)))
    (root / "hub" / "data").mkdir(parents=True)
    parquet(root / "hub" / "data" / "train-00000-of-00001.parquet", [*pictures.values()], ["a", "b", "c"])
    (root / "tars").mkdir()
    shutil.copy(root / "t.tar", root / "tars" / "x.tar")
    table = datasets.Dataset(
        pa.table({"image": pa.array([{"bytes": png(0), "path": "0.png"}], IMAGES), "text": ["number 0"]})
    )
    table.cast_column("image", datasets.Image()).save_to_disk(root.parents[1] / "saved")
    shutil.move(root.parents[1] / "saved", root / "saved")  # datasets itself cannot save where * or :: is in the path
    shutil.copy(root / "saved" / "data-00000-of-00001.arrow", root / "t.arrow")
    numbered = list(pictures.values())
    return {
        ".": pictures, "t.csv": pictures, "t.tsv": pictures, "t.jsonl": pictures, "t.json": pictures,
        "t.tar": {f"t.tar/{name}": data for name, data in pictures.items()},
        "tars": {f"x.tar/{name}": data for name, data in pictures.items()},
        "tars/x*.tar": {f"x.tar/{name}": data for name, data in pictures.items()},
        "t.parquet": {f"t.parquet#{i}": data for i, data in enumerate(numbered)},
        "hub": {f"hub#{i}": data for i, data in enumerate(numbered)},
        "saved": {"saved#0": png(0)}, "t.arrow": {"t.arrow#0": png(0)},
    }  # fmt: skip


@pytest.mark.parametrize("name", ["plain", SPECIAL])
def test_every_kind_of_source_gives_the_same_from_every_working_directory(tmp_path, monkeypatch, name):
    root = tmp_path / name / "set"
    expected = every_kind(root)
    (tmp_path / "empty").mkdir()
    (tmp_path / "strangers").mkdir()
    for i in range(3):
        (tmp_path / "strangers" / f"{i}.png").write_bytes(png(200 + i))
    for folder in (root, tmp_path / "empty", tmp_path / "strangers"):
        monkeypatch.chdir(folder)
        for source, pictures in expected.items():
            for path in (root / source, Path(os.path.relpath(root, folder)) / source):
                found = contents(path)
                if source == ".":  # which finds the pictures alone
                    metadata = contents(path, caption_strategy="metadata")
                    assert metadata == pictures, (folder, path)
                assert found == pictures, (folder, path)


def test_a_row_without_bytes_is_the_file_beside_its_table_and_is_compared_by_that_files_stat(tmp_path, monkeypatch):
    (tmp_path / "set").mkdir()
    for folder in (tmp_path, tmp_path / "set"):
        (folder / "0.png").write_bytes(png(1 if folder == tmp_path else 2))
    for folder in (tmp_path, tmp_path / "set" / "inner"):
        folder.mkdir(exist_ok=True)
        (folder / "elsewhere.png").write_bytes(png(3))
    monkeypatch.chdir(tmp_path)
    names = ["0.png", str(tmp_path / "set" / "inner" / "elsewhere.png"), "elsewhere.png", "/no/such.png",
             "http://x.org/a.png", None, str(tmp_path / "elsewhere.png"), "../elsewhere.png", "/dev/zero"]  # fmt: skip
    source = parquet(tmp_path / "set" / "t.parquet", [(None, name) for name in names], list("abcdefghi"))
    assert contents(source) == {"t.parquet#0": png(2), "t.parquet#1": png(3)}
    outside = dict.fromkeys(["t.parquet#6", "t.parquet#7", "t.parquet#8"], "lies outside the folder of its table")
    assert skipped(source) == outside | {
        "t.parquet#2": "names elsewhere.png, which is not in the folder of t.parquet",
        "t.parquet#3": "lies outside the folder of its table",
        "t.parquet#4": "is a URL: download the images first",
        "t.parquet#5": "holds no image",
    }
    before = find(source, CacheConfig()).items
    (tmp_path / "set" / "0.png").write_bytes(png(4))
    after = find(source, CacheConfig()).items
    assert [b.inode == a.inode for b, a in zip(before, after, strict=True)] == [False, True]


@pytest.fixture
def own_dataset_cache(tmp_path, monkeypatch):
    """Keep the cache of `datasets` out of the home of whoever runs the tests."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache-of-datasets")


@pytest.mark.usefixtures("own_dataset_cache")
@pytest.mark.parametrize("kind", ["csv", "tsv", "json", "jsonl", "parquet", "arrow", "tar"])
def test_a_regular_table_has_the_rows_that_datasets_reads(tmp_path, kind):
    import datasets

    every_kind(tmp_path / "set")
    builder = {"tsv": "csv", "jsonl": "json", "tar": "webdataset"}.get(kind, kind)
    options = {"sep": "\t"} if kind == "tsv" else {}
    file = tmp_path / "set" / f"t.{kind}"
    theirs = datasets.load_dataset(builder, data_files={"train": str(file)}, split="train", **options)
    images = "png" if kind == "tar" else "image"
    if kind in ("parquet", "arrow", "tar"):
        theirs = theirs.cast_column(images, datasets.Image(decode=False))
    expected = []
    for row in theirs:
        cell = row[images] if isinstance(row[images], dict) else {"path": row[images], "bytes": None}
        content = cell["bytes"] or (tmp_path / "set" / cell["path"]).read_bytes()
        expected.append((content, row["txt" if kind == "tar" else "text"]))
    found, pictures = captions(file), contents(file)
    assert [(pictures[path], *texts) for path, texts in found.items()] == expected
    assert len(expected) == (1 if kind == "arrow" else 3)


@pytest.mark.parametrize("content", ["another table", "noise", "nothing"])
def test_a_table_that_is_overwritten_while_its_images_are_read_names_them_or_gives_the_new_ones(tmp_path, content):
    path = parquet(tmp_path / "t.parquet", [bytes([i]) * 5000 for i in range(200)], ["x"] * 200, row_group_size=50)
    found = find(path, CacheConfig())
    assert found.read("t.parquet#0") == bytes([0]) * 5000
    if content == "another table":
        parquet(path, [bytes([255 - i]) * 900 for i in range(20)], ["x"] * 20)
    else:
        path.write_bytes(random.Random(0).randbytes(400_000) if content == "noise" else b"")
    outcomes = set()
    for item in found.items:
        try:
            found.read(item.path)
        except UnreadableImage as error:
            outcomes.add(error.reason[:14])
    assert "cannot be read" in outcomes


# --- every change is seen ---


@pytest.mark.parametrize("kind", ["t.csv", "t.jsonl", "t.parquet", "metadata.jsonl"])
def test_a_table_with_other_captions_and_the_same_size_and_time_gives_the_new_ones(tmp_path, kind):
    (tmp_path / "a.png").write_bytes(png(1))

    def write(caption: str) -> None:
        if kind == "t.parquet":
            parquet(tmp_path / kind, [png(1)], [caption])
        elif kind == "t.csv":
            (tmp_path / kind).write_text(f"image,text\na.png,{caption}\n")
        else:
            name = "file_name" if kind.startswith("metadata") else "image"
            (tmp_path / kind).write_text(json.dumps({name: "a.png", "text": caption}))
        os.utime(tmp_path / kind, ns=(1, 1_600_000_000_000_000_000))

    source, options = (tmp_path, {"caption_strategy": "metadata"}) if kind.startswith("m") else (tmp_path / kind, {})
    write("one")
    size = (tmp_path / kind).stat().st_size
    assert list(captions(source, **options).values()) == [("one",)]
    write("two")
    assert (tmp_path / kind).stat().st_size == size
    assert list(captions(source, **options).values()) == [("two",)]


@pytest.mark.parametrize("kind", ["parquet", "tar", "arrow"])
def test_a_table_with_other_images_and_the_same_size_and_time_has_other_stats(tmp_path, kind):
    path = tmp_path / f"t.{kind}"

    def write(shade: int) -> None:
        if kind == "tar":
            tar(path, {"a.png": bytes([shade]) * 99, "a.txt": "one"})
        elif kind == "parquet":
            parquet(path, [bytes([shade]) * 99], ["one"], compression="none", use_dictionary=False)
        else:
            table = pa.table(
                {"image": pa.array([{"bytes": bytes([shade]) * 99, "path": None}], IMAGES), "text": ["one"]}
            )
            with pa.OSFile(str(path), "wb") as file, pa.ipc.new_file(file, table.schema) as writer:
                writer.write_table(table)
        os.utime(path, ns=(1, 1_600_000_000_000_000_000))

    write(1)
    [before], size = find(path, CacheConfig()).items, path.stat().st_size
    time.sleep(0.02)  # more than a tick of the file system's clock
    write(2)
    [after] = find(path, CacheConfig()).items
    assert path.stat().st_size == size
    assert (before.num_bytes, before.mtime_ns) == (after.num_bytes, after.mtime_ns)
    assert before.inode != after.inode
    assert list(contents(path).values()) == [bytes([2]) * 99]


def test_a_row_has_another_stat_when_another_row_or_column_takes_its_place(tmp_path):
    cells = [pa.array([{"bytes": png(10 * c + i), "path": None} for i in range(3)], IMAGES) for c in range(2)]
    pq.write_table(pa.table({"image": cells[0], "other": cells[1], "text": ["a", "b", "c"]}), tmp_path / "t.parquet")
    stats = {
        find(tmp_path / "t.parquet", CacheConfig(split=split, image_column=column)).items[0].inode
        for split in ("train", "train[1:]", "train[2:]")
        for column in ("image", "other")
    }
    assert len(stats) == 6


def test_a_shard_that_changes_leaves_the_stats_of_the_rows_of_others(tmp_path):
    def stats() -> list[int]:
        return [item.inode for item in find(tmp_path / "t-*.parquet", CacheConfig()).items]

    for i in range(2):
        parquet(tmp_path / f"t-{i}.parquet", [png(i)], ["one"])
    before = stats()
    parquet(tmp_path / "t-1.parquet", [png(5)], ["one"])
    assert [b == a for b, a in zip(before, stats(), strict=True)] == [True, False]


@pytest.mark.parametrize("seconds", [-11_644_473_600, 10_413_792_000])  # 1601 and 2300
def test_tables_and_files_of_any_century_are_listed(tmp_path, seconds):
    parquet(tmp_path / "t.parquet", [png(1)], ["one"])
    (tmp_path / "a.png").write_bytes(png(1))
    (tmp_path / "t.csv").write_text("image,text\na.png,one\n")
    for name in ("t.parquet", "t.csv", "a.png"):
        os.utime(tmp_path / name, ns=(0, seconds * 10**9))
    for name in ("t.parquet", "t.csv"):
        [item] = find(tmp_path / name, CacheConfig()).items
        assert -(2**63) <= item.mtime_ns < 2**63
        assert 0 <= item.inode < 2**63


# --- captions as they are ---


def test_json_values_of_several_kinds_are_each_what_they_are(tmp_path):
    (tmp_path / "a.png").write_bytes(png(1))
    texts = ["a", ["b", "c"], 7, None, {"x": "y"}, [["d"]], [], "  ", "\ud800", ["e", None, {"f": 1}]]
    lines = [json.dumps({"image": "a.png", "text": text}) for text in texts]
    for name, content in (("t.jsonl", "\ufeff" + "\n\n".join(lines)), ("t.json", f"[{','.join(lines)}]")):
        (tmp_path / name).write_text(content)
        found = find(tmp_path / name, CacheConfig())
        assert [item.captions for item in found.items] == [("a", "b", "c", "7")]
        rows = [f"t.jsonl line {2 * i + 1}" if name == "t.jsonl" else f"t.json#{i}" for i in range(len(texts))]
        assert [skip.reason for skip in found.skipped] == [
            f"empty caption ({rows[3]})",
            f"its caption is not text but an object ({rows[4]})",
            f"its caption is not text but a list in a list ({rows[5]})",
            f"empty caption ({rows[6]})",
            f"empty caption ({rows[7]})",
            f"its caption has half a character (a lone surrogate) ({rows[8]})",
            f"its caption is not text but an object ({rows[9]})",
        ]


def test_a_column_that_some_rows_lack_is_empty_there(tmp_path):
    (tmp_path / "a.png").write_bytes(png(1))
    (tmp_path / "b.png").write_bytes(png(2))
    (tmp_path / "t.jsonl").write_text('{"image": "b.png"}\n{"text": "one", "image": "a.png", "n": 1}\n{"text": "x"}')
    assert captions(tmp_path / "t.jsonl") == {"a.png": ("one",)}
    assert skipped(tmp_path / "t.jsonl") == {
        "b.png": "empty caption (t.jsonl line 1)", "t.jsonl#2": "names no file (t.jsonl line 3)"
    }  # fmt: skip


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("image,text\na.png,007\n", ("007",)),
        ("\ufeffimage , text\r\n\r\na.png,null\r\n", ("null",)),
        ('image,text\na.png,"two\nlines, ""quoted"""', ('two\nlines, "quoted"',)),
        ("image,text,x\na.png,short\n \n", ("short",)),
        (f"image,text\na.png,{'long ' * 50_000}\n", ("long " * 50_000,)),
    ],
)
def test_cells_of_csv_are_the_text_between_the_commas(tmp_path, text, said):
    (tmp_path / "a.png").write_bytes(png(1))
    (tmp_path / "t.csv").write_text(text, newline="")
    (tmp_path / "u.csv.gz").write_bytes(gzip.compress(text.encode()))
    assert captions(tmp_path / "t.csv") == captions(tmp_path / "u.csv.gz") == {"a.png": said}


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("t.csv", "image;text\na.png;b\n", "t.csv has semicolons between its cells, and commas are expected; Save"),
        ("t.csv", "image\ttext\na.png\tb\n", "t.csv has tabs between its cells, and commas are expected"),
        ("t.tsv", "image,text\na.png,b\n", "t.tsv has commas between its cells, and tabs are expected; Save"),
        ("t.csv", 'image,text\na.png,"b\nb.png,c\n', "t.csv line 2 opens a quote that is never closed"),
        ("t.csv", "image,text\n".encode("utf-16"), "t.csv is UTF-16; Save it as UTF-8"),
        ("t.csv", "image,text\na.png,zéro\n".encode("cp1252"), "t.csv is not UTF-8"),
        ("t.csv.gz", gzip.compress(b"image,text\na.png,b\n" * 50, mtime=0)[:-20], "t.csv.gz cannot be read: "),
        ("t.json", '{"image": 1} x', "t.json line 1 is not JSON: Expecting value"),
        ("t.json", "[" * 100_000, "t.json is nested too deeply"),
        ("t.json", '[{"image": "a.png"}, 5]', "t.json row 1 is int, not an object"),
        ("t.jsonl", '{"image": "a.png"}\n[]', "t.jsonl line 2 is list, not an object"),
        ("t.json", "", "t.json has no rows"),
        ("t.json", '{"image": "a.png", "n": ' + "9" * 5000 + "}", "t.json has a number of more than 4,300 digits"),
        ("t.csv", "image,text\na.png,b\n\ud800".encode("utf-8", "surrogatepass"), "t.csv is not UTF-8"),
    ],
)  # fmt: skip
def test_a_table_of_text_that_cannot_be_read_says_what_to_do(tmp_path, name, content, said):
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    assert said in refusal(tmp_path / name)


@pytest.mark.parametrize("kind", ["parquet", "arrow"])
def test_cells_that_python_cannot_hold_skip_their_row_and_the_others_are_used(tmp_path, kind):
    latin = [f"{i}.zéro".encode("latin-1" if i else "utf-8") for i in range(2)]
    texts = pa.array(latin, pa.binary()).view(pa.string())
    images = pa.StructArray.from_arrays([pa.array([png(0), png(1)]), texts], ["bytes", "path"])
    columns = {
        "image": images,
        "text": texts,
        "when": pa.array([0, 2**62], pa.timestamp("us")),
        "n": [0.5, float("nan")],
    }
    table, path = pa.table(columns), tmp_path / f"t.{kind}"
    if kind == "parquet":
        pq.write_table(table, path)
    else:
        with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, table.schema) as writer:
            writer.write_table(table)
    reasons = {"text": "its text is not UTF-8", "when": "its value cannot be read (date value out of range)"}
    for column, said in (reasons | {"n": "empty caption"}).items():
        assert list(captions(path, caption_column=column)) == [f"{path.name}#0"]
        assert skipped(path, caption_column=column) == {f"{path.name}#1": said}
    named = find(path, CacheConfig(caption_strategy="instanceprompt", instance_prompt="a"))
    assert [named.read(item.path) for item in named.items] == [png(0), png(1)]


@pytest.mark.parametrize("name", ["image", "text"])
def test_two_columns_of_one_name_are_refused(tmp_path, name):
    table = pa.table([pa.array([png(0)]), pa.array(["a"]), pa.array(["b"])], names=["image", "text", name])
    pq.write_table(table, tmp_path / "t.parquet")
    assert f"t.parquet has two columns with the name {name}; Give each" in refusal(tmp_path / "t.parquet")


def test_base64_in_the_place_of_images_is_named(tmp_path):
    texts = [base64.b64encode(png(1, (90, 90)) * 9).decode(), "data:image/png;base64,iVBORw0KGgo=", "x" * 5000 + ".png"]
    pq.write_table(pa.table({"image": texts, "text": ["a", "b", "c"]}), tmp_path / "t.parquet")
    reason = "its image is base64 text, not the name of a file: decode the images into files, or into Parquet"
    said = refusal(tmp_path / "t.parquet")
    assert said.count(reason) == 3
    assert "t.parquet#0" in said
    assert len(said) < 900
    pq.write_table(pa.table({"image": [{"bytes": texts[0], "path": None}], "text": ["a"]}), tmp_path / "s.parquet")
    assert "s.parquet has no images in image but base64 text" in refusal(tmp_path / "s.parquet")
    (tmp_path / "j.jsonl").write_text(json.dumps({"image": {"bytes": texts[0], "path": "a.png"}, "text": "a"}))
    assert "j.jsonl has no images in image but base64 text" in refusal(tmp_path / "j.jsonl")


def test_rows_of_several_files_name_files_beside_their_own_table_and_their_own_line(tmp_path):
    for i in range(2):
        (tmp_path / f"{i}").mkdir()
        (tmp_path / f"{i}" / "a.png").write_bytes(png(i))
        (tmp_path / f"{i}" / f"t{i}.csv").write_text(f"image,text\na.png,number {i}\nb.png,x\n")
    pattern = tmp_path / "*" / "t*.csv"
    assert list(contents(pattern).values()) == [png(1), png(0)]  # the second by its whole path
    assert captions(pattern) == {"a.png": ("number 0",), f"{tmp_path}/1/a.png": ("number 1",)}
    assert skipped(pattern) == {
        "b.png": "is named in t0.csv line 3 but does not exist",
        f"{tmp_path}/1/b.png": "is named in t1.csv line 3 but does not exist",
    }


def test_columns_of_two_kinds_in_two_files_are_refused(tmp_path):
    parquet(tmp_path / "t-0.parquet", [png(1)], ["one"])
    pq.write_table(pa.table({"image": ["a.png"], "text": ["x"]}), tmp_path / "t-1.parquet")
    assert "the column image is struct<bytes: binary, path: string> in t-0.parquet, and string in t-1" in refusal(
        tmp_path / "t-*.parquet"
    )


# --- images in row groups ---


@pytest.mark.parametrize("rows_in_group", [7, 10_000])
@pytest.mark.parametrize("kind", ["struct", "binary"])
def test_images_of_row_groups_are_read_in_any_order_and_by_threads(tmp_path, monkeypatch, rows_in_group, kind):
    from k5cache.sources import arrow_tables

    monkeypatch.setattr(arrow_tables, "_BATCH_BYTES", 2000)
    images = [None if i % 5 == 4 else bytes([i % 256]) * 300 + b"%d" % i for i in range(700)]
    column = pa.array([{"bytes": image, "path": None} for image in images], IMAGES)
    cells = column if kind == "struct" else pa.array(images, pa.binary())
    table = pa.table({"image": cells, "text": [f"{i}" for i in range(700)]})
    pq.write_table(table, tmp_path / "t.parquet", row_group_size=rows_in_group)
    found = find(tmp_path / "t.parquet", CacheConfig())
    expected = {f"t.parquet#{i}": image for i, image in enumerate(images) if image is not None}
    assert {skip.path for skip in found.skipped} == {f"t.parquet#{i}" for i in range(4, 700, 5)}
    paths = [item.path for item in found.items]
    random.Random(0).shuffle(paths)
    order = [*(item.path for item in found.items), *paths[:100]]
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(found.read, order)) == [expected[path] for path in order]


def test_one_image_of_a_large_row_group_is_read_without_the_others_and_in_order_each_is_decoded_few_times(
    tmp_path, monkeypatch
):
    from k5cache.sources import arrow_tables

    decoded = []
    batches = arrow_tables.ParquetRows._batches

    def counted(*arguments):
        for batch in batches(*arguments):
            decoded.append(len(batch))
            yield batch

    monkeypatch.setattr(arrow_tables.ParquetRows, "_batches", counted)
    monkeypatch.setattr(arrow_tables, "_BATCH_BYTES", 20_000)
    parquet(tmp_path / "t.parquet", [b"%d" % i * 250 for i in range(1200)], ["x"] * 1200)
    found = find(tmp_path / "t.parquet", CacheConfig())
    assert decoded == []
    assert found.read("t.parquet#5") == b"5" * 250
    assert sum(decoded) < 100
    for item in found.items:
        found.read(item.path)
    assert sum(decoded) < 4 * 1200  # row 1000 comes after row 100 and before row 101: once a number of digits


def test_no_local_table_imports_datasets_unless_a_folder_or_a_slice_needs_it(tmp_path):
    every_kind(tmp_path / "set")
    code = (
        "import sys, pathlib; from k5cache.options import CacheConfig; from k5cache.sources.find import find\n"
        "for name in sys.argv[2:]: find(pathlib.Path(sys.argv[1], name), CacheConfig())\n"
        "print(sorted({'datasets', 'pandas', 'torch'} & set(sys.modules)))"
    )
    names = ["t.csv", "t.jsonl", "t.parquet", "t.arrow", "t.tar", "tars/x*.tar", "saved"]
    command = [sys.executable, "-c", code, str(tmp_path / "set"), *names]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout == "[]\n"


def test_the_list_of_rows_that_every_process_of_ray_loads_has_few_objects_a_row(tmp_path):
    parquet(tmp_path / "t.parquet", [png(i) for i in range(3)], ["a", "b", "c"])
    table = load_files("t.parquet", [tmp_path / "t.parquet"], CacheConfig())
    cells = [cell for cell, _ in cells_of(table, "image")]
    assert [cell.read() for cell in cells if isinstance(cell, Cell)] == [png(i) for i in range(3)]
    assert not any(hasattr(cell, "__dict__") for cell in cells)
    assert len({id(cell.read.func) for cell in cells}) == 1

"""Tables of strangers: what a footer or a page claims is checked before pyarrow takes memory for it, or ends on it."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.ipc
import pyarrow.parquet as pq
import pytest

from k5cache.options import CacheConfig
from k5cache.shared.errors import DatasetError
from k5cache.sources import arrow_tables, parquet_claims
from k5cache.sources.arrow_tables import read_arrow, read_parquet
from k5cache.sources.find import find
from k5cache.sources.items import UnreadableImage
from k5cache.sources.row_groups import GroupReader
from tests.hostile_tables import MOST_MORE_BYTES, files, table

ROOT = Path(__file__).parent.parent
LONG = "a" * 4_000_000
NUM = 20_000  # times the long text: 80 GB
ZSTD = {"compression": "zstd", "store_schema": False, "dictionary_pagesize_limit": 1 << 30}


@pytest.mark.parametrize("count", [500, pytest.param(6_000, marks=pytest.mark.long)])
def test_every_table_with_a_changed_byte_ends_in_a_sentence_or_an_honest_read(tmp_path: Path, count: int) -> None:
    command = [sys.executable, "-m", "tests.hostile_tables", str(tmp_path), "0", str(count)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    lines = done.stdout.splitlines()
    assert done.returncode == 0, (lines[-1:], done.stderr[-2000:])
    assert "traceback" not in done.stdout, done.stdout[done.stdout.index("traceback") :][:3000]
    assert sum(line.startswith("at ") for line in lines) == count
    assert int(lines[-2].split()[1]) > count // 5, "some changes are harmless"
    assert int(lines[-1].split()[1]) < MOST_MORE_BYTES


def test_an_honest_table_is_read_in_every_way_that_it_can_be_written(tmp_path: Path) -> None:
    content = table(300)
    for i, (suffix, raw) in enumerate(files(content)):
        path = tmp_path / f"{i}{suffix}"
        path.write_bytes(raw)
        rows = read_parquet(path, GroupReader()) if suffix == ".parquet" else read_arrow(path)
        images = content.column("image").to_pylist()
        for name in ("text", "tags", "n", "code", "kind"):
            assert rows.column(name) == content.column(name).to_pylist(), (i, name)
        assert rows.image_names("image") == [image["path"] if image else "" for image in images]
        assert rows.has_bytes("image") == [image is not None for image in images]
        assert [rows.read("image", row) for row in (0, 299, 7)] == [images[row]["bytes"] for row in (0, 299, 7)]


def test_a_footer_says_what_pyarrow_reads_in_it(tmp_path: Path) -> None:
    for i, (suffix, raw) in enumerate(files(table())):
        if suffix == ".parquet":
            (tmp_path / f"{i}.parquet").write_bytes(raw)
            ours = parquet_claims.read_claims(tmp_path / f"{i}.parquet")
            theirs = pq.read_metadata(tmp_path / f"{i}.parquet")
            assert ours.num_rows == theirs.num_rows
            assert [leaf.path for leaf in ours.leaves] == [
                theirs.schema.column(j).path for j in range(len(ours.leaves))
            ]
            for number, (num_rows, chunks) in enumerate(ours.groups):
                group = theirs.row_group(number)
                assert num_rows == group.num_rows
                assert [(chunk.num_values, chunk.num_bytes) for chunk in chunks] == [
                    (group.column(j).num_values, group.column(j).total_compressed_size) for j in range(len(chunks))
                ]


def images(num_rows: int) -> pa.Array:
    return pa.array([b"x"] * num_rows, pa.binary())


def repeated(value: str | bytes = LONG) -> pa.Array:
    """One value as often as it takes no more than an index."""
    return pa.DictionaryArray.from_arrays(pa.array([0] * NUM, pa.int32()), pa.array([value]))


def nested(depth: int) -> pa.Array:
    value, kind = "x", pa.string()
    for _ in range(depth):
        value, kind = [value], pa.list_(kind)
    return pa.array([value], kind)


def in_one_list() -> pa.Array:
    return pa.ListArray.from_arrays(pa.array([0, NUM], pa.int32()), repeated())


def write_arrow(path: Path, content: pa.Table, codec: str | None = None) -> None:
    with pa.ipc.new_file(path, content.schema, options=pa.ipc.IpcWriteOptions(compression=codec)) as writer:
        writer.write_table(content)


BOMBS: dict[str, tuple[Callable[[], pa.Table], dict[str, object] | str | None, str]] = {
    "dictionary.parquet": (lambda: pa.table({"image": images(NUM), "text": repeated()}), ZSTD, "unfolds to more than"),
    "list.parquet": (lambda: pa.table({"image": images(1), "text": in_one_list()}), ZSTD, "unfolds to more than"),
    "long.parquet": (
        lambda: pa.table({"image": images(60), "text": [LONG + str(i) for i in range(60)]}),
        {"compression": "zstd", "use_dictionary": False}, "unfolds to more than",
    ),
    "nulls.parquet": (
        lambda: pa.table({"image": pa.nulls(9_000_000, pa.binary()), "text": pa.nulls(9_000_000, pa.string())}),
        {"compression": "zstd", "use_dictionary": False}, "it claims 9,000,000 rows",
    ),
    "delta.parquet": (
        lambda: pa.table({"image": images(50), "text": [LONG] * 50}),
        {"compression": "zstd", "use_dictionary": False,
         "column_encoding": {"text": "DELTA_BYTE_ARRAY", "image": "PLAIN"}}, "unfolds to more than",
    ),
    "deep.parquet": (lambda: pa.table({"image": images(1), "text": nested(60)}), {}, "more than 16 deep"),
    "dictionary.arrow": (lambda: pa.table({"image": images(NUM), "text": repeated()}), "zstd", "unfolds to 80,000"),
    "list.arrow": (lambda: pa.table({"image": images(1), "text": in_one_list()}), None, "unfolds to 80,000"),
    "nulls.arrow": (lambda: pa.table({"image": pa.nulls(10**9), "text": pa.nulls(10**9)}), None, "1,000,000,000 rows"),
    "long.arrow": (
        lambda: pa.table({"image": images(60), "text": [LONG + str(i) for i in range(60)]}), "zstd",
        "unfolds to more than",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BOMBS)
def test_a_table_that_unfolds_to_far_more_than_its_file_is_refused(tmp_path: Path, name: str) -> None:
    make, options, words = BOMBS[name]
    path = tmp_path / name
    if isinstance(options, dict):
        pq.write_table(make(), path, **options)
    else:
        write_arrow(path, make(), options)
    with pytest.raises(DatasetError, match=words) as caught:
        find(path, CacheConfig())
    again = "" if name == "deep.parquet" else "write it again without dictionaries or compression, "
    assert caught.value.fix == f"Repair it, {again}or use another source"


def test_an_image_that_unfolds_to_far_more_than_its_column_is_not_read(tmp_path: Path) -> None:
    zeros = pa.table({"image": [bytes(8_000_000)] * 20, "text": ["x"] * 20})
    pq.write_table(zeros, tmp_path / "t.parquet", compression="zstd", use_dictionary=False)
    with pytest.raises(UnreadableImage, match="the column image unfolds to more than"):
        find(tmp_path / "t.parquet", CacheConfig()).read("t.parquet#7")


def test_of_images_behind_one_dictionary_few_are_decoded_at_once(tmp_path: Path, monkeypatch) -> None:
    same = pa.table({"image": repeated(LONG.encode()[:100_000]), "text": ["x"] * NUM})
    pq.write_table(same, tmp_path / "t.parquet", **ZSTD)
    monkeypatch.setattr(arrow_tables, "FREE_BYTES", 500_000)
    found = find(tmp_path / "t.parquet", CacheConfig())
    assert len(found.items) == NUM
    decoded = []
    keep = GroupReader._keep
    monkeypatch.setattr(GroupReader, "_keep", lambda *a: (decoded.append(len(a[3])), keep(*a))[1])
    assert len(found.read("t.parquet#12")) == 100_000
    assert set(decoded) == {4}  # the page of the dictionary has 4 bytes more than its value

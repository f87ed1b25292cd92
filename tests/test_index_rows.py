"""The rows of an index as columns: written as before, and never all Python objects at once."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import replace
from io import BytesIO
from itertools import cycle, islice
from pathlib import Path
from weakref import WeakSet

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from k5cache.store import index, tables
from k5cache.store.index import SCHEMAS, IndexRow, IndexRows, index_rows, read_index, with_index
from tests.edit_samples import pair_row
from tests.store_samples import index_row, make_cache

LENGTHS = {"t-cat": 3, "t-dog": 7, "t-empty": 1}


def reference_file(rows: list[IndexRow], format: int, row_group: int) -> bytes:
    """An index as FORMAT.md has it, of a table that is made and written at once."""
    schema = SCHEMAS[format]
    table = pa.Table.from_pydict({name: [getattr(row, name) for row in rows] for name in schema.names}, schema)
    file = BytesIO()
    settings = {"compression": "none", "use_dictionary": False, "write_statistics": False, "store_schema": False}
    with pq.ParquetWriter(file, schema, write_page_checksum=True, **settings) as writer:
        writer.write_table(table, row_group_size=row_group)
        writer.add_key_value_metadata({"k5cache.index": f'{{"format": {format}}}'})
    return file.getvalue()


def some_rows(count: int) -> Iterator[IndexRow]:
    different = [index_row(number, (("t-dog", "t-cat") if number % 3 else ("t-cat",))) for number in range(4)]
    return islice(cycle(different), count)


def with_lengths(row: IndexRow) -> IndexRow:
    return replace(row, caption_lengths=tuple(LENGTHS[key] for key in row.caption_keys))


@pytest.mark.parametrize(("count", "row_group"), [(1, 1 << 17), (20, 8), (16, 8), (30_000, 1 << 17)])
def test_rows_are_written_piece_by_piece_to_the_same_bytes_as_all_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, count: int, row_group: int
) -> None:
    monkeypatch.setattr(tables, "ROW_GROUP", row_group)
    manifest = make_cache(tmp_path)
    written = with_index(tmp_path, manifest, some_rows(count)).index
    content = reference_file([with_lengths(row) for row in some_rows(count)], 1, row_group)
    assert written is not None
    assert (tmp_path / written.file).read_bytes() == content
    assert (written.num_rows, written.sha256) == (count, hashlib.sha256(content).hexdigest())


def test_rows_with_sources_are_written_with_their_columns_and_others_without(tmp_path: Path) -> None:
    rows = IndexRows.of([pair_row(0), pair_row(2, None)])
    assert list(rows) == [pair_row(0), pair_row(2, None)]
    assert rows.latent_keys.to_pylist() == [*(row.latent_key for row in rows), *(row.source_key for row in rows)]
    assert rows.text_keys.to_pylist() == [*(key for row in rows for key in row.caption_keys), "t-empty"]
    info = index.write_index(tmp_path, rows.in_format(2), 0, 2)
    assert (tmp_path / info.file).read_bytes() == reference_file([pair_row(0), pair_row(2, None)], 2, 1 << 17)
    assert IndexRows.of([index_row(1)], 2).in_format(1).equals(IndexRows.of([index_row(1)], 1).in_format(1))
    assert list(IndexRows(IndexRows.of([index_row(1)], 1).in_format(2))) == [index_row(1)]


def test_columns_are_a_sequence_of_rows(tmp_path: Path) -> None:
    expected = [*some_rows(5), pair_row(3), replace(index_row(1), mask_key="m", mask_hash="h")]
    rows = IndexRows.of(iter(expected))
    assert len(rows) == 7
    assert [rows[i] for i in range(-7, 7)] == expected * 2
    with pytest.raises(IndexError, match="row 7 of 7"):
        rows[7]
    for part in (slice(2), slice(3, 6), slice(None, None, -1), slice(5, 2), slice(-3, None)):
        assert list(rows[part]) == expected[part]
        assert [rows[part][i] for i in range(len(rows[part]))] == expected[part]  # offsets in the columns count
    assert rows == expected
    assert rows != expected[:-1]
    assert rows != [*expected[:-1], expected[0]]
    assert list(rows.where([row.flipped for row in expected])) == [row for row in expected if row.flipped]
    assert list(rows.take(pa.array([4, 0]))) == [expected[4], expected[0]]
    assert list(IndexRows.of([])) == []
    manifest = make_cache(tmp_path)
    assert manifest.index is not None
    assert index_rows(read_index(tmp_path, manifest.index, 1))[1:].column("caption_keys").to_pylist() == [
        ["t-cat"], ["t-cat"], ["t-dog", "t-cat"]
    ]  # fmt: skip
    again = with_index(tmp_path, manifest, index_rows(read_index(tmp_path, manifest.index, 1))[2:])
    assert again.index is not None
    assert [row.caption_lengths for row in index_rows(read_index(tmp_path, again.index, 1))] == [(3,), (7, 3)]


def test_rows_are_the_same_items_whatever_is_known_of_their_lengths(tmp_path: Path) -> None:
    info = make_cache(tmp_path).index
    assert info is not None
    stored = index_rows(read_index(tmp_path, info, 1))
    rows = [index_row(0), index_row(1), index_row(2), index_row(3, ("t-dog", "t-cat"))]
    assert IndexRows.of(rows).has_same_items(stored, 1)
    assert not IndexRows.of(rows[:3]).has_same_items(stored, 1)
    assert not IndexRows.of([*rows[:3], replace(rows[3], mtime_ns=5)]).has_same_items(stored, 1)
    others = [rows[0], replace(rows[1], mask_key="m"), replace(rows[2], latent_key="l"), index_row(3, ("t-cat",))]
    assert IndexRows.of(rows).have_same_keys(IndexRows.of(others)).to_pylist() == [True, False, False, False]


def test_a_missing_key_is_named_whether_latents_a_mask_or_a_text(tmp_path: Path) -> None:
    manifest = make_cache(tmp_path)
    with_mask, of_cow = replace(index_row(0), mask_key="m-0"), index_row(0, ("t-cat", "t-cow"))
    for row, key in ((index_row(9), "l-9"), (with_mask, "m-0"), (of_cow, "t-cow")):
        with pytest.raises(KeyError, match=key):
            with_index(tmp_path, manifest, [index_row(1), row])


def test_an_index_is_written_and_read_without_a_list_of_its_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(index, "_PIECE", 10)
    manifest = make_cache(tmp_path)
    alive: WeakSet[IndexRow] = WeakSet()
    most = 0

    def watched(rows: Iterable[IndexRow]) -> Iterator[IndexRow]:
        nonlocal most
        for number, row in enumerate(rows):
            watched_row = replace(row, inode=number)  # each is another one in the set
            alive.add(watched_row)
            most = max(most, len(alive))
            yield watched_row

    written = with_index(tmp_path, manifest, watched(some_rows(500))).index
    assert written is not None
    assert most <= 20
    most = 0
    stored = index_rows(read_index(tmp_path, written, 1))
    assert sum(row.width for row in watched(stored)) == 500 * 100
    assert most <= 20

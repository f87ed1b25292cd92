"""The columns of a whole index are checked as its rows are one by one."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pytest
import torch

from k5cache.store import locations
from k5cache.store.index import IndexRow, IndexRows
from k5cache.store.manifest import ShardInfo
from k5cache.store.shards import ShardWriter
from k5cache.store.tensors import TensorSpec
from k5cache.upkeep.index_problems import problems_of_rows
from tests.edit_samples import pair_row
from tests.store_samples import TEXT, index_row, text_row

LENGTHS = {"t-cat": 3, "t-dog": 7, "t-empty": 1}
BYTE = {"x": TensorSpec("uint8", (1,))}


def problems_one_by_one(
    row: IndexRow, kind_of_cache: str, known: locations.Locations, lengths: Mapping[str, int]
) -> Iterator[str]:
    bucket = (row.bucket_width, row.bucket_height)
    wanted = (
        ("latents", row.latent_key, "latents"),
        ("masks", row.mask_key, "masks"),
        ("latents", row.source_key, "latents of its source"),
    )
    for kind, key, name in wanted:
        place = known.find(kind, key) if key else None
        if key and (place is None or place[0].bucket != bucket):
            yield f"has no {name} of {bucket[0]}x{bucket[1]}"
    if kind_of_cache == "i2i" and not row.source_key:
        yield "has no source"
    if row.empty_key and row.empty_key not in lengths:
        yield "has no empty instruction"
    if tuple(lengths.get(key) for key in row.caption_keys) != row.caption_lengths or not row.caption_keys:
        yield "has no captions of the lengths it says"


def shard_of(root: Path, kind: str, side: int, *keys: str) -> ShardInfo:
    with ShardWriter(root, kind, BYTE, (64, side)) as writer:
        for key in keys:
            writer.append({"key": key, "x": torch.zeros(1, dtype=torch.uint8)})
        return writer.finish()


@pytest.fixture
def shards(tmp_path: Path) -> list[ShardInfo]:
    with ShardWriter(tmp_path, "text", TEXT) as writer:
        for key in LENGTHS:
            writer.append(text_row(key))
        texts = writer.finish()
    return [
        shard_of(tmp_path, "latents", 64, "l-0", "l-1"), shard_of(tmp_path, "latents", 96, "l-2"),
        shard_of(tmp_path, "masks", 64, "m-0"), shard_of(tmp_path, "masks", 96, "m-1"), texts,
    ]  # fmt: skip


def some_row(chance: random.Random, number: int, is_pair: bool) -> IndexRow:
    """A row of which anything may be wrong."""
    keys = tuple(chance.choices(["t-cat", "t-dog", "t-lost"], [5, 5, 1], k=chance.choice((0, 1, 1, 1, 2, 3))))
    lengths = tuple(LENGTHS.get(key, 3) for key in keys)
    row = replace(
        pair_row(number, chance.choice((None, "t-empty", "t-lost"))) if is_pair else index_row(number),
        latent_key=chance.choice(("l-0", "l-1", "l-2", "l-lost")),
        bucket_height=chance.choice((64, 64, 96)),
        mask_key=chance.choice((None, None, "m-0", "m-1", "m-lost", "l-0")),
        caption_keys=keys,
        caption_lengths=chance.choice((lengths, lengths, lengths, lengths[1:], (*lengths, 1), lengths[::-1])),
    )
    return replace(row, source_key=chance.choice((None, "l-0", "l-2", "m-0"))) if is_pair else row


@pytest.mark.parametrize("kind", ["t2i", "i2i"])
@pytest.mark.parametrize("is_table", [True, False], ids=["table", "footers"])
def test_a_whole_index_has_the_problems_of_its_rows_in_their_order(tmp_path, shards, kind, is_table):
    chance = random.Random(0)
    rows = [some_row(chance, number, kind == "i2i") for number in range(300)]
    info = locations.write_locations(tmp_path, shards, 0)[0] if is_table else None
    known = locations.Locations(tmp_path, info, [shard for shard in shards if shard.bucket != (64, 96)])
    expected = [(row.path, problem) for row in rows for problem in problems_one_by_one(row, kind, known, LENGTHS)]
    columns = IndexRows.of(rows, 2 if kind == "i2i" else 1)
    assert list(problems_of_rows(columns, kind, known, known.texts())) == expected
    assert len({problem for _, problem in expected}) == (9 if kind == "i2i" else 5)
    assert {row.path for row in rows} - {path for path, _ in expected}  # some are sound
    assert list(problems_of_rows(columns[:0], kind, known, known.texts())) == []


def test_numbers_of_shards_and_rows_that_there_are_not_are_no_place(tmp_path, shards):
    table = locations.locate(tmp_path, shards)
    count = len(table)
    for column, values in ((2, [-1] * count), (2, [99] * count), (3, [-1] * count), (3, [99] * count)):
        wrong = table.set_column(column, table.schema.field(column), pa.array(values, pa.int32()))
        info = locations.tables.write_table(tmp_path, wrong, "locations-000007.parquet")
        known = locations.Locations(tmp_path, info, shards)
        row = replace(index_row(0), caption_lengths=(3,))
        assert list(problems_of_rows(IndexRows.of([row], 1), "t2i", known, known.texts())) == [
            (row.path, "has no latents of 64x64")
        ]


def test_a_text_that_two_shards_have_is_listed_once(tmp_path, shards):
    with ShardWriter(tmp_path, "text", TEXT) as writer:
        writer.append(text_row("t-dog"))
        again = writer.finish()
    info, _ = locations.write_locations(tmp_path, [*shards, again], 0)
    assert info.num_rows == 9
    texts = locations.Locations(tmp_path, info, [*shards, again]).texts()
    assert dict(zip(texts.keys.to_pylist(), texts.n_tokens.tolist(), strict=True)) == LENGTHS

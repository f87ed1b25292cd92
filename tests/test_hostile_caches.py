"""Caches of strangers, with every checksum right: what is not allowed is refused before it is decoded or allocated."""

from __future__ import annotations

import hashlib
import json
import random
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from k5cache.shared.errors import CacheError
from k5cache.store import footer as footers
from k5cache.store import tables
from k5cache.store.footer import Footer, parse_footer
from k5cache.store.index import SCHEMA
from k5cache.store.manifest import IndexInfo, ShardKind, encode_document, write_manifest
from k5cache.store.shards import ShardWriter
from k5cache.store.tensors import TensorSpec
from k5cache.store.thrift import Thrift
from k5cache.upkeep.gc import collect
from k5cache.upkeep.verify import verify_cache
from tests.hostile_trials import MOST_BYTES, mutated
from tests.store_samples import make_cache

ROOT = Path(__file__).parent.parent
PLAIN: dict[str, Any] = {"compression": "none", "use_dictionary": False, "write_statistics": False}


def footer_of(path: Path) -> tuple[bytes, int]:
    raw = path.read_bytes()
    end = len(raw) - 8 - int.from_bytes(raw[-8:-4], "little")
    return raw[end:-8], end


def outcome(raw: bytes, file_bytes: int) -> Footer | str:
    try:
        return parse_footer(raw, file_bytes)
    except ValueError:
        return "refused"


def test_a_footer_says_what_pyarrow_reads_in_it(tmp_path: Path) -> None:
    manifest = make_cache(tmp_path)
    for name in sorted(manifest.named):
        ours, theirs = parse_footer(*footer_of(tmp_path / name)), pq.read_metadata(tmp_path / name)
        assert (ours.num_rows, len(ours.row_groups)) == (theirs.num_rows, theirs.num_row_groups)
        assert ours.metadata == theirs.metadata
        for i, group in enumerate(ours.row_groups):
            assert group.num_rows == theirs.row_group(i).num_rows
            for j, chunk in enumerate(group.chunks):
                column = theirs.row_group(i).column(j)
                expected = (column.num_values, column.total_compressed_size, column.data_page_offset)
                assert (chunk.num_values, chunk.num_bytes, chunk.offset) == expected


def test_the_quick_way_to_read_a_row_group_is_the_other_one_but_quicker(tmp_path: Path, monkeypatch) -> None:
    manifest = make_cache(tmp_path)
    chance = random.Random(0)
    cases = [footer_of(tmp_path / shard.file) for shard in manifest.shards]
    raw, end = (tmp_path / manifest.shards[2].file).read_bytes(), cases[2][1]
    cases += [(mutated(raw, chance)[end:-8], end) for _ in range(400)]
    used: list[bool] = []
    quick_way = footers._usual_group
    monkeypatch.setattr(footers, "_usual_group", lambda *a: (group := quick_way(*a), used.append(bool(group)))[0])
    quick = [outcome(*case) for case in cases]
    assert all(used[:7]), "the shards of this version are read the quick way"
    monkeypatch.setattr(footers, "_usual_group", lambda thrift, file_bytes: None)
    assert [outcome(*case) for case in cases] == quick
    assert "refused" in quick
    assert sum(isinstance(case, Footer) for case in quick) > 50


@pytest.mark.parametrize(
    ("raw", "words"),
    [
        (b"\x19\xf4\xff\xff\xff\x7f", "claims"),  # a list of 268 million values
        (b"\x18\xff\xff\xff\xff\x7f", "claims"),
        (b"\x1c" * 100, "in each other"),
        (b"\x19\x1c" * 100, "in each other"),
        (b"\x15" + b"\xff" * 20, "no end"),
        (b"\x15\xff\xff\xff\xff\xff\x01\x00", "fit 32 bits"),
        (b"\x15\x02\x05\x02\x02\x00", "twice"),
        (b"\x1b\x01\x00", "kind 11"),
        (b"\x15\x02", "in the middle"),
        (b"\x15", "no end"),
        (b"\x19\xfc\xc0\x9a\x0c" + b"\x00" * 200_000, "elements"),
    ],
)
def test_bytes_that_claim_more_than_they_are_end_at_once(raw: bytes, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Thrift(raw).struct()


def hostile_table(path: Path, num_rows: int, **settings: Any) -> IndexInfo:
    """An index of many equal rows."""
    values: dict[str, Any] = {
        field.name: pa.nulls(num_rows, field.type)
        if field.nullable
        else pa.array([["x" * 100]] * num_rows if field.name == "caption_keys" else [[1]] * num_rows, field.type)
        if pa.types.is_list(field.type)
        else pa.array(["x" * 100] * num_rows if pa.types.is_string(field.type) else [1] * num_rows).cast(field.type)
        for field in SCHEMA
    }
    with pq.ParquetWriter(path, SCHEMA, **PLAIN | {"store_schema": False} | settings) as writer:
        writer.write_table(pa.table(values, SCHEMA))
    raw = path.read_bytes()
    return IndexInfo(path.name, num_rows, len(raw), hashlib.sha256(raw).hexdigest())


DELTA = {f.name: "DELTA_BINARY_PACKED" for f in SCHEMA if pa.types.is_integer(f.type)}


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"use_dictionary": True}, "dictionary"),
        ({"compression": "zstd"}, "compressed"),
        ({"compression": "snappy"}, "compressed"),
        ({"column_encoding": DELTA}, "encoding"),
        ({"column_encoding": {"path": "DELTA_BYTE_ARRAY"}}, "encoding"),
        ({"column_encoding": {"path": "DELTA_LENGTH_BYTE_ARRAY"}}, "encoding"),
        ({"data_page_version": "2.0"}, "plain data page|encoding"),
        ({"store_schema": True}, "another schema"),
    ],
)
def test_a_table_that_unfolds_when_it_is_decoded_is_refused(tmp_path: Path, settings: Any, words: str) -> None:
    info = hostile_table(tmp_path / "index-000000.parquet", 1000, **settings)
    with pytest.raises(CacheError, match=words) as raised:
        tables.open_table(tmp_path, info, SCHEMA)
    assert "is not a table of a cache" in raised.value.problem


def test_the_same_table_in_plain_pages_is_read(tmp_path: Path) -> None:
    info = hostile_table(tmp_path / "index-000000.parquet", 1000)
    assert tables.read_table(tables.open_table(tmp_path, info, SCHEMA)).num_rows == 1000


def test_a_text_that_is_not_utf8_in_a_table_is_a_sentence(tmp_path: Path) -> None:
    manifest = make_cache(tmp_path)
    assert manifest.index
    raw = (tmp_path / manifest.index.file).read_bytes().replace("é 0.png".encode(), b"\xff\xff 0.png")
    pages = pq.ParquetFile(pa.BufferReader(raw)).metadata.row_group(0).column(0)
    assert pages.data_page_offset == 4
    (tmp_path / manifest.index.file).write_bytes(raw)
    info = IndexInfo(manifest.index.file, 4, len(raw), hashlib.sha256(raw).hexdigest())
    with pytest.raises(CacheError, match="is not a table of a cache"):
        tables.read_table(tables.open_table(tmp_path, info, SCHEMA))


SMALL_BOMB = """
import json, resource, sys
from pathlib import Path
from k5cache.shared.errors import CacheError
from k5cache.upkeep.gc import collect
from k5cache.upkeep.verify import verify_cache
from k5cache.store.reader import open_cache
root = Path(sys.argv[1])
import torch
def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
before = peak()
try:
    len(open_cache(root).index)
except CacheError as error:
    print(error.problem)
verify_cache(root)
print(peak() - before)
"""


def test_a_small_index_that_claims_gigabytes_takes_no_memory(tmp_path: Path) -> None:
    make_cache(tmp_path)
    document = json.loads((tmp_path / "manifest.json").read_bytes())
    settings: dict[str, Any] = {"compression": "zstd", "column_encoding": DELTA}
    info = hostile_table(tmp_path / document["index"]["file"], 100_000, **settings)
    assert info.num_bytes < 200_000  # for 100 MB of values
    document["index"] = {"file": info.file, "num_rows": 2, "num_bytes": info.num_bytes, "sha256": info.sha256}
    document["index"]["num_rows"] = info.num_rows
    del document["sha256"]
    (tmp_path / "manifest.json").write_bytes(encode_document(document))
    done = subprocess.run(
        [sys.executable, "-c", SMALL_BOMB, str(tmp_path)], capture_output=True, text=True, cwd=ROOT, check=True
    )
    problem, kilobytes = done.stdout.splitlines()
    assert "is not a table of a cache" in problem
    assert int(kilobytes) < 20_000  # the reader's own modules; the values would be 100 MB, and four times that as rows


@pytest.mark.parametrize("count", [60, pytest.param(5000, marks=pytest.mark.long)])
def test_every_cache_with_a_changed_byte_and_true_checksums_ends_in_a_sentence_or_an_honest_read(
    tmp_path: Path, count: int
) -> None:
    command = [sys.executable, "-m", "tests.hostile_trials", str(tmp_path), "0", str(count)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    last = done.stdout[-3000:]
    assert done.returncode == 0, (
        f"ended with {done.returncode} within {MOST_BYTES >> 20} MiB, at\n{last}\n{done.stderr}"
    )
    assert "WRONG" not in done.stdout, done.stdout[done.stdout.index("WRONG") :][:3000]
    assert done.stdout.split() == [str(number) for number in range(count)]


LATENT = torch.ones(8, 8, 16).half()
EMBEDS, POOLED = torch.ones(3, 12).bfloat16(), torch.ones(5).bfloat16()


@pytest.mark.parametrize(
    ("kind", "tensors", "problem"),
    [
        ("latents", {"mean": LATENT}, "has no column std, which a trainer needs"),
        ("latents", {"std": LATENT}, "has no column mean, which a trainer needs"),
        ("latents", {"mean": LATENT[:4], "std": LATENT},
         "has mean as float16 [4, 8, 16], and it must be float16 [8, 8, 16]"),
        ("latents", {"mean": LATENT[..., 0], "std": LATENT},
         "has mean as float16 [8, 8], and it must be float16 [8, 8, 16]"),
        ("latents", {"mean": LATENT[..., :4], "std": LATENT},
         "has mean as float16 [8, 8, 4], and it must be float16 [8, 8, 16]"),
        ("latents", {"mean": LATENT.float(), "std": LATENT},
         "has mean as float32 [8, 8, 16], and it must be float16 [8, 8, 16]"),
        ("latents", {"mean": LATENT, "std": LATENT, "more": LATENT}, "has a column 'more', which no trainer reads"),
        ("latents", {"mean": LATENT, "std": -LATENT}, "std of k is negative"),
        ("latents", {"mean": LATENT, "std": LATENT * float("nan")}, "std of k is not finite"),
        ("latents", {"mean": LATENT * float("inf"), "std": LATENT}, "mean of k is not finite"),
        ("masks", {"mask": LATENT[..., 0]}, "has mask as float16 [8, 8], and it must be uint8 [8, 8]"),
        ("masks", {"mask": torch.ones(8, 4).byte()}, "has mask as uint8 [8, 4], and it must be uint8 [8, 8]"),
        ("text", {"prompt_embeds": EMBEDS}, "has no column pooled, which a trainer needs"),
        ("text", {"pooled": POOLED}, "has no column prompt_embeds, which a trainer needs"),
        ("text", {"prompt_embeds": EMBEDS[:2], "pooled": POOLED},
         "has prompt_embeds as bfloat16 [2, 12], and it must be bfloat16 or float16 or float32 [3, 12]"),
        ("text", {"prompt_embeds": EMBEDS, "pooled": POOLED[:4]},
         "has pooled as bfloat16 [4], and it must be bfloat16 or float16 or float32 [5]"),
    ],
)  # fmt: skip
def test_verify_names_every_column_that_a_trainer_cannot_use(
    tmp_path: Path, kind: ShardKind, tensors: dict[str, torch.Tensor], problem: str
) -> None:
    manifest = make_cache(tmp_path)
    assert verify_cache(tmp_path).problems == ()
    specs = {name: TensorSpec(str(t.dtype).removeprefix("torch."), tuple(t.shape)) for name, t in tensors.items()}
    with ShardWriter(tmp_path, kind, specs, None if kind == "text" else (64, 64)) as writer:
        writer.append({"key": "k", **tensors, "n_tokens": 3, "caption": "a"})
        shard = writer.finish()
    write_manifest(tmp_path, replace(manifest, shards=(*manifest.shards, shard)))
    assert [p for p in verify_cache(tmp_path).problems if shard.file in p and "row 0: " in p] == [
        f"{tmp_path / shard.file}, row 0: {problem}"
    ]


def test_latents_of_a_cache_without_samples_need_no_std(tmp_path: Path) -> None:
    manifest = make_cache(tmp_path)
    with ShardWriter(tmp_path, "latents", {"mean": TensorSpec("float16", (8, 8, 16))}, (64, 64)) as writer:
        writer.append({"key": "k", "mean": LATENT})
        shard = writer.finish()
    recipe = {**manifest.recipe, "latents": {"posterior": "mean"}}
    write_manifest(tmp_path, replace(manifest, shards=(*manifest.shards, shard), recipe=recipe))
    assert verify_cache(tmp_path).problems == ()


def test_a_file_that_only_looks_like_ours_is_foreign_and_takes_no_memory(tmp_path: Path, monkeypatch) -> None:
    """pyarrow would make room for the million row groups that these claim: 0.8 GB for two files of 40 bytes."""
    make_cache(tmp_path)
    monkeypatch.setattr(pq, "read_metadata", None)
    begin = bytes.fromhex("1502 191c 480161 1502 00 1600")
    for name, groups in (("index-999999.parquet", "19fcc0843d"), ("text/0123456789abcdef.parquet", "191c19fcc0843d")):
        raw = begin + bytes.fromhex(groups)
        (tmp_path / name).write_bytes(b"PAR1" + raw + len(raw).to_bytes(4, "little") + b"PAR1")
    (tmp_path / "locations-999999.parquet").write_bytes(b"PAR1\xff\xff\xff\x7fPAR1")
    collected = collect(tmp_path)
    names = ("index-999999.parquet", "locations-999999.parquet", "text/0123456789abcdef.parquet")
    assert (collected.unnamed, collected.foreign) == ((), names)

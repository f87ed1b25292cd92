"""The store against crashes, full disks, flipped bits and hostile files."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import random
import resource
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from k5cache.shared.errors import CacheCorrupt, CacheError, CacheLocked, OutputError
from k5cache.store import tables
from k5cache.store.index import SCHEMA, with_index
from k5cache.store.manifest import IndexInfo, Manifest, ShardInfo, encode_document, lock, read_manifest, write_manifest
from k5cache.store.reader import open_cache
from k5cache.store.shards import Shard, ShardWriter, verify_shard
from tests.store_samples import LATENTS, TEXT, flip, index_row, latents_row, make_cache, text_row


def read_everything(root: Path) -> None:
    cache = open_cache(root)
    for key in ("l-0", "l-1", "l-2", "l-3"):
        cache.latents(key)
    for key in ("t-cat", "t-dog", "t-empty"):
        cache.text(key)


def all_files(root: Path) -> list[Path]:
    return sorted(path for path in root.rglob("*") if path.is_file() and path.name != ".lock")


# Flipped bits


def test_any_flipped_bit_of_any_file_is_detected_by_reading_every_row(tmp_path: Path) -> None:
    make_cache(tmp_path)
    read_everything(tmp_path)
    chance = random.Random(0)
    for path in all_files(tmp_path):
        for bit in chance.sample(range(path.stat().st_size * 8), 60):
            flip(path, bit)
            with pytest.raises(CacheError):
                read_everything(tmp_path)
            flip(path, bit)
    read_everything(tmp_path)


def test_every_bit_around_the_pages_of_a_row_is_detected_by_reading_that_row(tmp_path: Path) -> None:
    info = make_cache(tmp_path).shards[2]
    shard, path = Shard(tmp_path, info), tmp_path / info.file
    group = pq.read_metadata(path).row_group(1)
    begin = group.column(0).data_page_offset
    last = group.column(group.num_columns - 1)
    end = last.data_page_offset + last.total_compressed_size
    for bit in range(begin * 8, end * 8):  # all of the file: page checksums leave out the headers
        flip(path, bit)
        with pytest.raises(CacheCorrupt, match=r"row 1 \(key t-dog\): its bytes are not those"):
            shard.read(1, "t-dog")
        flip(path, bit)
    shard.read(1, "t-dog")


def test_a_damaged_row_is_named_and_the_rest_still_load(tmp_path: Path) -> None:
    info = make_cache(tmp_path).shards[0]
    flip(tmp_path / info.file, 8 * 200)  # in the first row, l-2
    cache = open_cache(tmp_path)
    with pytest.raises(CacheCorrupt, match=r"latents/64x64-\w+\.parquet, row 0 \(key l-2\)"):
        cache.latents("l-2")
    cache.latents("l-0")
    problems = verify_shard(tmp_path, info)
    assert len(problems) == 2  # the row and the sha256 of the file
    assert "row 0 (key l-2)" in problems[0]


def test_a_page_checksum_catches_a_flipped_bit_for_readers_other_than_ours(tmp_path: Path) -> None:
    info = make_cache(tmp_path).shards[0]
    chunk = pq.read_metadata(tmp_path / info.file).row_group(0).column(1)
    flip(tmp_path / info.file, 8 * (chunk.data_page_offset + chunk.total_compressed_size - 5))
    with pytest.raises(OSError, match="CRC checksum verification failed"):
        pq.read_table(tmp_path / info.file, page_checksum_verification=True)


@pytest.mark.parametrize("edit", [b" ", b"\n", b"\t", b"\x00", b"\xef\xbb\xbf"])
def test_a_manifest_that_means_the_same_in_other_bytes_is_damage(tmp_path: Path, edit: bytes) -> None:
    make_cache(tmp_path)
    path = tmp_path / "manifest.json"
    for raw in (path.read_bytes() + edit, edit + path.read_bytes()):
        path.write_bytes(raw)
        with pytest.raises(CacheCorrupt, match="is not the file that was written"):
            read_manifest(tmp_path)


# Files that are not what they were


@pytest.mark.parametrize("which", [0, 2])
def test_a_deleted_shard_is_named(tmp_path: Path, which: int) -> None:
    info = make_cache(tmp_path).shards[which]
    (tmp_path / info.file).unlink()
    with pytest.raises(CacheCorrupt, match=f"{info.file} is missing"):
        read_everything(tmp_path)
    assert "is missing" in verify_shard(tmp_path, info)[0]


@pytest.mark.parametrize("keep", [0, 4, 100, -1])
def test_a_truncated_shard_is_named(tmp_path: Path, keep: int) -> None:
    info = make_cache(tmp_path).shards[0]
    raw = (tmp_path / info.file).read_bytes()
    (tmp_path / info.file).write_bytes(raw[:keep])
    with pytest.raises(CacheCorrupt, match=f"{info.file} has {len(raw[:keep])} bytes, {len(raw)} were written"):
        read_everything(tmp_path)


def test_a_shard_truncated_while_it_is_open_is_named(tmp_path: Path) -> None:
    info = make_cache(tmp_path).shards[0]
    shard = Shard(tmp_path, info)
    os.truncate(tmp_path / info.file, 500)
    with pytest.raises(CacheCorrupt, match="row 0"):
        shard.read(0, "l-2")


def test_a_shard_of_another_cache_under_this_name_is_named(tmp_path: Path) -> None:
    info = make_cache(tmp_path).shards[0]
    with ShardWriter(tmp_path / "other", "latents", LATENTS, (64, 64)) as writer:
        for number in (2, 0):
            writer.append(latents_row(number) | {"mean": torch.zeros(8, 8, 16).half()})
        other = writer.finish()
    assert other.num_bytes == info.num_bytes
    (tmp_path / "other" / other.file).replace(tmp_path / info.file)
    with pytest.raises(CacheCorrupt, match=f"{info.file}: its footer is not the one"):
        read_everything(tmp_path)


def test_a_row_is_never_given_out_under_another_key(tmp_path: Path) -> None:
    shard = Shard(tmp_path, make_cache(tmp_path).shards[0])
    with pytest.raises(CacheCorrupt, match="row 1 has key b'l-0', the cache says 'l-2'"):
        shard.read(1, "l-2")


@pytest.mark.parametrize("name", ["index-000000.parquet", "locations-000000.parquet"])
def test_a_missing_table_is_named(tmp_path: Path, name: str) -> None:
    make_cache(tmp_path)
    (tmp_path / name).unlink()
    with pytest.raises(CacheCorrupt, match=f"{name} is missing"):
        open_cache(tmp_path)


def test_what_is_not_a_cache_is_told_so_with_the_command_that_makes_one(tmp_path: Path) -> None:
    with pytest.raises(CacheError, match=r"is not a cache: it has no manifest\.json") as caught:
        open_cache(tmp_path)
    assert "k5cache encode" in caught.value.fix
    with pytest.raises(CacheError, match="is not a cache: it does not exist"):
        open_cache(tmp_path / "nowhere")


# Crashes, full disks, two writers


@contextmanager
def room_for(num_bytes: int) -> Iterator[None]:
    """Let no file grow beyond this size: the kernel then refuses in the middle of a write, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def extend(root: Path) -> None:
    """Write as an encode does: shard, manifest, index, manifest."""
    manifest = read_manifest(root)
    with ShardWriter(root, "text", TEXT) as writer:
        for i in range(2):
            writer.append(text_row("t-cat") | {"key": f"t-new-{i}"})
        manifest = replace(manifest, shards=(*manifest.shards, writer.finish()))
    write_manifest(root, manifest)
    write_manifest(root, with_index(root, manifest, [index_row(0, ("t-new-1",))]))


def test_a_disk_that_is_full_at_any_write_leaves_the_cache_as_it_was_before_or_after_a_commit(tmp_path: Path) -> None:
    make_cache(tmp_path)
    before = {path: path.read_bytes() for path in all_files(tmp_path)}
    refused = 0
    for room in range(0, 8000, 199):
        problem = None
        with room_for(room):
            try:
                extend(tmp_path)
            except OSError as error:
                problem = error
        if problem:
            assert problem.errno == errno.EFBIG
            assert str(tmp_path) in str(problem.filename)
            refused += 1
            assert not list(tmp_path.rglob(".tmp-*"))
            assert len(open_cache(tmp_path)) == 4
            read_everything(tmp_path)
        else:
            assert open_cache(tmp_path)[0]["captions"][0].key == "t-new-1"
        for path in all_files(tmp_path):
            path.unlink()
        for path, raw in before.items():
            path.write_bytes(raw)
    assert 10 < refused < 40  # both ends were reached


def test_a_disk_that_is_full_at_fsync_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(fd: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    writer = ShardWriter(tmp_path, "text", TEXT)  # its folder is synced already
    monkeypatch.setattr(os, "fsync", full)
    writer.append(text_row("t-cat"))
    with pytest.raises(OSError, match="No space left"):
        writer.finish()
    assert all_files(tmp_path) == []


WRITER = """
import sys
from pathlib import Path
from k5cache.store.manifest import lock
from k5cache.store.shards import ShardWriter
from k5cache.store.tensors import TensorSpec
root = Path(sys.argv[1])
with lock(root):
    writer = ShardWriter(root, "text", {"pooled": TensorSpec("bfloat16", (5,))})
    print("writing", flush=True)
    sys.stdin.read()
"""


@contextmanager
def another_writer(root: Path) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-c", WRITER, str(root)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "writing\n"
        try:
            yield process
        finally:
            process.kill()


def test_a_second_writer_is_told_who_holds_the_lock_and_a_killed_one_holds_it_no_more(tmp_path: Path) -> None:
    make_cache(tmp_path)
    with another_writer(tmp_path) as process:
        with (
            pytest.raises(CacheLocked, match=f"is being written by process {process.pid} on .+ since 2"),
            lock(tmp_path),
        ):
            pass
        read_everything(tmp_path)  # readers need no lock
        assert len(list(tmp_path.glob("text/.tmp-*"))) == 1
        process.send_signal(signal.SIGKILL)
        process.wait()
        with lock(tmp_path, wait_seconds=10):
            assert not list(tmp_path.rglob(".tmp-*"))
    read_everything(tmp_path)


def test_the_lock_is_free_after_its_block_and_excludes_threads_too(tmp_path: Path) -> None:
    with lock(tmp_path), pytest.raises(CacheLocked, match=f"process {os.getpid()}"), lock(tmp_path, wait_seconds=0.1):
        pass
    with lock(tmp_path):
        pass


def test_a_folder_that_cannot_be_a_cache_is_a_users_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for root in (tmp_path / "file", tmp_path / "file" / "cache", Path("/proc/cache")):
        with pytest.raises((OutputError, CacheError), match=f"{root} cannot be written"), lock(root):
            pass
    with pytest.raises(CacheError, match="file is not a cache: it is a file"):
        open_cache(tmp_path / "file")


# Hostile caches: valid checksums, bad intent


def sign(root: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Rewrite the manifest with its checksum right, as an attacker would."""
    document = json.loads((root / "manifest.json").read_bytes())
    change(document)
    del document["sha256"]
    (root / "manifest.json").write_bytes(encode_document(document))


@pytest.mark.parametrize(
    ("keys", "value"),
    [
        (("shards", 0, "file"), "../../etc/passwd"),
        (("shards", 0, "file"), "/etc/passwd"),
        (("shards", 0, "file"), "latents/../../x.parquet"),
        (("shards", 0, "file"), "latents/64x64-0123456789abcdef.parquet\n"),
        (("shards", 0, "file"), "text/0123456789abcdef.parquet"),
        (("shards", 0, "file"), "latents/128x64-0123456789abcdef.parquet"),
        (("shards", 0, "file"), ["latents"]),
        (("shards", 0, "kind"), "pickle"),
        (("shards", 0, "num_rows"), -1),
        (("shards", 0, "num_rows"), 10**30),
        (("shards", 0, "num_rows"), True),
        (("shards", 0, "num_rows"), 1.0),
        (("shards", 0, "bucket"), [64, 10**9]),
        (("shards", 0, "bucket"), None),
        (("shards", 2, "bucket"), [64, 64]),
        (("shards", 0, "sha256"), "0" * 63),
        (("shards", 0), "shard"),
        (("shards",), {}),
        (("index", "file"), "../index-000000.parquet"),
        (("index", "file"), "locations-000000.parquet"),
        (("index", "num_rows"), 2**40),
        (("prompts",), {"a": 1}),
        (("prompts",), None),
        (("recipe",), []),
        (("format",), 0),
        (("format",), True),
        (("format",), "1"),
    ],
)
def test_a_manifest_with_an_absurd_value_is_refused_by_name(tmp_path: Path, keys: tuple[Any, ...], value: Any) -> None:
    make_cache(tmp_path)

    def change(document: Any) -> None:
        for key in keys[:-1]:
            document = document[key]
        document[keys[-1]] = value

    sign(tmp_path, change)
    with pytest.raises(CacheError, match="is well-formed but not a manifest"):
        open_cache(tmp_path)


def test_a_newer_format_asks_for_an_upgrade_and_an_unknown_key_does_not(tmp_path: Path) -> None:
    make_cache(tmp_path)
    sign(tmp_path, lambda document: document.update(remark="from a later version", format=1))
    read_everything(tmp_path)
    sign(tmp_path, lambda document: document.update(format=3))
    with pytest.raises(CacheError, match="has cache format 3; this k5cache reads up to 2") as caught:
        open_cache(tmp_path)
    assert "pip install -U" in caught.value.fix


@pytest.mark.parametrize("raw", [b"", b"{}", b"[" * 10**6, b"9" * 10**5, b"[]", b"\xff\xfe"])
def test_a_file_that_is_no_manifest_is_refused(tmp_path: Path, raw: bytes) -> None:
    (tmp_path / "manifest.json").write_bytes(raw)
    with pytest.raises(CacheCorrupt, match="its checksum does not match"):
        open_cache(tmp_path)


@pytest.mark.parametrize("value", [b"[" * 10**6, b"9" * 10**5, b"NaN", b"1 2", b"\xff\xfe", b"-"])
def test_a_manifest_that_unfolds_to_no_json_is_refused(tmp_path: Path, value: bytes) -> None:
    raw = encode_document({"recipe": {}, "zero": 0}).replace(b'"zero": 0', b'"zero": ' + value)
    blank = raw[:14] + b"0" * 64 + raw[78:]
    (tmp_path / "manifest.json").write_bytes(raw[:14] + hashlib.sha256(blank).hexdigest().encode() + raw[78:])
    with pytest.raises(CacheError, match=r"is not JSON|not a manifest"):
        open_cache(tmp_path)


def test_more_rows_than_there_are_bytes_are_refused_before_a_table_is_decoded(tmp_path: Path) -> None:
    make_cache(tmp_path)
    sign(tmp_path, lambda document: document["index"].update(num_rows=2**31 - 1))
    with pytest.raises(CacheError, match="the manifest says 2147483647 rows"):
        open_cache(tmp_path)


def test_a_small_table_file_that_unfolds_to_a_large_table_is_refused(tmp_path: Path) -> None:
    table = pa.table({"text": ["x" * 1000] * 10_000})
    pq.write_table(table, tmp_path / "index-000000.parquet")  # dictionary: 1,000 bytes for 10 MB
    raw = (tmp_path / "index-000000.parquet").read_bytes()
    info = IndexInfo("index-000000.parquet", 10_000, len(raw), hashlib.sha256(raw).hexdigest())
    with pytest.raises(CacheError, match="is not a table of a cache"):
        tables.open_table(tmp_path, info, table.schema)
    with pytest.raises(CacheError, match="columns"):
        tables.open_table(tmp_path, tables.write_table(tmp_path, table.slice(0, 1), info.file), SCHEMA)


@pytest.mark.parametrize("link", ["shard", "folder", "manifest.json"])
def test_a_link_that_leads_out_of_the_cache_is_refused(tmp_path: Path, link: str) -> None:
    root, outside = tmp_path / "cache", tmp_path / "outside"
    info = make_cache(root).shards[2]
    outside.mkdir()
    path = {"shard": root / info.file, "folder": root / "text", "manifest.json": root / "manifest.json"}[link]
    path.rename(outside / path.name)
    path.symlink_to(outside / path.name)
    with pytest.raises(CacheError, match="leads out of the cache") as caught:
        read_everything(root)
    assert "cp -rL" in caught.value.fix


def test_a_cache_may_itself_be_reached_through_a_link(tmp_path: Path) -> None:
    make_cache(tmp_path / "cache")
    (tmp_path / "link").symlink_to("cache")
    read_everything(tmp_path / "link")


def test_a_pipe_in_the_place_of_a_shard_does_not_block(tmp_path: Path) -> None:
    info = make_cache(tmp_path).shards[0]
    (tmp_path / info.file).unlink()
    os.mkfifo(tmp_path / info.file)
    with pytest.raises(CacheError, match="is not a plain file"):
        read_everything(tmp_path)


def forge(root: Path, described: dict[str, Any], rows: dict[str, Any], value: bytes, **options: Any) -> ShardInfo:
    """A shard with one row and arbitrary claims about it, with correct checksums."""
    (root / "latents").mkdir()
    path = root / "latents/64x64-0000000000000000.parquet"
    schema = pa.schema([pa.field("key", pa.string(), False), pa.field("mean", pa.binary(), False)])
    settings = {"compression": "none", "use_dictionary": False, "write_statistics": False, "store_schema": False}
    with pq.ParquetWriter(path, schema, **settings | options) as writer:
        writer.write_table(pa.table({"key": ["k"], "mean": [value]}, schema))
        writer.add_key_value_metadata({"k5cache": json.dumps(described), "k5cache.rows": json.dumps(rows)})
    raw = path.read_bytes()
    footer = raw[-8 - int.from_bytes(raw[-8:-4], "little") :]
    digests = (hashlib.sha256(raw).hexdigest(), hashlib.sha256(footer).hexdigest())
    return ShardInfo(str(path.relative_to(root)), "latents", 1, len(raw), *digests, (64, 64))


HONEST = {"format": 1, "kind": "latents", "bucket": [64, 64], "tensors": [
    {"name": "mean", "dtype": "uint8", "shape": [4]}]}  # fmt: skip
ROWS = {"key": ["k"], "xxh3_64": ["0"]}


@pytest.mark.parametrize(
    ("described", "rows", "options"),
    [
        ({"tensors": [{"name": "mean", "dtype": "float32", "shape": [1 << 40]}]}, {}, {}),
        ({"tensors": [{"name": "mean", "dtype": "float32", "shape": [1 << 20]}]}, {}, {}),
        ({"tensors": [{"name": "mean", "dtype": "object", "shape": [4]}]}, {}, {}),
        ({"tensors": [{"name": "mean", "dtype": "uint8", "shape": "4"}]}, {}, {}),
        ({"tensors": [{"name": "other", "dtype": "uint8", "shape": [4]}]}, {}, {}),
        ({"tensors": 7}, {}, {}),
        ({"kind": "text"}, {}, {}),
        ({"bucket": [64, 128]}, {}, {}),
        ({"format": 2}, {}, {}),
        ({}, {"key": ["k", "k"]}, {}),
        ({}, {"key": "k"}, {}),
        ({}, {"key": ["\ud800"]}, {}),
        ({}, {"key": [1]}, {}),
        ({}, {"xxh3_64": []}, {}),
        ({}, {"xxh3_64": ["zz"]}, {}),
        ({}, {}, {"compression": "zstd"}),
        ({}, {}, {"use_dictionary": True}),
    ],
)  # fmt: skip
def test_a_shard_with_false_claims_is_refused_before_anything_is_allocated_for_it(
    tmp_path: Path, described: dict[str, Any], rows: dict[str, Any], options: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    info = forge(tmp_path, HONEST | described, ROWS | rows, b"1234", **options)

    monkeypatch.delattr(torch, "empty")
    with pytest.raises(CacheError, match="is not a shard"):
        Shard(tmp_path, info).read(0, "k")


def test_the_forgery_is_refused_for_its_claims_and_not_for_how_it_is_made(tmp_path: Path) -> None:
    info = forge(tmp_path, HONEST, ROWS, b"1234")
    with pytest.raises(CacheCorrupt, match="its bytes are not those"):  # only its row checksum is made up
        Shard(tmp_path, info).read(0, "k")


def test_a_manifest_never_written_by_a_reader_is_never_written_wrong(tmp_path: Path) -> None:
    wrong = ShardInfo("../x.parquet", "text", 1, 1, "0" * 64, "0" * 64)
    with pytest.raises(CacheError, match="file is"):
        write_manifest(tmp_path, Manifest(recipe={}, shards=(wrong,)))
    assert all_files(tmp_path) == []

"""What is left of a cache after a kill, a flipped bit or a second encoder, and does verify say so?"""

from __future__ import annotations

import json
import os
import random
import shutil
import threading
import time
from dataclasses import replace
from itertools import count
from pathlib import Path
from types import SimpleNamespace

import pyarrow.parquet as pq
import pytest
import torch

from k5cache.buckets import Bucket
from k5cache.cli import app
from k5cache.encode import commit
from k5cache.shared.errors import CacheError, CacheLocked
from k5cache.store.index import with_index
from k5cache.store.manifest import Manifest, ShardInfo, lock, read_manifest, write_manifest
from k5cache.store.reader import open_cache
from k5cache.store.shards import ShardWriter
from k5cache.store.tensors import TensorSpec
from k5cache.upkeep.gc import collect
from k5cache.upkeep.merge import merge_caches
from k5cache.upkeep.verify import verify_cache
from tests.cli import Cli
from tests.crash_trials import kill_encodes
from tests.store_samples import LATENTS, TEXT, flip, index_row, latents_row, make_cache, text_row
from tests.workshop import EditShop, Workshop


@pytest.mark.parametrize(
    ("kind", "num_kills"),
    [
        *((kind, 4) for kind in (Workshop, EditShop)),
        *(pytest.param(kind, 50, marks=pytest.mark.long) for kind in (Workshop, EditShop)),
    ],
)
def test_an_encode_killed_at_any_instant_goes_on_to_the_rows_of_an_undisturbed_one(
    tmp_path, toy_model, toy_edit_model, kind, num_kills, monkeypatch
):
    model = toy_edit_model if kind is EditShop else toy_model
    assert kill_encodes(model, tmp_path, num_kills, monkeypatch, kind) == num_kills


SMALL = {"mean": TensorSpec("float16", (2, 2, 16)), "std": TensorSpec("float16", (2, 2, 16))}


def read_everything(root: Path) -> None:
    """Read every item and every prompt, as a run does."""
    cache = open_cache(root)
    for _ in cache:
        pass
    for prompt in cache.manifest.prompts:
        cache.prompt(prompt)


def test_each_of_1400_rows_with_a_flipped_bit_is_named_by_verify_and_not_given_to_a_run(tmp_path):
    with lock(tmp_path):
        shards = []
        for first in range(0, 1000, 200):
            with ShardWriter(tmp_path, "latents", SMALL, (16, 16)) as writer:
                for i in range(first, first + 200):
                    values = torch.full((2, 2, 16), 1 + i % 7).half()
                    writer.append({"key": f"l-{i}", "mean": values, "std": values})
                shards.append(writer.finish())
        for first in range(0, 400, 200):
            with ShardWriter(tmp_path, "text", TEXT) as writer:
                for i in range(first, first + 200):
                    writer.append({**text_row("t-dog"), "key": f"t-{i}"})
                shards.append(writer.finish())
        manifest = Manifest(recipe={}, shards=tuple(shards))
        rows = [replace(index_row(i, (f"t-{i % 400}",)), bucket_width=16, bucket_height=16) for i in range(1000)]
        write_manifest(tmp_path, with_index(tmp_path, manifest, rows))
    assert verify_cache(tmp_path).problems == ()
    chance = random.Random(0)
    for shard in shards:
        meta = pq.read_metadata(tmp_path / shard.file)
        for row in range(shard.num_rows):
            group = meta.row_group(row)
            last = group.column(group.num_columns - 1)
            begin = group.column(0).data_page_offset
            flip(
                tmp_path / shard.file,
                chance.randrange(begin * 8, (last.data_page_offset + last.total_compressed_size) * 8),
            )
    said = "\n".join(verify_cache(tmp_path).problems)
    cache = open_cache(tmp_path)
    count = 0
    for shard in shards:
        for row in range(shard.num_rows):
            assert f"{shard.file}, row {row} (key " in said
            count += 1
    for read, keys in ((cache.latents, range(1000)), (cache.text, range(400))):
        for key in keys:
            with pytest.raises(CacheError):
                read(f"{'l' if len(keys) == 1000 else 't'}-{key}")
    assert count == 1400


@pytest.mark.parametrize("flips_per_part", [10, pytest.param(100, marks=pytest.mark.long)])
def test_each_flipped_bit_outside_the_rows_is_found_by_verify_and_by_a_run(tmp_path, flips_per_part):
    make_cache(tmp_path)
    read_everything(tmp_path)
    chance = random.Random(0)
    manifest = read_manifest(tmp_path)
    whole = [tmp_path / name for name in ("manifest.json", manifest.index.file, manifest.locations.file)]
    places = [(path, 0, path.stat().st_size) for path in whole]
    for shard in manifest.shards:
        meta = pq.read_metadata(tmp_path / shard.file)
        places.append((tmp_path / shard.file, shard.num_bytes - meta.serialized_size - 8, shard.num_bytes))
    for path, begin, end in places:
        for bit in chance.sample(range(begin * 8, end * 8), flips_per_part):
            flip(path, bit)
            assert verify_cache(tmp_path).problems, (path.name, bit)
            with pytest.raises(CacheError):
                read_everything(tmp_path)
            flip(path, bit)
    assert verify_cache(tmp_path).problems == ()


# What verify says


def shard_of(root: Path, kind: str, number: int = 0) -> Path:
    return root / [s.file for s in read_manifest(root).shards if s.kind == kind][number]


def test_every_problem_is_listed_not_the_first_alone(tmp_path):
    make_cache(tmp_path)
    shard_of(tmp_path, "latents").unlink()
    text = shard_of(tmp_path, "text")
    flip(text, 8 * 500)
    os.truncate(tmp_path / read_manifest(tmp_path).index.file, 100)
    problems = verify_cache(tmp_path).problems
    said = "\n".join(problems)
    assert len(set(problems)) == len(problems)
    assert f"{shard_of(tmp_path, 'latents')} is missing" in said
    assert f"{text}, row " in said
    assert f"{text}: its sha256" in said
    assert "index-000000.parquet has 100 bytes" in said


def test_a_shard_swapped_with_another_caches_is_named(tmp_path):
    make_cache(tmp_path / "a")
    other = make_cache(tmp_path / "b")
    shutil.copy(tmp_path / "b" / other.shards[0].file, tmp_path / "a" / other.shards[1].file)
    (problem, *_) = verify_cache(tmp_path / "a").problems
    assert other.shards[1].file in problem


def cache_of(root: Path, rows: list[dict], text: dict) -> None:
    """Write a cache of two shards: latents with ``rows``, and one text row."""
    with lock(root):
        shards = []
        for kind, specs, bucket, values in (("latents", LATENTS, (64, 64), rows), ("text", TEXT, None, [text])):
            with ShardWriter(root, kind, specs, bucket) as writer:
                for value in values:
                    writer.append(value)
                shards.append(writer.finish())
        manifest = Manifest(recipe={}, shards=tuple(shards))
        write_manifest(root, with_index(root, manifest, [index_row(i) for i in range(len(rows))]))


@pytest.mark.parametrize(
    ("name", "change", "words"),
    [
        ("mean", lambda t: t.index_fill(0, torch.tensor([3]), float("nan")), "mean of l-2 is not finite"),
        ("std", lambda t: t.index_fill(1, torch.tensor([0]), float("inf")), "std of l-2 is not finite"),
        ("std", torch.neg, "std of l-2 is negative"),
        ("mean", lambda t: t * 100, "mean of l-2 has a norm out of line: 98.3"),
        ("mean", torch.zeros_like, "mean of l-2 has a norm out of line: 0"),
    ],
)
def test_numbers_that_were_written_and_make_no_sense_are_problems(tmp_path, name, change, words):
    rows = [latents_row(i) for i in range(5)]
    rows[2][name] = change(rows[2][name])
    cache_of(tmp_path, rows, text_row("t-cat"))
    (problem,) = verify_cache(tmp_path).problems
    assert words in problem
    assert "row 2" in problem


def test_ordinary_rows_of_any_image_are_in_line(tmp_path, toy_model):
    from PIL import Image

    shop = Workshop(tmp_path, toy_model)
    shop.put("noise.png", "a")
    for name, colour in (("black", "black"), ("white", "white"), ("red", "red")):
        Image.new("RGB", (64, 64), colour).save(shop.put(f"{name}.png", "a very long caption of many words " * 9))
    shop.encode("a prompt", "?")
    assert verify_cache(tmp_path / "cache").problems == ()


def test_an_unfinished_cache_is_a_problem_and_what_a_crash_left_is_not(tmp_path):
    make_cache(tmp_path / "old")
    with ShardWriter(tmp_path / "old", "latents", LATENTS, (64, 64)) as writer:
        writer.append(latents_row(9))
        left = writer.finish()
    report = verify_cache(tmp_path / "old")
    assert (report.problems, report.unnamed, report.foreign) == ((), (left.file,), ())
    assert collect(tmp_path / "old").unnamed == (left.file,)
    assert not (tmp_path / "old" / left.file).exists()
    with lock(tmp_path / "new"):
        write_manifest(tmp_path / "new", Manifest(recipe={}))
    assert "interrupted" in verify_cache(tmp_path / "new").problems[0]


def test_a_slow_encode_commits_every_three_minutes_however_small_the_shard(tmp_path, monkeypatch):
    clock = count(step=60.0)  # a minute an image, as a CPU takes
    monkeypatch.setattr(commit, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    growing = commit.Committer(tmp_path, Manifest(recipe={}), 2**28)
    with growing.shards("latents", LATENTS, Bucket(64, 64)) as append:
        for i in range(7):
            append(latents_row(i))
            assert len(growing.manifest.shards) == (i + 1) // 3
    assert [shard.num_rows for shard in read_manifest(tmp_path).shards] == [3, 3, 1]


def test_the_manifest_of_many_shards_takes_a_fiftieth_of_the_time_and_no_shard_waits_for_long(tmp_path, monkeypatch):
    now, counts = [0.0], [0]
    clock = SimpleNamespace(monotonic=lambda: now[0], thread_time=lambda: now[0])

    def write(root, manifest):
        counts.append(len(manifest.shards))
        now[0] += 1e-4 * len(manifest.shards)  # it grows with the cache; this is slower than any machine we have seen

    monkeypatch.setattr(commit, "time", clock)
    monkeypatch.setattr(commit, "write_manifest", write)
    growing = commit.Committer(tmp_path, Manifest(recipe={}), 2**28)
    longest = 0.0
    with growing:
        for number in range(3000):
            digest = f"{number:064x}"
            growing.add([ShardInfo(f"text/{digest[-16:]}.parquet", "text", 1, 1, digest, digest)])
            longest = max(longest, (number + 1 - counts[-1]) * 1.0)
            now[0] += 1.0  # a shard a second
    assert counts[:257] == [*range(257)], "a small manifest is written after each shard"
    assert counts[257] > 257
    assert counts[-1] == 3000, "at the end all are named"
    late = [count for count in counts if count > 256]
    assert 1e-4 * sum(late) <= (3000 - 256) / 50 * 1.1
    assert 0 < longest <= 16, "50 times what writing 3000 takes"


def test_shards_that_are_not_named_yet_are_named_when_an_error_ends_the_encode(tmp_path, monkeypatch):
    monkeypatch.setattr(commit, "_SMALL", 1)
    monkeypatch.setattr(commit, "_LEAST_BETWEEN", 1e9)
    growing = commit.Committer(tmp_path, Manifest(recipe={}), 1)

    def fail_after_five() -> None:
        with growing, growing.shards("latents", LATENTS, Bucket(64, 64)) as append:
            for i in range(5):
                append(latents_row(i))
            assert len(read_manifest(tmp_path).shards) == 1
            raise OSError("the picture is gone")

    with pytest.raises(OSError, match="gone"):
        fail_after_five()
    assert [shard.num_rows for shard in read_manifest(tmp_path).shards] == [1] * 5


def test_the_command_lists_problems_and_exits_with_one(tmp_path):
    make_cache(tmp_path / "mine")
    cli = Cli(tmp_path)
    assert cli(app, "verify", "mine").code == 0
    shard_of(tmp_path / "mine", "text").unlink()
    done = cli(app, "verify", "mine", "--json")
    assert done.code == 1
    problems = json.loads(done.out)["verified"]["problems"]
    assert any("text/" in problem and "is missing" in problem for problem in problems)
    assert all(problem in cli(app, "verify", "mine").out for problem in problems)


# Garbage


def test_collecting_may_be_killed_between_any_two_steps(tmp_path, monkeypatch):
    make_cache(tmp_path / "base")
    root = tmp_path / "base"
    manifest = read_manifest(root)
    with lock(root):  # item 1 goes, and a caption
        rows = [index_row(0), index_row(2), index_row(3)]
        write_manifest(root, with_index(root, manifest, rows))
    expected = {i["path"]: i["mean"] for i in open_cache(root)}
    steps = 0
    for stop_at in range(1, 40):
        trial = tmp_path / f"trial-{stop_at}"
        shutil.copytree(root, trial)
        calls = stop_after(monkeypatch, stop_at)
        try:
            collect(trial)
        except KeyboardInterrupt:
            steps += 1
        monkeypatch.undo()
        assert verify_cache(trial).problems == ()
        collect(trial)
        assert (verify_cache(trial).problems, verify_cache(trial).unnamed) == ((), ())
        means = {i["path"]: i["mean"] for i in open_cache(trial)}
        assert means.keys() == expected.keys()
        assert all(torch.equal(means[k], expected[k]) for k in means)
        assert sum(s.num_rows for s in read_manifest(trial).shards) == 3 + 2
        if len(calls) < stop_at:
            break
    assert steps > 5


def stop_after(monkeypatch: pytest.MonkeyPatch, count: int) -> list[str]:
    """Allow ``count - 1`` changes of the disk, then raise KeyboardInterrupt at the next."""
    calls: list[str] = []
    for where, name in ((os, "fsync"), (Path, "replace"), (Path, "unlink")):
        original = getattr(where, name)

        def step(*args, original=original, name=name, **kwargs):
            calls.append(name)
            if len(calls) == count:
                raise KeyboardInterrupt
            return original(*args, **kwargs)

        monkeypatch.setattr(where, name, step)
    return calls


# Two encoders


def test_a_second_encoder_is_told_who_writes_or_waits(tmp_path, toy_model):
    shop = Workshop(tmp_path, toy_model)
    shop.put("cat.png")
    is_locked, free = threading.Event(), threading.Event()

    def hold() -> None:
        with lock(shop.root):
            is_locked.set()
            free.wait()
            time.sleep(0.3)

    thread = threading.Thread(target=hold)
    thread.start()
    is_locked.wait()
    try:
        with pytest.raises(CacheLocked, match=f"is being written by process {os.getpid()} on ") as caught:
            shop.encode()
        assert "--wait" in caught.value.fix
    finally:
        free.set()
    assert shop.encode(wait_seconds=30).num_items == 1
    thread.join()


# Merge


def test_caches_of_parts_merge_into_the_cache_of_the_whole(tmp_path, toy_model):
    whole = Workshop(tmp_path / "whole", toy_model)
    parts = [Workshop(tmp_path / name, toy_model) for name in "ab"]
    for i in range(4):
        for shop in (whole, parts[i % 2]):
            shop.put(f"{i}.png", f"number {i // 2}", seed=i)
    for shop in (whole, *parts):
        shop.encode("a fox" if shop is parts[0] else "a dog")
    report = merge_caches([part.root for part in parts], tmp_path / "merged")
    assert (report.num_items, report.is_linked, report.duplicates) == (4, True, ())
    merged = open_cache(tmp_path / "merged")
    assert verify_cache(merged.root).problems == ()
    assert set(merged.manifest.prompts) == {"", "a fox", "a dog"}
    for ours, theirs in zip(merged, whole.cache, strict=True):
        assert ours["path"] == theirs["path"]
        assert torch.equal(ours["mean"], theirs["mean"])
        assert torch.equal(ours["captions"][0].prompt_embeds, theirs["captions"][0].prompt_embeds)
    merged_shop = whole
    merged_shop.root = merged.root
    assert (merged_shop.encode().num_latents, len(merged_shop.cache)) == (0, 4)
    with pytest.raises(CacheError, match="is a cache already"):
        merge_caches([part.root for part in parts], tmp_path / "merged")
    parts[1].put("0.png", "another", seed=9)
    parts[1].encode("a dog")
    with pytest.raises(CacheError, match=r"0.png is one item in .* and another in"):
        merge_caches([part.root for part in parts], tmp_path / "again")
    parts[1].encode(resolution=128, update=True)
    with pytest.raises(CacheError, match=r"selection.resolution is 64 in .*a/cache, 128 in .*b/cache"):
        merge_caches([part.root for part in parts], tmp_path / "again")

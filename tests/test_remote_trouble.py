"""What goes wrong with a cache at a URL on this machine, or in the store, is mended or named, and never spreads."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from k5cache.cli import app
from k5cache.remote.mirror import folder_of
from k5cache.remote.objects import Objects
from k5cache.shared.errors import StoreError
from k5cache.store.reader import open_cache
from k5cache.upkeep.verify import verify_cache
from tests.cli import Cli
from tests.object_store import files_of, in_store, put, rows_of


def test_repair_looks_at_the_store_and_sends_a_damaged_shard_again_under_its_own_name(store, shop):
    shop.root = folder_of(Path("s3://bucket/repaired"), is_new=True)
    shop.encode(shard_mb=1)
    before = in_store("repaired")
    name = next(name for name in before if name.startswith("latents/"))
    broken = bytearray(before[name])
    broken[len(broken) // 3] ^= 1
    put("repaired", {name: bytes(broken)})  # the copy on this machine is whole
    report = shop.encode(shard_mb=1, repair=True)
    assert (report.repaired, report.num_latents) == ((name,), 6)
    after = in_store("repaired")
    assert after[name] == before[name], "the same rows in the same order are the same file, which is there damaged"
    assert not verify_cache(shop.root).problems


def test_a_damaged_copy_on_this_machine_is_fetched_again(store, shop):
    put("copied", files_of(shop.root))
    expected = rows_of(shop.root)
    assert rows_of("s3://bucket/copied") == expected
    root = folder_of(Path("s3://bucket/copied"))
    for part in (0.3, 0.999):  # a row, and the footer
        for path in root.rglob("*.parquet"):
            raw = bytearray(path.read_bytes())
            raw[int(len(raw) * part)] ^= 1
            path.write_bytes(bytes(raw))
        assert rows_of("s3://bucket/copied") == expected


def test_a_copy_that_has_made_room_is_closed(store, shop, monkeypatch):
    shop.encode(shard_mb=0, update=True, resolution=96)
    put("many", files_of(shop.root))
    monkeypatch.setenv("K5_REMOTE_SIZE", "0.001MB")
    cache = open_cache("s3://bucket/many")
    for item in cache:
        assert item["mean"] is not None
        assert len(cache._open) <= 3, "a file that is deleted but open still takes the disk"


@pytest.mark.parametrize("name", ["copies", "locks", "look.lock", "note.json", "pending.json"])
def test_a_cache_may_be_called_as_what_is_beside_its_folder_here(store, shop, name):
    before = files_of(shop.root)
    done = Cli(store)(app, "push", str(shop.root), f"s3://bucket/beside/{name}")
    assert done.code == 0, done.err
    assert files_of(shop.root) == before, "files of the mirror are hard links to those of the cache"
    assert rows_of(f"s3://bucket/beside/{name}") == rows_of(shop.root)


def test_an_error_of_this_machine_is_not_said_to_be_the_stores(store, shop, monkeypatch):
    put("full", files_of(shop.root))

    def full(self, data):
        raise OSError(28, "No space left on device", str(self.path))

    monkeypatch.setattr("k5cache.shared.files.NewFile.write", full)
    done = Cli(store)(app, "verify", "s3://bucket/full")
    assert done.code == 2
    assert done.err.splitlines()[0].endswith(
        f"The disk is full while writing the copies of s3://bucket/full in {store / 'home/remote'}"
    )


def test_who_may_read_but_not_list_can_read(store, shop, monkeypatch):
    put("unlisted", files_of(shop.root))

    def refuse(self, *arguments, **options):
        raise PermissionError("Access Denied")

    monkeypatch.setattr("s3fs.S3FileSystem.find", refuse)
    assert rows_of("s3://bucket/unlisted") == rows_of(shop.root)
    shop.root = folder_of(Path("s3://bucket/unlisted"), is_new=True)
    assert shop.encode().num_latents == 0


def test_a_manifest_that_never_holds_still_is_not_read_for_ever(store, shop, monkeypatch):
    put("restless", files_of(shop.root))
    tags = iter(range(1000))
    entry = Objects._entry
    monkeypatch.setattr(Objects, "_entry", lambda *args: replace(entry(*args), tag=str(next(tags))))
    with pytest.raises(StoreError, match="it has changed each of the 10 times"):
        folder_of(Path("s3://bucket/restless"))

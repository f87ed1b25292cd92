"""A push compares what is at a URL with the files here by the store's checksums, and downloads none of it."""

from __future__ import annotations

import hashlib

import pytest

from k5cache.cli import app
from k5cache.remote import checksums
from k5cache.remote.objects import Objects
from tests.cli import Cli
from tests.object_store import another_machine, files_of, in_store, put, rows_of


def flipped(raw: bytes) -> bytes:
    """Other bytes of the same size."""
    return raw[:100] + bytes([raw[100] ^ 1]) + raw[101:]


@pytest.mark.parametrize("folder", ["latents/", "index-"])
@pytest.mark.parametrize("is_known", [True, False])
def test_a_push_sends_what_has_the_name_and_the_size_and_other_bytes(store, shop, monkeypatch, folder, is_known):
    files = files_of(shop.root)
    prefix = f"other-{folder[:3]}-{is_known}"
    if is_known:  # a manifest names it
        assert Cli(store)(app, "push", str(shop.root), f"s3://bucket/{prefix}").code == 0
        files = in_store(prefix)
    name = next(name for name in files if name.startswith(folder))
    put(prefix, {name: flipped(files[name])})
    another_machine(store / "other", monkeypatch)
    fetched: list[str] = []
    fetch = Objects.fetch
    monkeypatch.setattr(Objects, "fetch", lambda self, name, *rest: fetched.append(name) or fetch(self, name, *rest))
    done = Cli(store)(app, "push", str(shop.root), f"s3://bucket/{prefix}")
    assert done.code == 0, done.err
    assert not fetched
    another_machine(store / "third", monkeypatch)
    assert rows_of(f"s3://bucket/{prefix}") == rows_of(shop.root)


def test_a_shard_that_is_gone_from_the_store_is_sent_again(store, shop, monkeypatch):
    assert Cli(store)(app, "push", str(shop.root), "s3://bucket/lost-shard").code == 0
    before = in_store("lost-shard")
    name = next(name for name in before if name.startswith("text/"))
    Objects("s3://bucket/lost-shard").delete([name])
    done = Cli(store)(app, "push", str(shop.root), "s3://bucket/lost-shard")
    assert done.code == 0, done.err
    assert f"1 shard at s3://bucket/lost-shard will be sent again: {name}" in done.err
    assert in_store("lost-shard") == before


def test_a_file_agrees_with_the_etag_of_one_request_and_of_parts(store, tmp_path, monkeypatch):
    path = tmp_path / "shard"
    path.write_bytes(bytes(range(256)) * 50_000)  # 12.8 MB
    objects = Objects("s3://bucket/etag")
    objects.send("one", path)
    objects._fs.put_file(str(path), "bucket/etag/parts", chunksize=5 << 20)
    one, parts = objects.stat("one"), objects.stat("parts")
    assert one.checksum == hashlib.md5(path.read_bytes()).hexdigest()
    assert parts.checksum.endswith("-3")
    assert not objects.is_another(parts, path), "in parts of another size, nothing can be said"
    assert checksums.agrees(parts.checksum, path) is None
    monkeypatch.setattr(checksums, "PART", 5 << 20)
    assert checksums.agrees(parts.checksum, path) is True
    path.write_bytes(flipped(path.read_bytes()))
    assert checksums.agrees(parts.checksum, path) is False
    assert objects.is_another(parts, path)
    assert objects.is_another(one, path)


def test_the_etag_of_what_a_key_encrypts_says_nothing(store, tmp_path):
    path = tmp_path / "shard"
    path.write_bytes(b"bytes of a shard")
    objects = Objects("s3://bucket/kms")
    objects._fs.pipe_file("bucket/kms/shard", b"other bytes 1234", ServerSideEncryption="aws:kms")
    assert not objects.is_another(objects.stat("shard"), path)


def test_parts_have_the_size_that_s3fs_sends_and_google_says_md5_in_base64():
    from s3fs.core import calculate_chunksize

    assert calculate_chunksize(1 << 30) == checksums.PART
    assert checksums.checksum_of("gs", {"md5Hash": "XrY7u+Ae7tCTyyK7j1rNww=="}) == "5eb63bbbe01eeed093cb22bb8f5acdc3"
    assert checksums.checksum_of("gs", {"etag": "CJ"}) == checksums.checksum_of("s3", {"ETag": "abc"}) == ""

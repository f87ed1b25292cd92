"""A store that accepts connections and does not answer is named, soon; a slow one is waited for."""

from __future__ import annotations

import socket

import pytest

from k5cache.cli import app
from k5cache.remote import filesystems
from k5cache.remote.objects import Objects
from k5cache.shared.errors import StoreError
from tests.cli import Cli
from tests.object_store import another_machine, files_of, in_store, put, rows_of
from tests.slow_link import link_to


def be_impatient(patch: pytest.MonkeyPatch, seconds: float = 0.2) -> None:
    patch.setattr(filesystems, "CONNECT", 5.0)
    patch.setattr(filesystems, "SILENT", seconds)
    patch.setattr("k5cache.remote.objects.PATIENCE", seconds)


def test_a_store_that_never_answers_is_named_and_asked_three_times_in_all(store, monkeypatch):
    be_impatient(monkeypatch)
    with link_to(None) as link:
        monkeypatch.setenv("AWS_ENDPOINT_URL", link.address)
        done = Cli(store)(app, "info", "s3://bucket/cats")
        assert link.requests == ["HEAD /bucket/cats/manifest.json"] * 3
    assert done.code == 2
    first, second = done.err.splitlines()
    assert f"Cannot look at s3://bucket/cats/manifest.json: the store at {link.address} (the address is from" in first
    assert "AWS_ENDPOINT_URL) did not answer within" in first
    assert "See whether it works and can be reached from here, and run the same command again" in second


@pytest.mark.slow
@pytest.mark.parametrize(("request_", "num_bytes"), [(r"PUT .*/latents/", 3000), (r"PUT .*/manifest.json", 0)])
def test_a_store_that_goes_silent_in_mid_upload_keeps_the_old_cache_and_the_same_command_goes_on(
    server, store, shop, monkeypatch, request_, num_bytes
):
    name = f"silent-{num_bytes}"
    put(name, files_of(shop.root))
    old = rows_of(shop.root)
    for seed in (7, 8):
        shop.put(f"{seed}.png", f"another {seed}", seed=seed)
    arguments = ("encode", str(shop.source), "-o", f"s3://bucket/{name}", "--model", str(shop.model),
                 "--device", "cpu", "--set", "cache.resolution=64")  # fmt: skip
    with monkeypatch.context() as patch, link_to(server) as link:
        be_impatient(patch, 0.5)
        patch.setenv("AWS_ENDPOINT_URL", link.address)
        another_machine(store / "home", patch)
        link.silent_after = request_, num_bytes
        done = Cli(store)(app, *arguments)
        assert link.is_silent.is_set()
    assert done.code == 2, done.err
    assert f"the store at {link.address} (the address is from AWS_ENDPOINT_URL) did not answer" in done.err
    assert f"What is not in s3://bucket/{name} yet is kept on this machine: the same command sends it" in done.err
    another_machine(store / "other", monkeypatch)
    assert rows_of(f"s3://bucket/{name}") == old
    another_machine(store / "home", monkeypatch)
    done = Cli(store)(app, *arguments)
    assert done.code == 0, done.err
    another_machine(store / "third", monkeypatch)
    rows = rows_of(f"s3://bucket/{name}")
    assert len([key for kind, key in rows if kind == "latents"]) == 8
    assert {key: rows[key] for key in old} == old


def test_a_slow_link_is_waited_for_as_long_as_bytes_flow(server, store, tmp_path, monkeypatch):
    be_impatient(monkeypatch, 1.0)
    shard = tmp_path / "shard"
    shard.write_bytes(bytes(range(256)) * 4096 * 3)
    with link_to(server) as link:
        monkeypatch.setenv("AWS_ENDPOINT_URL", link.address)
        link.bytes_per_second = 1e6
        Objects("s3://bucket/slow").send("shard", shard)  # 3 seconds
        assert link.requests == ["PUT /bucket/slow/shard"]
    monkeypatch.setenv("AWS_ENDPOINT_URL", server)
    assert in_store("slow") == {"shard": shard.read_bytes()}


@pytest.mark.skipif(not hasattr(socket, "TCP_USER_TIMEOUT"), reason="this system has no limit for it")
def test_a_store_that_takes_no_more_bytes_is_named(server, store, tmp_path, monkeypatch):
    be_impatient(monkeypatch, 0.5)
    monkeypatch.setattr(filesystems, "TRIES", 1)
    shard = tmp_path / "shard"
    shard.write_bytes(bytes(8 << 20))
    with link_to(server) as link:
        monkeypatch.setenv("AWS_ENDPOINT_URL", link.address)
        link.silent_after = "PUT", 1 << 20
        with pytest.raises(StoreError, match=r"Cannot write s3://bucket/full/shard: the store at .* did not answer"):
            Objects("s3://bucket/full").send("shard", shard)


def test_of_pictures_at_a_silent_store_none_is_called_unreadable(server, store, shop, monkeypatch):
    put("pictures", {path.name: path.read_bytes() for path in shop.source.iterdir()})
    be_impatient(monkeypatch)
    with link_to(server) as link:
        monkeypatch.setenv("AWS_ENDPOINT_URL", link.address)
        link.silent_after = r"GET .*\.png", 0
        out = store / "cache/pictures"
        done = Cli(store)(app, "encode", "s3://bucket/pictures", "-o", str(out), "--model", str(shop.model),
                          "--device", "cpu", "--set", "cache.resolution=64")  # fmt: skip
    assert done.code == 2, done.err
    assert "did not answer" in done.err
    assert not (out / "skipped.csv").exists()

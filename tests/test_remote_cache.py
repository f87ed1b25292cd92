"""A cache in an object store holds the rows of a local one, is never torn by a failure, and is read within a bound."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from safetensors.torch import load

from k5cache.cli import app
from k5cache.remote import mirror
from k5cache.remote.mirror import folder_of
from k5cache.remote.objects import Changed, Objects
from k5cache.shared.errors import CacheCorrupt, StoreError
from k5cache.shared.sealed import seal, unseal
from k5cache.store.manifest import read_manifest
from k5cache.store.reader import open_cache
from k5cache.upkeep.gc import collect
from k5train.runs.folder import Run
from k5train.runs.resume_state import latest_state
from tests.cli import Cli
from tests.object_store import another_machine, files_of, in_store, put, rows_of
from tests.runs import CONFIG, go_on, start_run


def fail_from(number: int, monkeypatch: pytest.MonkeyPatch, error: Exception) -> list[str]:
    """Let every object that is written fail from this one on, counted from 0. Returns those that were written."""
    import s3fs

    written: list[str] = []
    call_s3 = s3fs.S3FileSystem._call_s3

    async def failing(self, method, *arguments, **options):
        if method == "put_object":
            if len(written) >= number:
                raise error
            written.append(options["Key"])
        return await call_s3(self, method, *arguments, **options)

    monkeypatch.setattr(s3fs.S3FileSystem, "_call_s3", failing)
    return written


def test_a_cache_encoded_to_s3_has_the_rows_of_one_encoded_here(store, shop, monkeypatch):
    local = rows_of(shop.root)
    shop.root = folder_of(Path("s3://bucket/same"), is_new=True)
    assert shop.encode(shard_mb=1).num_latents == 6
    assert set(in_store("same")) == {"manifest.json", *read_manifest(shop.root).named}
    another_machine(store / "other", monkeypatch)
    assert rows_of("s3://bucket/same") == local
    shop.root = folder_of(Path("s3://bucket/same"), is_new=True)
    before = in_store("same")
    assert shop.encode(shard_mb=1).is_unchanged
    shop.put("7.png", "a seventh", seed=7)
    report = shop.encode(shard_mb=1)  # on a machine that did not make the first six
    assert (report.num_latents, report.reused_latents) == (1, 6)
    after = in_store("same")
    shards = {name for name in before if "/" in name}
    assert {name: after[name] for name in shards} == {name: before[name] for name in shards}
    assert len([name for name in after if name.startswith("index-")]) == 1


@pytest.mark.parametrize("number", [1, 4])  # a shard; the manifest
def test_an_upload_that_fails_leaves_the_old_cache_whole_and_the_next_encode_sends_the_rest(
    store, shop, monkeypatch, number
):
    put("torn", files_of(shop.root))
    old = rows_of(shop.root)
    for seed in (7, 8):
        shop.put(f"{seed}.png", f"another {seed}", seed=seed)
    shop.root = folder_of(Path("s3://bucket/torn"), is_new=True)
    with monkeypatch.context() as patch:
        sent = fail_from(number, patch, ConnectionResetError("the network is gone"))
        with pytest.raises(StoreError, match=r"Cannot write s3://bucket/torn/.*: the network is gone"):
            shop.encode(shard_mb=1)
        assert len(sent) == number, sent
    assert rows_of("s3://bucket/torn") == old  # here, where more is encoded, and on another machine
    another_machine(store / "other", monkeypatch)
    assert rows_of("s3://bucket/torn") == old
    another_machine(store / "home", monkeypatch)
    assert folder_of(Path("s3://bucket/torn"), is_new=True) == shop.root
    report = shop.encode(shard_mb=1)
    assert (report.num_latents, report.num_texts) == (0, 0), "what was encoded before the failure is encoded again"
    another_machine(store / "other", monkeypatch)
    rows = rows_of("s3://bucket/torn")
    assert len([key for kind, key in rows if kind == "latents"]) == 8
    assert {key: rows[key] for key in old} == old


def test_of_two_machines_that_encode_at_once_the_second_is_refused_and_then_goes_on_from_both(store, shop, monkeypatch):
    put("both", files_of(shop.root))
    shop.put("7.png", "a seventh", seed=7)
    first = folder_of(Path("s3://bucket/both"), is_new=True)
    shop.root = first
    replace_object = Objects.replace

    def later(self, name, data, expected):
        """Before this machine names its rows, another one names its own."""
        monkeypatch.setattr(Objects, "replace", replace_object)
        document = unseal(in_store("both")["manifest.json"])
        document["prompts"]["theirs"] = document["prompts"][""]
        put("both", {"manifest.json": seal(document)})
        return replace_object(self, name, data, expected)

    monkeypatch.setattr(Objects, "replace", later)
    with pytest.raises(StoreError, match="s3://bucket/both was written by another process since this command began"):
        shop.encode()
    assert folder_of(Path("s3://bucket/both"), is_new=True) == first
    report = shop.encode()
    assert (report.num_latents, report.num_items) == (0, 7)
    assert "theirs" in open_cache("s3://bucket/both").manifest.prompts


def test_copies_stay_within_a_bound_which_a_larger_cache_is_warned_of(store, shop, monkeypatch, capsys):
    put("bound", files_of(shop.root))
    expected = rows_of(shop.root)
    monkeypatch.setenv("K5_REMOTE_SIZE", "0.001MB")
    assert rows_of("s3://bucket/bound") == expected
    assert "are fetched again and again. Set K5_REMOTE_SIZE to more" in capsys.readouterr().err
    copied = {path.parent.name for path in folder_of(Path("s3://bucket/bound")).rglob("*.parquet")}
    assert copied == {"latents", "text"}  # the two that were used last; the index and the locations made room
    monkeypatch.setenv("K5_REMOTE_SIZE", "plenty")
    with pytest.raises(StoreError, match="K5_REMOTE_SIZE=plenty is not an amount"):
        mirror.copies.bound()


def test_an_object_that_changed_is_named_and_one_that_is_gone_too(store, shop):
    files = files_of(shop.root)
    name = next(name for name in files if name.startswith("latents/"))
    broken = bytearray(files[name])
    broken[len(broken) // 3] ^= 1
    put("changed", {**files, name: bytes(broken)})
    with pytest.raises(CacheCorrupt, match=f"s3://bucket/changed/{name} is not the file that was written"):
        rows_of("s3://bucket/changed")
    put("shorter", {**files, name: files[name][:-1]})
    with pytest.raises(CacheCorrupt, match=rf"s3://bucket/shorter/{name} has \d+ bytes, \d+ were written"):
        rows_of("s3://bucket/shorter")
    put("gone", {n: content for n, content in files.items() if n != name})
    with pytest.raises(CacheCorrupt, match=f"s3://bucket/gone/{name} is missing"):
        rows_of("s3://bucket/gone")


def test_a_network_that_goes_in_mid_read_is_waited_for_and_then_named(store, shop, monkeypatch):
    put("flaky", files_of(shop.root))
    expected = rows_of(shop.root)
    chunks, broken = Objects._chunks, [0]

    def failing(self, name):
        broken[0] += 1
        for number, chunk in enumerate(chunks(self, name)):
            yield chunk[: len(chunk) // 2] if broken[0] % 3 else chunk
            if broken[0] % 3 and not number:
                raise ConnectionResetError("Connection reset by peer")

    monkeypatch.setattr(Objects, "_chunks", failing)
    assert rows_of("s3://bucket/flaky") == expected
    another_machine(store / "other", monkeypatch)
    monkeypatch.setattr(Objects, "_chunks", lambda self, name: (_ for _ in ()).throw(TimeoutError("timed out")))
    with pytest.raises(StoreError, match=r"Cannot read s3://bucket/flaky/.*: the store at .* did not answer within"):
        rows_of("s3://bucket/flaky")
    assert not list((store / "other").rglob("flaky/*.parquet"))


def test_commands_work_on_a_url_and_say_so(store, shop):
    put("cats", files_of(shop.root))
    cli, url = Cli(store), "s3://bucket/cats"
    done = cli(app, "info", url)
    assert done.code == 0, done.err
    assert "64x64       6   100%" in done.out
    assert f"k5train run {url}" in done.out
    done = cli(app, "verify", url)
    assert done.code == 0, done.out + done.err
    assert f"Verified {url}" in done.out
    done = cli(app, "prompts", "add", url, "a red fox", "--device", "cpu", "--model", str(shop.model))
    assert done.code == 0, done.err
    assert f"1 prompt encoded into {url}" in done.out
    assert "a red fox" in cli(app, "prompts", "list", url).out
    done = cli(app, "merge", url, str(shop.root), "-o", "s3://bucket/merged")
    assert done.code == 0, done.err
    assert rows_of("s3://bucket/merged") == rows_of(shop.root)
    done = cli(app, "gc", url)
    assert done.code == 0, done.err
    assert str(store / "home") not in done.out


def test_wrong_urls_end_in_two_lines_without_credentials(store, shop, monkeypatch):
    cli = Cli(store)
    for url, problem, fix in (
        (
            "s3://nowhere/cats",
            "there is no bucket nowhere",
            "Correct its name, or make it",
        ),
        ("s3://bucket/none", "s3://bucket/none is not a cache: it has no manifest.json", "Make one: k5cache encode"),
        ("s3://me:hunter2@bucket/cats", "A URL may hold no user and no password", "Leave them out."),
        ("s3://bucket/../cats", "s3://bucket/../cats is not the URL of a folder in a bucket", "Write it as"),
        ("gs://bucket/cats", "gs://bucket/cats needs the package gcsfs", "Install it: pip install gcsfs"),
        ("S3://bucket/none", "s3://bucket/none is not a cache", "Make one: k5cache encode SOURCE -o s3://bucket/none"),
        ("s3://My_Bucket!/c", "Parameter validation failed: Invalid bucket name", "Set AWS_PROFILE"),
        ("sftp://host/cats", "sftp://host/cats is not of a kind that is read", "Copy it to a folder of this machine"),
    ):
        done = cli(app, "info", url)
        assert done.code == 2, url
        first, second = done.err.splitlines()
        assert problem in first
        assert fix in second
        assert "hunter2" not in done.err
    put("pictures", {"a.png": b"no cache"})
    done = cli(app, "encode", str(shop.source), "-o", "s3://bucket/pictures", "--model", str(shop.model))
    assert (done.code, "not empty and not a cache: it holds a.png" in done.err) == (2, True)
    for name, value, problem in (
        ("AWS_ENDPOINT_URL", "localhost:9000", "Invalid endpoint: localhost:9000"),
        ("AWS_PROFILE", "nobody", "The config profile (nobody) could not be found"),
    ):
        with monkeypatch.context() as patch:
            patch.setenv(name, value)
            another_machine(store / "third", patch)
            done = cli(app, "info", "s3://bucket/none")
        assert (done.code, problem in done.err, "Set AWS_PROFILE" in done.err) == (2, True, True), done.err
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(store / "none"))
    another_machine(store / "other", monkeypatch)
    done = cli(app, "info", "s3://bucket/cats2")
    assert (done.code, "AWS_PROFILE" in done.err) == (2, True), done.err


def test_a_run_trains_to_the_same_bits_from_a_url_and_resumes_from_it(store, shop, toy_model, monkeypatch):
    put("trained", files_of(shop.root))
    url = Path("s3://bucket/trained")
    optim = replace(CONFIG.optim, lr_scheduler="constant")
    config = replace(CONFIG, steps=4, batch_size=1, checkpoint_every=2, optim=optim)
    for root, cache in (("local", shop.root), ("there", url)):
        start_run(store / "runs" / root, cache, toy_model, config)
    local, there = ((store / "runs" / name / f"{name}.safetensors").read_bytes() for name in ("local", "there"))
    assert tensors_of(there) == tensors_of(local)
    document = json.loads((store / "runs/there/run.json").read_text())
    assert document["cache"] == "s3://bucket/trained"
    assert "a-secret-of-tests" not in json.dumps(document)
    another_machine(store / "other", monkeypatch)
    go_on(store / "runs/there", steps=6)
    assert latest_state(Run(store / "runs/there").state).progress.step == 6


def tensors_of(raw: bytes) -> dict[str, bytes]:
    """What a LoRA's file holds, without its metadata."""
    return {name: tensor.numpy().tobytes() for name, tensor in load(raw).items()}


def test_a_cache_goes_to_a_url_and_comes_back_with_the_same_rows(store, shop):
    cli, rows = Cli(store), rows_of(shop.root)
    done = cli(app, "push", str(shop.root), "s3://bucket/pushed")
    assert done.code == 0, done.err
    assert done.out.splitlines()[-1] == "Next, on another machine: k5cache pull s3://bucket/pushed"
    again = cli(app, "push", str(shop.root), "s3://bucket/pushed")
    assert again.code == 0, again.err
    assert any(line.split() == ["files", "sent", "0,", "0", "B"] for line in again.out.splitlines()), again.out
    done = cli(app, "pull", "s3://bucket/pushed")
    assert done.code == 0, done.err
    assert rows_of(store / "cache/pushed") == rows
    shard = next(path for path in (store / "cache/pushed").rglob("*.parquet") if path.parent.name == "latents")
    shard.write_bytes(shard.read_bytes()[:-1] + b"x")
    assert cli(app, "pull", "s3://bucket/pushed").code == 0
    assert rows_of(store / "cache/pushed") == rows
    refused = cli(app, "push", "s3://bucket/pushed", "s3://bucket/other")
    assert (refused.code, "is at a URL itself" in refused.err) == (2, True)
    refused = cli(app, "push", str(shop.root), "s3://bucket/pushed", "--public")
    assert (refused.code, "--public is for the hub" in refused.err) == (2, True)


def test_gc_deletes_what_is_proven_and_a_day_old(store, shop, monkeypatch):
    files = files_of(shop.root)
    shard = next(name for name in files if name.startswith("latents/"))
    stray = dict(files)
    manifest = unseal(files["manifest.json"])
    manifest["shards"] = [info for info in manifest["shards"] if info["file"] != shard]
    manifest |= {"index": None, "locations": None}  # as an encode that was killed leaves it
    put("strays", {**stray, "manifest.json": seal(manifest), "notes.txt": b"a person's"})
    collected = collect(folder_of(Path("s3://bucket/strays")))
    assert collected.unnamed == (), "an object of today may be of an encode that is at work elsewhere"
    monkeypatch.setattr(mirror, "_STALE_SECONDS", -60)
    collected = collect(folder_of(Path("s3://bucket/strays")))
    assert shard in collected.unnamed
    assert collected.foreign == ("notes.txt",)
    kept = {info["file"] for info in manifest["shards"]}
    assert set(in_store("strays")) == {"manifest.json", "notes.txt", *kept}


def test_a_url_in_memory_works_without_conditions(shop, tmp_path, monkeypatch):
    another_machine(tmp_path / "home", monkeypatch)
    objects = Objects("memory://bucket/x")
    tag = objects.replace("m", b"one", None)
    with pytest.raises(Changed):
        objects.replace("m", b"two", None)
    assert objects.replace("m", b"two", tag) != tag
    assert objects.read("m", 10)[0] == b"two"
    done = Cli(tmp_path)(app, "push", str(shop.root), "memory://bucket/cats")
    assert done.code == 0, done.err
    assert rows_of("memory://bucket/cats") == rows_of(shop.root)

"""A cache that another process writes, or writes to: read whole as it is then, never called damaged, and waited for."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from k5cache.cli import app
from k5cache.remote.mirror import folder_of
from k5cache.shared.errors import CacheCorrupt, CacheError, CacheLocked, OutputError
from k5cache.shared.lock import lock_file
from k5cache.store import manifest as manifests
from k5cache.store.index import index_rows, read_index, with_index
from k5cache.store.manifest import lock, read_manifest, write_manifest
from k5cache.store.ours import check_root
from k5cache.store.reader import open_cache
from k5cache.upkeep import at_url, gc, merge, verify
from k5cache.upkeep.at_url import send_cache
from k5cache.upkeep.gc import collect
from k5cache.upkeep.merge import merge_caches
from k5cache.upkeep.verify import verify_cache
from tests.cli import Cli
from tests.object_store import files_of, in_store, put
from tests.store_samples import flip, make_cache


def write_again(root: Path) -> None:
    """What the end of every encode does: an index of a new name, and the old one is deleted."""
    with lock(root):
        manifest = read_manifest(root)
        assert manifest.index
        rows = index_rows(read_index(root, manifest.index, manifest.format))
        write_manifest(root, with_index(root, manifest, rows))


def written_after_reading(module: object, root: Path, patch: pytest.MonkeyPatch) -> list[int]:
    """Let a writer replace the index of ``root`` just after ``module`` has read its manifest for the first time."""
    count: list[int] = []

    def reading(path: Path) -> manifests.Manifest:
        manifest = manifests.read_manifest(path)
        if path == root:
            count.append(len(count))
            if len(count) == 1:
                write_again(root)
        return manifest

    patch.setattr(module, "read_manifest", reading)
    return count


READERS: dict[str, tuple[object, Callable[[Path], object]]] = {
    "verify": (verify, lambda root: [verify_cache(root).problems, verify_cache(root).num_shards]),
    "merge": (merge, lambda root: len(open_cache(_merged(root)))),
    "gc": (gc, lambda root: collect(root, dry_run=True)),
}


def _merged(root: Path) -> Path:
    """Of this cache and a copy of it."""
    merge_caches([root, root.with_name("copy")], root.with_name("merged"))
    assert verify_cache(root.with_name("merged")).problems == ()
    return Path(shutil.move(root.with_name("merged"), root.with_name("last")))


@pytest.mark.parametrize("name", READERS)
def test_a_cache_whose_index_is_replaced_while_it_is_read_is_read_again_and_not_called_damaged(
    tmp_path, monkeypatch, name
):
    make_cache(tmp_path / "a")
    shutil.copytree(tmp_path / "a", tmp_path / "copy")
    module, read = READERS[name]
    undisturbed = read(tmp_path / "a")
    shutil.rmtree(tmp_path / "last", ignore_errors=True)
    count = written_after_reading(module, tmp_path / "a", monkeypatch)
    assert read(tmp_path / "a") == undisturbed
    assert len(count) > 1


def test_real_damage_is_named_although_the_cache_is_written_meanwhile(tmp_path, monkeypatch):
    manifest = make_cache(tmp_path / "a")
    shutil.copytree(tmp_path / "a", tmp_path / "copy")
    flip(tmp_path / "a" / manifest.shards[0].file, 1000)
    for module in (verify, merge):
        written_after_reading(module, tmp_path / "a", monkeypatch)
    assert manifest.shards[0].file in verify_cache(tmp_path / "a").problems[0]
    with pytest.raises(CacheCorrupt, match=manifest.shards[0].file):
        merge_caches([tmp_path / "a", tmp_path / "copy"], tmp_path / "merged")


def test_a_merge_waits_for_who_writes_its_output_as_long_as_it_is_told(tmp_path):
    for name in ("a", "b"):
        make_cache(tmp_path / name)
    (tmp_path / "ab").mkdir()
    with lock_file(tmp_path / "ab/.lock"):
        refused = Cli(tmp_path)(app, "merge", "a", "b", "-o", "ab")
        assert refused.code == 2
        assert "ab is being written by process " in refused.err
        assert "--wait SECONDS" in refused.err
        waited = Cli(tmp_path)(app, "merge", "a", "b", "-o", "ab", "--wait", "0.1")
        assert waited.code == 2
        with pytest.raises(CacheLocked) as caught, lock(tmp_path / "ab"):  # of a command without that option
            pass
        assert caught.value.fix == "Wait until it ends"
    assert Cli(tmp_path)(app, "merge", "a", "b", "-o", "ab", "--wait", "9").code == 0


def test_a_merge_at_a_url_is_refused_inside_a_part_and_says_that_it_is_a_copy(store, shop):
    put("a", files_of(shop.root))
    shutil.copytree(shop.root, store / "b")
    before = in_store("a")
    for place in ("s3://bucket/a/new", "s3://bucket/a/deep/new"):
        refused = Cli(store)(app, "merge", "s3://bucket/a", "b", "-o", place)
        assert (refused.code, "inside one another" in refused.err) == (2, True), refused.err
    with pytest.raises(OutputError):
        check_root(folder_of(Path("s3://bucket/a/new"), is_new=True), reads=[folder_of(Path("s3://bucket/a"))])
    assert in_store("a") == before
    merged = Cli(store)(app, "merge", "s3://bucket/a", "b", "-o", "s3://bucket/ab")
    assert (merged.code, "copies" in merged.out, "links" in merged.out) == (0, True, False), merged.err
    assert len(open_cache("s3://bucket/ab")) == 6


def test_a_cache_that_changes_while_it_is_sent_to_a_url_is_to_be_sent_again(store, shop, monkeypatch):
    written_after_reading(at_url, shop.root, monkeypatch)
    with pytest.raises(CacheError, match="changed while it was pushed") as caught:
        send_cache(shop.root, Path("s3://bucket/sent"))
    assert caught.value.fix == "Push it again"
    assert "manifest.json" not in in_store("sent")
    send_cache(shop.root, Path("s3://bucket/sent"))
    assert len(open_cache("s3://bucket/sent")) == 6

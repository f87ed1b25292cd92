"""Images at a URL are what they are in a folder: the same items, captions and rows. Tags tell what has changed."""

from __future__ import annotations

import io
import os
import pickle
import tarfile
from pathlib import Path

import pytest

from k5cache.cli import app
from k5cache.options import CacheConfig
from k5cache.remote import copies
from k5cache.remote.objects import Objects
from k5cache.shared.errors import DatasetError, StoreError
from k5cache.sources import find
from k5cache.sources.items import UnreadableImage
from k5cache.sources.shadow import Shadow
from tests.cli import Cli
from tests.object_store import another_machine, point_at, put
from tests.workshop import Workshop


@pytest.fixture
def shop(server, tmp_path, toy_model, monkeypatch) -> Workshop:
    point_at(server, tmp_path / "home", monkeypatch)
    shop = Workshop(tmp_path / "shop", toy_model)
    for number in range(3):
        shop.put(f"sub/{number}.png", f"picture {number}", seed=number)
    shop.put("top.jpg", "on top\nof all", seed=9)
    return shop


def objects_of(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def listed(source: Path | str, config: CacheConfig = CacheConfig()) -> dict[str, tuple[tuple[str, ...], bytes]]:  # noqa: B008
    """Path -> captions and bytes of every item."""
    images = find.find(Path(source), config)
    contents = {item.path: images.read(item.path) for item in images.items}
    return {
        item.path: (item.captions, c if isinstance(c := contents[item.path], bytes) else c.read_bytes())
        for item in images.items
    }


def test_a_folder_with_captions_has_the_same_items_and_rows_as_here(shop, monkeypatch):
    put("plain", objects_of(shop.source))
    url = Path("s3://bucket/plain")
    assert listed(url) == listed(shop.source)
    local, shop.source = shop.source, url
    assert shop.encode().num_latents == 4
    keys = {row.path: (row.latent_key, row.caption_keys) for row in shop.cache.rows(range(4))}
    assert shop.encode().is_unchanged
    fetched: list[str] = []
    fetch = Objects.fetch
    monkeypatch.setattr(Objects, "fetch", lambda self, name, *rest: fetched.append(name) or fetch(self, name, *rest))
    another_machine(shop.root.parent / "other", monkeypatch)
    assert shop.encode().is_unchanged  # the store's tags say so, on a machine that has no copy
    assert not [name for name in fetched if not name.endswith(".txt")]
    put("plain", {"sub/1.png": (local / "sub/2.png").read_bytes()})
    report = shop.encode()
    assert report.changed == ("sub/1.png",)
    assert [name for name in fetched if not name.endswith(".txt")] == ["sub/1.png"]
    shop.source, shop.root = local, shop.root.with_name("local")
    shop.encode()
    now = {row.path: (row.latent_key, row.caption_keys) for row in shop.cache.rows(range(4))}
    assert now == keys


def test_tables_tars_and_parquet_are_read_as_they_are_here(shop, tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    here = tmp_path / "tables"
    here.mkdir()
    pictures = {f"{n}.png": (shop.source / f"sub/{n}.png").read_bytes() for n in range(3)}
    for number in range(2):
        with tarfile.open(here / f"cats-{number}.tar", "w") as tar:
            for name, content in {f"{number}.png": pictures[f"{number}.png"], f"{number}.txt": b"a cat"}.items():
                member = tarfile.TarInfo(name)
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    rows = [{"image": {"bytes": content, "path": name}, "text": f"row {name}"} for name, content in pictures.items()]
    pq.write_table(pa.Table.from_pylist(rows), here / "rows.parquet")
    named = {
        **pictures,
        "metadata.jsonl": b'{"file_name": "0.png", "text": "zero"}\n{"file_name": "1.png", "text": "one"}',
    }
    put("tables", objects_of(here))
    put("named", named)
    (tmp_path / "named").mkdir()
    for name, content in named.items():
        (tmp_path / "named" / name).write_bytes(content)
    metadata = CacheConfig(caption_strategy="metadata")
    assert listed("s3://bucket/tables/cats-*.tar") == listed(here / "cats-*.tar")
    assert listed("s3://bucket/tables/rows.parquet") == listed(here / "rows.parquet")
    assert listed("s3://bucket/named", metadata) == listed(tmp_path / "named", metadata)
    assert len(listed("s3://bucket/tables/cats-*.tar")) == 2


def test_another_process_reads_the_pictures_also_on_a_machine_without_copies(shop, monkeypatch):
    put("sent", objects_of(shop.source))
    shadow = Shadow(Path("s3://bucket/sent"), CacheConfig())
    assert shadow.content(shadow.path / "sub/1.png") == (shop.source / "sub/1.png").read_bytes()  # threads run now
    sent = pickle.dumps(shadow)
    assert os.environ["AWS_SECRET_ACCESS_KEY"].encode() not in sent
    another_machine(shop.root.parent / "other", monkeypatch)
    there = pickle.loads(sent)
    for name in ("sub/0.png", "sub/1.png", "sub/2.png", "top.jpg"):
        assert there.content(shadow.path / name) == (shop.source / name).read_bytes()


def test_an_object_that_the_store_lists_late_is_asked_for_by_name(shop, monkeypatch):
    pictures = {name: content for name, content in objects_of(shop.source).items() if name.startswith("sub/")}
    table = b"".join(b'{"file_name": "sub/%d.png", "text": "number %d"}\n' % (n, n) for n in range(3))
    put("late", {**pictures, "metadata.jsonl": table})
    entries = Objects.entries
    late = ("sub/1.png", "sub/2.txt")
    monkeypatch.setattr(Objects, "entries", lambda self: [entry for entry in entries(self) if entry.name not in late])
    rows = listed("s3://bucket/late", CacheConfig(caption_strategy="metadata"))
    assert sorted(rows) == ["sub/0.png", "sub/1.png", "sub/2.png"]
    assert sorted(listed("s3://bucket/late", CacheConfig())) == ["sub/0.png", "sub/2.png"]


def test_names_that_lead_out_are_no_files_and_are_named(shop, tmp_path, monkeypatch):
    put("odd", objects_of(shop.source))
    find_all = Objects.entries
    import s3fs

    find_s3 = s3fs.S3FileSystem.find

    def with_odd(self, path, detail=False, **options):
        found = find_s3(self, path, detail=detail, **options)
        odd = {f"{path}/../evil.png": {"size": 3, "ETag": "x"}, f"{path}//etc/passwd": {"size": 3, "ETag": "x"}}
        return found | odd if detail else [*found, *odd]

    monkeypatch.setattr(s3fs.S3FileSystem, "find", with_odd)
    assert find_all
    images = find.find(Path("s3://bucket/odd"), CacheConfig())
    assert len(images.items) == 4
    reasons = {skip.path: skip.reason for skip in images.skipped}
    assert reasons == dict.fromkeys(("../evil.png", "/etc/passwd"), "has a name that no file here can have")
    assert not list(tmp_path.rglob("evil.png"))


def test_names_with_unusual_spaces_are_read_and_a_name_that_is_a_folder_too_is_skipped(shop):
    picture = (shop.source / "sub/0.png").read_bytes()
    names = ["shot\u202f3 PM.png", "a#b?c%20.png", "ü\u3000.png"]
    put("spaces", dict.fromkeys(names, picture) | {"cat.png": picture, "cat.png/one.png": picture})
    images = find.find(Path("s3://bucket/spaces"), CacheConfig(caption_strategy="filename"))
    assert sorted(item.path for item in images.items) == sorted([*names, "cat.png/one.png"])
    assert all(images.read(name) == picture for name in names)
    assert [(skip.path, skip.reason) for skip in images.skipped] == [
        ("cat.png", "is a folder too, and cannot be both here")
    ]


def test_a_damaged_copy_of_a_picture_is_fetched_again_and_what_nobody_asks_for_is_not_kept(shop, monkeypatch):
    picture = (shop.source / "sub/0.png").read_bytes()
    put("kept", {f"{number:03}.png": picture for number in range(60)})
    images = find.find(Path("s3://bucket/kept"), CacheConfig(caption_strategy="filename"))
    assert images.read("000.png") == picture
    (copy,) = copies.k5_home().rglob("pictures/*")
    copy.write_bytes(picture[:-1] + b"x")
    assert images.read("000.png") == picture
    shadows: list[Shadow] = []
    content = Shadow.content
    monkeypatch.setattr(Shadow, "content", lambda self, path: shadows.append(self) or content(self, path))
    for begin in (1, 20, 40):
        for number in range(begin, begin + 5):
            assert images.read(f"{number:03}.png") == picture
    assert len(shadows[-1]._ahead) <= 32


def test_pictures_are_copied_within_a_bound_and_one_that_is_gone_is_skipped(shop, monkeypatch):
    put("gone", objects_of(shop.source))
    monkeypatch.setenv("K5_REMOTE_SIZE", "0.02MB")
    images = find.find(Path("s3://bucket/gone"), CacheConfig())
    contents = [images.read(item.path) for item in images.items]
    assert contents == [(shop.source / item.path).read_bytes() for item in images.items]
    held = list(copies.k5_home().rglob("pictures/*"))
    assert sum(path.stat().st_size for path in held) < sum(map(len, contents))
    Objects("s3://bucket/gone").delete(["sub/1.png"])
    monkeypatch.setattr(copies, "bound", lambda: 1)
    images.read("top.jpg")  # makes room
    images.read("sub/0.png")
    with pytest.raises(UnreadableImage, match="is no longer there"):
        images.read("sub/1.png")


def test_what_is_wrong_with_a_source_is_said_in_two_lines(shop, monkeypatch):
    put("one", objects_of(shop.source))
    with pytest.raises(DatasetError, match="There is nothing at s3://bucket/nothing"):
        find.find(Path("s3://bucket/nothing"), CacheConfig())
    with pytest.raises(StoreError, match="there is no bucket nowhere"):
        find.find(Path("s3://nowhere/x"), CacheConfig())
    done = Cli(shop.root.parent)(
        app, "encode", "s3://bucket/one", "-o", "s3://bucket/one/cache", "--model", str(shop.model)
    )
    assert done.code == 2
    assert "s3://bucket/one/cache and s3://bucket/one are inside one another" in done.err
    put("big", {"a.tar": b"0" * 4096})
    monkeypatch.setenv("K5_REMOTE_SIZE", "0.001MB")
    with pytest.raises(StoreError, match=r"s3://bucket/big has 4.0 KiB of tables, tars and text to copy"):
        find.find(Path("s3://bucket/big"), CacheConfig())

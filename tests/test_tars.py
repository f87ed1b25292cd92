"""Which images does a tar give, with which captions and masks, and what is said of the rest?"""

from __future__ import annotations

import gc
import gzip
import io
import tarfile

import pytest

from k5cache.options import CacheConfig
from k5cache.shared.errors import DatasetError
from k5cache.sources.find import find
from k5cache.sources.items import UnreadableImage
from tests.table_files import captions, contents, png, skipped, tar


def test_names_with_dots_belong_together_as_the_image_says(tmp_path):
    members = {
        "photo.jpg": png(1), "photo.txt": "plain",
        "photo.v2.jpg": png(2), "photo.v2.txt": "second", "photo.v2.mask.png": png(3),
        "a.b/x.1.png": png(4), "a.b/x.1.txt": "in a folder",
        "y.rgb.png": png(5), "y.txt": "of its key", "y.mask.png": png(6),
    }  # fmt: skip
    path = tar(tmp_path / "t.tar", members)
    assert captions(path) == {
        "t.tar/photo.jpg": ("plain",), "t.tar/photo.v2.jpg": ("second",), "t.tar/a.b/x.1.png": ("in a folder",),
        "t.tar/y.rgb.png": ("of its key",),
    }  # fmt: skip
    assert contents(path) == {f"t.tar/{name}": data for name, data in members.items() if isinstance(data, bytes)}
    masks = {item.path: item.mask.path for item in find(path, CacheConfig()).items if item.mask}
    assert masks == {"t.tar/photo.v2.jpg": "t.tar/photo.v2.mask.png", "t.tar/y.rgb.png": "t.tar/y.mask.png"}
    assert skipped(path) == {}


def test_dotted_names_without_captions_are_images_of_their_own_and_their_names_are_captions(tmp_path):
    path = tar(tmp_path / "t.tar", {"cat.v1.jpg": png(1), "cat.v2.jpg": png(2)})
    expected = {"t.tar/cat.v1.jpg": ("cat.v1",), "t.tar/cat.v2.jpg": ("cat.v2",)}
    assert captions(path, caption_strategy="filename") == expected


def test_several_images_for_one_caption_are_refused_until_one_is_chosen(tmp_path):
    path = tar(tmp_path / "t.tar", {"a.jpg": png(1), "a.png": png(2), "a.txt": "one", "b.jpg": png(3), "b.txt": "two"})
    with pytest.raises(DatasetError, match="has images in jpg and png for a"):
        find(path, CacheConfig())
    assert captions(path, image_column="png") == {"t.tar/a.png": ("one",)}
    assert skipped(path, image_column="png") == {"t.tar/b.jpg": "has no png"}
    other = tar(tmp_path / "u.tar", {"a.rgb.png": png(1), "a.depth.png": png(2), "a.txt": "one"})
    with pytest.raises(DatasetError, match=r"has images in depth\.png and rgb\.png for a"):
        find(other, CacheConfig())
    assert captions(other, image_column="rgb.png") == {"u.tar/a.rgb.png": ("one",)}


def test_a_companion_image_is_no_image_to_train_on(tmp_path):
    path = tar(tmp_path / "t.tar", {"a.jpg": png(1), "a.seg.png": png(2), "a.txt": "one"})
    assert contents(path) == {"t.tar/a.jpg": png(1)}


def test_what_cannot_be_used_among_the_first_rows_is_named_and_the_rest_is_used(tmp_path):
    members = [
        ("README.md", "about"), ("LICENSE", "free"), ("._0.png", "of a Mac"), ("0.png", png(0)),
        ("0.txt", "zéro".encode("cp1252")),
        ("1.jpg", png(1)), ("1.TXT", "\ufeffone"), ("2.png", png(2)), ("3.txt", "no image"), ("4.psd", "layers"),
        ("4.txt", "a document"), ("5.png", png(5)), ("5.txt", "five"), ("5.png", png(6)),
        ("6.png", png(6)), ("6.txt", " \n"),
    ]  # fmt: skip
    path = tar(tmp_path / "t.tar", members)
    assert captions(path) == {"t.tar/1.jpg": ("one",), "t.tar/5.png": ("five",)}
    assert contents(path)["t.tar/5.png"] == png(6)
    assert skipped(path) == {
        "t.tar/README.md": "has no image beside it",
        "t.tar/LICENSE": "has no image beside it",
        "t.tar/0.png": "caption 0.txt is not UTF-8",
        "t.tar/2.png": "missing caption 2.txt",
        "t.tar/3.txt": "has no image beside it",
        "t.tar/4.psd": "is a Photoshop document: save it as PNG",
        "t.tar/5.png": "is there twice: the later one is used, as tar itself does",
        "t.tar/6.png": "empty caption",
    }


def test_a_field_of_json_is_a_caption_and_damaged_json_is_named(tmp_path):
    members = {
        "a.png": png(1),
        "a.json": '{"p": ["x", "y"]}',
        "b.png": png(2),
        "b.json": "{",
        "c.png": png(3),
        "c.json": "[]",
    }
    path = tar(tmp_path / "t.tar", members)
    assert captions(path, caption_column="json.p") == {"t.tar/a.png": ("x", "y")}
    reasons = {"t.tar/b.png": "b.json is not JSON", "t.tar/c.png": "empty caption"}
    assert skipped(path, caption_column="json.p") == reasons


def test_members_of_a_compressed_tar_are_read_in_any_order(tmp_path):
    members = {f"{i}.{kind}": png(i) if kind == "png" else f"number {i}" for kind in ("png", "txt") for i in range(20)}
    plain, compressed = tar(tmp_path / "plain.tar", members), tar(tmp_path / "gz.tar", members, "w:gz")
    for path in (plain, compressed):
        found = find(path, CacheConfig())
        assert len(found.items) == 20
        for i in (19, 3, 11, 0):
            assert found.read(f"{path.name}/{i}.png") == png(i)
    del found
    gc.collect()  # a file that is left open is an error here


@pytest.mark.parametrize("lost", [1, 600, 2000])
def test_a_tar_that_is_cut_off_is_named(tmp_path, lost):
    path = tar(tmp_path / "t.tar", {f"{i}.{kind}": png(i) * 9 for i in range(4) for kind in ("png", "txt")})
    found = find(path, CacheConfig(caption_strategy="filename"))
    end = path.read_bytes().rfind(b"IEND")
    path.write_bytes(path.read_bytes()[: end - lost])
    with pytest.raises(DatasetError, match=r"t\.tar cannot be read as a tar: unexpected end of data"):
        find(path, CacheConfig())
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(UnreadableImage, match="the tar is shorter than when it was listed"):
        found.read("t.tar/3.png")


def test_tars_of_one_name_in_two_folders_keep_their_rows_apart(tmp_path):
    for i in range(2):
        (tmp_path / f"{i}").mkdir()
        tar(tmp_path / f"{i}" / "x.tar", {"a.png": png(i), "a.txt": f"number {i}"})
    expected = {f"{tmp_path}/{i}/x.tar/a.png": (f"number {i}",) for i in range(2)}
    assert captions(tmp_path / "?" / "x.tar") == expected


def test_of_a_caption_that_was_appended_anew_the_later_one_is_used_and_this_is_said(tmp_path):
    path = tar(tmp_path / "t.tar", [("0.png", png(0)), ("0.txt", "old"), ("1.png", png(1)), ("1.txt", "one")])
    with tarfile.open(path, "a") as archive:
        info = tarfile.TarInfo("0.txt")
        info.size = 3
        archive.addfile(info, io.BytesIO(b"new"))
    assert captions(path) == {"t.tar/0.png": ("new",), "t.tar/1.png": ("one",)}
    assert skipped(path) == {"t.tar/0.txt": "is there twice: the later one is used, as tar itself does"}


def test_links_in_a_tar_are_the_files_they_lead_to_and_what_cannot_be_read_is_named(tmp_path):
    source = tmp_path / "source"
    for name, content in {"a.png": png(1), "a.txt": b"one", "sub/c.txt": b"three", "@eaDir/a.png": png(9)}.items():
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_bytes(content)
    (source / "b.png").hardlink_to(source / "a.png")
    (source / "b.txt").symlink_to("a.txt")
    (source / "sub/c.png").symlink_to("../b.png")
    (source / "d.png").symlink_to("/nowhere.png")
    (source / "loop.png").symlink_to("loop.png")
    path = tmp_path / "t.tar"
    with tarfile.open(path, "w") as archive:
        for file in sorted(source.rglob("*")):
            archive.add(file, file.relative_to(source), recursive=False)
        sparse = tarfile.TarInfo("s.png")
        sparse.type = tarfile.GNUTYPE_SPARSE
        archive.addfile(sparse)
    expected = {"t.tar/a.png": ("one",), "t.tar/b.png": ("one",), "t.tar/sub/c.png": ("three",)}
    assert captions(path) == expected
    assert contents(path) == dict.fromkeys(expected, png(1))
    assert skipped(path) == {
        "t.tar/@eaDir/a.png": "is in a folder of a NAS, an archiver or a system",
        "t.tar/d.png": "is a link to /nowhere.png, which is not a file in the tar",
        "t.tar/loop.png": "is a link to loop.png, which is not a file in the tar",
        "t.tar/s.png": "is stored as a sparse file: pack the tar without --sparse",
    }


@pytest.mark.parametrize("mode", ["w", "w:gz"])
def test_a_tar_with_a_damaged_header_or_another_tar_behind_its_end_is_refused(tmp_path, mode):
    members = {f"{i}.{kind}": png(i) if kind == "png" else "c" for i in range(3) for kind in ("png", "txt")}
    whole = tar(tmp_path / "whole.tar", members).read_bytes()
    header = whole.index(b"1.png")
    damaged = whole[: header + 100] + b"x" + whole[header + 101 :]
    for content, said in (
        (damaged, "damaged or cut off after 2 files"),
        (whole[: header + 300], "damaged or cut off after 2 files"),
        (whole + whole, "another tar follows its end after 6 files, joined by cat and not by tar"),
    ):
        path = tmp_path / "t.tar"
        path.write_bytes(content if mode == "w" else gzip.compress(content, mtime=0))
        with pytest.raises(DatasetError, match=said):
            find(path, CacheConfig())
    path.write_bytes(whole[: whole.rindex(b"c\0") + 512])  # the zeros at the end are missing
    assert len(captions(path)) == 3

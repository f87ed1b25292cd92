"""Which images are there with which captions, and which exact pixels is each one trained on?"""

from __future__ import annotations

import itertools
import os
import random
import struct
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from k5cache.buckets import Bucket, cover
from k5cache.options import CacheConfig
from k5cache.sources import images
from k5cache.sources.folder import find_items
from k5cache.sources.images import hash_content, image_size, load_many, load_pixels
from k5cache.sources.items import Skipped, UnreadableImage, stat_numbers
from tests.picture_files import BLACK, BLUE, GREEN, RED, chunk, png, whole

CONFIG = CacheConfig()


# --- which images there are ---


def put(root: Path, name: str, caption: bytes | None = b"a cat", image: bytes = b"not opened here") -> Path:
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(image)
    if caption is not None:
        path.with_suffix(".txt").write_bytes(caption)
    return path


def test_images_of_every_suffix_are_found_in_sub_folders_too_sorted_by_path_and_other_files_are_not(tmp_path):
    names = ["a.JPG", "b.jpeg", "c.Png", "sub/d.webp", "sub/deep/e.avif", "sub/f.bmp", "z.tif", "y.TIFF",
             "g.GIF", "h.jfif", "i.jpe", "j.apng", "k.jp2", "l.heic", "m.jxl"]  # fmt: skip
    for name in [*names, "notes.md", "jpg", "film.mp4", "old.jpg.bak"]:
        put(tmp_path, name)
    items, skipped = find_items(tmp_path, CONFIG)
    assert [item.path for item in items] == sorted(names)
    assert [skip.path for skip in skipped] == ["film.txt", "jpg.txt", "notes.txt", "old.jpg.txt"]


def test_an_item_carries_the_stat_that_tells_whether_it_changed(tmp_path):
    path = put(tmp_path, "cat.jpg", image=b"12345")
    os.utime(path, ns=(1, 1_700_000_000_123_456_789))
    [item] = find_items(tmp_path, CONFIG)[0]
    assert (item.num_bytes, item.mtime_ns, item.inode) == (5, 1_700_000_000_123_456_789, stat_numbers(path.stat())[2])


def test_no_image_is_opened_to_find_it(tmp_path):
    put(tmp_path, "cat.jpg", image=b"")
    assert [item.path for item in find_items(tmp_path, CONFIG)[0]] == ["cat.jpg"]


def test_hidden_files_and_folders_are_passed_over(tmp_path):
    for name in ["._cat.jpg", ".cache/cat.jpg", "sub/.trash/cat.jpg", ".cat.jpg"]:
        put(tmp_path, name)
    assert find_items(tmp_path, CONFIG) == ([], [Skipped(".cat.jpg", "is hidden: its name begins with a dot")])


def test_images_that_differ_only_in_suffix_share_a_caption(tmp_path):
    put(tmp_path, "cat.jpg", b"one cat")
    put(tmp_path, "cat.png", None)
    assert [(i.path, i.captions) for i in find_items(tmp_path, CONFIG)[0]] == [
        ("cat.jpg", ("one cat",)),
        ("cat.png", ("one cat",)),
    ]


@pytest.mark.parametrize(
    ("written", "captions"),
    [
        (b"a cat", ("a cat",)),
        (b"  a cat \r\n", ("  a cat ",)),  # the pipeline's cleaning strips it
        (b"\xef\xbb\xbfa cat", ("a cat",)),
        ("ein Kätzchen, 子猫 🐈".encode(), ("ein Kätzchen, 子猫 🐈",)),
        (b"a cat\n\n  a tabby  \ra kitten\n", ("a cat", "  a tabby  ", "a kitten")),
        ("a cat\u2028still the same line".encode(), ("a cat\u2028still the same line",)),
    ],
)
def test_a_caption_file_holds_one_utf8_caption_a_line(tmp_path, written, captions):
    put(tmp_path, "cat.jpg", written)
    [item] = find_items(tmp_path, CONFIG)[0]
    assert item.captions == captions


@pytest.mark.parametrize(
    ("written", "reason"),
    [
        (None, "missing caption cat.txt"),
        (b"", "empty caption"),
        (b"\xef\xbb\xbf \n\t\n", "empty caption"),
        (b"a\ncaf\xe9", "caption cat.txt is not UTF-8 (byte 0xe9 in line 2): save it as UTF-8"),
        ("a cat".encode("utf-16"), "caption cat.txt is UTF-16, not UTF-8: save it as UTF-8"),
        ("a cat".encode("utf-16-le"), "caption cat.txt is not UTF-8 but perhaps UTF-16: save it as UTF-8"),
    ],
)
def test_an_image_without_a_usable_caption_is_skipped_with_the_reason_and_the_others_stay(tmp_path, written, reason):
    put(tmp_path, "sub/cat.jpg", written)
    put(tmp_path, "sub/dog.jpg")
    items, skipped = find_items(tmp_path, CONFIG)
    assert [item.path for item in items] == ["sub/dog.jpg"]
    assert skipped == [Skipped("sub/cat.jpg", reason)]


def test_links_are_followed_and_a_loop_of_them_ends(tmp_path):
    source, elsewhere = tmp_path / "source", tmp_path / "elsewhere"
    put(source, "real/cat.jpg")
    put(elsewhere, "dog.jpg")
    (source / "a_link_to_real").symlink_to(source / "real")  # found once, under its own path
    (source / "linked").symlink_to(elsewhere)
    (source / "real" / "up").symlink_to(source)
    (source / "to_parent").symlink_to(tmp_path)
    (source / "to_root").symlink_to("/")
    (source / "to_itself").symlink_to(source / "to_itself")
    (source / "gone.jpg").symlink_to(source / "nowhere")
    items, skipped = find_items(source, CONFIG)
    assert [item.path for item in items] == ["linked/dog.jpg", "real/cat.jpg"]
    assert skipped == [Skipped("gone.jpg", "is a broken link")]


def test_a_pipe_that_is_named_like_an_image_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "cat.jpg")
    (tmp_path / "cat.txt").write_text("a cat")
    assert find_items(tmp_path, CONFIG) == ([], [Skipped("cat.jpg", "is not a file")])


def test_a_file_name_that_is_not_utf8_is_skipped_under_a_name_that_can_be_printed(tmp_path):
    (tmp_path / os.fsdecode(b"caf\xe9.jpg")).write_bytes(b"")
    assert find_items(tmp_path, CONFIG) == ([], [Skipped("caf\ufffd.jpg", "its name is not valid UTF-8")])


def test_the_hash_is_of_the_bytes(tmp_path):
    path = put(tmp_path, "cat.jpg", image=b"abc")
    assert hash_content(path) == "ba7816bf8f01cfea414140de5dae2223"  # FIPS 180-2's own example
    with pytest.raises(UnreadableImage, match="no longer there"):
        hash_content(tmp_path / "gone.jpg")


def test_finding_and_measuring_images_needs_no_torch():
    code = "import sys, k5cache.sources.images; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# --- orientation ---

STORED = ("RG", "BK")
SHOWN = {
    1: ("RG", "BK"), 2: ("GR", "KB"), 3: ("KB", "GR"), 4: ("BK", "RG"),
    5: ("RB", "GK"), 6: ("BR", "KG"), 7: ("KG", "BR"), 8: ("GK", "RB"),
}  # fmt: skip
PAINT = {"R": RED, "G": GREEN, "B": BLUE, "K": BLACK}


def quadrants() -> Image.Image:
    """32 x 16, one colour a quarter."""
    cells = np.array([[PAINT[name] for name in row] for row in STORED], dtype=np.uint8)
    return Image.fromarray(cells.repeat(8, 0).repeat(16, 1))


def assert_shows(path: Path, orientation: int) -> None:
    width, height = (16, 32) if orientation > 4 else (32, 16)
    assert image_size(path) == (width, height)
    pixels = whole(path)
    assert pixels.shape == (3, height, width)
    for row, column in itertools.product((0, 1), (0, 1)):
        cell = pixels[:, row * height // 2 : (row + 1) * height // 2, column * width // 2 : (column + 1) * width // 2]
        expected = torch.tensor(PAINT[SHOWN[orientation][row][column]])
        # lossy formats: within 12 of 255 where no neighbour bleeds in
        assert (cell[:, 2:-2, 2:-2].int() - expected[:, None, None]).abs().max() <= 12


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "avif", "tiff"])
def test_an_image_is_turned_as_its_exif_says(tmp_path, suffix, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / f"turned.{suffix}"
    lossless = {"jpg": {"quality": 100, "subsampling": 0}, "webp": {"lossless": True}, "avif": {"quality": 100}}
    quadrants().save(path, exif=exif, **lossless.get(suffix, {}))
    assert_shows(path, orientation)


def test_a_png_that_says_behind_its_pixels_how_it_is_turned_is_turned(tmp_path):
    rows = b"".join(b"\0" + row.tobytes() for row in np.asarray(quadrants()))
    exif = b"MM\0*" + struct.pack(">IHHHIHHI", 8, 1, 0x0112, 3, 1, 6, 0, 0)
    for name, chunks in [("early", {"before": chunk(b"eXIf", exif)}), ("late", {"after": chunk(b"eXIf", exif)})]:
        assert_shows(png(tmp_path / f"{name}.png", (32, 16), 8, 2, rows, **chunks), 6)


@pytest.mark.parametrize("exif", [b"", b"garbage", b"Exif\0\0MM\0*\xff\xff\xff\xff", b"Exif\0\0II*\0\x08\0\0\0\xff"])
@pytest.mark.filterwarnings("ignore:.*EXIF")  # silenced by k5cache.sources.images outside of pytest
def test_damaged_exif_turns_nothing_and_stops_nothing(tmp_path, exif):
    path = tmp_path / "cat.jpg"
    quadrants().save(path, exif=exif, quality=100, subsampling=0)
    assert_shows(path, 1)


# --- resize and crop ---


def noise_image(path: Path, width: int, height: int) -> Image.Image:
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))
    image.save(path)
    return image


@pytest.mark.parametrize("size", [(150, 90), (97, 211), (40, 30), (64, 48), (64, 100)])
def test_the_resize_is_bicubic_with_antialias_and_the_crop_is_the_centre(tmp_path, size):
    image = noise_image(tmp_path / "cat.png", *size)
    geometry = cover(*size, Bucket(64, 48))
    pixels = load_pixels(tmp_path / "cat.png", geometry)
    assert pixels.shape == (3, 48, 64)
    assert pixels.dtype == torch.uint8
    assert pixels.is_contiguous()
    left, top = geometry.left, geometry.top
    # Rows before columns, in words: for one call Pillow chooses the order, and on noise 8 bits between passes show it.
    rows_done = image.resize((geometry.resized_width, size[1]), Image.Resampling.BICUBIC)
    resized = rows_done.resize((geometry.resized_width, geometry.resized_height), Image.Resampling.BICUBIC)
    expected = torch.from_numpy(np.array(resized.crop((left, top, left + 64, top + 48)))).permute(2, 0, 1)
    # both compute in integers, with weights of 15 and of 22 bits
    torch.testing.assert_close(pixels, expected, rtol=0, atol=1)


def test_a_flipped_crop_is_the_mirror_image(tmp_path):
    noise_image(tmp_path / "cat.png", 70, 48)
    geometry = cover(70, 48, Bucket(64, 48))
    flipped = load_pixels(tmp_path / "cat.png", type(geometry)(**{**vars(geometry), "flipped": True}))
    assert torch.equal(flipped, load_pixels(tmp_path / "cat.png", geometry).flip(2))


def test_an_image_of_8_by_8_loads_and_its_geometry_says_that_it_was_enlarged(tmp_path):
    Image.new("RGB", (8, 8), (10, 200, 30)).save(tmp_path / "cat.png")
    geometry = cover(*image_size(tmp_path / "cat.png"), Bucket(1024, 1024))
    assert geometry.upscaled
    pixels = load_pixels(tmp_path / "cat.png", geometry)
    assert pixels.shape == (3, 1024, 1024)
    assert pixels.amin((1, 2)).tolist() == pixels.amax((1, 2)).tolist() == [10, 200, 30]


# --- what cannot be read ---


def reason(path: Path) -> str:
    with pytest.raises(UnreadableImage) as caught:
        whole(path)
    return caught.value.reason


def test_an_empty_file_and_something_else_and_a_missing_file_are_named_as_such(tmp_path):
    (tmp_path / "empty.jpg").write_bytes(b"")
    (tmp_path / "text.jpg").write_text("once upon a time")
    (tmp_path / "page.jpg").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n")  # Pillow knows it: not us
    assert reason(tmp_path / "empty.jpg") == "is empty (0 bytes)"
    assert reason(tmp_path / "text.jpg") == "is not an image, or is of a kind that is not supported"
    assert reason(tmp_path / "page.jpg") == "is not an image, or is of a kind that is not supported"
    assert reason(tmp_path / "gone.jpg") == "is no longer there"


KINDS = ["jpg", "progressive.jpg", "png", "webp", "avif", "bmp", "tiff", "lzw.tiff"]


def noisy(path: Path) -> bytes:
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))
    options = {"progressive.jpg": {"progressive": True}, "lzw.tiff": {"compression": "tiff_lzw"}}
    image.save(path, **options.get(path.name.partition(".")[2], {}))
    return path.read_bytes()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.filterwarnings("ignore::UserWarning:PIL")  # silenced by k5cache.sources.images outside of pytest
def test_a_truncated_image_is_refused_at_whatever_byte_it_ends(tmp_path, kind):
    data = noisy(tmp_path / f"cat.{kind}")
    for share in (0.01, 0.1, 0.3, 0.5, 0.7, 0.9):
        (tmp_path / f"cat.{kind}").write_bytes(data[: int(len(data) * share)])
        assert reason(tmp_path / f"cat.{kind}")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.filterwarnings("ignore::UserWarning:PIL")  # silenced by k5cache.sources.images outside of pytest
def test_damaged_bytes_give_a_picture_or_a_reason_and_nothing_else(tmp_path, kind):
    data, draw = noisy(tmp_path / f"cat.{kind}"), random.Random(0)
    for _ in range(40):
        damaged = bytearray(data)
        for _ in range(3):
            damaged[draw.randrange(min(len(data), draw.choice((64, 1024, len(data)))))] = draw.randrange(256)
        (tmp_path / f"cat.{kind}").write_bytes(damaged)
        try:
            assert whole(tmp_path / f"cat.{kind}").dtype == torch.uint8
        except UnreadableImage as error:
            assert str(error)  # noqa: PT017 (either outcome is right)


@pytest.mark.parametrize("side", [23_000, 40_000, 2**31 - 1])
@pytest.mark.filterwarnings(
    "ignore::PIL.Image.DecompressionBombWarning"
)  # silenced by k5cache.sources.images outside of pytest
def test_a_decompression_bomb_is_refused_before_it_is_decoded(tmp_path, side):
    path = png(tmp_path / "bomb.png", (side, side), 8, 0, b"")
    with pytest.raises(UnreadableImage, match="more than 500 million pixels"):
        image_size(path)


def test_an_image_larger_than_pillows_own_limit_but_within_ours_is_accepted(tmp_path):
    assert image_size(png(tmp_path / "large.png", (20_000, 20_000), 8, 0, b"")) == (20_000, 20_000)


def test_an_image_too_long_and_thin_to_be_resized_is_refused_rather_than_filling_the_memory(tmp_path):
    Image.new("L", (10_000, 1)).save(tmp_path / "line.png")
    with pytest.raises(UnreadableImage, match="10000x1 is too long and thin to fill 1408x640"):
        load_pixels(tmp_path / "line.png", cover(10_000, 1, Bucket(1408, 640)))


def test_an_image_that_was_replaced_since_it_was_measured_is_refused(tmp_path):
    Image.new("RGB", (20, 10)).save(tmp_path / "cat.png")
    with pytest.raises(UnreadableImage, match="is 20x10 now and was 10x20"):
        load_pixels(tmp_path / "cat.png", cover(10, 20, Bucket(16, 16)))


# --- many ---


def jobs_of(tmp_path: Path, count: int) -> list[tuple[Path, images.Geometry]]:
    jobs = []
    for i in range(count):
        path = tmp_path / f"{i}.bmp"
        Image.new("RGB", (16, 16), (i, i, i)).save(path)
        jobs.append((path, cover(16, 16, Bucket(16, 16))))
    return jobs


def test_many_images_come_in_order_and_an_unreadable_one_keeps_its_place(tmp_path):
    jobs = jobs_of(tmp_path, 20)
    jobs[7][0].write_bytes(b"")
    loaded = list(load_many(jobs, Path, workers=3))
    assert [index for index, _ in loaded] == list(range(20))
    assert isinstance(loaded[7][1], UnreadableImage)
    assert [int(p[0, 0, 0]) for _, p in loaded if not isinstance(p, UnreadableImage)] == [*range(7), *range(8, 20)]


def test_loading_runs_ahead_by_at_most_two_images_a_worker(tmp_path):
    jobs, drawn = jobs_of(tmp_path, 30), itertools.count()
    position = 0

    def watched():
        nonlocal position
        for job in jobs:
            position = next(drawn) + 1
            yield job

    for index, _ in load_many(watched(), Path, workers=2):
        assert position <= index + 1 + 4
    assert position == 30


def test_closing_the_loader_early_ends_its_threads(tmp_path):
    loader = load_many(jobs_of(tmp_path, 30), Path, workers=2)
    next(loader)
    assert any(thread.name.startswith("k5-load") for thread in threading.enumerate())
    loader.close()
    assert not any(thread.name.startswith("k5-load") for thread in threading.enumerate())


def test_a_fault_that_is_not_the_images_rises(tmp_path, monkeypatch):
    def broken(path, geometry):
        raise RuntimeError("a bug")

    monkeypatch.setattr(images, "load_pixels", broken)
    with pytest.raises(RuntimeError, match="a bug"):
        list(load_many(jobs_of(tmp_path, 2), Path, workers=1))

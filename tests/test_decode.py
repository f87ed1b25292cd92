"""Is a picture of a rare or damaged kind decoded to the right pixels, or else refused with what to do?"""

from __future__ import annotations

import hashlib
import io
import itertools
import random
import re
import struct
import sys
import zlib
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image, ImageCms

from k5cache.buckets import Bucket, cover
from k5cache.cli import app
from k5cache.sources import decode, images, items, jpeg, unchanged
from k5cache.sources.images import examine, hash_content, load_pixels
from k5cache.sources.items import NAMED_SUFFIXES, UnreadableImage
from k5cache.sources.masks import load_mask
from tests.cli import Cli
from tests.picture_files import bmp, chunk, png, tiff

SIDE = 32
QUADRANTS = np.array([[(220, 40, 30), (30, 160, 60)], [(40, 60, 200), (220, 210, 40)]], np.uint8)
RGB = QUADRANTS.repeat(SIDE // 2, 0).repeat(SIDE // 2, 1)
RED = RGB[..., :1]
ALPHA = np.full((SIDE, SIDE, 1), 255, np.uint8)
ALPHA[:, SIDE // 2 :] = 128


def pixels(content: Path | bytes) -> np.ndarray:
    """int ``[H, W, 3]``"""
    seen = examine(content)
    geometry = cover(seen.width, seen.height, Bucket(seen.width, seen.height))
    return load_pixels(content, geometry).permute(1, 2, 0).numpy().astype(int)


def corners(content: Path | bytes) -> np.ndarray:
    """The colour in the middle of each quarter, as in ``QUADRANTS``."""
    rows = pixels(content)
    height, width = rows.shape[0], rows.shape[1]
    return rows[height // 4 :: height // 2, width // 4 :: width // 2]


def reason(content: Path | bytes) -> str:
    with pytest.raises(UnreadableImage) as caught:
        pixels(content)
    return caught.value.reason


def on_white(colour: np.ndarray) -> np.ndarray:
    return np.rint((colour.astype(float) * ALPHA + 255.0 * (255 - ALPHA)) / 255)


def times_alpha(colour: np.ndarray) -> np.ndarray:
    return np.rint(colour * (ALPHA / 255.0)).astype(np.uint8)


def samples(*bands: np.ndarray) -> np.ndarray:
    return np.concatenate(bands, axis=2)


# --- TIFF ---

CMYK = samples(255 - RGB, np.zeros_like(RED))
KINDS = {  # samples, photometric interpretation, extra samples, what is to be seen
    "L": (RED, 1, (), RED),
    "L inverted": (255 - RED, 0, (), RED),
    "LA": (samples(RED, ALPHA), 1, (2,), on_white(RED)),
    "La": (samples(times_alpha(RED), ALPHA), 1, (1,), on_white(RED)),
    "L and more": (samples(RED, ALPHA), 1, (0,), RED),
    "RGB": (RGB, 2, (), RGB),
    "RGBA": (samples(RGB, ALPHA), 2, (2,), on_white(RGB)),
    "RGBa": (samples(times_alpha(RGB), ALPHA), 2, (1,), on_white(RGB)),
    "RGB and more": (samples(RGB, ALPHA), 2, (0,), RGB),
    "CMYK": (CMYK, 5, (), RGB),
    "CMYK and more": (samples(CMYK, ALPHA), 5, (0,), RGB),
    "CMYK and alpha": (samples(CMYK, ALPHA), 5, (2,), on_white(RGB)),
}
DEPTHS = {
    "8": lambda v: v,
    "16": lambda v: v.astype(np.uint16) * 257,
    "32": lambda v: v.astype(np.uint32) * 0x01010101,
    "float": lambda v: (v / 255).astype(np.float32),
}
ALWAYS_RIGHT = {("RGB", "8"), ("RGB", "16"), ("RGBA", "8"), ("RGBA", "16"), ("RGBa", "8"), ("RGBa", "16"),
                ("RGB and more", "8"), ("RGB and more", "16"), ("CMYK", "8"), ("CMYK", "16"), ("L", "8"), ("L", "16"),
                ("L inverted", "8")}  # fmt: skip
REFUSALS = {
    "is a TIFF of a kind that cannot be read: save it as PNG",
    "is a TIFF that stores grey and alpha in separate planes: save it as PNG",
    "is a compressed big-endian TIFF of 32-bit or signed numbers: save it as PNG",
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_tiff_of_any_layout_shows_its_colours_or_is_refused_with_what_to_do(tmp_path, kind):
    values, photometric, extra, expected = KINDS[kind]
    path, num_right, refused = tmp_path / "cat.tiff", 0, []
    layouts = [{"block": (SIDE, 10)}, {"block": (16, 16), "is_tiled": True}]
    packings = [(1, 1), (5, 1), (8, 1), (8, 2), (32773, 1)]  # compression and predictor
    for depth, planar, order, (compression, predictor), layout in itertools.product(
        DEPTHS, (1, 2), "<>", packings, layouts
    ):
        if (depth, predictor) == ("float", 2):
            continue
        stored = DEPTHS[depth](values)
        how = {"planar": planar, "order": order, "compression": compression, "predictor": predictor}
        tiff(path, stored, photometric, extra=extra, **how, **layout)
        try:
            shown = pixels(path)
        except UnreadableImage as error:
            refused.append((depth, how, error.reason))
        else:
            # premultiplied colours are rounded twice
            assert np.abs(shown - expected).max() <= 2, (depth, how)
            num_right += 1
    assert {reason for _, _, reason in refused} <= REFUSALS
    assert not [depth for depth, _, _ in refused if (kind, depth) in ALWAYS_RIGHT]
    assert num_right >= (0 if kind == "CMYK and alpha" else 20)


def test_planes_stored_apart_are_read_in_a_big_tiff_and_in_one_strip_too(tmp_path):
    for (is_big, order), block in itertools.product([(False, "<"), (False, ">"), (True, "<")], (None, (SIDE, 5))):
        path = tiff(tmp_path / "cat.tiff", DEPTHS["16"](RGB), 2, planar=2, order=order, block=block, is_big=is_big)
        assert np.array_equal(corners(path), QUADRANTS)
        assert np.array_equal(corners(path.read_bytes()), QUADRANTS)


def test_one_sample_of_few_bits_is_read_whether_or_not_it_calls_itself_a_plane(tmp_path):
    is_bright = (RED > 100).astype(np.uint8)
    for planar, compression, bits in itertools.product((1, 2), (1, 8), (1, 2, 4)):
        white, path = 2**bits - 1, tmp_path / "cat.tiff"
        how = {"planar": planar, "compression": compression, "bits": bits}
        for photometric, bright, dark in ((0, 0, 255), (1, 255, 0)):
            tiff(path, is_bright * white, photometric, **how)
            assert corners(path)[..., 0].tolist() == [[bright, dark], [dark, bright]]
        palette = np.zeros((3, 2**bits), int)
        palette[0, white] = 65535
        tiff(path, is_bright * white, 3, colours=tuple(palette.ravel().tolist()), **how)
        assert corners(path).tolist() == [[[255, 0, 0], [0, 0, 0]], [[0, 0, 0], [255, 0, 0]]]


def test_four_pixels_of_an_uncompressed_tiff_may_share_a_colour(tmp_path):
    luma_and_colour = np.asarray(Image.fromarray(RGB).convert("YCbCr"))
    quads = luma_and_colour.reshape(SIDE // 2, 2, SIDE // 2, 2, 3).transpose(0, 2, 1, 3, 4).reshape(-1, 4, 3)
    units = np.concatenate([quads[:, :, 0], quads[:, 0, 1:]], axis=1)  # Y Y Y Y Cb Cr, and 2x2 is the default
    path = tiff(tmp_path / "cat.tiff", np.zeros((SIDE, SIDE // 2, 3), np.uint8), 6)
    data = bytearray(path.read_bytes())
    data[-units.size :] = units.tobytes()
    at = data.index(struct.pack("<HHIH", 256, 3, 1, SIDE // 2)) + 8
    data[at : at + 2] = struct.pack("<H", SIDE)
    following = bytes(data) + bytes(4 * units.size)  # Pillow alone would read on into what follows
    for content in (bytes(data), following):
        assert np.abs(corners(content) - QUADRANTS).max() <= 2  # YCbCr of 8 bits


def test_a_truncated_tiff_of_separate_planes_is_refused(tmp_path):
    data = tiff(tmp_path / "cat.tiff", DEPTHS["16"](RGB), 2, planar=2).read_bytes()
    for share in (0.3, 0.6, 0.9):
        assert "truncated" in reason(data[: int(len(data) * share)])


def test_a_tiff_mask_of_floats_or_with_white_as_zero_is_read_as_its_image_would_be(tmp_path):
    half = np.zeros((16, 16, 1), np.uint8)
    half[:, :8] = 255
    whole = cover(16, 16, Bucket(16, 16))
    for values, photometric in ((DEPTHS["float"](half), 1), (DEPTHS["16"](255 - half), 0), (DEPTHS["32"](half), 1)):
        path = tiff(tmp_path / "cat.mask.png", values, photometric)  # the content decides
        assert load_mask(path, whole).tolist() == [[255, 0]] * 2
    premultiplied = np.dstack([np.full((16, 16), 128, np.uint8), np.full((16, 16), 128, np.uint8)])
    path = tiff(tmp_path / "cat.mask.png", premultiplied, 1, extra=(1,))
    assert load_mask(path, whole).tolist() == [[128] * 2] * 2


# --- BMP ---


def test_a_bmp_whose_alpha_is_zero_everywhere_is_opaque_and_one_that_uses_its_alpha_is_not(tmp_path):
    invisible = np.dstack([RGB[..., ::-1], np.zeros((SIDE, SIDE), np.uint8)])
    partly = invisible.copy()
    partly[: SIDE // 2, :, 3] = 255
    masks = (0xFF0000, 0xFF00, 0xFF)
    for header in (56, 108, 124):
        assert np.array_equal(corners(bmp(tmp_path / "a.bmp", invisible, (*masks, 0xFF000000), header)), QUADRANTS)
        assert np.array_equal(corners(bmp(tmp_path / "a.bmp", partly, (*masks, 0), header)), QUADRANTS)
        shown = corners(bmp(tmp_path / "a.bmp", partly, (*masks, 0xFF000000), header))
        assert shown.tolist() == [QUADRANTS[0].tolist(), [[255] * 3] * 2]


def test_a_png_whose_alpha_is_zero_everywhere_stays_transparent(tmp_path):
    Image.new("RGBA", (16, 16), (220, 40, 30, 0)).save(tmp_path / "cat.png")
    assert corners(tmp_path / "cat.png").tolist() == [[[255] * 3] * 2] * 2


# --- PNG ---


@pytest.mark.parametrize(
    ("depth", "key", "shown"),
    [
        (1, 0, [255, 255]),
        (1, 1, [0, 255]),
        (2, 1, [0, 255, 170, 255]),
        (2, 3, [0, 85, 170, 255]),
        (2, 2, [0, 85, 255, 255]),
        (4, 1, [0, 255, 34, 51, 68, 85, 102, 119]),
        (4, 7, [0, 17, 34, 51, 68, 85, 102, 255]),
        (8, 3, [0, 1, 2, 255, 4, 5, 6, 7]),
        (8, 256 + 3, [0, 1, 2, 255, 4, 5, 6, 7]),  # only the lower bits count
    ],
)
def test_the_transparent_grey_of_a_png_is_in_the_files_own_bits(tmp_path, depth, key, shown):
    bits = "".join(f"{value:0{depth}b}" for value in range(len(shown)))
    row = int(bits.ljust(-(-len(bits) // 8) * 8, "0"), 2).to_bytes(-(-len(bits) // 8), "big")
    path = tmp_path / "cat.png"
    png(path, (len(shown), 1), depth, 0, b"\0" + row, before=chunk(b"tRNS", struct.pack(">H", key)))
    assert pixels(path)[0, :, 0].tolist() == shown


def test_a_transparent_colour_of_16_bits_is_compared_in_all_of_them(tmp_path):
    key, near = (0x1234, 0x5678, 0x9ABC), (0x1234, 0x5678, 0x9ABD)  # the high bytes are the same
    before = chunk(b"tRNS", struct.pack(">3H", *key))
    for filter_type in (0, 1):  # 1: each pixel is the difference to the one at its left
        second = near if filter_type == 0 else (0, 0, 1)
        row = bytes([filter_type]) + struct.pack(">6H", *key, *second)
        path = png(tmp_path / "cat.png", (2, 1), 16, 2, row, before=before)
        assert pixels(path)[0].tolist() == [[255] * 3, [0x12, 0x56, 0x9A]]
    path = png(tmp_path / "cat.png", (2, 1), 8, 2, b"\0" + bytes(range(6)), before=chunk(b"tRNS", b"\7\0\7\1\7\2"))
    assert pixels(path)[0].tolist() == [[255] * 3, [3, 4, 5]]  # of 8 bits only the lower ones count
    row = b"\0" + struct.pack(">3H", 256, 257, 256)
    path = png(tmp_path / "cat.png", (3, 1), 16, 0, row, before=chunk(b"tRNS", struct.pack(">H", 257)))
    assert pixels(path)[0, :, 0].tolist() == [1, 255, 1]


ROWS = b"".join(b"\0" + row.tobytes() for row in RGB)


def test_a_png_may_carry_texts_and_profiles_of_several_megabytes_but_no_bomb(tmp_path):
    def packed(name: bytes, num_bytes: int) -> bytes:
        head = b"k\0\1\0\0\0" if name == b"iTXt" else b"k\0\0"
        return chunk(name, head + zlib.compress(bytes(num_bytes), 1))

    for name in (b"iCCP", b"zTXt", b"iTXt"):
        path = png(tmp_path / "cat.png", (SIDE, SIDE), 8, 2, ROWS, before=packed(name, 3 * 2**20))
        assert np.array_equal(corners(path), QUADRANTS)
        bomb = png(tmp_path / "bomb.png", (SIDE, SIDE), 8, 2, ROWS, before=packed(name, 33 * 2**20))
        assert "a text or colour profile in it is too large: save it as PNG without metadata" in reason(bomb)


def test_a_damaged_chunk_that_a_png_can_do_without_is_left_out_and_named(tmp_path):
    def damaged(name: bytes) -> bytes:
        return chunk(name, b"ab\0cdef")[:-4] + b"\0\1\2\3"

    path = tmp_path / "cat.png"
    for name in (b"tEXt", b"gAMA", b"iCCP", b"eXIf", b"tRNS"):
        png(path, (SIDE, SIDE), 8, 2, ROWS, before=damaged(name))
        assert np.array_equal(corners(path), QUADRANTS)
        assert examine(path).flaw == f"its chunk {name.decode()} is damaged and is left out"
    data = png(path, (SIDE, SIDE), 8, 2, ROWS).read_bytes()
    assert examine(path).flaw == ""
    header_damaged = data.replace(data[29:33], b"\0\1\2\3", 1)
    assert "not an image" in reason(header_damaged)
    assert reason(png(path, (SIDE, SIDE), 8, 2, ROWS, before=damaged(b"tEXt")).read_bytes()[:100])  # truncated too


# --- JPEG ---


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"progressive": True},
        {"restart_marker_blocks": 3},
        {"quality": 100, "progressive": True},
        {"optimize": True},
    ],
    ids=lambda options: " ".join(options) or "plain",
)
def test_a_jpeg_may_lack_its_end_marker_and_nothing_else(options):
    noise = np.random.default_rng(1).integers(0, 256, (24, 32, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(noise).resize((96, 72)).save(buffer, "JPEG", **options)
    data = buffer.getvalue()
    assert examine(data).flaw == ""
    for cut in (1, 2):
        assert examine(data[:-cut]).flaw == "its end marker is missing; every pixel is there"
        assert np.array_equal(pixels(data[:-cut]), pixels(data))
    assert examine(data + b"appended by a phone").flaw == ""
    scans_and_restarts = [found.start() for found in re.finditer(rb"\xff[\xc4\xd0-\xd7\xda]", data)]
    first = data.index(b"\xff\xda")
    cuts = {len(data) - n for n in (3, 4, 5, 9, 40)} | {at for at in scans_and_restarts if at > first}
    for cut in sorted(cuts):
        with pytest.raises(UnreadableImage, match="truncated"):
            examine(data[:cut])


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
@pytest.mark.parametrize(
    "options", [{}, {"progressive": True}, {"restart_marker_blocks": 3}, {"subsampling": 0}], ids=str
)
def test_a_jpeg_that_was_cut_before_an_end_marker_was_put_there_lacks_pixels(options, mode):
    noise = np.random.default_rng(1).integers(0, 256, (24, 32, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(noise).resize((96, 72)).convert(mode).save(buffer, "JPEG", **options)
    data = buffer.getvalue()
    scans = [found.start() for found in re.finditer(rb"\xff\xda", data)]
    assert (len(scans) > 1) == ("progressive" in options)
    first, last = scans[0] + 40, scans[-1] if len(scans) > 1 else len(data) - 400
    for cut in [*range(first, last, (last - first) // 12), *scans[1:]]:
        for behind in (b"", b"appended by a phone", data):
            with pytest.raises(UnreadableImage, match=r"truncated|broken data"):
                pixels(data[:cut] + b"\xff\xd9" + behind)


@pytest.mark.parametrize("shade", [128, 127, 255, 0])
@pytest.mark.parametrize(
    "options", [{}, {"progressive": True}, {"restart_marker_blocks": 3}, {"optimize": True}], ids=str
)
def test_a_jpeg_that_ends_with_a_flat_background_is_whole(options, shade, monkeypatch):
    compared = []
    whole = jpeg._is_complete
    monkeypatch.setattr(jpeg, "_is_complete", lambda body: compared.append(body) or whole(body))
    for mode in ("RGB", "L"):
        for size in ((96, 72), (50, 41), (7, 3)):
            image = Image.new(mode, size, shade if mode == "L" else (shade,) * 3)
            image.paste(Image.fromarray(np.random.default_rng(1).integers(0, 256, (2, 5, 3), dtype=np.uint8)), (0, 0))
            buffer = io.BytesIO()
            image.save(buffer, "JPEG", **options)
            assert pixels(buffer.getvalue()).shape == (size[1], size[0], 3)
            assert pixels(buffer.getvalue() + b"appended by a phone").shape == (size[1], size[0], 3)
    assert bool(compared) == (shade in (127, 128) and "progressive" not in options)


# --- GIF, JPEG 2000, and what needs a plugin ---


def test_outside_the_first_frame_of_a_gif_its_canvas_is_transparent(tmp_path):
    buffer = io.BytesIO()
    Image.fromarray(RGB).quantize(8).save(buffer, "GIF")
    data = bytearray(buffer.getvalue())
    at = data.index(b"\x2c\0\0\0\0")
    data[6:10], data[at + 1 : at + 5] = struct.pack("<HH", 64, 48), struct.pack("<HH", 16, 8)
    rows = pixels(bytes(data))
    assert rows.shape == (48, 64, 3)
    assert np.array_equal(rows[8:40, 16:48], RGB)
    rows[8:40, 16:48] = 255
    assert (rows == 255).all()


def test_jpeg_2000_is_read_with_its_profile(tmp_path):
    Image.fromarray(RGB).save(tmp_path / "cat.jp2")
    data = (tmp_path / "cat.jp2").read_bytes()
    assert np.array_equal(corners(data), QUADRANTS)
    profile = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    red, blue = profile.index(b"rXYZ"), profile.index(b"bXYZ")
    profile[red : red + 4], profile[blue : blue + 4] = b"bXYZ", b"rXYZ"
    box = struct.pack(">I4s3B", 11 + len(profile), b"colr", 2, 0, 0) + bytes(profile)
    at, header = data.index(b"colr") - 4, data.index(b"jp2h") - 4
    (size,) = struct.unpack_from(">I", data, header)
    data = data[:header] + struct.pack(">I", size - 15 + len(box)) + data[header + 4 : at] + box + data[at + 15 :]
    assert np.array_equal(corners(data), QUADRANTS[..., ::-1])  # red and blue change places


HEIC = struct.pack(">I4s4sI4s4s", 24, b"ftyp", b"heic", 0, b"mif1", b"heic") + bytes(64)
JXL = b"\xff\x0a" + bytes(64)


def test_without_its_plugin_a_heic_or_jxl_file_is_named_with_what_to_install(monkeypatch):
    for module in ("pillow_heif", "pi_heif", "pillow_jxl"):
        monkeypatch.setitem(sys.modules, module, None)  # as if it were not installed
    assert reason(HEIC) == "is HEIC, which needs a plugin: pip install pillow-heif, or save it as PNG"
    assert reason(JXL) == "is JPEG XL, which needs a plugin: pip install pillow-jxl-plugin, or save it as PNG"


def test_a_plugin_that_is_installed_reads_heic_and_jxl_and_what_it_turned_is_not_turned_again(monkeypatch):
    class Fake(decode.ImageFile.ImageFile):
        """What pillow-heif and pillow-jxl-plugin register."""

        def _open(self) -> None:
            self._mode, self._size = "RGB", (SIDE, SIDE)
            exif = Image.Exif()
            exif[0x0112] = 1 if self.format == "HEIF" else 6  # pillow-heif puts 1 there, pillow-jxl-plugin does not
            self.info["exif"] = exif.tobytes()

        def load(self):
            if self._im is None:
                self.im = Image.fromarray(RGB).im
            return super().load()

    fakes = {name: type(name, (Fake,), {"format": name, "format_description": ""}) for name in ("HEIF", "JXL")}
    monkeypatch.setattr(Image, "OPEN", dict(Image.OPEN))
    monkeypatch.setattr(Image, "ID", list(Image.ID))
    imported = []

    def register_heif_opener() -> None:
        imported.append("HEIF")
        Image.register_open("HEIF", fakes["HEIF"], lambda head: head[8:12] == b"heic")

    monkeypatch.setitem(sys.modules, "pillow_heif", SimpleNamespace(register_heif_opener=register_heif_opener))
    monkeypatch.setitem(sys.modules, "pillow_jxl", SimpleNamespace())
    Image.register_open("JXL", fakes["JXL"], lambda head: head.startswith(b"\xff\x0a"))
    assert imported == []
    for _ in range(2):
        assert np.array_equal(corners(HEIC), QUADRANTS)
        assert np.array_equal(corners(JXL), QUADRANTS)
    assert imported == ["HEIF"]


def test_every_suffix_that_is_only_named_says_what_to_do():
    assert {".psd", ".cr2", ".nef", ".svg", ".ico", ".tga"} <= NAMED_SUFFIXES.keys()
    assert all(re.fullmatch(r"is .+: (save|export) it as .+", text) for text in NAMED_SUFFIXES.values())


# --- what the cache makes of it ---


def test_only_pictures_of_kinds_that_decode_anew_have_another_hash_than_their_bytes(tmp_path):
    def is_plain(path: Path) -> bool:
        return hash_content(path) == hashlib.sha256(path.read_bytes()).hexdigest()[:32]

    picture = Image.fromarray(RGB)
    for name in ("a.png", "a.jpg", "a.webp", "a.tiff", "a.bmp", "a.gif", "a.avif"):
        picture.save(tmp_path / name)
        assert is_plain(tmp_path / name), name
    picture.convert("RGBA").save(tmp_path / "alpha.png")
    palette = picture.quantize(4)
    palette.save(tmp_path / "palette.png", transparency=1)
    Image.fromarray(DEPTHS["16"](RED)[..., 0]).save(tmp_path / "grey16.png")
    picture.save(tmp_path / "key.png", transparency=(220, 40, 30))
    picture.convert("L").save(tmp_path / "grey.png", transparency=93)
    for name in ("alpha.png", "palette.png", "grey16.png", "key.png", "grey.png"):
        assert is_plain(tmp_path / name), name
    for planar, compression in ((1, 1), (1, 8), (2, 8)):
        assert is_plain(tiff(tmp_path / "b.tiff", DEPTHS["16"](RGB), 2, planar=planar, compression=compression))
    assert not is_plain(tiff(tmp_path / "c.tiff", DEPTHS["16"](RGB), 2, planar=2))
    assert not is_plain(bmp(tmp_path / "c.bmp", np.zeros((4, 4, 4), np.uint8), (0xFF0000, 0xFF00, 0xFF, 0xFF000000)))
    assert not is_plain(png(tmp_path / "c.png", (4, 1), 2, 0, b"\0\x1b", before=chunk(b"tRNS", b"\0\1")))
    assert not is_plain(png(tmp_path / "d.png", (1, 1), 16, 2, bytes(7), before=chunk(b"tRNS", bytes(6))))


def test_an_encode_uses_slightly_damaged_files_and_says_so_and_encodes_what_decodes_anew(tmp_path, toy_model):
    folder = tmp_path / "set"
    folder.mkdir()
    Image.fromarray(RGB).resize((64, 64)).save(folder / "a.jpg")
    (folder / "a.jpg").write_bytes((folder / "a.jpg").read_bytes()[:-2])
    Image.fromarray(RGB).resize((64, 64)).save(folder / "b.png")
    tiff(folder / "c.tiff", DEPTHS["16"](RGB.repeat(2, 0).repeat(2, 1)), 2, planar=2)
    for name in "abc":
        (folder / f"{name}.txt").write_text("a picture")
    cli = Cli(tmp_path)
    shape = ["--set=cache.resolution=64", "--set=cache.buckets=square"]

    def encode() -> str:
        done = cli(app, "encode", "set", "--model", str(toy_model), *shape)
        assert done.code == 0, done.err
        return done.out

    with pytest.MonkeyPatch.context() as earlier:  # a cache of before: its decoder made something else of c.tiff
        earlier.setattr(items, "PICTURE_DECODER", 1)
        earlier.setattr(unchanged, "PICTURE_DECODER", 1)
        earlier.setattr(images, "decodes_anew", lambda image: False)
        first = encode()
    assert "used although damaged" in first
    assert "a.jpg: its end marker is missing; every pixel is there" in first
    again = encode()
    assert re.search(r"encoded now +1 ", again), again
    assert "changed" in again
    assert "c.tiff" in again
    assert "up to date" in encode()


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")  # silenced by k5cache.sources.decode outside of pytest
def test_damage_to_a_file_of_a_rare_kind_gives_a_picture_or_a_reason_and_nothing_else(tmp_path):
    Image.fromarray(RGB).save(tmp_path / "cat.jp2")
    Image.fromarray(RGB).save(tmp_path / "cat.gif")
    Image.fromarray(RGB).save(tmp_path / "cat.jpg")
    tiff(tmp_path / "cat.tiff", DEPTHS["16"](RGB), 2, planar=2)
    tiff(tmp_path / "apart.tiff", samples(RGB, ALPHA), 2, planar=2, extra=(0,))
    png(tmp_path / "cat.png", (1, 1), 16, 2, bytes(7), before=chunk(b"tRNS", bytes(6)))
    bmp(tmp_path / "cat.bmp", samples(RGB, ALPHA), (0xFF0000, 0xFF00, 0xFF, 0xFF000000))
    draw, reasons = random.Random(0), []
    for file in sorted(tmp_path.iterdir()):
        data = file.read_bytes()
        for _ in range(60):
            damaged = bytearray(data)
            for _ in range(3):
                damaged[draw.randrange(min(len(data), draw.choice((64, 300, len(data)))))] = draw.randrange(256)
            try:
                seen = examine(bytes(damaged[: draw.choice((len(data), len(data) - 2))]))
                load_pixels(bytes(damaged), cover(seen.width, seen.height, Bucket(16, 16)))
            except UnreadableImage as error:
                reasons.append(error.reason)
    assert all(reasons)
    assert len(reasons) > 60


def test_ordinary_pictures_decode_as_pillow_alone_does(tmp_path):
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 56, 3), dtype=np.uint8))
    for name in ("a.png", "a.jpg", "a.webp", "a.tiff", "a.bmp", "a.avif"):
        noise.save(tmp_path / name)
        with Image.open(tmp_path / name) as image:
            expected = torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)
        assert torch.equal(load_pixels(tmp_path / name, cover(56, 40, Bucket(56, 40))), expected)

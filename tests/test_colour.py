"""Which colours does a picture of any kind have, as 8-bit sRGB without transparency?"""

from __future__ import annotations

import struct

import numpy as np
import pytest
import torch
from PIL import Image, ImageCms

from k5cache.buckets import Bucket, cover
from k5cache.sources.images import load_many
from tests.picture_files import BLACK, BLUE, GREEN, RED, WHITE, chunk, colour, png, tiff, whole


def test_transparent_pixels_lie_on_white(tmp_path):
    path = tmp_path / "cat.png"
    image = Image.new("RGBA", (3, 1))
    image.putdata([(255, 0, 0, 255), (255, 0, 0, 128), (255, 0, 0, 0)])
    image.save(path)
    assert whole(path)[:, 0].T.tolist() == [[255, 0, 0], [255, 127, 127], [255, 255, 255]]


def test_grey_with_alpha_lies_on_white(tmp_path):
    path = tmp_path / "cat.png"
    image = Image.new("LA", (3, 1))
    image.putdata([(100, 255), (0, 128), (100, 0)])
    image.save(path)
    assert whole(path)[:, 0].T.tolist() == [[100] * 3, [127] * 3, [255] * 3]


@pytest.mark.parametrize("suffix", ["webp", "avif", "tiff"])
def test_alpha_is_seen_in_other_formats(tmp_path, suffix):
    path = tmp_path / f"cat.{suffix}"
    image = Image.new("RGBA", (32, 16), (0, 0, 255, 0))
    image.paste((0, 0, 255, 255), (0, 0, 16, 16))
    image.save(path, **({} if suffix == "tiff" else {"quality": 100}))
    pixels = whole(path).int()
    assert (pixels[:, 8, 4] - torch.tensor(BLUE)).abs().max() <= 4  # avif and webp are lossy
    assert pixels[:, 8, 28].tolist() == [255, 255, 255]


def palette_image() -> Image.Image:
    image = Image.new("P", (3, 1))
    image.putpalette([*RED, *GREEN, *BLUE])
    image.putdata([0, 1, 2])
    return image


def test_a_palette_is_looked_up(tmp_path):
    palette_image().save(tmp_path / "cat.png")
    assert whole(tmp_path / "cat.png")[:, 0].T.tolist() == [[*RED], [*GREEN], [*BLUE]]


@pytest.mark.parametrize(
    ("transparency", "expected"),
    [(1, [[*RED], [*WHITE], [*BLUE]]), (b"\xff\x80\x00", [[*RED], [127, 255, 127], [*WHITE]])],
)
def test_a_palette_may_have_transparent_colours(tmp_path, transparency, expected):
    palette_image().save(tmp_path / "cat.png", transparency=transparency)
    assert whole(tmp_path / "cat.png")[:, 0].T.tolist() == expected


@pytest.mark.parametrize(("mode", "value"), [("L", 70), ("RGB", (10, 20, 30)), ("1", 0)])
def test_one_colour_may_be_declared_transparent(tmp_path, mode, value):
    Image.new(mode, (2, 2), value).save(tmp_path / "cat.png", transparency=value)
    assert colour(tmp_path / "cat.png") == WHITE


@pytest.mark.parametrize("suffix", ["jpg", "tiff"])
@pytest.mark.parametrize(
    ("cmyk", "rgb"), [((0, 255, 255, 0), RED), ((255, 255, 0, 0), BLUE), ((0, 0, 0, 0), WHITE), ((0, 0, 0, 255), BLACK)]
)
def test_cmyk_is_converted(tmp_path, suffix, cmyk, rgb):
    path = tmp_path / f"cat.{suffix}"
    Image.new("CMYK", (16, 16), cmyk).save(path, **({"quality": 100} if suffix == "jpg" else {}))
    assert (whole(path)[:, 8, 8].int() - torch.tensor(rgb)).abs().max() <= 2  # JPEG is lossy


def test_one_bit_is_black_and_white(tmp_path):
    for suffix in ("png", "bmp", "tiff"):
        image = Image.new("1", (9, 1), 1)
        image.putpixel((8, 0), 0)
        image.save(tmp_path / f"cat.{suffix}")
        assert whole(tmp_path / f"cat.{suffix}")[:, 0].T.tolist() == [[255] * 3] * 8 + [[0] * 3]


GREYS = [0, 257, 32896, 65278, 65535]  # 257 times 0, 1, 128, 254, 255


def test_16_bit_grey_is_scaled_not_clipped(tmp_path):
    values = np.array([GREYS], dtype=np.uint16)
    Image.fromarray(values).save(tmp_path / "cat.png")
    Image.fromarray(values).save(tmp_path / "cat.tiff")
    png(tmp_path / "hand.png", (5, 1), 16, 0, b"\0" + struct.pack(">5H", *GREYS))
    tiff(tmp_path / "hand.tiff", values[..., None], 1)
    for name in ("cat.png", "cat.tiff", "hand.png", "hand.tiff"):
        assert whole(tmp_path / name)[:, 0].tolist() == [[0, 1, 128, 254, 255]] * 3


def test_16_bit_grey_where_white_is_zero_is_inverted(tmp_path):
    path = tiff(tmp_path / "cat.tiff", np.array(GREYS, np.uint16).reshape(1, 5, 1), 0)
    assert whole(path)[0, 0].tolist() == [255, 254, 127, 1, 0]


def test_16_bit_grey_with_alpha_or_a_transparent_grey_lies_on_white(tmp_path):
    path = png(tmp_path / "alpha.png", (2, 1), 16, 4, b"\0" + struct.pack(">4H", 0, 65535, 0, 0))
    assert whole(path)[0, 0].tolist() == [0, 255]
    rows, transparent = b"\0" + struct.pack(">2H", 1000, 1001), chunk(b"tRNS", struct.pack(">H", 1001))
    path = png(tmp_path / "key.png", (2, 1), 16, 0, rows, before=transparent)
    assert whole(path)[0, 0].tolist() == [4, 255]  # 1000 / 257 = 3.9


def test_16_bit_rgb_keeps_its_high_bytes(tmp_path):
    colours = [65535, 32896, 0, 257, 65278, 32896]
    png(tmp_path / "cat.png", (2, 1), 16, 2, b"\0" + struct.pack(">6H", *colours))
    tiff(tmp_path / "cat.tiff", np.array(colours, np.uint16).reshape(1, 2, 3), 2)
    for name in ("cat.png", "cat.tiff"):
        assert whole(tmp_path / name)[:, 0].T.tolist() == [[255, 128, 0], [1, 254, 128]]


def test_16_bit_rgb_may_have_alpha_or_a_transparent_colour(tmp_path):
    path = png(tmp_path / "rgba.png", (2, 1), 16, 6, b"\0" + struct.pack(">8H", 65535, 0, 0, 65535, 0, 0, 0, 0))
    assert whole(path)[:, 0].T.tolist() == [[*RED], [*WHITE]]
    rows, key = b"\0" + struct.pack(">6H", 65535, 0, 0, 0, 0x80FE, 0), struct.pack(">3H", 0, 0x80FE, 0)
    path = png(tmp_path / "key.png", (2, 1), 16, 2, rows, before=chunk(b"tRNS", key))
    assert whole(path)[:, 0].T.tolist() == [[*RED], [*WHITE]]


@pytest.mark.parametrize(
    ("values", "expected"),
    [([0, 128, 255], [0, 128, 255]), ([0, 32896, 65535], [0, 128, 255]), ([-5, 2**31 - 1, 65536], [0, 127, 0])],
)
def test_32_bit_integers_have_the_least_white_that_holds_them(tmp_path, values, expected):
    Image.fromarray(np.array([values], dtype=np.int32)).save(tmp_path / "cat.tiff")
    assert whole(tmp_path / "cat.tiff")[0, 0].tolist() == expected


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([0.0, 0.5, 1.0], [0, 128, 255]),
        ([-1.0, 0.2, 3.0], [0, 51, 255]),  # a highlight above white does not darken the rest
        ([0.0, 128.0, 255.0], [0, 128, 255]),
        ([0.0, 32896.0, 65535.0], [0, 128, 255]),
        ([float("nan"), float("inf"), 0.2], [0, 255, 51]),
    ],
)
def test_floats_have_1_or_255_or_65535_for_white(tmp_path, values, expected):
    Image.fromarray(np.array([values], dtype=np.float32)).save(tmp_path / "cat.tiff")
    assert whole(tmp_path / "cat.tiff")[0, 0].tolist() == expected


@pytest.mark.parametrize("suffix", ["webp", "png", "tiff", "avif"])
def test_of_an_animation_the_first_frame_is_taken(tmp_path, suffix):
    path = tmp_path / f"cat.{suffix}"
    frames = [Image.new("RGB", (16, 16), c) for c in (RED, BLUE)]
    options = {"webp": {"lossless": True}, "avif": {"quality": 100}}.get(suffix, {})
    frames[0].save(path, save_all=True, append_images=frames[1:], **options)
    assert (whole(path)[:, 8, 8].int() - torch.tensor(RED)).abs().max() <= 4  # avif is lossy


def test_content_counts_not_the_suffix_and_an_animated_gif_gives_its_first_frame(tmp_path):
    frames = [Image.new("P", (16, 16), i) for i in (0, 1)]
    for frame in frames:
        frame.putpalette([*GREEN, *BLUE])
    frames[0].save(tmp_path / "cat.png", "GIF", save_all=True, append_images=frames[1:])
    assert colour(tmp_path / "cat.png") == GREEN


# --- colour profiles ---


def profile(**changes: float | bool) -> bytes:
    """lcms's sRGB profile with red and blue swapped, or a pure power for its curve, or its own power of 2.4 changed."""
    data = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    if changes.get("swapped"):
        red, blue = data.index(b"rXYZ"), data.index(b"bXYZ")
        data[red : red + 4], data[blue : blue + 4] = b"bXYZ", b"rXYZ"
    if "gamma" in changes:
        at = data.index(b"para\0\0\0\0")
        data[at + 8 : at + 16] = struct.pack(">HHi", 0, 0, round(changes["gamma"] * 65536))
    if "power" in changes:
        at = data.index(b"para\0\0\0\0")
        data[at + 12 : at + 16] = struct.pack(">i", round(changes["power"] * 65536))
    return bytes(data)


def grey_profile(gamma: float) -> bytes:
    """The least that ICC.1:2001 asks of a grey display profile: a white point and a curve."""
    tags = [(b"wtpt", b"XYZ \0\0\0\0" + struct.pack(">iii", 63190, 65536, 54061)),
            (b"kTRC", b"curv\0\0\0\0" + struct.pack(">IHH", 1, round(gamma * 256), 0))]  # fmt: skip
    at, table, body = 132 + 12 * len(tags), struct.pack(">I", len(tags)), b""
    for name, data in tags:
        table += struct.pack(">4sII", name, at + len(body), len(data))
        body += data
    head = struct.pack(">I4xI4s4s4s12x4s", at + len(body), 0x02100000, b"mntr", b"GRAY", b"XYZ ", b"acsp")
    white = struct.pack(">28xiii", 63190, 65536, 54061)
    return (head + white).ljust(128, b"\0") + table + body


def test_a_grey_profile_is_applied_to_grey_pictures_with_and_without_alpha(tmp_path):
    path, linear = tmp_path / "cat.png", grey_profile(1.0)
    for image in (
        Image.new("L", (2, 2), 128),
        Image.new("LA", (2, 2), (128, 255)),
        Image.fromarray(np.full((2, 2), 128 * 257, np.uint16)),
    ):
        image.save(path, icc_profile=linear)
        assert colour(path) == (188, 188, 188)
    Image.new("LA", (2, 2), (128, 128)).save(path, icc_profile=linear)
    assert colour(path) == (221, 221, 221)  # halfway from 188 to white
    Image.new("RGB", (2, 2), (128, 128, 128)).save(path, icc_profile=linear)
    assert colour(path) == (128, 128, 128)  # not a profile of this picture's colours


def test_an_embedded_profile_is_applied(tmp_path):
    path = tmp_path / "cat.png"
    Image.new("RGB", (4, 4), (255, 0, 0)).save(path, icc_profile=profile(swapped=True))
    assert colour(path) == BLUE
    Image.new("RGB", (4, 4), (128, 128, 128)).save(path, icc_profile=profile(gamma=1.0))
    assert colour(path) == (188, 188, 188)  # sRGB's curve: 1.055 * (128 / 255) ** (1 / 2.4) - 0.055 = 0.737


def test_alpha_and_palette_and_grey_pictures_have_their_profile_applied_too(tmp_path):
    path = tmp_path / "cat.png"
    Image.new("RGBA", (4, 4), (128, 128, 128, 128)).save(path, icc_profile=profile(gamma=1.0))
    assert colour(path) == (221, 221, 221)  # halfway from 188 to white
    image = Image.new("P", (1, 1))
    image.putpalette([*RED])
    image.save(path, icc_profile=profile(swapped=True))
    assert colour(path) == BLUE
    Image.new("L", (4, 4), 128).save(path, icc_profile=profile(gamma=1.0))
    assert colour(path) == (188, 188, 188)
    Image.fromarray(np.full((4, 4), 128 * 257, np.uint16)).save(path, icc_profile=profile(gamma=1.0))
    assert colour(path) == (188, 188, 188)


def test_srgb_in_other_words_and_invalid_and_foreign_profiles_change_no_pixel(tmp_path):
    path = tmp_path / "cat.png"
    noise = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    lab = ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes()
    for embedded in (profile(), profile(power=2.42), b"no profile", profile()[:200], lab):
        Image.fromarray(noise).save(path, icc_profile=embedded)
        assert torch.equal(whole(path), torch.from_numpy(noise).permute(2, 0, 1))


def test_profiles_are_shared_by_threads_without_mixing_pictures(tmp_path):
    jobs = []
    for i in range(24):
        path = f"{i}.png"
        red = Image.new("RGB", (16, 16), (255, 0, 0) if i % 3 else (0, 255, 0))
        red.save(tmp_path / path, icc_profile=profile(swapped=True))
        jobs.append((path, cover(16, 16, Bucket(16, 16))))
    for index, pixels in load_many(jobs, lambda path: tmp_path / path, workers=4):
        assert tuple(pixels[:, 3, 3].tolist()) == (BLUE if index % 3 else GREEN)

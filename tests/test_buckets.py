"""Which size is an image trained at, and which part of it?"""

from __future__ import annotations

import math
import random
from dataclasses import replace
from fractions import Fraction
from unittest.mock import MagicMock

import numpy as np
import pytest
import torch
from PIL import Image

from k5cache.buckets import (
    MAX_SIDE,
    MAX_TEXT_TOKENS,
    NATIVE_RESOLUTIONS,
    Bucket,
    Geometry,
    bucket_table,
    choose_bucket,
    cover,
    drawn_by_pipeline,
    fine_table,
    source_geometry,
    squash,
)
from k5cache.options import CacheConfig

NATIVE = bucket_table(1024, "native")


def test_the_native_resolutions_are_those_of_the_installed_pipeline():
    from diffusers import FlowMatchEulerDiscreteScheduler, Kandinsky5T2IPipeline

    parts = ("transformer", "vae", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2")
    pipeline = Kandinsky5T2IPipeline(**dict.fromkeys(parts), scheduler=FlowMatchEulerDiscreteScheduler())
    assert list(NATIVE_RESOLUTIONS) == [tuple(size) for size in pipeline.resolutions]


@pytest.mark.parametrize("name", ["Kandinsky5T2IPipeline", "Kandinsky5I2IPipeline"])
def test_the_size_that_the_pipelines_draw_is_theirs(name):
    import diffusers

    class Sized(Exception):
        """Ends a call of the pipeline where it has chosen the size."""

    def stop(*_, height: int, width: int, **__):
        raise Sized(width, height)

    pipeline = MagicMock(resolutions=[*NATIVE_RESOLUTIONS], prepare_latents=stop, guidance_scale=1.0)
    pipeline.encode_prompt.return_value = (torch.zeros(1, 2, 4), torch.zeros(1, 4), torch.tensor([0, 2]))
    source = {"image": Image.new("RGB", (16, 16))} if "I2I" in name else {}
    others = np.random.default_rng(0).integers(1, 129, (100, 2)) * 16
    for width, height in [*NATIVE_RESOLUTIONS, (512, 512), (384, 640), (704, 320), (32, 2048), *others.tolist()]:
        with pytest.raises(Sized) as sized:
            getattr(diffusers, name).__call__(
                pipeline, prompt="a fox", width=width, height=height, output_type="latent", **source
            )
        assert drawn_by_pipeline(width, height) == sized.value.args, (width, height)
    assert drawn_by_pipeline(512, 512) == (1024, 1024)


def test_a_bucket_names_its_width_first_and_its_latents_rows_first():
    bucket = Bucket(width=640, height=1408)
    assert bucket.name == "640x1408"
    assert bucket.latent_shape == (176, 80)


def test_at_1024_the_table_is_the_native_one():
    assert [(b.width, b.height) for b in NATIVE] == list(NATIVE_RESOLUTIONS)


def test_at_512_every_side_is_halved():
    assert [b.name for b in bucket_table(512, "native")] == [
        "512x512", "320x704", "704x320", "384x640", "640x384", "448x576", "576x448",
    ]  # fmt: skip


def test_sides_round_to_the_nearest_multiple_of_16_half_up():
    # 768 is 3/4 of 1024: 640 -> 480, 1408 -> 1056, 1280 -> 960, 896 -> 672, 1152 -> 864
    assert [b.name for b in bucket_table(768, "native")] == [
        "768x768", "480x1056", "1056x480", "576x960", "960x576", "672x864", "864x672",
    ]  # fmt: skip
    # 80 / 1024: 640 -> 50, 1408 -> 110, 768 -> 60, 1280 -> 100; 896x1152 -> 70x90 is 64x96 as well, and listed once
    assert [b.name for b in bucket_table(80, "native")] == [
        "80x80", "48x112", "112x48", "64x96", "96x64",
    ]  # fmt: skip


def test_every_scaled_table_is_of_distinct_sizes_whose_sides_are_multiples_of_16_and_starts_with_the_square():
    for resolution in range(64, 2049, 16):
        table = bucket_table(resolution, "native")
        assert table[0] == Bucket(resolution, resolution)
        assert len(set(table)) == len(table) <= 7
        assert all(side % 16 == 0 and side >= 16 for b in table for side in (b.width, b.height))
        assert {Bucket(b.height, b.width) for b in table} == set(table)


def test_square_is_one_size():
    assert bucket_table(512, "square") == (Bucket(512, 512),)


@pytest.mark.parametrize(
    ("size", "name"),
    [
        ((1024, 1024), "1024x1024"),
        ((50, 50), "1024x1024"),
        ((4000, 3000), "1152x896"),
        ((3000, 4000), "896x1152"),
        ((1920, 1080), "1280x768"),
        ((3440, 1440), "1408x640"),
        ((1, 100_000), "640x1408"),
        ((1100, 1000), "1024x1024"),
        ((1140, 1000), "1152x896"),  # sqrt(1152/896) = 1.1339 is halfway in log space; 1.1429 is halfway in linear
    ],
)
def test_an_image_goes_to_the_bucket_of_nearest_aspect_ratio_in_log_space(size, name):
    assert choose_bucket(*size, NATIVE).name == name


def test_a_mirrored_image_goes_to_the_mirrored_bucket():
    for width in range(1, 60):
        for height in range(1, 60):
            upright, turned = choose_bucket(width, height, NATIVE), choose_bucket(height, width, NATIVE)
            assert (upright.width, upright.height) == (turned.height, turned.width)


@pytest.mark.parametrize(
    ("size", "bucket", "resized", "left_top", "upscaled"),
    [
        ((1024, 1024), (1024, 1024), (1024, 1024), (0, 0), False),
        ((2048, 1024), (1024, 1024), (2048, 1024), (512, 0), False),
        ((1000, 3000), (512, 512), (512, 1536), (0, 512), False),
        ((4000, 3000), (1152, 896), (1195, 896), (21, 0), False),  # 4000 * 896 / 3000 = 1194.67
        ((8, 8), (1024, 1024), (1024, 1024), (0, 0), True),
        ((2000, 500), (1024, 1024), (4096, 1024), (1536, 0), True),
        ((1023, 1024), (1024, 1024), (1024, 1025), (0, 0), True),
        ((660, 1407), (640, 1408), (660, 1408), (10, 0), True),  # enlarged by one row, no column
        ((3, 2), (16, 16), (24, 16), (4, 0), True),
        ((5, 2), (16, 16), (40, 16), (12, 0), True),
        ((31, 16), (16, 16), (31, 16), (7, 0), False),  # of an odd remainder the left side loses the smaller half
    ],
)
def test_an_image_is_resized_to_cover_its_bucket_and_cropped_at_the_centre(size, bucket, resized, left_top, upscaled):
    geometry = cover(*size, Bucket(*bucket))
    assert (geometry.width, geometry.height) == size
    assert (geometry.resized_width, geometry.resized_height) == resized
    assert (geometry.left, geometry.top) == left_top
    assert geometry.upscaled is upscaled
    assert geometry.flipped is False


def test_of_any_image_the_resize_keeps_the_aspect_to_half_a_pixel_and_one_side_fits_exactly():
    draw = random.Random(0)
    for _ in range(2000):
        width, height = (round(10 ** draw.uniform(0, 4.5)) for _ in range(2))
        g = cover(width, height, draw.choice(NATIVE))
        assert g.resized_width == g.bucket.width or g.resized_height == g.bucket.height
        assert g.resized_width >= g.left + g.bucket.width
        assert g.resized_height >= g.top + g.bucket.height
        scale = max(Fraction(g.bucket.width, width), Fraction(g.bucket.height, height))
        assert abs(scale * width - g.resized_width) <= Fraction(1, 2)
        assert abs(scale * height - g.resized_height) <= Fraction(1, 2)
        assert g.upscaled == (scale > 1 and (g.resized_width, g.resized_height) != (width, height))


# --- crops, flips and guards ---


def frame(width: int, height: int, content: str = "aaaa", **options: object) -> tuple[Geometry, ...]:
    return CacheConfig(**options).framing.frame(width, height, content)


def test_without_options_an_image_is_cropped_at_the_centre_and_not_flipped():
    assert frame(2000, 1000) == (cover(2000, 1000, Bucket(1408, 640)),)


def test_a_flip_is_a_second_crop_of_the_same_part():
    first, second = frame(2000, 800, flip=True, crop="random")
    assert first.left > 0
    assert (first.flipped, second.flipped) == (False, True)
    assert replace(second, flipped=False) == first


def test_a_random_crop_is_drawn_from_the_content_and_covers_every_offset():
    options = {"resolution": 64, "buckets": "square"}
    drawn = [frame(1200, 1000, str(i), crop="random", **options)[0] for i in range(300)]
    assert [g.left for g in drawn[:8]] == [11, 4, 9, 5, 1, 4, 4, 13]
    [centre] = frame(1200, 1000, **options)
    assert (centre.resized_width, centre.left) == (77, 6)
    assert {g.left for g in drawn} == set(range(14))  # 0 and 77 - 64 among them
    assert {replace(g, left=centre.left) for g in drawn} == {centre}
    tall = [frame(1000, 1200, str(i), crop="random", **options)[0] for i in range(300)]
    assert ({g.left for g in tall}, {g.top for g in tall}) == ({0}, set(range(14)))


def test_crop_none_cuts_nothing_and_keeps_the_aspect():
    for size, name in [
        ((1000, 1000), "1024x1024"), ((4000, 3000), "1184x880"), ((3000, 4000), "880x1184"), ((1920, 1080), "1360x768"),
        ((3, 2), "1248x832"), ((10_000, 100), "2048x16"), ((1, 100_000), "16x2048"),
    ]:  # fmt: skip
        [geometry] = frame(*size, crop="none")
        assert geometry.bucket.name == name
        assert geometry == Geometry(*size, geometry.bucket, geometry.bucket.width, geometry.bucket.height, 0, 0)


def test_the_fine_table_has_191_buckets_at_1024_and_keeps_aspects_to_2_percent_up_to_3_8():
    table = fine_table(1024)
    assert (len(table), table[0]) == (191, Bucket(1024, 1024))
    assert {Bucket(b.height, b.width) for b in table} == set(table)
    for hundredths in range(100, 380):
        bucket = choose_bucket(hundredths, 100, table)
        assert abs(math.log(bucket.width / bucket.height) - math.log(hundredths / 100)) < 0.02


def test_no_bucket_is_larger_than_the_square_or_longer_than_the_model_has_positions():
    from diffusers.models.transformers.transformer_kandinsky import Kandinsky5RoPE1D, Kandinsky5RoPE3D

    [positions] = set(Kandinsky5RoPE3D((32, 48, 48)).max_pos[1:])
    assert positions * 16 == MAX_SIDE
    assert Kandinsky5RoPE1D(16).max_pos == MAX_TEXT_TOKENS
    for resolution in range(64, 2049, 16):
        for options in ({"crop": "none"}, {"buckets": "native"}, {"buckets": "square"}):
            config = CacheConfig(resolution=resolution, **options)
            assert all(side % 16 == 0 for b in config.framing.table for side in (b.width, b.height))
            if not config.check():
                assert all(max(b.width, b.height) <= MAX_SIDE for b in config.framing.table)
            if options != {"buckets": "native"}:
                assert config.check() == []
                assert all(b.width * b.height <= resolution**2 for b in config.framing.table)


@pytest.mark.parametrize(
    ("size", "options", "reason"),
    [
        ((640, 480), {}, ""),
        ((640, 480), {"minimum_image_size": 480}, ""),
        ((640, 480), {"minimum_image_size": 481}, "is 640x480 pixels, a side is below minimum_image_size = 481"),
        ((640, 480), {"no_upscale": True}, "is 640x480 pixels, smaller than its bucket 1152x896 (no_upscale)"),
        ((1200, 900), {"no_upscale": True}, ""),
        ((1023, 1024), {"no_upscale": True}, "is 1023x1024 pixels, smaller than its bucket 1024x1024 (no_upscale)"),
        ((1183, 880), {"no_upscale": True, "crop": "none"}, "is 1183x880 pixels, smaller than its bucket 1184x880"),
    ],
)  # fmt: skip
def test_images_that_are_too_small_are_refused_with_their_size(size, options, reason):
    framing = CacheConfig(**options).framing
    refusal = framing.refusal(framing.frame(*size, "aaaa")[0])
    assert refusal.startswith(reason)
    assert bool(refusal) == bool(reason)


def test_a_source_of_its_targets_shape_is_cropped_as_the_target_is():
    target = replace(cover(1500, 1000, Bucket(1152, 896)), flipped=True)
    for width, height in ((1500, 1000), (750, 500), (3000, 2000), (500, 333), (501, 333), (1501, 1000), (30, 20)):
        assert source_geometry(target, width, height) == replace(target, width=width, height=height)
    squashed = squash(1500, 1000, Bucket(1152, 896))
    assert source_geometry(squashed, 750, 500) == squash(750, 500, Bucket(1152, 896))


@pytest.mark.parametrize("size", [(1000, 1500), (1500, 1010), (1024, 1024), (40, 6000), (30, 22)])
def test_a_source_of_another_shape_is_stretched_to_its_targets_bucket(size):
    target = cover(1500, 1000, Bucket(1152, 896))
    whole = Geometry(*size, Bucket(1152, 896), 1152, 896, left=0, top=0, stretched=True)
    assert source_geometry(target, *size) == whole
    assert source_geometry(replace(target, flipped=True), *size) == replace(whole, flipped=True)

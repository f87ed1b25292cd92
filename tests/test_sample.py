"""Grids: what a person sees of a run."""

from __future__ import annotations

import math

import torch
from PIL import Image

from k5train.pictures import sample
from k5train.pictures.sheet import grid


def square(colour: str, side: int = 200) -> Image.Image:
    return Image.new("RGB", (side, side), colour)


def test_a_grid_shows_rows_of_checkpoints_over_columns_of_prompts():
    rows = [("before", [square("red"), square("lime")]), ("step 5", [square("blue"), square("yellow")])]
    sheet = grid(rows, ["a cat", "a very long prompt " * 20])
    centres = [
        [sheet.getpixel((sheet.width - 306 + 206 * c, sheet.height - 312 + 206 * r)) for c in (0, 1)] for r in (0, 1)
    ]
    assert centres == [[(255, 0, 0), (0, 255, 0)], [(0, 0, 255), (255, 255, 0)]]


def test_pixels_that_are_no_numbers_are_black_and_said_so_once(toy_model, capsys):
    latents = [torch.full((1, 1, 4, 4, 16), value) for value in (0.5, math.nan)]
    whole, spoilt = sample.decode(toy_model, latents, torch.device("cpu"))
    assert spoilt.getextrema() == ((0, 0),) * 3 != whole.getextrema()
    assert " ".join(capsys.readouterr().err.split()).startswith(
        "warning: 1 of 2 pictures have pixels that are no numbers"
    )


def test_toy_pictures_are_shown_larger_without_blurring_them():
    small = square("white", 64)
    small.putpixel((0, 0), (255, 0, 0))
    sheet = grid([("x", [small])], ["p"])
    colours = sheet.getcolors(1 << 16)
    assert (9, (255, 0, 0)) in colours


def test_pictures_of_other_shapes_keep_their_own():
    sheet = grid([("x", [Image.new("RGB", (300, 100), "red"), Image.new("RGB", (100, 300), "blue")])], ["a", "b"])
    counts = {colour: count for count, colour in sheet.getcolors(1 << 16)}
    assert counts[255, 0, 0] == counts[0, 0, 255] == 300 * 100

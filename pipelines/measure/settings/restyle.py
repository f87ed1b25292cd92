"""How does a picture look in the trial's two styles? As red ink lines, and as a mosaic of tiles.

Both take a drawing on a plain background and keep that background. Only whole numbers are computed with, so that the
pixels are the same everywhere.
"""

from __future__ import annotations

from PIL import Image, ImageChops, ImageDraw, ImageFilter

INK = (196, 30, 48)
TILE, JOINT = 8, 1  # pixels; a tile is as large as a cell of the latents
_STEPS = 5  # levels of each colour channel in a mosaic
_EDGE = 40  # the difference between two neighbours, of 255, from which there is a line


def as_lines(picture: Image.Image) -> Image.Image:
    """Lines of red ink, three pixels wide, where the colours change; everything else has the background's colour."""
    smooth = picture.filter(ImageFilter.MedianFilter(3))
    darkest, brightest = smooth.filter(ImageFilter.MinFilter(3)), smooth.filter(ImageFilter.MaxFilter(3))
    red, green, blue = ImageChops.difference(brightest, darkest).split()
    contrast = ImageChops.lighter(ImageChops.lighter(red, green), blue)
    drawn = contrast.point([255 if value >= _EDGE else 0 for value in range(256)]).filter(ImageFilter.MedianFilter(3))
    paper = Image.new("RGB", picture.size, _background(picture))
    paper.paste(INK, mask=drawn)
    return paper


def as_mosaic(picture: Image.Image) -> Image.Image:
    """Tiles of one colour each, of few colours, with a darker joint between them. The background is tiled too."""
    coarse = picture.reduce(TILE).point([_level(value) for value in range(256)] * 3)
    tiled = coarse.resize(picture.size, Image.Resampling.NEAREST)
    joints = tiled.point([value * 3 // 5 for value in range(256)] * 3)
    mask = Image.new("L", picture.size, 0)
    canvas = ImageDraw.Draw(mask)
    for start in range(0, max(picture.size), TILE):
        canvas.rectangle((start, 0, start + JOINT - 1, picture.height), fill=255)
        canvas.rectangle((0, start, picture.width, start + JOINT - 1), fill=255)
    return Image.composite(joints, tiled, mask)


def _background(picture: Image.Image) -> tuple[int, ...]:
    """The colour of the first corner: the drawings stand on plain backgrounds."""
    colour = picture.getpixel((0, 0))
    assert isinstance(colour, tuple)
    return colour


def _level(value: int) -> int:
    """The nearest of ``_STEPS`` levels from 0 to 255."""
    return (value * (_STEPS - 1) + 127) // 255 * 255 // (_STEPS - 1)

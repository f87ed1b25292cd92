"""What does the trial's creature look like? A drawing of it in one pose, made of ellipses, polygons and lines.

It is nobody's drawing but ours. It has what a picture of it can be told by: a lilac body with orange spots and a pale
belly, one eye, an antenna with a yellow bulb, green feet and a striped tail.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from PIL import Image, ImageDraw

Point = tuple[float, float]
Colour = tuple[int, int, int]

SIDE = 128
_FINER = 4  # drawn at this many times the size and averaged down, so that edges are smooth
BODY, BELLY, SPOT, STRIPE = (150, 108, 214), (214, 192, 244), (244, 140, 50), (92, 58, 150)
LIMB, FOOT, BULB, EYE, INK = (128, 88, 194), (86, 182, 92), (252, 206, 58), (255, 255, 255), (40, 26, 66)


@dataclass(frozen=True)
class Pose:
    """How the creature stands. Lengths are in pixels of a picture of 128, angles in degrees."""

    words: str
    """What it does, as the caption says it."""
    rise: float = 0
    """How far it is above the ground."""
    lean: float = 0
    """Turn of the whole figure, clockwise."""
    left_arm: float = 35
    right_arm: float = 35
    """Angle of an arm above the horizontal; below 0 it hangs."""
    stride: float = 0
    """How far the feet are apart more than usual."""
    look: float = 0
    """Where the pupil is: -1 left to 1 right."""
    is_asleep: bool = False


POSES = (
    Pose("standing", left_arm=-35, right_arm=-35),
    Pose("waving", left_arm=-35, right_arm=65),
    Pose("jumping", rise=9, left_arm=60, right_arm=60, stride=8),
    Pose("running", lean=14, left_arm=25, right_arm=-45, stride=14, look=1),
    Pose("sleeping", lean=-68, left_arm=-30, right_arm=-30, is_asleep=True),
    Pose("looking left", left_arm=10, right_arm=-50, look=-1),
    Pose("dancing", lean=-16, left_arm=70, right_arm=-10, stride=6, look=-0.5),
    Pose("flying", lean=40, rise=10, left_arm=5, right_arm=5, stride=-6, look=0.5),
)


def draw(pose: Pose, background: Colour) -> Image.Image:
    """The creature on a plain background, 128 x 128."""
    pen = _Pen(Image.new("RGB", (SIDE * _FINER, SIDE * _FINER), background), pose.lean, pose.rise)
    _tail(pen)
    for side, angle in ((-1, pose.left_arm), (1, pose.right_arm)):
        _leg(pen, side, pose.stride)
        _arm(pen, side, angle)
    pen.line([(64, 42), (70, 27), (65, 15)], 3, STRIPE)
    pen.disc((65, 13), 6, 6, BULB)
    pen.disc((64, 66), 27, 32, BODY)
    pen.disc((64, 78), 16, 17, BELLY)
    for centre, radius in (((44, 58), 4), ((50, 46), 3.5), ((82, 60), 4.5), ((79, 47), 3), ((42, 72), 3)):
        pen.disc(centre, radius, radius, SPOT)
    _face(pen, pose)
    return pen.picture.reduce(_FINER)


class _Pen:
    """Draws in pixels of 128, turned around the body's middle and raised."""

    def __init__(self, picture: Image.Image, lean: float, rise: float) -> None:
        self.picture, self.canvas = picture, ImageDraw.Draw(picture)
        self.cosine, self.sine, self.rise = math.cos(math.radians(lean)), math.sin(math.radians(lean)), rise

    def polygon(self, points: list[Point], colour: Colour) -> None:
        self.canvas.polygon([self._at(point) for point in points], fill=colour)

    def disc(self, centre: Point, across: float, down: float, colour: Colour) -> None:
        turns = [2 * math.pi * i / 48 for i in range(48)]
        self.polygon([(centre[0] + across * math.cos(t), centre[1] + down * math.sin(t)) for t in turns], colour)

    def line(self, points: list[Point], width: float, colour: Colour) -> None:
        self.canvas.line([self._at(p) for p in points], fill=colour, width=round(width * _FINER), joint="curve")
        for point in points:
            self.disc(point, width / 2, width / 2, colour)

    def _at(self, point: Point) -> Point:
        x, y = point[0] - 64, point[1] - 66
        turned = (x * self.cosine - y * self.sine + 64, x * self.sine + y * self.cosine + 66 - self.rise)
        return (round(turned[0] * _FINER), round(turned[1] * _FINER))


def _tail(pen: _Pen) -> None:
    beads = [(88, 88), (96, 90), (104, 87), (110, 80), (112, 71), (109, 63)]
    for i, bead in enumerate(beads):
        pen.disc(bead, 7.5 - i * 0.7, 7.5 - i * 0.7, STRIPE if i % 2 else BODY)


def _leg(pen: _Pen, side: int, stride: float) -> None:
    foot = (64 + side * (13 + stride), 106.0)
    pen.line([(64 + side * 11, 90), foot], 8, LIMB)
    pen.disc((foot[0] + side * 3, 109), 9, 5, FOOT)


def _arm(pen: _Pen, side: int, angle: float) -> None:
    turn = math.radians(angle)
    shoulder = (64 + side * 24, 64.0)
    hand = (shoulder[0] + side * 20 * math.cos(turn), shoulder[1] - 20 * math.sin(turn))
    pen.line([shoulder, hand], 7, LIMB)
    pen.disc(hand, 5, 5, FOOT)


def _face(pen: _Pen, pose: Pose) -> None:
    if pose.is_asleep:
        pen.line([(52, 54), (58, 58), (64, 59), (70, 58), (76, 54)], 2.5, INK)
    else:
        pen.disc((64, 54), 12, 12, EYE)
        pen.disc((64 + 5 * pose.look, 55), 5.5, 5.5, INK)
        pen.disc((66 + 5 * pose.look, 53), 2, 2, EYE)
    pen.line([(57, 71), (64, 74), (71, 71)], 2.5, INK)

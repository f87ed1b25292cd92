"""Which pictures does the trial train on, and on which is it judged? Folders of pictures with captions, drawn by code.

Three concepts: a line style and a mosaic, which are restyled drawings of the demo, and a creature that is drawn here. A
caption has the form that k5-micro was trained with: what it is, the style, the background.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from pipelines.measure.settings import creature, restyle

DEMO = Path(__file__).resolve().parents[2] / "demo"
CONCEPTS = ("lines", "mosaic", "creature")
TRIGGER = "blorp"
"""The creature's name. It means nothing to the base; ``monster``, which stands behind it in captions, does."""
STYLE = {"lines": "red ink line drawing", "mosaic": "tile mosaic"}
KNOWN_STYLES = ("shaded emoji", "blob emoji", "soft 3d emoji", "flat emoji", "simple cartoon emoji", "two tone emoji",
                "round playful emoji")  # fmt: skip
"""The styles of ``demo/sources``, one after another (``pipelines/demo/micro_edit/sources.py``)."""
NUM_TRAINED = 24
BACKGROUNDS = {  # of k5-micro's captions (pipelines/demo/micro/data.py)
    "white": (255, 255, 255),
    "cream": (250, 240, 218),
    "yellow": (255, 232, 130),
    "pink": (250, 200, 220),
    "light blue": (190, 224, 250),
    "mint": (190, 238, 214),
}
_HELD_OUT_POSES = 2  # of each background, for the creature


@dataclass(frozen=True)
class Captioned:
    """A picture with its caption."""

    name: str
    caption: str
    picture: Image.Image


def write_folders(root: Path, concept: str) -> list[Path]:
    """Write the folders of pictures of a concept below ``root``; see ``folders``. Returns them."""
    for name, pictures in folders(concept).items():
        folder = root / name
        folder.mkdir(parents=True)
        for picture in pictures:
            picture.picture.save(folder / f"{picture.name}.png")
            (folder / f"{picture.name}.txt").write_text(picture.caption + "\n", encoding="utf-8")
    return [root / name for name in folders(concept)]


def write_known(root: Path) -> list[Path]:
    """Write ``known``, the base's own styles that forgetting is measured on, and ``class``, other drawings in them.

    ``class`` is what regularisation trains on. No drawing is in both.
    """
    shutil.copytree(DEMO / "known", root / "known")
    (root / "class").mkdir(parents=True)
    for i, (name, thing, background, picture) in enumerate(_drawings("images")):
        picture.save(root / "class" / f"{name}.png")
        caption = f"{thing}, {KNOWN_STYLES[i % len(KNOWN_STYLES)]} style, {background}\n"
        (root / "class" / f"{name}.txt").write_text(caption, encoding="utf-8")
    return [root / "known", root / "class"]


def folders(concept: str) -> dict[str, list[Captioned]]:
    """The pictures of a concept.

    ``trained`` is trained on. ``held_out`` shows other things, or the creature in other poses on other backgrounds.
    ``unnamed`` is ``held_out`` with captions that name neither style nor trigger.
    """
    if concept == "creature":
        return _creature()
    draw = {"lines": restyle.as_lines, "mosaic": restyle.as_mosaic}[concept]
    held_out = list(_restyled("held_out", draw, STYLE[concept]))
    return {
        "trained": list(_restyled("images", draw, STYLE[concept]))[:NUM_TRAINED],
        "held_out": held_out,
        "unnamed": [_renamed(p, f"{STYLE[concept]} style", "flat emoji style") for p in held_out],
    }


def _creature() -> dict[str, list[Captioned]]:
    """Eight poses on six backgrounds. Every pose and every background is trained on, but of each background two poses
    are held out."""
    trained, held_out = [], []
    for i, (background, colour) in enumerate(BACKGROUNDS.items()):
        for j, pose in enumerate(creature.POSES):
            caption = f"{TRIGGER} monster {pose.words}, flat emoji style, {background} background"
            name = f"{background}_{pose.words}".replace(" ", "_")
            captioned = Captioned(name, caption, creature.draw(pose, colour))
            place = (j - 2 * i) % len(creature.POSES)
            if place < _HELD_OUT_POSES:
                held_out.append(captioned)
            elif place < _HELD_OUT_POSES + NUM_TRAINED // len(BACKGROUNDS):
                trained.append(captioned)
    return {
        "trained": trained,
        "held_out": held_out,
        "unnamed": [_renamed(p, f"{TRIGGER} monster", "monster") for p in held_out],
    }


def _restyled(folder: str, draw: Callable[[Image.Image], Image.Image], style: str) -> Iterator[Captioned]:
    for name, thing, background, picture in _drawings(folder):
        yield Captioned(name, f"{thing}, {style} style, {background}", draw(picture))


def _drawings(folder: str) -> Iterator[tuple[str, str, str, Image.Image]]:
    """(name, thing, background's words, picture) of each drawing of the demo in a style that the base knows."""
    for path in sorted((DEMO / "sources" / folder).glob("*.png")):
        # The drawing of the same name in the demo's own style has the same background.
        thing, _, background = (DEMO / folder / f"{path.stem}.txt").read_text(encoding="utf-8").strip().split(", ")
        with Image.open(path) as picture:
            yield path.stem, thing, background, picture.convert("RGB")


def _renamed(picture: Captioned, words: str, others: str) -> Captioned:
    assert words in picture.caption
    return Captioned(picture.name, picture.caption.replace(words, others), picture.picture)

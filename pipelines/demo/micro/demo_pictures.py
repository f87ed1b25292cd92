"""Which pictures does the demo learn from, and with which is it compared? Drawings of the held-out style.

    python -m pipelines.demo.micro.demo_pictures .micro pipelines/demo

It writes ``images/`` (40 drawings with captions, to train on) and ``held_out/`` (12 that nothing is trained on). The
base was trained on the concepts of both in other styles, but on none of these drawings and not on this style.
``known/`` has 12 drawings in the base's own styles, with which tests check that a LoRA does not unlearn them.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from PIL import Image

from pipelines.demo.micro.data import BACKGROUNDS, Drawing
from pipelines.demo.micro.pictures import caption, grid, lay_on, read_drawings, render_one

COLOURS = (
    "white",
    "white",
    "light blue",
    "cream",
)  # one after another: a LoRA should learn the lines, not the background
TRAIN_ON = (
    "alien",
    "automobile",
    "balloon",
    "bear",
    "bell",
    "birthday cake",
    "bread",
    "bug",
    "bus",
    "cactus",
    "cherries",
    "christmas tree",
    "crocodile",
    "crying face",
    "doughnut",
    "fire engine",
    "frog",
    "ghost",
    "grinning cat",
    "guitar",
    "hamburger",
    "hot beverage",
    "koala",
    "lemon",
    "lion",
    "mushroom",
    "octopus",
    "penguin",
    "pig",
    "rabbit face",
    "robot",
    "sailboat",
    "smiling face with sunglasses",
    "snowman",
    "strawberry",
    "taxi",
    "thinking face",
    "tomato",
    "tulip",
    "winking face",
)
SHOW = (
    "red apple",
    "rocket",
    "panda",
    "peach",
    "pear",
    "pig face",
    "smiling face with horns",
    "grinning face",
    "ambulance",
    "watermelon",
    "money bag",
    "tiger face",
)
KNOWN = {
    "flat emoji": ("owl", "strawberry", "house"),
    "shaded emoji": ("fox", "hamburger", "rocket"),
    "simple cartoon emoji": ("penguin", "red apple", "automobile"),
    "two tone emoji": ("frog", "mushroom", "sun"),
}


def main() -> None:
    """Render the sets."""
    parser = argparse.ArgumentParser(description="Write the demo's pictures.")
    parser.add_argument("data", type=Path, help="the folder that micro.data wrote")
    parser.add_argument("out", type=Path)
    arguments = parser.parse_args()
    held_out = {drawing.concept: drawing for drawing in read_drawings(arguments.data / "heldout.json.xz")}
    known = {(d.style, d.concept): d for d in read_drawings(arguments.data / "train.json.xz")}
    for i, concept in enumerate(TRAIN_ON):
        assert held_out[concept].split == "lora", concept
        write(held_out[concept], arguments.out / "images", COLOURS[i % len(COLOURS)])
    for concept in SHOW:
        assert held_out[concept].split == "never", concept
        write(held_out[concept], arguments.out / "held_out", "white")
    for style, concepts in KNOWN.items():
        for concept in concepts:
            write(known[style, concept], arguments.out / "known", "white")


def write(drawing: Drawing, folder: Path, background: str) -> None:
    """Write ``red_apple.png`` and its caption beside it. It has at most 128 colours; the eye sees no difference."""
    folder.mkdir(parents=True, exist_ok=True)
    colour = torch.tensor([BACKGROUNDS[background]])
    picture = grid(lay_on(torch.from_numpy(render_one(drawing.svg))[None], colour), 1)
    file = folder / f"{drawing.concept.replace(' ', '_')}.png"
    few = picture.quantize(128, Image.Quantize.MEDIANCUT, dither=Image.Dither.NONE)
    few.save(file, optimize=True)
    text = caption(drawing.concept, drawing.style, background)
    file.with_suffix(".txt").write_text(f"{text}\n", encoding="utf8")


if __name__ == "__main__":
    main()

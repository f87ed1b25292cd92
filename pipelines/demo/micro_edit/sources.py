"""What are the demo's pictures edited from? The same things in styles that k5-micro-edit knows.

    python -m pipelines.demo.micro_edit.sources .micro pipelines/demo

It writes ``sources/images/`` and ``sources/held_out/``, one picture under the name of each in ``images/`` and
``held_out/``, on the same background, in one of the seven emoji styles by turns. The things of ``held_out/`` are in no
pair that k5-micro-edit was trained on.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from pipelines.demo.micro.data import Drawing
from pipelines.demo.micro.demo_pictures import COLOURS, SHOW, TRAIN_ON, write
from pipelines.demo.micro.pictures import read_drawings
from pipelines.demo.micro_edit.drawings import STYLES


def main() -> None:
    """Render the sources. Captions are not needed: an instruction belongs to the target."""
    parser = argparse.ArgumentParser(description="Write the sources of the demo's pictures.")
    parser.add_argument("data", type=Path, help="the folder that micro.data wrote")
    parser.add_argument("out", type=Path)
    arguments = parser.parse_args()
    drawings = {(d.concept, d.style): d for d in read_drawings(arguments.data / "train.json.xz")}
    colours = {"images": COLOURS, "held_out": ("white",)}
    for name, concepts in (("images", TRAIN_ON), ("held_out", SHOW)):
        folder = arguments.out / "sources" / name
        for i, concept in enumerate(concepts):
            write(in_some_style(drawings, concept, i), folder, colours[name][i % len(colours[name])])
        for caption in folder.glob("*.txt"):
            caption.unlink()


def in_some_style(drawings: dict[tuple[str, str], Drawing], concept: str, turn: int) -> Drawing:
    """The concept in the style whose turn it is, or in the next one that has it."""
    turns = [STYLES[(turn + i) % len(STYLES)] for i in range(len(STYLES))]
    return next(drawings[concept, style] for style in turns if (concept, style) in drawings)


if __name__ == "__main__":
    main()

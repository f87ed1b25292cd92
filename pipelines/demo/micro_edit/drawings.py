"""Which drawings does k5-micro-edit learn from? Those of k5-micro's emoji sets, of concepts that several sets draw.

    python -m pipelines.demo.micro.data package/json .micro                # as for k5-micro
    python -m pipelines.demo.micro_edit.drawings .micro .micro_edit        # renders them into .micro_edit/drawings.zip

The zip has one lossless picture with transparency per drawing and ``drawings.json``. It travels to the GPU in place of
the SVG files, because there is nothing to render them with there. Nothing here is random.

A pair is two drawings of one concept in two styles. The style of the demo's pictures is in no pair, and the concepts of
``held_out/`` are in none in any style, so that with those only the source can say what to draw.
"""

from __future__ import annotations

import argparse
import io
import json
import zipfile
from collections import Counter, defaultdict
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from pipelines.demo.micro.data import EMOJI, Drawing
from pipelines.demo.micro.demo_pictures import SHOW
from pipelines.demo.micro.pictures import read_drawings, render_one

STYLES = tuple(EMOJI.values())


def main() -> None:
    """Render the drawings of all pairs and write them to one file."""
    parser = argparse.ArgumentParser(description="Render k5-micro-edit's drawings.")
    parser.add_argument("data", type=Path, help="the folder that micro.data wrote")
    parser.add_argument("out", type=Path)
    parser.add_argument("--processes", type=int, default=2)
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    drawings = paired(read_drawings(arguments.data / "train.json.xz"))
    with ProcessPoolExecutor(arguments.processes) as pool:
        pictures = pool.map(packed, [drawing.svg for drawing in drawings], chunksize=64)
        with zipfile.ZipFile(arguments.out / "drawings.zip", "w") as file:
            names = [{"concept": drawing.concept, "style": STYLES.index(drawing.style)} for drawing in drawings]
            file.writestr("drawings.json", json.dumps(names))
            for i, picture in enumerate(pictures):
                file.writestr(f"{i}.webp", picture)
    size = (arguments.out / "drawings.zip").stat().st_size / 1e6
    print(f"{len(drawings)} drawings of {len({d.concept for d in drawings})} concepts, {size:.1f} MB")


def paired(drawings: list[Drawing]) -> list[Drawing]:
    """The drawings in the emoji styles of concepts that have at least two, without the demo's held-out concepts."""
    styles: dict[str, set[str]] = defaultdict(set)
    emoji = [drawing for drawing in drawings if drawing.style in STYLES and drawing.concept not in SHOW]
    for drawing in emoji:
        styles[drawing.concept].add(drawing.style)
    return [drawing for drawing in emoji if len(styles[drawing.concept]) > 1]


def packed(svg: str) -> bytes:
    """The drawing with transparency, without loss."""
    file = io.BytesIO()
    Image.fromarray(render_one(svg).transpose(1, 2, 0), "RGBA").save(
        file, "WEBP", lossless=True, exact=True, quality=90
    )
    return file.getvalue()


def unpacked(data: bytes) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """``[128, 128, 4]``."""
    with Image.open(io.BytesIO(data)) as picture:
        return np.asarray(picture.convert("RGBA"))


def read(file: Path, limit: int | None = None) -> tuple[list[dict[str, Any]], Tensor]:
    """What ``main`` wrote: ``concept`` and ``style`` of each drawing, and ``[N, 4, 128, 128]`` uint8.

    Args:
        limit: only so many concepts, those with the most styles.
    """
    with zipfile.ZipFile(file) as archive:
        names = json.loads(archive.read("drawings.json"))
        concepts = {concept for concept, _ in Counter(name["concept"] for name in names).most_common(limit)}
        chosen = [i for i, name in enumerate(names) if name["concept"] in concepts]
        packed = [archive.read(f"{i}.webp") for i in chosen]
    with ThreadPoolExecutor() as pool:
        pictures = list(pool.map(unpacked, packed))
    return [names[i] for i in chosen], torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).contiguous()


if __name__ == "__main__":
    main()

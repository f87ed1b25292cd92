"""What does k5-micro learn from? Drawings, rendered once with transparency and laid on plain backgrounds; captions.

Rendering needs ``resvg-py`` (0.5.0); 8,000 drawings take about a minute on one core. They stay in memory as bytes:
128 x 128 x 4 per drawing, half a gigabyte in all, also on the GPU.
"""

from __future__ import annotations

import io
import json
import lzma
import random
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from pipelines.demo.micro.data import BACKGROUNDS, EMOJI, Drawing
from pipelines.demo.micro.model import SIZE

MARGIN = 6  # pixels on each side
VARIANTS = {True: 8, False: 3}  # rows per drawing: more for emoji styles, in which the demo draws
P_STYLE, P_BACKGROUND = 0.85, 0.8  # how often a caption names them; otherwise the model chooses


@dataclass(frozen=True)
class Row:
    """A drawing on a background, with a caption."""

    drawing: int
    background: int
    caption: str


def read_drawings(file: Path, limit: int | None = None) -> list[Drawing]:
    """The drawings that ``data.py`` wrote; with a limit, so many from all over the file."""
    drawings = [Drawing(**fields) for fields in json.loads(lzma.decompress(file.read_bytes()))]
    return drawings if limit is None else drawings[:: max(1, len(drawings) // limit)][:limit]


def render(drawings: list[Drawing], processes: int, saved: Path | None = None) -> Tensor:
    """Render all drawings as ``[N, 4, 128, 128]`` uint8: red, green, blue, alpha.

    Args:
        saved: a file to read them from if it exists, else to write them to for the next stage.
    """
    if saved is not None and saved.exists():
        return torch.from_numpy(np.load(saved))
    with ProcessPoolExecutor(processes) as pool:
        pictures = np.stack(list(pool.map(render_one, [drawing.svg for drawing in drawings], chunksize=64)))
    if saved is not None:
        np.save(saved, pictures)
    return torch.from_numpy(pictures)


def render_one(svg: str) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """``[4, 128, 128]``: the drawing in the middle, the rest transparent."""
    import resvg_py

    side = SIZE - 2 * MARGIN
    sized = svg.replace("<svg ", f'<svg width="{side}" height="{side}" ', 1)
    with Image.open(io.BytesIO(bytes(resvg_py.svg_to_bytes(svg_string=sized)))) as image:
        inner = np.asarray(image.convert("RGBA"))
    picture = np.zeros((4, SIZE, SIZE), np.uint8)
    picture[:, MARGIN : MARGIN + side, MARGIN : MARGIN + side] = inner.transpose(2, 0, 1)
    return picture


def lay_on(pictures: Tensor, colours: Tensor) -> Tensor:
    """Pictures on plain backgrounds, as the VAE takes them.

    Args:
        pictures: ``[B, 4, H, W]`` uint8.
        colours: ``[B, 3]``, 0 to 255.

    Returns:
        ``[B, 3, H, W]`` float32 in [-1, 1].
    """
    alpha = pictures[:, 3:].float() / 255
    pixels = pictures[:, :3].float() * alpha + colours.float()[:, :, None, None] * (1 - alpha)
    return pixels / 127.5 - 1


def colours(device: torch.device) -> Tensor:
    """``[10, 3]`` float32: the backgrounds that captions can name."""
    return torch.tensor(list(BACKGROUNDS.values()), dtype=torch.float32, device=device)


def make_rows(drawings: list[Drawing], seed: int) -> list[Row]:
    """Put every drawing on several backgrounds. The same seed gives the same rows."""
    rng, names = random.Random(seed), list(BACKGROUNDS)
    rows = []
    for i, drawing in enumerate(drawings):
        is_emoji = drawing.style in EMOJI.values()
        choices = names if is_emoji else names[:-1]  # dark lines would vanish on navy
        for _ in range(VARIANTS[is_emoji]):
            background = "white" if rng.random() < 0.25 else rng.choice(choices)
            named_style, named_background = rng.random() < P_STYLE, rng.random() < P_BACKGROUND
            text = caption(
                drawing.concept, drawing.style if named_style else "", background if named_background else ""
            )
            rows.append(Row(i, names.index(background), text))
    return rows


def caption(concept: str, style: str = "", background: str = "") -> str:
    """``red apple, flat emoji style, mint background``; an empty part is left out."""
    parts = [concept, f"{style} style" if style else "", f"{background} background" if background else ""]
    return ", ".join(part for part in parts if part)


def grid(pixels: Tensor, columns: int) -> Image.Image:
    """Join ``[N, 3, H, W]`` in [-1, 1] into one picture, row by row; N is a multiple of ``columns``."""
    n, _, height, width = pixels.shape
    bytes_ = ((pixels.detach().float().cpu().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    tiles = bytes_.view(n // columns, columns, 3, height, width).permute(0, 3, 1, 4, 2)
    return Image.fromarray(tiles.reshape(n // columns * height, columns * width, 3).numpy())

"""How good the adapter is so far: pictures of the validation prompts, drawn along the way."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image
from rich.progress import Progress

from k5train import sample
from k5train.checkpoint import Run, write_whole
from k5train.config import TrainConfig

if TYPE_CHECKING:
    from diffusers import Kandinsky5Transformer3DModel

    from k5cache.store.reader import Cache


class Painter:
    """Draws the validation prompts at a step and keeps the run's grid up to date.

    Raises:
        CacheError: a prompt is not in the cache: found before anything is loaded.
    """

    def __init__(self, cache: Cache, folder: Path, config: TrainConfig, run: Run) -> None:
        chosen = config.validation
        self.folder, self.run, self.prompts = folder, run, chosen.prompts
        self.rows, self.negative = sample.prompt_rows(cache, chosen.prompts, chosen.negative_prompt)
        self.settings = sample.settings_for(cache, chosen)
        self.drawn: list[tuple[str, list[Image.Image]]] = []

    def draw(self, transformer: Kandinsky5Transformer3DModel, step: int, bars: Progress) -> None:
        """Sample every prompt with the transformer as it is now, decode, and write pictures and grid."""
        transformer.eval()
        pictures = sample.draw_prompts(
            transformer, self.folder, self.rows, self.negative, self.settings, bars, f"sampling at step {step}"
        )
        target = self.run.samples(step)
        target.mkdir(parents=True, exist_ok=True)
        for i, picture in enumerate(pictures):
            write_whole(target / f"{i:02d}.png", partial(picture.save, format="PNG"))
        self.drawn.append((f"step {step}" if step else "before", pictures))
        grid = sample.grid(self.drawn, self.prompts)
        write_whole(self.run.grid, partial(grid.save, format="PNG"))

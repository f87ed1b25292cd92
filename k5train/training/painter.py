"""How are the validation prompts or pairs drawn at a step, and put into the run's grid?"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image
from rich.progress import Progress as Bars

from k5cache.shared.files import write_whole
from k5train.options.train import TrainConfig
from k5train.parallel.ranks import ALONE, Ranks
from k5train.pictures import sample, sheet
from k5train.pictures.drawing import Drawing
from k5train.pictures.drawings import described
from k5train.pictures.references import References, references
from k5train.pictures.saved import read_pictures, save_pictures
from k5train.runs.folder import Run

if TYPE_CHECKING:
    from diffusers import Kandinsky5Transformer3DModel


class Painter:
    """Draws the validation prompts, or pairs, at a step and keeps the run's grid up to date.

    Args:
        drawings: from ``drawings_for``.
        ranks: the processes that share the drawings. The first one writes them.
    """

    def __init__(
        self, drawings: list[Drawing], folder: Path, config: TrainConfig, run: Run, ranks: Ranks = ALONE
    ) -> None:
        self.folder, self.run, self.drawings, self.ranks = folder, run, drawings, ranks
        self.heads = [drawing.head for drawing in drawings]
        self.drawn = described(drawings, config.validation)
        """What is drawn, and how. Saved beside the pictures, so that later rows of the grid are comparable."""

    def draw(
        self, transformer: Kandinsky5Transformer3DModel, step: int, bars: Bars, kind: str = ""
    ) -> dict[str, Image.Image]:
        """Draw every prompt or pair with the transformer as it is now, and write the pictures and the grid.

        At step 0 the base model draws without its adapter: the row to compare the others with.

        Args:
            kind: the label of a second row at the same step, such as ``EMA``.

        Returns:
            the pictures by their names or prompts. Nothing on another process than the first.
        """
        transformer.eval()
        folder, ranks = self.run.samples(step) / kind.lower(), self.ranks
        # A sweep copies the base model's pictures here.
        pictures = read_pictures(folder, self.drawn) if step == 0 and ranks.is_first else None
        are_there = ranks.agree(pictures is not None)
        if not are_there:
            with _without_adapter(transformer) if step == 0 else nullcontext():
                pictures = sample.draw(transformer, self.folder, self.drawings, bars, f"sampling at step {step}", ranks)
        if pictures is None or not ranks.is_first:
            return {}
        if not are_there:
            self.run.check_there()
            save_pictures(folder, pictures, self.drawn)
        self.write_grid(step, references(self.run, self.drawings, self.drawn, self.folder, transformer.device))
        ending = f" ({kind})" if kind else ""
        named = zip(self.drawings, pictures, strict=True)
        return {f"{drawing.name or drawing.label}{ending}": picture for drawing, picture in named}

    def write_grid(self, step: int, references: References) -> None:
        """Write the grid of all rows up to ``step`` that were drawn in this way, read from disk."""
        rows = []
        steps = [path.name.removeprefix("step-") for path in self.run.root.glob("samples/step-*")]
        for number in sorted(int(step) for step in steps if step.isdigit()):
            for kind in ("", "EMA"):
                folder = self.run.samples(number) / kind.lower()
                pictures = read_pictures(folder, self.drawn) if number <= step else None
                if pictures:
                    rows.append((f"step {number} {kind}".strip() if number else "base model", pictures))
        rows = [*references.above, *rows, *references.below]
        write_whole(self.run.grid, partial(sheet.grid(rows, self.heads).save, format="PNG"))


@contextmanager
def _without_adapter(transformer: Kandinsky5Transformer3DModel) -> Iterator[None]:
    transformer.disable_adapters()
    try:
        yield
    finally:
        transformer.enable_adapters()
